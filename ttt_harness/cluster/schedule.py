"""Which piece of the work a free worker does next: the longest task first, the last tasks' questions shared.

A task is fitted in one piece and then answered by the worker that has fitted it. As long as other tasks wait, it
answers all questions in one piece too; once none does, they are cut into parts that idle workers share. `Schedule` is
told who is free and what is finished, and keeps no time itself, so that `simulate` can ask it what a real run asks it.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Fewer questions than this are not worth another worker: it has to read the demonstrations first.
LEAST_QUESTIONS = 8


@dataclass(frozen=True)
class Task:
    """What is known of a task beforehand.

    fit: its fit in tokens, 0 where there is nothing to fit; answer: its answers in tokens; questions: their number.
    """

    name: str
    fit: float
    answer: float
    questions: int


@dataclass(frozen=True)
class Piece:
    """Something for one worker to do: the fit of task number `task`, or its questions from `start` to before `stop`."""

    task: int
    start: int = 0
    stop: int = 0

    @property
    def fits(self) -> bool:
        """Whether it is a fit."""
        return self.stop == 0


class Schedule:
    """The pieces of a run, in the order in which they are asked for.

    Args:
        tasks: all of them.
        workers: how many there are.
        fit_cost: what a token of a fit costs, in tokens of an answer.
    """

    def __init__(self, tasks: Sequence[Task], workers: int, *, fit_cost: float = 1.0) -> None:
        self.tasks = tasks
        self._workers = workers
        self._fit_cost = fit_cost
        self._waiting = sorted(range(len(tasks)), key=lambda task: (-self._cost(task), task))
        self._ready: dict[int, list[Piece]] = {}  # fitted task -> pieces of its questions
        self._fitted_by: dict[int, int] = {}

    def _cost(self, task: int) -> float:
        return self._fit_cost * self.tasks[task].fit + self.tasks[task].answer

    def next(self, worker: int) -> Piece | None:
        """What the free worker number `worker` does now; None where there is nothing to do at present."""
        own = [task for task in self._ready if self._fitted_by.get(task) == worker]
        if own:
            return self._take(own[0])
        if self._waiting:
            task = self._waiting.pop(0)
            if self.tasks[task].fit:
                return Piece(task)
            self._cut(task)
            return self._take(task) if task in self._ready else self.next(worker)
        if self._ready:  # of the task with most left to answer
            return self._take(max(self._ready, key=lambda task: len(self._ready[task]) * self.tasks[task].answer))
        return None

    @property
    def left(self) -> bool:
        """Whether there is anything to do now, for any worker."""
        return bool(self._waiting or self._ready)

    def fitted(self, task: int, worker: int) -> None:
        """The fit of a task is done, by `worker`."""
        self._fitted_by[task] = worker
        self._cut(task)

    def failed(self, piece: Piece) -> None:
        """The piece has to be done again, by any worker."""
        if piece.fits:
            self._waiting.insert(0, piece.task)
        else:
            self._ready.setdefault(piece.task, []).append(piece)

    def _cut(self, task: int) -> None:
        count = self.tasks[task].questions
        parts = 1 if self._waiting else max(1, min(self._workers, count // LEAST_QUESTIONS))
        ends = [count * part // parts for part in range(parts + 1)]
        if count:
            self._ready[task] = [Piece(task, start, stop) for start, stop in pairwise(ends)]

    def _take(self, task: int) -> Piece:
        piece = self._ready[task].pop(0)
        if not self._ready[task]:
            del self._ready[task]
        return piece


@dataclass(frozen=True)
class Done:
    """A piece in a simulated run: who does it, and from when to when, in seconds."""

    piece: Piece
    worker: int
    begin: float
    end: float


def simulate(schedule: Schedule, workers: int, seconds: Callable[[Piece], float]) -> list[Done]:
    """The run that the schedule leads to where a piece takes `seconds`; in the order of the pieces' ends."""
    running: list[tuple[float, int, float, Piece]] = []
    idle = list(range(workers))
    now = 0.0
    done: list[Done] = []
    while True:
        for worker in list(idle):
            if (piece := schedule.next(worker)) is not None:
                idle.remove(worker)
                heapq.heappush(running, (now + seconds(piece), worker, now, piece))
        if not running:
            return done
        now, worker, begin, piece = heapq.heappop(running)
        done.append(Done(piece, worker, begin, now))
        if piece.fits:
            schedule.fitted(piece.task, worker)
        idle.append(worker)
