"""What vLLM calls at the start of each of its processes, by an entry point: LoRA for one adapter after the other."""


def register() -> None:
    """Put faster LoRA code in the place of vLLM's. Safe to call twice."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from ttt_harness.serving import cpu_lora

        cpu_lora.install()
    else:
        from vllm.lora import lora_model, model_manager

        # Pinned memory makes the copy of an adapter that is used again and again faster. Here each is used for one
        # task, and pinning the 300 MB of an 8B model's takes 5 to 10 s, a hundred times the copy.
        lora_model.PIN_MEMORY = model_manager.PIN_MEMORY = False
