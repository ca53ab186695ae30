"""What `ttt-harness fit` runs: the fits of a call of lm-eval, and none of its answers.

lm-eval itself loads the tasks and applies its options to them, so that the adapters are those that the same call of
`lm_eval run` would fit. Where it would ask the model, one request of each task tells what there is to fit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from ttt_harness import patches
from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.records import TaskRecord
from ttt_harness.sweep.lm_eval_call import no_bars, parse_call, run_lm_eval, sentence
from ttt_harness.terminal import visible


class _Fitted(Exception):
    """Ends lm-eval where it would evaluate; holds the records of the fits by task."""

    def __init__(self, records: Mapping[str, TaskRecord]) -> None:
        super().__init__()
        self.records = records


def fit(options: Sequence[str], *, form: str = "text") -> int:
    """Fit the adapters of tasks, and print where they are. Returns the exit status.

    Args:
        options: those of `lm_eval run`.
        form: text, a line for each task; or json.

    Raises:
        TTTError: an option is not allowed, there is nothing to fit, or a fit fails.
    """
    if any(option.split("=")[0] in ("--output_path", "-o") for option in options):
        raise ConfigError("--output_path is not allowed with fit, which has no results to write; leave it out.")
    call = parse_call({"output_path": "."}, options) | {"model": "ttt_vllm", "log_samples": False}
    call.pop("output_path")
    records = _fit(call)
    if form == "json":
        print(json.dumps([_as_dict(task, record) for task, record in records.items()], indent=2))
    else:
        for task, record in records.items():
            print(visible(f"{task}  {record.adapter}"))
    return 0


def _as_dict(task: str, record: TaskRecord) -> dict[str, Any]:
    said = record.to_dict()
    for name in ("requests", "generate_seconds"):  # nothing was answered
        said.pop(name, None)
    return {"task": task, "key": Path(str(record.adapter)).name, **said}


def _fit(call: dict[str, Any]) -> Mapping[str, TaskRecord]:
    from ttt_harness.harness.model import TTTVLLM

    try:
        with (
            no_bars(),
            patches.applied("lm_eval: evaluation, left out", _instead_of_evaluating),
            mock.patch.object(TTTVLLM, "answers", False),
        ):
            run_lm_eval(call)
    except _Fitted as done:
        return done.records
    except TTTError:
        raise
    except Exception as error:
        raise ConfigError(f"lm-eval refuses these options: {sentence(error)}.") from error
    raise ConfigError("lm-eval found no task to fit; name some with --tasks.")


def _instead_of_evaluating(
    lm: Any,
    task_dict: Mapping[str, Any],
    *,
    system_instruction: str | None = None,
    apply_chat_template: bool | str = False,
    fewshot_as_multiturn: bool = False,
    **_: Any,
) -> NoReturn:
    """Fit where lm-eval's function of the same arguments would ask and score.

    Raises:
        _Fitted: always.
    """
    requests = []
    for task in task_dict["tasks"].values():
        task.build_all_requests(
            limit=1,
            rank=0,
            world_size=1,
            system_instruction=system_instruction,
            apply_chat_template=bool(apply_chat_template),
            fewshot_as_multiturn=fewshot_as_multiturn,
            chat_template=lm.apply_chat_template if apply_chat_template else None,
            tokenizer_name=lm.tokenizer_name if apply_chat_template else "",
        )
        requests += task.instances
    raise _Fitted(lm.fit(requests))
