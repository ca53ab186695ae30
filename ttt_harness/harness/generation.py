"""How a task's answers are generated: greedily, unless the YAML or `--gen_kwargs` asks for sampling.

lm-eval's model classes disagree where neither `do_sample` nor `temperature` is stated: `hf` decodes greedily, `vllm`
samples at vLLM's default temperature of 1. Both are therefore stated in every request.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from ttt_harness.errors import ConfigError

_log = logging.getLogger(__name__)


def greedy_unless_sampled(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Generation arguments that every model class of lm-eval reads in the same way.

    Args:
        arguments: a task's `generation_kwargs` under those of the command line. `do_sample: true`, or a temperature
            above 0 without `do_sample`, asks for sampling, as lm-eval has it.
        where: the task, as messages name it.

    Raises:
        ConfigError: `do_sample` is neither true nor false, or `temperature` is no number of at least 0.
    """
    samples, temperature = arguments.get("do_sample"), arguments.get("temperature")
    if not (samples is None or isinstance(samples, bool)):
        raise ConfigError(
            f"{where}: the generation argument do_sample={samples!r} is not allowed; it is true or false, and "
            "false where it is left out."
        )
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (number and math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            f"{where}: the generation argument temperature={temperature!r} is not allowed; it is a number of at "
            "least 0, and 0 where it is left out."
        )
    if samples or (samples is None and temperature):
        return dict(arguments)
    if temperature:
        _log.warning(
            "%s: temperature=%s has no effect, since do_sample is false; set do_sample=true to sample.",
            where,
            temperature,
        )
    return {**arguments, "do_sample": False, "temperature": 0.0}
