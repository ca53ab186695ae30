"""The progress of a run: one display in a terminal, a plain line every so often elsewhere.

`RunProgress` counts the work of one run and shows its share in a display: the one that `showing` names, which a sweep
does for all of its runs, or else one of its own.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ttt_harness.terminal import cell, complain, visible

SECONDS_BETWEEN_LINES = 15.0


class Display:
    """Bars at the foot of a terminal, or lines on stderr where it is none. Use as a context manager.

    Attributes:
        bars: None where the output is not a terminal.
    """

    def __init__(self, *columns: ProgressColumn, transient: bool = False) -> None:
        console = Console(file=sys.stderr)
        self.bars = Progress(*columns, console=console, transient=transient) if console.is_terminal else None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def show(self, share: float, what: str, *, line: bool = False) -> None:
        """Show that `share` of the run, from 0 to 1, is done. line: worth a line outside a terminal."""
        raise NotImplementedError

    def print(self, text: str) -> None:
        """A line that stays."""
        if self.bars:
            self.bars.console.print(cell(text), soft_wrap=True)
        else:
            complain(text)

    def due(self, line: bool) -> bool:
        """Whether to print a line now, outside a terminal: always if `line`, else some time after the last one."""
        now = time.monotonic()
        if not line and now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True


class RunDisplay(Display):
    """The display of a run by itself."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),  # holds the names of tasks
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns)
        self._start = time.monotonic()
        self._bar = self.bars.add_task("starting", total=1.0) if self.bars else None

    def show(self, share: float, what: str, *, line: bool = False) -> None:
        """Show that `share` of the run, from 0 to 1, is done."""
        if self.bars and self._bar is not None:
            self.bars.update(self._bar, completed=share, description=visible(what))
        elif self.due(line):
            elapsed = time.monotonic() - self._start
            left = f", about {elapsed * (1 - share) / share:.0f} s left" if share else ""
            self.print(f"[{elapsed:5.0f} s] {what} ({share:.0%} done{left})")


_shared: Display | None = None


@contextmanager
def showing(display: Display) -> Iterator[None]:
    """Have every run within the block show its progress in `display`; two displays would overwrite each other."""
    global _shared
    before, _shared = _shared, display
    try:
        yield
    finally:
        _shared = before


class RunProgress:
    """Counts work in tokens, so that the time left is told well although fitting and answering differ.

    Use as a context manager; `work` is the sum of what `advance` will be given.
    """

    def __init__(self, work: float) -> None:
        self._work = max(work, 1.0)
        self._done = 0.0
        self._what = ""
        self._display = _shared or RunDisplay()

    def __enter__(self) -> Self:
        if self._display is not _shared:
            self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not _shared:
            self._display.__exit__(kind, error, trace)

    def say(self, what: str) -> None:
        """Tell what is being done now; a line of its own where the output is not a terminal."""
        if what != self._what:
            self._what = what
            self.advance(0, what, line=True)

    def advance(self, work: float, what: str, *, line: bool = False) -> None:
        """Count `work` as done, and show `what` beside it."""
        self._done += work
        self._display.show(min(1.0, self._done / self._work), what, line=line)
