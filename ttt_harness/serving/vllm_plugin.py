"""What vLLM calls at the start of each of its processes, by an entry point.

It acts where `ttt_vllm` has made the engine; a vLLM that somebody else starts stays as it is.
"""

import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading

from ttt_harness import patches
from ttt_harness.serving.environment import ENGINE_VARIABLE

GROUPED = "ttt_harness.serving.cpu_lora.GroupedPunicaWrapper"


def register() -> None:
    """Have vLLM apply adapters as suits one adapter for each task, and end with its parent. Safe to repeat."""
    if ENGINE_VARIABLE not in os.environ:
        return
    _end_with_parent()
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        patches.apply("vllm: LoRA on a CPU", lambda _: lambda cls: GROUPED)  # noqa: ARG005
    else:
        patches.apply("vllm: pinned memory of adapters", lambda _: False)
        patches.apply("vllm: pinned memory of packed adapters", lambda _: False)


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
