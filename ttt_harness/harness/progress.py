"""The progress of a run: one display in a terminal, a plain line every so often elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class RunProgress:
    """Counts work in tokens, so that the time left is told well although fitting and answering differ.

    Use as a context manager; `work` is the sum of what `advance` will be given.
    """

    def __init__(self, work: float) -> None:
        self._work = max(work, 1.0)
        self._done = 0.0
        self._what = ""
        self._console = Console(file=sys.stderr)
        self._start = self._last_line = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._bar = self._progress.add_task("starting", total=self._work) if self._progress else None

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, what: str) -> None:
        """Tell what is being done now; a line of its own where the output is not a terminal."""
        if what != self._what:
            self._what = what
            self.advance(0, what, line=True)

    def advance(self, work: float, what: str, *, line: bool = False) -> None:
        """Count `work` as done, and show `what` beside it."""
        self._done += work
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=self._done, description=what)
            return
        now = time.monotonic()
        if line or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            elapsed = now - self._start
            left = elapsed * (self._work - self._done) / self._done if self._done else None
            told = f", about {left:.0f} s left" if left is not None else ""
            print(f"[{elapsed:5.0f} s] {what} ({self._done / self._work:.0%} done{told})", file=sys.stderr, flush=True)
