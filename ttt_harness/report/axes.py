"""The settings that a sweep has varied: which they are, how the score moves along them, and whether the best one leads.

Whatever differs between runs of one method besides the seed is an axis. `sweep_of` gives the points on the axes, each
with its score and interval, and compares the best one with every other, question by question where samples were kept.
summary_tables.py prints that, plots.py draws it.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from ttt_harness.errors import ReportError
from ttt_harness.report.compare import MEAN_ROW, KeptSamples, choose_metric, compare_runs
from ttt_harness.report.results import Metric, Run
from ttt_harness.report.seeds import as_one
from ttt_harness.statistics import CONFIDENCE, Difference, compare_unpaired, holm

# What is no axis, although runs can differ in it: another model, other questions, or other texts around them.
SHARED = ("weights", "chat_template_sha", "system_instruction_sha", "lm-eval model")
_NO_AXES = {*SHARED, "method", "model", "limit", "tasks"}


@dataclass(frozen=True)
class Point:
    """A setting: the values on the axes, and its score with a 95 % interval, in the metric's own unit.

    low, high: with several seeds from their standard deviation (t), else from lm-eval's standard error; None without.
    """

    settings: Mapping[str, Any]
    seeds: int
    mean: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """The setting: "lr=0.0001, epochs=3"."""
        return ", ".join(point_text(self.settings))


@dataclass(frozen=True)
class Rival:
    """Another setting beside the best one. difference: its score less the best one's.

    p_holm: corrected for the number of rivals; None where nothing is known of the spread.
    """

    point: Point
    difference: Difference
    p_holm: float | None

    @property
    def within_noise(self) -> bool:
        """Whether the difference could as well be chance: p is 0.05 or more, or not known."""
        return self.p_holm is None or self.p_holm >= 0.05


@dataclass(frozen=True)
class Sweep:
    """The settings of one method. name, metric: what is scored; share: it reads best in percent.

    points: in the order of their values on the axes. best: the one with the best score. rivals: all others.
    """

    method: str
    axes: tuple[str, ...]
    name: str
    metric: Metric
    share: bool
    points: tuple[Point, ...]
    best: Point
    rivals: tuple[Rival, ...]

    def values(self, axis: str) -> list[Any]:
        """The different values on an axis, in order."""
        return _distinct(point.settings.get(axis) for point in self.points)

    def rival(self, point: Point) -> Rival | None:
        """The point beside the best one; None for the best one itself."""
        return next((rival for rival in self.rivals if rival.point is point), None)

    @property
    def verdict(self) -> str:
        """Which setting is best, and whether it leads by more than chance would give."""
        best = f"{self.method}: {self.best.text} has the best {self.name} of {len(self.points)} settings"
        close = [rival for rival in self.rivals if rival.within_noise]
        if len(close) == len(self.rivals):
            return f"{best}, but it is within noise of all others: these runs do not tell which setting is best."
        if close:
            return f"{best}, within noise of {'; '.join(rival.point.text for rival in close)}."
        others = f"all {len(self.rivals)} others" if len(self.rivals) > 1 else "the other"
        return f"{best}, and is clearly better than {others}."


def varied(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs of one method differ. One that some runs do not state makes no difference."""
    setups = [run.setup for run in runs]
    keys = dict.fromkeys(key for setup in setups for key in setup if key not in _NO_AXES)
    found = [key for key in keys if len(_distinct(v for s in setups if (v := s.get(key)) is not None)) > 1]
    # with other demonstrations there are other shots in the prompts
    return [key for key in found if key != "shots" or "k" not in found]


def in_order(runs: Sequence[Run], axes: Sequence[str]) -> list[tuple[dict[str, Any], list[Run]]]:
    """The runs by their values on the axes, which come in rising order."""
    found: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        settings = {axis: run.setup.get(axis) for axis in axes}
        found.setdefault(_key(settings), (settings, []))[1].append(run)
    return sorted(found.values(), key=lambda item: [_rank(value) for value in item[0].values()])


def point_text(settings: Mapping[str, Any]) -> list[str]:
    """For people: ["lr=0.0001", "epochs=3"]."""
    return [f"{axis}={value_text(value)}" for axis, value in settings.items()]


def value_text(value: Any) -> str:
    """A value on an axis, for people."""
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def sweep_of(
    method: str,
    axes: Sequence[str],
    points: Sequence[tuple[Mapping[str, Any], Mapping[Any, Run]]],
    wanted: str | None = None,
) -> Sweep | None:
    """The sweep of a method, by its first group, or the mean of its tasks where they are in none.

    points: settings, and the runs by seed. wanted: a metric, as in `choose_metric`. None where fewer than two points
    have a score.
    """
    name, metric, tasks = _scored(points, wanted)
    if metric is None:
        return None
    found: list[tuple[Point, float | None, Run]] = []
    higher, share = True, True
    for settings, by_seed in points:
        scores = [score for run in by_seed.values() if (score := _score(run, name, metric, tasks))]
        if scores:
            values = [value for value, _, _ in scores]
            error = _standard_error(values, scores[0][1])
            reach = None if error is None else error * _quantile(len(values))
            mean = statistics.fmean(values)
            low, high = (None, None) if reach is None else (mean - reach, mean + reach)
            one = as_one(by_seed, Path(", ".join([method, *point_text(settings)])))
            found.append((Point(settings, len(values), mean, low, high), error, one))
            higher = scores[0][2]
            share = share and higher and all(0 <= value <= 1 for value in values)
    if len(found) < 2:
        return None
    best = (max if higher else min)(found, key=lambda one: one[0].mean)
    kept = KeptSamples(only=best[2])
    others = [one for one in found if one is not best]
    differences = [_difference(best, other, metric, kept) for other in others]
    corrected = iter(holm([d.p for d in differences if d.p is not None]))
    rivals = [
        Rival(point, difference, None if difference.p is None else next(corrected))
        for (point, _, _), difference in zip(others, differences, strict=True)
    ]
    ordered = tuple(point for point, _, _ in found)
    return Sweep(method, tuple(axes), name, metric, share, ordered, best[0], tuple(rivals))


def _scored(
    points: Sequence[tuple[Mapping[str, Any], Mapping[Any, Run]]], wanted: str | None
) -> tuple[str, Metric | None, list[str]]:
    """What the points are compared by: the name, the metric, and the tasks below; no metric where there is none."""
    runs = [run for _, by_seed in points for run in by_seed.values()]
    first = runs[0]
    for group, below in first.groups.items():
        if group in first.results and (metric := choose_metric(first, first, group, wanted)):
            return group, metric, below
    chosen = {task: metric for task in first.tasks if (metric := choose_metric(first, first, task, wanted))}
    if len(set(chosen.values())) != 1:
        return "", None, []
    tasks = list(chosen)
    return tasks[0] if len(tasks) == 1 else MEAN_ROW, chosen[tasks[0]], tasks


def _score(run: Run, name: str, metric: Metric, tasks: Sequence[str]) -> tuple[float, float | None, bool] | None:
    """Score, standard error where known, and whether higher is better; None where the run has no such score."""
    if name != MEAN_ROW:
        if metric not in run.metrics(name):
            return None
        score = run.score(name, metric)
        return score.value, score.stderr, score.higher_is_better
    if not all(metric in run.metrics(task) for task in tasks):
        return None
    scores = [run.score(task, metric) for task in tasks]
    errors = [score.stderr for score in scores if score.stderr is not None]
    error = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    return statistics.fmean(score.value for score in scores), error, scores[0].higher_is_better


def _standard_error(values: Sequence[float], of_one: float | None) -> float | None:
    """Of the mean over the seeds; of a single one, what lm-eval states."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else of_one


def _quantile(seeds: int) -> float:
    tail = (1 + CONFIDENCE) / 2
    return float(stats.t.ppf(tail, seeds - 1) if seeds > 1 else stats.norm.ppf(tail))


def _difference(
    best: tuple[Point, float | None, Run], other: tuple[Point, float | None, Run], metric: Metric, kept: KeptSamples
) -> Difference:
    """The other's score less the best one's: paired by question, or by the standard errors where that cannot be."""
    try:
        rows = compare_runs(best[2], [other[2]], metric=str(metric), allow_same_run=True, read=kept.read).others[0].rows
        return rows[0].difference
    except ReportError:  # another k leaves other questions to be asked
        return compare_unpaired(best[0].mean, other[0].mean, best[1], other[1])


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON can state them: finite numbers, truth values and texts; everything else by its text."""
    return {
        axis: value
        if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
        else value_text(value)
        for axis, value in settings.items()
    }


def _distinct(values: Any) -> list[Any]:
    by_key = {_key(value): value for value in values}
    return sorted(by_key.values(), key=_rank)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _rank(value: Any) -> tuple[bool, float, str]:
    """Numbers in their order, then everything else by its text."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return (not number, float(value) if number else 0.0, "" if number else str(value))
