"""Decides which piece of the work a worker does next: the longest fit first, the last tasks' questions shared.

A run is a set of fits, each of one adapter, and the tasks whose questions are answered with these adapters. A task can
be answered once its adapter is fitted, best by the worker that has fitted it. While fits are waiting, a task's
questions stay in one piece. When none are waiting, they are cut into parts that idle workers share. `Schedule` keeps no
time itself, so that `simulate` can use it in the same way as a run.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

# Fewer questions than this are not worth another worker: it has to read the demonstrations first.
LEAST_QUESTIONS = 8


class Stages(Enum):
    """How a worker goes about its two stages, fits and answers."""

    SEQUENTIAL = "one piece at a time"
    OVERLAPPED = "one fits while the other answers"
    ALTERNATING = "all fits first, then all answers, for which the trainer leaves the device"


@dataclass(frozen=True)
class Task:
    """A task to answer.

    key: of the adapter that it is answered with; None for the base model.
    answer: what its answers cost, in tokens.
    questions: their number.
    """

    name: str
    key: str | None
    answer: float
    questions: int


@dataclass(frozen=True)
class Fit:
    """The fit of the adapter named `key`."""

    key: str


@dataclass(frozen=True)
class Answers:
    """The questions of task number `task` from `start` to before `stop`."""

    task: int
    start: int
    stop: int


Piece = Fit | Answers


class Schedule:
    """The pieces of a run, in the order in which they are asked for.

    Args:
        fits: key -> what its fit costs, in tokens; adapters that are in the store already have no place here.
        tasks: all that are to be answered.
        workers: how many there are.
        fit_cost: what a token of a fit costs, in tokens of an answer.
    """

    def __init__(
        self, fits: Mapping[str, float], tasks: Sequence[Task], workers: int, *, fit_cost: float = 1.0
    ) -> None:
        self.fits = dict(fits)
        self.tasks = list(tasks)
        self._workers = workers
        answers = dict.fromkeys(fits, 0.0)
        for task in tasks:
            if task.key in answers:
                answers[task.key] += task.answer
        cost = {key: fit_cost * fit + answers[key] for key, fit in fits.items()}
        self._waiting = sorted(fits, key=lambda key: -cost[key])
        self._ready: dict[int, list[Answers]] = {}
        self._held: dict[int, list[Answers]] = {}  # cut already, but the adapter is fitted again
        self._refitted: set[str] = set()
        self._fitted_by: dict[str, int] = {}
        # Without a fit of its own, the costliest first as well.
        self._unfitted = [number for number, task in enumerate(tasks) if task.key not in fits]
        self._unfitted.sort(key=lambda number: -tasks[number].answer)

    @property
    def waiting(self) -> int:
        """How many fits nobody has begun."""
        return len(self._waiting)

    @property
    def left(self) -> bool:
        """Whether there is anything to begin now, for any worker."""
        return bool(self._waiting or self._ready or self._unfitted)

    def next_fit(self) -> Fit | None:
        """The fit to begin now; None where all are begun."""
        return Fit(self._waiting.pop(0)) if self._waiting else None

    def next_answers(self, worker: int) -> Answers | None:
        """What worker number `worker` answers now; None where nothing can be answered at present.

        First the tasks whose adapters it has fitted, then those that need no fit, then what waits for another worker.
        """
        own = [task for task in self._ready if self._fitted_by.get(self.tasks[task].key or "") == worker]
        if own:
            return self._take(own[0])
        if self._unfitted:
            self._cut(self._unfitted.pop(0))
            return self.next_answers(worker)
        if self._ready:  # of the task with most left to answer
            return self._take(max(self._ready, key=lambda task: len(self._ready[task]) * self.tasks[task].answer))
        return None

    def fitted(self, key: str, worker: int) -> None:
        """The adapter `key` is in the store; worker number `worker` has fitted it."""
        first = key not in self._fitted_by and key not in self._refitted
        self._fitted_by[key] = worker
        self._refitted.discard(key)
        for number, task in enumerate(self.tasks):
            if task.key != key:
                continue
            if first:
                self._cut(number)
            elif pieces := self._held.pop(number, []):
                self._ready.setdefault(number, []).extend(pieces)

    def failed(self, piece: Piece) -> None:
        """The piece has to be done again, by any worker."""
        if isinstance(piece, Fit):
            self._waiting.insert(0, piece.key)
        else:
            self._ready.setdefault(piece.task, []).append(piece)

    def gone(self, piece: Answers) -> None:
        """The adapter of a piece is no longer in the store: it is fitted again before anything is answered with it."""
        key = self.tasks[piece.task].key
        assert key is not None
        for number, task in enumerate(self.tasks):
            if task.key == key:
                if number in self._unfitted:
                    self._unfitted.remove(number)
                    self._cut(number)
                self._held.setdefault(number, []).extend(self._ready.pop(number, []))
        self._held[piece.task].append(piece)
        if key not in self._refitted:
            self._refitted.add(key)
            self._waiting.insert(0, key)

    def _cut(self, number: int) -> None:
        count = self.tasks[number].questions
        alone = self._waiting or self._unfitted
        parts = 1 if alone else max(1, min(self._workers, count // LEAST_QUESTIONS))
        ends = [count * part // parts for part in range(parts + 1)]
        if count:
            self._ready[number] = [Answers(number, start, stop) for start, stop in pairwise(ends)]

    def _take(self, number: int) -> Answers:
        piece = self._ready[number].pop(0)
        if not self._ready[number]:
            del self._ready[number]
        return piece


def next_piece(schedule: Schedule, worker: int, running: Sequence[Piece], stages: Stages) -> Piece | None:
    """What a worker begins now, beside what it is at; None where it has to wait.

    Args:
        schedule: of the run.
        worker: its number.
        running: the pieces that it is at.
        stages: how it goes about fits and answers.
    """
    fits = sum(isinstance(piece, Fit) for piece in running)
    answers = len(running) - fits
    if stages is Stages.SEQUENTIAL:
        return None if running else schedule.next_answers(worker) or schedule.next_fit()
    if stages is Stages.ALTERNATING:
        if schedule.waiting:
            return schedule.next_fit() if not running else None
        return schedule.next_answers(worker) if not running else None
    if not answers and (piece := schedule.next_answers(worker)):
        return piece
    return schedule.next_fit() if not fits else None


@dataclass(frozen=True)
class Done:
    """A piece in a simulated run: who does it, and from when to when, in seconds."""

    piece: Piece
    worker: int
    begin: float
    end: float


def simulate(
    schedule: Schedule,
    workers: int,
    seconds: Callable[[Piece], float],
    stages: Stages = Stages.SEQUENTIAL,
) -> list[Done]:
    """The run that the schedule leads to where a piece takes `seconds`; in the order of the pieces' ends."""
    running: list[tuple[float, int, int, float, Piece]] = []
    at: dict[int, list[Piece]] = {worker: [] for worker in range(workers)}
    now, begun = 0.0, 0
    done: list[Done] = []
    while True:
        for worker in range(workers):
            while piece := next_piece(schedule, worker, at[worker], stages):
                at[worker].append(piece)
                begun += 1  # settles the order of equal ends
                heapq.heappush(running, (now + seconds(piece), begun, worker, now, piece))
        if not running:
            return done
        now, _, worker, begin, piece = heapq.heappop(running)
        at[worker].remove(piece)
        done.append(Done(piece, worker, begin, now))
        if isinstance(piece, Fit):
            schedule.fitted(piece.key, worker)
