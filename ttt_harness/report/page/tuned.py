"""What a search on demonstrations has found, as the page shows it: held-out accuracy over the candidates, and tasks.

Each candidate has a column, with its mean over the tasks, the mean's interval, and a dot for each task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_harness.errors import ConfigError
from ttt_harness.report.page.plots import HEIGHT, LEFT, RIGHT, TOP, ticks
from ttt_harness.tuned import Candidate, Tuned, is_tuned, read_tuned
from ttt_harness.tuned.choice import Choice, Prediction, Row, choose

COLUMN, LINE = 104, 15
FILE_NAME = "tuned.json"


@dataclass(frozen=True)
class Column:
    """A candidate. x: of its column; y, low, high: of its mean and interval; dots: (y, text) of the tasks."""

    x: float
    y: float | None
    low: float | None
    high: float | None
    dots: tuple[tuple[float, str], ...]
    label: tuple[str, ...]
    row: Row
    chosen: bool


@dataclass(frozen=True)
class TunedFigure:
    """A file. ticks: (y, text); tasks: (name, its own setting, what the setting for all tasks is predicted to gain)."""

    path: str
    tuned: Tuned
    choice: Choice
    ticks: tuple[tuple[float, str], ...]
    columns: tuple[Column, ...]
    tasks: tuple[tuple[str, Candidate, Prediction | None], ...]
    width: float
    height: float


def find_tuned(given: str | Path) -> tuple[list[tuple[str, Tuned]], list[str]]:
    """The files that a path names or a folder holds, to any depth, and remarks on those that cannot be read.

    Raises:
        ConfigError: the path itself names one that is damaged.
    """
    path = Path(given)
    try:
        inside = sorted(path.rglob(FILE_NAME)) if path.is_dir() else None
    except (OSError, ValueError):  # what reads the runs says what is wrong with the path
        return [], []
    if inside is None:
        return ([(str(path), read_tuned(path))] if is_tuned(path) else []), []
    found, remarks = [], []
    for file in inside:
        if is_tuned(file):
            try:
                found.append((str(file), read_tuned(file)))
            except ConfigError as error:
                remarks.append(f"Left out: {error}")
    return found, remarks


def tuned_figure(path: str, tuned: Tuned, prefix: str) -> TunedFigure:
    """The figure of a file; `prefix` is left out of the names of tasks."""
    choice = choose(tuned)
    shares = [
        {task: sum(found.values()) / len(found) for task, tried in tuned.tasks.items() if (found := tried.get(name))}
        for name in (row.candidate.name for row in choice.rows)
    ]
    at = ticks(0.0, max(value for of_one in shares for value in of_one.values()) or 1.0)
    labels = [tuple(row.candidate.name.split(", ")) for row in choice.rows]

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP) * (at[-1] - value) / (at[-1] - at[0])

    columns = []
    for number, (row, of_one, label) in enumerate(zip(choice.rows, shares, labels, strict=True)):
        mean, low, high = (
            (row.accuracy.value, row.accuracy.low, row.accuracy.high) if row.accuracy else (None, None, None)
        )
        columns.append(
            Column(
                x=LEFT + COLUMN * (number + 0.5),
                y=None if mean is None else y(mean),
                low=None if low is None else y(low),
                high=None if high is None else y(min(high, at[-1])),
                dots=tuple(
                    (y(share), f"{task.removeprefix(prefix)}: {100 * share:.0f}") for task, share in of_one.items()
                ),
                label=label,
                row=row,
                chosen=row.candidate is choice.pooled,
            )
        )
    tasks = [
        (task.removeprefix(prefix), own, choice.predictions[task].get(choice.pooled.name))
        for task, own in choice.by_task.items()
    ]
    return TunedFigure(
        path=path,
        tuned=tuned,
        choice=choice,
        ticks=tuple((y(value), f"{100 * value:.0f}") for value in at),
        columns=tuple(columns),
        tasks=tuple(tasks),
        width=LEFT + COLUMN * len(columns) + RIGHT,
        height=HEIGHT + LINE * (max(map(len, labels)) + 1),
    )


def tuned_figures(found: Sequence[tuple[str, Tuned]], prefix: str) -> list[TunedFigure]:
    """The figures of all files."""
    return [tuned_figure(path, tuned, prefix) for path, tuned in found]
