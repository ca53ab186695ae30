"""What a run states about a task: written by the run, read by reports and estimates.

In a results file of lm-eval it stands under `config.ttt.tasks.<task>`, as a mapping with the names of the fields.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self


@dataclass
class TaskRecord:
    """The adapter that a task was answered with, and what its stages took.

    adapter: its PEFT directory; None where the base model answered.
    plain: the task is no TTT task, and was answered by the base model.
    reused: the adapter was in the store.
    train_sequences, train_tokens: of the fit; tokens are counted once for each epoch.
    losses: of each optimiser step.
    fit_seconds: what the fit took, here or when it was done.
    changes_output: whether the adapter changes what the engine answers.
    requests, generate_seconds: how many were answered, and how long the engine took.
    truncated: prompts that lost tokens to the context window.
    served_check: how near the served adapter is to the trained one, for the first adapter of each worker
        (`ttt_harness.run.served_check`).
    setting: the tuned setting that answered it, where `settings=` chose one: its name, its model arguments, and whether
        it was chosen for this task or for all.
    sampling: the arguments that answers were drawn with; None where they were greedy or only scored.
    """

    adapter: str | None = None
    plain: bool = False
    reused: bool = False
    train_sequences: int | None = None
    train_tokens: int | None = None
    losses: list[float] = field(default_factory=list)
    fit_seconds: float | None = None
    changes_output: bool | None = None
    requests: int = 0
    generate_seconds: float = 0.0
    truncated: int = 0
    setting: dict[str, Any] | None = None
    sampling: dict[str, Any] | None = None
    served_check: dict[str, Any] | None = None

    def add_answers(self, more: "TaskRecord") -> None:
        """Count in what a worker has answered; its own record tells nothing else that is not here already."""
        self.requests += more.requests
        self.generate_seconds = round(self.generate_seconds + more.generate_seconds, 3)
        if more.changes_output is not None:
            self.changes_output = more.changes_output
        self.served_check = self.served_check or more.served_check

    @property
    def fitted(self) -> bool:
        """Whether the record tells the time of a fit that was done in this run."""
        return bool(self.fit_seconds) and not self.reused

    def to_dict(self) -> dict[str, Any]:
        """The record as results state it: without what does not apply, with the first and the last loss."""
        said = {name: value for name, value in asdict(self).items() if name == "adapter" or value not in (None, [])}
        if not self.plain:
            said.pop("plain")
        if not self.truncated:
            said.pop("truncated")
        if self.adapter is None:
            said.pop("reused")
        if self.losses:
            said |= {"first_loss": self.losses[0], "last_loss": self.losses[-1]}
        return said

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Self:
        """Read a record from a results file. A value of another type counts as not stated."""
        known: dict[str, Any] = {}
        for one in fields(cls):
            value = said.get(one.name)
            if one.name in ("plain", "reused", "changes_output"):
                ok = isinstance(value, bool)
            elif one.name == "adapter":
                ok = isinstance(value, str)
            elif one.name in ("setting", "sampling", "served_check"):
                ok = isinstance(value, dict)
            elif one.name == "losses":
                value = [x for x in value if _is_number(x)] if isinstance(value, list) else None
                ok = value is not None
            else:
                ok = _is_number(value)
                if ok and one.name not in ("fit_seconds", "generate_seconds"):
                    value = int(value)  # type: ignore[arg-type]
            if ok:
                known[one.name] = value
        return cls(**known)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
