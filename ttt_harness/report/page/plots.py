"""The plots of a sweep over settings, as numbers that page.html.j2 puts into an SVG.

One axis gives a line with intervals, two give a heat map. The values on an axis stand at equal distances, in their
order, for learning rates and the like are spread over decades. Coordinates are in the units of the SVG's view box.
"""

import math
from dataclasses import dataclass
from typing import Any

from ttt_harness.report.axes import Point, Sweep, value_text

WIDTH, HEIGHT = 600, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 44
MOST_TICKS = 6
CELL_WIDTH, CELL_HEIGHT = 112, 52
LIGHTEST, DARKEST = 0.04, 0.4  # of the colour, for the lowest and the highest score: text stays readable on both


@dataclass(frozen=True)
class Mark:
    """A setting in a plot. x, y: the place of its score; low, high: of the ends of its interval, where it has one."""

    x: float
    y: float
    low: float | None
    high: float | None
    label: str
    point: Point
    best: bool


@dataclass(frozen=True)
class LinePlot:
    """The score over one axis. ticks: (y, text); marks from left to right."""

    axis: str
    ticks: tuple[tuple[float, str], ...]
    marks: tuple[Mark, ...]

    @property
    def line(self) -> str:
        """The points of the line through the marks, as SVG writes them."""
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Cell:
    """A setting in a heat map. x, y: its upper left corner; shade: how strong the colour is, from 0 to 1."""

    x: float
    y: float
    shade: float
    point: Point
    best: bool


@dataclass(frozen=True)
class HeatMap:
    """The score over two axes: rows by the first, columns by the second. rows, columns: (place of the middle, text)."""

    axes: tuple[str, str]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    cells: tuple[Cell, ...]
    left: float
    width: float
    height: float


def plot_of(sweep: Sweep) -> LinePlot | HeatMap | None:
    """The plot of a sweep; None where it has more than two axes."""
    if len(sweep.axes) == 1:
        return _line_plot(sweep)
    return _heat_map(sweep) if len(sweep.axes) == 2 else None


def number(value: float, share: bool) -> str:
    """A score as the plots write it."""
    return f"{100 * value:.1f}" if share else f"{value:.4g}"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, at most `MOST_TICKS` + 1 of them."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    rough = (high - low) / (MOST_TICKS - 1)
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * i for i in range(first, last + 1)]


def _line_plot(sweep: Sweep) -> LinePlot:
    ends = [value for p in sweep.points for value in (p.mean, p.low, p.high) if value is not None]
    at = ticks(min(ends), max(ends))
    bottom, top = at[0], at[-1]

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - value) / (top - bottom)

    room = (WIDTH - LEFT - RIGHT) / len(sweep.points)
    (axis,) = sweep.axes
    marks = tuple(
        Mark(
            x=LEFT + room * (i + 0.5),
            y=y(point.mean),
            low=None if point.low is None else y(point.low),
            high=None if point.high is None else y(point.high),
            label=value_text(point.settings[axis]),
            point=point,
            best=point is sweep.best,
        )
        for i, point in enumerate(sweep.points)
    )
    decimals = max(0, -math.floor(math.log10((100 if sweep.share else 1) * (at[1] - at[0])) + 1e-9))
    text = [f"{(100 if sweep.share else 1) * value:.{decimals}f}" for value in at]
    return LinePlot(axis, tuple(zip(map(y, at), text, strict=True)), marks)


def _heat_map(sweep: Sweep) -> HeatMap:
    first, second = sweep.axes
    rows, columns = sweep.values(first), sweep.values(second)
    scores = [point.mean for point in sweep.points]
    low, high = min(scores), max(scores)
    left = 16.0 + 8 * max(len(value_text(value)[:20]) for value in [*rows, first])
    top = 44.0

    def place(values: list[Any], point: Point, axis: str) -> int:
        return [value_text(value) for value in values].index(value_text(point.settings[axis]))

    cells = tuple(
        Cell(
            x=left + CELL_WIDTH * place(columns, point, second),
            y=top + CELL_HEIGHT * place(rows, point, first),
            shade=DARKEST if high == low else LIGHTEST + (DARKEST - LIGHTEST) * (point.mean - low) / (high - low),
            point=point,
            best=point is sweep.best,
        )
        for point in sweep.points
    )
    return HeatMap(
        (first, second),
        tuple((top + CELL_HEIGHT * (i + 0.5), value_text(value)) for i, value in enumerate(rows)),
        tuple((left + CELL_WIDTH * (i + 0.5), value_text(value)) for i, value in enumerate(columns)),
        cells,
        left,
        left + CELL_WIDTH * len(columns) + 4,
        top + CELL_HEIGHT * len(rows) + 4,
    )
