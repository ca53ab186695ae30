"""The environment variables under which vLLM and torch start; to be set before either is imported.

A variable that the user has set is left as it is.
"""

import logging
import os
import warnings


def prepare_environment() -> None:
    """Set what makes vLLM start quickly, quietly, and with all cores. Safe to call twice."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        # vLLM sets one core aside for its front end, which idles while the engine computes.
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(cores),
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
        defaults |= {
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        logging.getLogger("vllm").setLevel(logging.ERROR)  # the variable above counts only once vLLM is loaded
        logging.getLogger("torchao").setLevel(logging.ERROR)  # its C++ extensions, which nothing here needs
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
