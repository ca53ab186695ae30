"""What vLLM calls at the start of each of its processes, by an entry point."""

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def register() -> None:
    """Put LoRA code for one adapter after the other in the place of vLLM's, and end with the parent. Safe to repeat."""
    from vllm.platforms import current_platform

    _end_with_parent()

    if current_platform.is_cpu():
        from ttt_harness.serving import cpu_lora

        cpu_lora.install()
    else:
        from vllm.lora import lora_model, model_manager

        # Pinned memory makes the copy of an adapter that is used again and again faster. Here each is used for one
        # task, and pinning the 300 MB of an 8B model's takes 5 to 10 s, a hundred times the copy.
        lora_model.PIN_MEMORY = model_manager.PIN_MEMORY = False


@functools.cache
def _end_with_parent() -> None:
    """Have this process killed when the one that started it is gone.

    An engine of vLLM's waits for requests for ever, and keeps the GPU's memory, where a run was ended by `kill -9` or
    for its memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # the run itself
        return

    def watch(gone: int) -> None:
        multiprocessing.connection.wait([gone])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, args=[parent.sentinel], name="parent-watch", daemon=True).start()
