"""torchtune: loading a base model, and fitting LoRA adapters on it."""
