"""Drives a run: hands the pieces of the schedule to free workers, and collects their results.

The executor is the same for one worker in this process (`local.LocalCrew`) and for many elsewhere
(`ttt_harness.cluster.pool.PoolCrew`). `Stages` says how a worker's two stages share its device: on a GPU with
room for both, a worker fits the next task while its engine answers the last.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from ttt_harness.errors import TTTError
from ttt_harness.run.orders import Order, Outcome, Report
from ttt_harness.run.progress import RunProgress
from ttt_harness.run.schedule import Answers, Fit, Piece, Schedule, Stages, next_piece
from ttt_harness.run.worker import AdapterGone

SECONDS_BETWEEN_LOOKS = 0.5

Handle = Any  # of a piece that a worker is at


class WorkerLost(TTTError):
    """A worker ended before it was done with a piece."""


class Crew(Protocol):
    """The workers of a run."""

    def ready(self) -> Collection[int]:
        """The numbers of the workers that take pieces now."""

    def stages_of(self, worker: int) -> Stages:
        """How a worker goes about fits and answers."""

    def begin(self, worker: int, order: Order, report: Report) -> Handle:
        """Have a worker begin a piece."""

    def wait(self, running: Collection[Handle]) -> Sequence[Handle]:
        """Those of `running` that are done; none where it takes longer than a moment.

        Raises:
            TTTError: no worker is left.
        """

    def result(self, handle: Handle) -> Outcome:
        """What came of a piece that is done.

        Raises:
            WorkerLost: nothing did; the piece has to be done again.
            TTTError: what the worker raised.
        """


class Executor:
    """Has all pieces of a schedule done.

    Args:
        crew: the workers.
        schedule: of the run.
        progress: counts the work of all pieces.
        order: makes the order of a piece.
        work: the work of a piece, as `progress` counts it.
        take: is given each piece and what came of it.
        again: is given each piece that has to be done again, and why, and raises where that is too often.
    """

    def __init__(
        self,
        crew: Crew,
        schedule: Schedule,
        progress: RunProgress,
        *,
        order: Callable[[Piece], Order],
        work: Callable[[Piece], float],
        take: Callable[[Piece, Outcome], None],
        again: Callable[[Piece, TTTError], None],
    ) -> None:
        self._crew = crew
        self._schedule = schedule
        self._progress = progress
        self._order, self._work, self._take, self._again = order, work, take, again
        self._running: dict[Handle, tuple[int, Piece, _Share]] = {}

    def run(self) -> None:
        """Do all of it.

        Raises:
            TTTError: what a worker raised, or what the crew says where none is left.
        """
        while self._schedule.left or self._running:
            self._hand_out()
            for handle in self._crew.wait(self._running):
                self._finish(handle)

    def _hand_out(self) -> None:
        for worker in self._crew.ready():
            while piece := self._next(worker):
                share = _Share(self._progress, self._work(piece))
                handle = self._crew.begin(worker, self._order(piece), share.report)
                self._running[handle] = (worker, piece, share)

    def _next(self, worker: int) -> Piece | None:
        at = [piece for number, piece, _ in self._running.values() if number == worker]
        return next_piece(self._schedule, worker, at, self._crew.stages_of(worker))

    def _finish(self, handle: Handle) -> None:
        worker, piece, share = self._running.pop(handle)
        try:
            outcome = self._crew.result(handle)
        except (AdapterGone, WorkerLost) as error:
            share.take_back()
            self._again(piece, error)
            if isinstance(error, AdapterGone) and isinstance(piece, Answers):
                self._schedule.gone(piece)
            else:
                self._schedule.failed(piece)
            return
        share.complete()
        self._take(piece, outcome)
        if isinstance(piece, Fit):
            self._schedule.fitted(piece.key, worker)


class _Share:
    """What the progress has counted of one piece."""

    def __init__(self, progress: RunProgress, work: float) -> None:
        self._progress, self._work = progress, work
        self._share, self._what = 0.0, ""

    def report(self, share: float, what: str, line: bool) -> None:
        """The worker says how far it is."""
        if line:
            self._progress.say(what)
        self._what = what
        self._count(share)

    def complete(self) -> None:
        self._count(1.0)

    def take_back(self) -> None:
        self._count(0.0)

    def _count(self, share: float) -> None:
        before, self._share = self._share, share
        self._progress.advance((share - before) * self._work, self._what)
