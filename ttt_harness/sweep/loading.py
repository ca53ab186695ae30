"""Loads the model class and the tasks of a call of lm-eval, with the call's options applied, without evaluating.

lm-eval itself loads them, as for a run, and is stopped where it would evaluate. `fit` and `tune` use this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

from ttt_harness import patches
from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.sweep.grid import Call
from ttt_harness.sweep.lm_eval_call import no_bars, run_lm_eval, sentence

if TYPE_CHECKING:
    from ttt_harness.harness.model import TTTVLLM


@dataclass(frozen=True)
class Chat:
    """How prompts are made, as lm-eval's options say.

    system_instruction, apply_chat_template, fewshot_as_multiturn: the options.
    """

    system_instruction: str | None
    apply_chat_template: bool
    fewshot_as_multiturn: bool

    def options(self) -> dict[str, Any]:
        """As keyword arguments of lm-eval's functions."""
        return dict(vars(self))


@dataclass(frozen=True)
class Loaded:
    """The model, the tasks by their names, and how prompts are made, as lm-eval has loaded them for a call."""

    lm: "TTTVLLM"
    tasks: Mapping[str, Any]
    chat: Chat


class _Stopped(Exception):
    """Ends lm-eval where it would evaluate."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded = loaded


def load(call: Call) -> Loaded:
    """The tasks of a call, and its model class; no engine is started.

    Raises:
        TTTError: lm-eval or a task refuses the options, or there is no task.
    """
    from ttt_harness.harness.model import TTTVLLM

    try:
        with (
            no_bars(),
            patches.applied("lm_eval: evaluation, left out", _instead_of_evaluating),
            mock.patch.object(TTTVLLM, "answers", False),
        ):
            run_lm_eval(call)
    except _Stopped as stopped:
        return stopped.loaded
    except TTTError:
        raise
    except Exception as error:
        raise ConfigError(f"lm-eval refuses these options: {sentence(error)}.") from error
    raise ConfigError("lm-eval found no task; name some with --tasks.")


def _instead_of_evaluating(
    lm: Any,
    task_dict: Mapping[str, Any],
    *,
    system_instruction: str | None = None,
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool = False,
    **_: Any,
) -> NoReturn:
    """Replaces lm-eval's function of the same arguments, which would ask and score.

    Raises:
        _Stopped: always.
    """
    chat = Chat(system_instruction, bool(apply_chat_template), bool(fewshot_as_multiturn))
    raise _Stopped(Loaded(lm, task_dict["tasks"], chat))
