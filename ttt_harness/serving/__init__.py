"""vLLM: starting the engine, generating and scoring with an adapter, and LoRA kernels for the CPU."""
