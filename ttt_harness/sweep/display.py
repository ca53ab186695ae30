"""The one progress display of a sweep: cells, the tasks of the current cell, time left.

In a terminal, two bars at its foot; elsewhere a plain line for each cell and one every so often within it.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from ttt_harness.run.progress import Display
from ttt_harness.terminal import visible

# Until a setting has been measured, one without a fit is taken to last this part of one with.
SHARE_WITHOUT_FIT = 0.2


def seconds_left(done: Mapping[str, Sequence[float]], todo: Sequence[str], fits: Mapping[str, bool]) -> float | None:
    """The time that cells of the settings `todo` will take; None while no cell is done.

    done: setting -> what its cells have taken so far, in seconds. One that has not run yet is taken to last as long as
    the measured ones do on average, fitted and unfitted ones weighted by `SHARE_WITHOUT_FIT`.
    """
    if not done:
        return None

    def weight(setting: str) -> float:
        return 1.0 if fits[setting] else SHARE_WITHOUT_FIT

    means = {setting: statistics.fmean(seconds) for setting, seconds in done.items()}
    unit = statistics.fmean(mean / weight(setting) for setting, mean in means.items())
    return sum(means.get(setting, unit * weight(setting)) for setting in todo)


def duration(seconds: float) -> str:
    """For people: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class SweepDisplay(Display):
    """The display of all cells and their runs.

    Args:
        todo: the setting (method and point) of each cell that is to run, in order.
        fits: for each setting, whether it fits adapters.
        skipped: cells of the grid that are done already.
    """

    def __init__(self, todo: Sequence[str], fits: Mapping[str, bool], skipped: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        super().__init__(*columns, transient=True)
        self._todo, self._fits = list(todo), fits
        self._first = skipped
        self._total = skipped + len(todo)
        self._done: dict[str, list[float]] = defaultdict(list)
        self._finished = 0
        self._name = ""
        self._started = time.monotonic()
        if self.bars:
            self._cells = self.bars.add_task("cells", total=self._total, completed=skipped, left="")
            self._within = self.bars.add_task("", total=1.0, left="")

    def begin(self, name: str) -> None:
        """The next cell starts."""
        self._name, self._started = name, time.monotonic()
        self._show(0.0, "preparing", line=True)

    def end(self, result: str, *, measured: bool) -> None:
        """The cell is over. measured: its time tells how long others will take."""
        seconds = time.monotonic() - self._started
        if measured:
            self._done[self._todo[self._finished]].append(seconds)
        self._finished += 1
        self.print(visible(f"{self._name}: {result} ({duration(seconds)})"))

    def show(self, share: float, what: str, *, line: bool = False) -> None:  # noqa: ARG002 - a cell has many of them
        """The state of the current cell: `share` of it is done, from 0 to 1."""
        self._show(share, what, line=False)

    def _show(self, share: float, what: str, *, line: bool) -> None:
        what = visible(what)  # task names among it
        left = self._left(time.monotonic())
        # no time is told for a last cell that takes longer than others did
        told = f"about {duration(left)} left" if left is not None and left >= 1 else ""
        position = f"{self._first + self._finished + 1}/{self._total}"
        if self.bars:
            at = self._first + self._finished + share
            self.bars.update(self._cells, completed=at, description=f"cell {position}: {self._name}", left=told)
            self.bars.update(self._within, completed=share, description=what, left="")
        elif self.due(line):
            of_all = f"cell {position}, {told}" if told else f"cell {position}"
            self.print(f"[{of_all}] {self._name}: {what} ({share:.0%} of this cell)")

    def _left(self, now: float) -> float | None:
        """Time left: all cells that are not over, less what the current one has had."""
        current, *later = self._todo[self._finished :]
        now_left = seconds_left(self._done, [current], self._fits)
        rest = seconds_left(self._done, later, self._fits)
        return None if now_left is None or rest is None else max(0.0, now_left - (now - self._started)) + rest
