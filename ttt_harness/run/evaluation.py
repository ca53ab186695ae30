"""Runs one call of lm-eval: takes groups of requests, returns their answers and records."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ttt_harness.errors import ClusterError, TTTError
from ttt_harness.records import TaskRecord
from ttt_harness.run.executor import Crew, Executor
from ttt_harness.run.fitter import work_of_fit
from ttt_harness.run.groups import Group
from ttt_harness.run.orders import Answered, AnswerOrder, FitOrder, Fitted, Order, Outcome
from ttt_harness.run.progress import RunProgress
from ttt_harness.run.schedule import Fit, Piece, Schedule, Task
from ttt_harness.run.worker import AdapterGone

# A token that is trained on costs about as much as this many that are only read (forward, and half of backward).
FIT_COST = 2.5
# The prefix cache spares most of a prompt, so 40 characters of it cost about one token.
CHARACTERS_PER_TOKEN = 40
# How often a piece of work is given to another worker after its own has died.
MOST_REPEATS = 2


class Evaluation:
    """Has the adapters of groups fitted, and their requests answered.

    Args:
        groups: with their sequences and keys.
        requests: lm-eval's instances, all of them.
        kind: the method of lm-eval's model classes that answers them.
        stored: key -> the record of an adapter that is in the store; the others are fitted.
        store: the store, as messages name it.
        keep: called with requests and their answers as soon as these are there.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        requests: Sequence[Any],
        kind: str,
        *,
        stored: Mapping[str, TaskRecord],
        store: str,
        keep: Callable[[Sequence[Any], Sequence[Any]], None] = lambda *_: None,
    ) -> None:
        self.answers: list[Any] = [None] * len(requests)
        self.records: dict[str, TaskRecord] = {}
        self._groups, self._requests, self._kind = groups, requests, kind
        self._store, self._keep = store, keep
        self._adapters = dict(stored)
        self._first = {group.key: number for number, group in reversed(list(enumerate(groups))) if group.key}
        self._fit_work = {key: self._work_of_fit(key) for key in self._first if key not in stored}
        self._tasks = [
            Task(group.task, group.key, self._characters(group) / CHARACTERS_PER_TOKEN, len(group.indices))
            for group in groups
        ]
        self._failed: Counter[tuple[Piece, type]] = Counter()

    @property
    def work(self) -> float:
        """The work of all of it, as a progress counts it."""
        return sum(self._fit_work.values()) + sum(task.answer for task in self._tasks)

    @property
    def adapters(self) -> Mapping[str, TaskRecord]:
        """The records of the fits of those adapters that are in the store, or on their way there, by their keys."""
        return self._adapters

    @property
    def to_fit(self) -> Collection[str]:
        """The keys of the adapters that have to be fitted."""
        return self._fit_work.keys()

    def run(self, crew: Crew, workers: int, progress: RunProgress) -> None:
        """Have `crew`, of so many workers, do all of it; fills `answers` and `records`.

        Raises:
            TTTError: a worker cannot do its work, a piece of it has ended its workers again and again, or no worker is
                left.
        """
        schedule = Schedule(self._fit_work, self._tasks, workers)
        Executor(crew, schedule, progress, order=self._order, work=self._work, take=self._take, again=self._again).run()

    def _work_of_fit(self, key: str) -> float:
        group = self._groups[self._first[key]]
        assert group.settings is not None
        return FIT_COST * work_of_fit(group.sequences, group.settings.epochs)

    def _characters(self, group: Group) -> int:
        return sum(len(self._requests[index].args[0]) for index in group.indices)

    def _order(self, piece: Piece) -> Order:
        number = self._first[piece.key] if isinstance(piece, Fit) else piece.task
        group = self._groups[number]
        where = f"{group.task} ({number + 1}/{len(self._groups)})"
        if isinstance(piece, Fit):
            tasks = [other.task for other in self._groups if other.key == piece.key]
            assert group.settings is not None
            return FitOrder(
                key=piece.key,
                task=group.task,
                where=where,
                sequences=group.sequences,
                settings=group.settings,
                said=group.said,
                tasks=tasks,
                determinants=group.determinants,
            )
        requests = [self._requests[index] for index in group.indices[piece.start : piece.stop]]
        probe = group.sequences[0] if group.sequences else None
        return AnswerOrder(group.key, group.task, where, self._kind, requests, probe)

    def _work(self, piece: Piece) -> float:
        if isinstance(piece, Fit):
            return self._fit_work[piece.key]
        task = self._tasks[piece.task]
        return task.answer * (piece.stop - piece.start) / task.questions

    def _take(self, piece: Piece, outcome: Outcome) -> None:
        if isinstance(piece, Fit):
            assert isinstance(outcome, Fitted)
            self._adapters[piece.key] = outcome.record
            return
        assert isinstance(outcome, Answered)
        group = self._groups[piece.task]
        indices = group.indices[piece.start : piece.stop]
        self._keep([self._requests[index] for index in indices], outcome.values)
        for index, value in zip(indices, outcome.values, strict=True):
            self.answers[index] = value
        if group.task not in self.records:
            self.records[group.task] = self._record_of(piece.task)
        self.records[group.task].add_answers(outcome.record)

    def _record_of(self, number: int) -> TaskRecord:
        """The record of a task before anything is answered."""
        key = self._groups[number].key
        if key is None:
            return TaskRecord(plain=self._groups[number].support is None)
        record = self._adapters[key]
        # Fitted for the first of the tasks that share it, and there already for the others.
        return dataclasses.replace(record, reused=record.reused or self._first[key] != number)

    def _again(self, piece: Piece, error: TTTError) -> None:
        self._failed[piece, type(error)] += 1
        number = self._first[piece.key] if isinstance(piece, Fit) else piece.task
        key = self._groups[number].key
        if isinstance(error, AdapterGone) and key is not None:  # perhaps one that was there when the run began
            self._fit_work.setdefault(key, self._work_of_fit(key))
        if self._failed[piece, type(error)] <= MOST_REPEATS:
            return
        what = "fit" if isinstance(piece, Fit) else "answers"
        raise ClusterError(
            f"the {what} of {self._groups[number].task} failed {MOST_REPEATS + 1} times: {error} "
            f"All adapters that are done are in {self._store}."
        )
