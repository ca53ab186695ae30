"""The one progress display of a sweep: cells, the tasks of the current cell, time left.

In a terminal, two bars at its foot; elsewhere a plain line for each cell and one every so often within it. `ttt_vllm`
reports to `CellProgress`, which stands in the place of its own display for as long as the sweep runs.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from ttt_harness.harness.progress import SECONDS_BETWEEN_LINES

# Until a method has been measured, one without a fit is taken to last this part of one with.
SHARE_WITHOUT_FIT = 0.2


def seconds_left(done: Mapping[str, Sequence[float]], todo: Sequence[str], fits: Mapping[str, bool]) -> float | None:
    """The time that cells of the methods `todo` will take; None while no cell is done.

    done: method -> what its cells have taken so far, in seconds. A method that has not run yet is taken to last as
    long as the measured ones do on average, fitted and unfitted ones set against each other by `SHARE_WITHOUT_FIT`.
    """
    if not done:
        return None

    def weight(method: str) -> float:
        return 1.0 if fits[method] else SHARE_WITHOUT_FIT

    means = {method: statistics.fmean(seconds) for method, seconds in done.items()}
    unit = statistics.fmean(mean / weight(method) for method, mean in means.items())
    return sum(means.get(method, unit * weight(method)) for method in todo)


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class SweepDisplay:
    """Use as a context manager.

    Args:
        todo: the method of each cell that is to run, in order.
        fits: for each method, whether it fits adapters.
        skipped: cells of the grid that are done already.
    """

    def __init__(self, todo: Sequence[str], fits: Mapping[str, bool], skipped: int) -> None:
        self._todo, self._fits = list(todo), fits
        self._first = skipped
        self._total = skipped + len(todo)
        self._done: dict[str, list[float]] = defaultdict(list)
        self._finished = 0
        self._name = ""
        self._started = self._last_line = time.monotonic()
        self._console = Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = (
            Progress(*columns, console=self._console, transient=True) if self._console.is_terminal else None
        )
        if self._progress:
            self._cells = self._progress.add_task("cells", total=self._total, completed=skipped, left="")
            self._within = self._progress.add_task("", total=1.0, left="")

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def begin(self, name: str) -> None:
        """The next cell starts."""
        self._name, self._started = name, time.monotonic()
        self.show(0.0, "preparing", line=True)

    def end(self, result: str, *, measured: bool) -> None:
        """The cell is over. measured: its time tells how long others will take."""
        seconds = time.monotonic() - self._started
        if measured:
            self._done[self._todo[self._finished]].append(seconds)
        self._finished += 1
        self.say(f"{self._name}: {result} ({duration(seconds)})")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, share: float, what: str, *, line: bool = False) -> None:
        """The state of the current cell: `share` of it is done, from 0 to 1. line: worth a line outside a terminal."""
        now = time.monotonic()
        left = self._left(now)
        told = "" if left is None else f"about {duration(left)} left"
        position = f"{self._first + self._finished + 1}/{self._total}"
        if self._progress:
            at = self._first + self._finished + share
            self._progress.update(self._cells, completed=at, description=f"cell {position}: {self._name}", left=told)
            self._progress.update(self._within, completed=share, description=what, left="")
        elif line or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            told = f" ({share:.0%} of this cell{', ' + told if told else ''})"
            self.say(f"[cell {position}] {self._name}: {what}{told}")

    def _left(self, now: float) -> float | None:
        """Time left: all cells that are not over, less what the current one has had."""
        current, *later = self._todo[self._finished :]
        now_left = seconds_left(self._done, [current], self._fits)
        rest = seconds_left(self._done, later, self._fits)
        return None if now_left is None or rest is None else max(0.0, now_left - (now - self._started)) + rest

    def cell_progress(self, work: float) -> "CellProgress":
        """Stands for `RunProgress(work)` within a sweep."""
        return CellProgress(self, work)


class CellProgress:
    """What `RunProgress` is for a run by itself: counts a run's work, but shows it in the sweep's display."""

    def __init__(self, display: SweepDisplay, work: float) -> None:
        self._display, self._work, self._done = display, max(work, 1.0), 0.0
        self._what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def say(self, what: str) -> None:
        """Tell what is being done now."""
        if what != self._what:
            self._what = what
            self.advance(0, what)

    def advance(self, work: float, what: str) -> None:
        """Count `work` as done, and show `what` beside it."""
        self._done += work
        self._display.show(min(1.0, self._done / self._work), what)
