"""LoRA adapters on disk: PEFT directories, and the store that keeps them under the hash of what determines them."""
