"""lm-eval's own options to its tasks: what a run with these options would learn from, and nothing that it evaluates.

lm-eval itself loads the tasks and the model class, as for a run. Where it would evaluate, it is stopped. Meanwhile the
tasks hold their demonstrations in the place of what they evaluate, so that no evaluated question can be rendered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

from ttt_harness.errors import ConfigError, DataError, TTTError
from ttt_harness.sweep.grid import Call
from ttt_harness.sweep.lm_eval_call import no_bars, run_lm_eval, sentence

if TYPE_CHECKING:
    from ttt_harness.harness.model import TTTVLLM
    from ttt_harness.harness.task import TTTTask


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
    """What lm-eval has made of a call: the model class, the tasks by their names, and how prompts are made."""

    lm: "TTTVLLM"
    tasks: "Mapping[str, TTTTask]"
    chat: Chat


class _Stopped(Exception):
    """Ends lm-eval where it would evaluate."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded = loaded


def load(call: Call) -> Loaded:
    """The tasks of a call, with the demonstrations that it draws, and its model class; no engine is started.

    Raises:
        TTTError: lm-eval or a task refuses the options, or a task is no TTT task.
    """
    import lm_eval.evaluator

    from ttt_harness.harness.drawing import demonstrations_alone
    from ttt_harness.harness.model import TTTVLLM

    try:
        with (
            no_bars(),
            demonstrations_alone(),
            mock.patch.object(lm_eval.evaluator, "evaluate", _instead_of_evaluating),
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
    """Stands where lm-eval's function of the same arguments would ask and score.

    Raises:
        _Stopped: always, but for
        DataError: a task is no TTT task.
    """
    from ttt_harness.harness.declaration import three_lines
    from ttt_harness.harness.task import TTTTask

    for name, task in task_dict["tasks"].items():
        if not isinstance(task, TTTTask):
            raise DataError(
                f"{name} is not a TTT task and has no demonstrations to tune with; write these three lines into a "
                f"YAML, name its folder with --include_path, and tune {name}_ttt:\n{three_lines(name)}"
            )
    chat = Chat(system_instruction, bool(apply_chat_template), bool(fewshot_as_multiturn))
    raise _Stopped(Loaded(lm, task_dict["tasks"], chat))
