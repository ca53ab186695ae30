"""What a worker is asked to do, and what it returns: plain data that is sent to other processes and machines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.records import TaskRecord
from ttt_harness.run.fit_settings import FitSettings

# the share of a piece that is done, from 0 to 1; what is being done; whether that is worth a line of its own
Report = Callable[[float, str, bool], None]


@dataclass(frozen=True)
class FitOrder:
    """Have an adapter in the store.

    key: its name.
    task: the task that it is fitted for, the first one of an adapter that several share.
    where: what the progress calls it.
    sequences: what it is fitted on.
    settings: of the fit.
    said: the same as the record of the fit states them.
    tasks: all that share it, where several do.
    determinants: what its name is the hash of, for the record of the fit.
    """

    key: str
    task: str
    where: str
    sequences: Sequence[TrainingSequence]
    settings: FitSettings
    said: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    determinants: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerOrder:
    """Answer requests of one task.

    key: of the adapter, which is in the store; None for the base model.
    kind: the method of lm-eval's model classes that answers them: `generate_until`, `loglikelihood`, ...
    requests: lm-eval's instances.
    probe: a training sequence, to find out with whether the adapter is applied.
    """

    key: str | None
    task: str
    where: str
    kind: str
    requests: Sequence[Any]
    probe: TrainingSequence | None = None


@dataclass(frozen=True)
class Fitted:
    """An adapter that is in the store: the record of its fit, and whether it was fitted for this order."""

    record: TaskRecord


@dataclass(frozen=True)
class Answered:
    """Answers in the order of the requests, and what they took."""

    values: Sequence[Any]
    record: TaskRecord


Order = FitOrder | AnswerOrder
Outcome = Fitted | Answered
