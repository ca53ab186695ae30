"""What `ttt-harness fit` runs: the fits of a call of lm-eval, and none of its answers.

lm-eval itself loads the tasks and applies its options to them, so that the adapters are those that the same call of
`lm_eval run` would fit.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_harness.errors import ConfigError
from ttt_harness.records import TaskRecord
from ttt_harness.sweep.grid import Call
from ttt_harness.sweep.lm_eval_call import no_bars, parse_call
from ttt_harness.sweep.loading import load
from ttt_harness.terminal import visible


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


def _fit(call: Call) -> Mapping[str, TaskRecord]:
    loaded = load(call)
    template = loaded.chat.apply_chat_template
    requests = []
    with no_bars():
        for task in loaded.tasks.values():
            task.build_all_requests(
                limit=1,  # one request of each task tells what there is to fit
                rank=0,
                world_size=1,
                **loaded.chat.options(),
                chat_template=loaded.lm.apply_chat_template if template else None,
                tokenizer_name=loaded.lm.tokenizer_name if template else "",
            )
            requests += task.instances
        return loaded.lm.fit(requests)
