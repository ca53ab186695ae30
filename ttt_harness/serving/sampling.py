"""Generation arguments of a task, as vLLM's own `SamplingParams`: built and checked before anything is fitted.

`sampling_params` is what a request with these arguments will be sampled with. `request_seed` is what makes sampling
repeatable: each request has a seed of its own, so that neither its place in a batch nor the worker matters.
"""

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.models import vllm_causallms
from vllm import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from ttt_harness.config import nearest, quoted
from ttt_harness.errors import ConfigError
from ttt_harness.serving.engine import reason_of
from ttt_harness.serving.generation import greedy, samples

# lm-eval's names for the budget of an answer, in the order in which its class takes them.
BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LM_EVALS = ("until", "do_sample", *BUDGETS)
# vLLM's names that lm-eval's class fills in itself, or without which it cannot read the answers.
OTHERS = {
    "stop": "use until",
    "n": "one answer of each request is read; use repeats in the task's YAML",
    "detokenize": "answers are texts",
    "output_kind": "answers are read when they are whole",
    "stream_interval": "answers are read when they are whole",
    "skip_clone": "it is vLLM's own",
    "output_text_buffer_length": "it is vLLM's own",
}


def vllm_arguments(
    arguments: Mapping[str, Any], eos: Any, default_budget: int
) -> tuple[dict[str, Any], list[str], int]:
    """What lm-eval's `vllm` class makes of generation arguments, but greedy unless they ask for sampling.

    Returns:
        Arguments of `SamplingParams`, the texts at which an answer stops, and the most tokens that it has.
    """
    if not samples(arguments, "generation_kwargs"):
        arguments = greedy(arguments)
    given = {name: value for name, value in arguments.items() if value is not None}  # lm-eval takes no null
    return vllm_causallms.VLLM.modify_gen_kwargs(given, eos=eos, default_max_gen_toks=default_budget)


def sampling_params(
    arguments: Mapping[str, Any], *, where: str, eos: str, default_budget: int, vllm_config: Any, tokenizer: Any
) -> SamplingParams:
    """Build the sampling parameters of a request, and have vLLM check them as it does when the request comes.

    Args:
        arguments: a task's `generation_kwargs`, with those of `--gen_kwargs` over them.
        where: the task, for messages.
        eos: the text of the token that ends an answer.
        default_budget: tokens of an answer where the arguments state none.
        vllm_config: of the engine that will answer.
        tokenizer: of the model.

    Raises:
        ConfigError: an argument is unknown or has a value that is not allowed.
    """
    _check_names(arguments, where)
    samples(arguments, where)
    _check_until(arguments.get("until"), where)
    for name in BUDGETS:
        _check_budget(name, arguments.get(name), where)
    try:
        kwargs, until, budget = vllm_arguments(arguments, eos, default_budget)
        params = SamplingParams(max_tokens=budget, stop=until, **kwargs)
        # Its types are checked where the engine has a process of its own, and only there.
        MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
        params.verify(
            vllm_config.model_config, vllm_config.speculative_config, vllm_config.structured_outputs_config, tokenizer
        )
    except Exception as error:  # vLLM raises many kinds
        raise ConfigError(
            f"{where}: vLLM refuses the generation arguments: {reason_of(error)}; change generation_kwargs in the "
            "task's YAML, or --gen_kwargs."
        ) from error
    return params


def request_seed(seed: int, task: str, prompt: str, occurrence: int) -> int:
    """The seed of one request: of the run's, the task and its prompt, and how often this prompt came before."""
    text = repr((seed, task, prompt, occurrence)).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.sha256(text).digest()[:4])


def _check_names(arguments: Mapping[str, Any], where: str) -> None:
    vllms = [name for name in inspect.signature(SamplingParams).parameters if not name.startswith("_")]
    known = [*LM_EVALS, *(name for name in vllms if name not in OTHERS)]
    for name in arguments:
        if name in OTHERS and name in vllms:
            raise ConfigError(f"{where}: the generation argument {name} is not allowed: {OTHERS[name]}.")
        if name not in known:
            raise ConfigError(
                f"{where}: {name!r} is no generation argument of lm-eval or of vLLM.{nearest(str(name), known)}"
            )


def _check_until(until: Any, where: str) -> None:
    for text in until if isinstance(until, list) else [until]:
        if until is not None and (not isinstance(text, str) or not text):
            raise ConfigError(
                f"{where}: the generation argument until={quoted(until)} is not allowed: it is a text or a list of "
                "texts, none of them empty; an empty list stops at the end-of-text token alone."
            )


def _check_budget(name: str, given: Any, where: str) -> None:
    # lm-eval's parser makes 1e3 a float
    whole = isinstance(given, int | float) and not isinstance(given, bool) and given == given // 1
    if given is not None and not (whole and 1 <= given < 2**31):
        raise ConfigError(
            f"{where}: the generation argument {name}={quoted(given)} is not allowed: it is a whole number of tokens, "
            "at least 1."
        )
