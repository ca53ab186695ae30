"""The environment variables under which vLLM, torch and Ray start; to be set before they are imported.

A variable that the user has set is left as it is.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ttt_harness.config import cache_dir

# Stands in the environment of every process of an engine that `ttt_vllm` has made.
ENGINE_VARIABLE = "TTT_VLLM_ENGINE"

# What torch compiles for the fits of one model, in bytes, generously.
KERNEL_BYTES = 2**26

_set_here: dict[str, str] = {}


def prepare_environment() -> None:
    """Set what makes vLLM start quickly, quietly, and with all cores. Safe to call twice."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # vLLM sets one core aside for its front end, which idles while the engine computes.
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(cores),
        # Said explicitly, it brings no warning at each process that is started. None of ours tokenizes after a fork.
        "TOKENIZERS_PARALLELISM": "true",
        "VLLM_NO_USAGE_STATS": "1",
        # Batches of many lengths leave pieces of GPU memory that fit none of the next; torch would keep those, by tens
        # of GiB, unless its segments can grow. torch reads this when it first allocates.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        ENGINE_VARIABLE: "1",
    }
    if kernels := _kernel_cache():
        defaults["TORCHINDUCTOR_CACHE_DIR"] = str(kernels)
    if not logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
        defaults |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        logging.getLogger("vllm").setLevel(logging.ERROR)  # the variable above counts only once vLLM is loaded
        logging.getLogger("torchao").setLevel(logging.ERROR)  # its C++ extensions, which nothing here needs
    if "RAY_ADDRESS" in os.environ and _has_ray_token():
        # As a local cluster does by itself. One that asks for no token takes it too.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # the older name; torch would take ours for it
        del defaults["PYTORCH_ALLOC_CONF"]
    for name, value in defaults.items():
        if name not in os.environ:
            os.environ[name] = _set_here[name] = value


def _kernel_cache() -> Path | None:
    """Where torch keeps what it compiles for fits on a GPU; None where nothing can be: it has a place in /tmp.

    Importing torch's compiler makes the folder, and fails where it cannot.
    """
    try:
        folder = cache_dir() / "torch"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, KERNEL_BYTES)
    except (OSError, RuntimeError):  # a full or read-only disk; no home folder
        return None
    return folder


def _has_ray_token() -> bool:
    """Whether there is a token to show to a cluster, where Ray looks for one."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    return "RAY_AUTH_TOKEN" in os.environ or Path(path).is_file()


@contextmanager
def environment_as_given() -> Iterator[None]:
    """Take back, within the block, what `prepare_environment` has set: a process elsewhere has to choose for itself."""
    taken = {name: os.environ.pop(name) for name, value in _set_here.items() if os.environ.get(name) == value}
    try:
        yield
    finally:
        os.environ.update(taken)
