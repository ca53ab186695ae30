"""Test-time training for language models, as an extension of lm-evaluation-harness.

The public names are loaded on first use: importing the package imports neither torch nor vLLM nor lm-eval, so that the
bridge to lm-eval (`ttt_harness.plugin`) costs next to nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt_harness.config import TTTConfig
    from ttt_harness.errors import TTTError
    from ttt_harness.harness.model import TTTVLLM
    from ttt_harness.harness.task import TTTTask

__all__ = ["TTTVLLM", "TTTConfig", "TTTError", "TTTTask"]

__version__ = "0.1.0"  # setup.cfg reads it here

_MODULES = {
    "TTTConfig": "ttt_harness.config",
    "TTTError": "ttt_harness.errors",
    "TTTTask": "ttt_harness.harness.task",
    "TTTVLLM": "ttt_harness.harness.model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
