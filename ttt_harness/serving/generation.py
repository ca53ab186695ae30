"""How a task's answers are generated: greedily, unless the YAML or `--gen_kwargs` asks for sampling.

lm-eval's model classes disagree where neither `do_sample` nor `temperature` is stated: `hf` decodes greedily, `vllm`
samples at vLLM's default temperature of 1. Both are therefore stated in every request.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from ttt_harness.config import quoted
from ttt_harness.errors import ConfigError

NO_CACHE = (
    "--use_cache is not allowed with ttt_vllm: lm-eval's cache knows an answer by its prompt, not by the adapter that "
    "gave it; leave it out (fitted adapters are kept and reused without it)."
)

_log = logging.getLogger(__name__)


def samples(arguments: Mapping[str, Any], where: str) -> bool:
    """Whether generation arguments ask for answers that are drawn: `do_sample: true`, or a temperature alone, above 0.

    Args:
        arguments: a task's `generation_kwargs` under those of the command line.
        where: the task, as messages name it.

    Raises:
        ConfigError: `do_sample` is neither true nor false, or `temperature` is no number of at least 0.
    """
    asked, temperature = arguments.get("do_sample"), arguments.get("temperature")
    if not (asked is None or isinstance(asked, bool)):
        raise ConfigError(
            f"{where}: the generation argument do_sample={quoted(asked)} is not allowed; it is true or false, and "
            "false where it is left out."
        )
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (number and 0 <= temperature < math.inf):
        raise ConfigError(
            f"{where}: the generation argument temperature={quoted(temperature)} is not allowed; it is a number of at "
            "least 0, and 0 where it is left out."
        )
    return temperature != 0 and (asked is True or (asked is None and temperature is not None))


def greedy(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Generation arguments that every model class of lm-eval reads as greedy decoding."""
    return {**arguments, "do_sample": False, "temperature": 0.0}


def greedy_unless_sampled(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Generation arguments that every model class of lm-eval reads in the same way; for Args and Raises, see `samples`.

    Warns of a temperature that has no effect.
    """
    if samples(arguments, where):
        return dict(arguments)
    if arguments.get("temperature"):
        _log.warning(
            "%s: temperature=%s has no effect, since do_sample is false; set do_sample=true to sample.",
            where,
            arguments["temperature"],
        )
    return greedy(arguments)
