"""Chooses a setting, for all tasks or for each task, from the outcomes on held-out demonstrations.

A candidate is compared with in-context learning on the demonstrations that both were asked. The orders in which one
demonstration was asked count as one observation, their mean. Shares lie from 0 to 1, differences from -1 to 1.

**The setting for all tasks** has the best held-out accuracy, as the mean over tasks. Candidates that were asked less
are compared on the demonstrations that both were asked. t tests with the variance pooled within tasks, corrected for
the number of candidates (Holm), tell whether it is better than in-context learning.

**The setting of a task** has the best *predicted* difference from in-context learning in that task; in-context learning
itself has 0. Ten demonstrations tell little about one task. So the task's own difference d is shrunk towards the mean m
of all tasks (empirical Bayes; Morris, JASA 78 (1983) 47):

    predicted = m + w (d - m),    w = T / (T + v / n)

v is the sampling variance of one demonstration's difference, and n the number of demonstrations. T is the variance
between tasks, estimated by moments: the variance of the tasks' d, less the part that sampling alone would give, and at
least 0. A handful of tasks tells little about the variance of one candidate, so T and v are means over the candidates.
With fewer than four tasks, w is 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ttt_harness.statistics import (
    NORMAL_REACH,
    Difference,
    Floats,
    compare_few_within_tasks,
    holm,
    variance_within_tasks,
)
from ttt_harness.tuned.file import Candidate, Outcomes, Tuned

# With fewer, the variance between tasks cannot be told from chance.
FEWEST_TASKS = 4


@dataclass(frozen=True)
class Row:
    """A candidate over all tasks.

    accuracy: the mean over tasks of held-out accuracy, with its interval; `p` means nothing here.
    difference: from in-context learning, on the demonstrations that both were asked; None for in-context learning
        itself, and where there are none.
    p_holm: of the difference, corrected for the number of candidates.
    demonstrations: how many were asked, over all tasks.
    """

    candidate: Candidate
    accuracy: Difference | None
    difference: Difference | None
    p_holm: float | None
    demonstrations: int

    @property
    def better(self) -> bool:
        """Whether it is better than in-context learning, beyond noise."""
        gains = self.difference is not None and self.difference.value > 0
        return gains and self.p_holm is not None and self.p_holm < 0.05


@dataclass(frozen=True)
class Prediction:
    """What a candidate is predicted to gain over in-context learning in one task.

    value, low, high: the prediction and its 95 % interval; None where the data do not allow one.
    own: the task's own held-out difference, before it is shrunk.
    weight: of `own` in the prediction.
    """

    candidate: Candidate
    value: float
    low: float | None
    high: float | None
    own: float
    weight: float


@dataclass(frozen=True)
class Choice:
    """The choices that the outcomes of a search lead to.

    rows: one for each candidate, in the file's order.
    pooled: the setting for all tasks.
    predictions: task -> candidate's name -> prediction; without those candidates that were dropped before `pooled`,
        and without in-context learning.
    """

    in_context: Candidate
    rows: tuple[Row, ...]
    pooled: Candidate
    predictions: Mapping[str, Mapping[str, Prediction]]

    def row(self, candidate: Candidate) -> Row:
        """That of a candidate."""
        return next(row for row in self.rows if row.candidate is candidate)

    @cached_property
    def by_task(self) -> Mapping[str, Candidate]:
        """Task -> its own setting: the best prediction, or in-context learning where none is above 0."""
        chosen = {}
        for task, predictions in self.predictions.items():
            best = max(predictions.values(), key=lambda one: one.value, default=None)
            chosen[task] = best.candidate if best is not None and best.value > 0 else self.in_context
        return chosen

    @property
    def verdict(self) -> str:
        """Whether the setting for all tasks is better than in-context learning, and by how much."""
        row = self.row(self.pooled)
        if row.difference is None:
            return "No setting has a better held-out accuracy than in-context learning."
        difference, settings = row.difference, len(self.rows) - 1
        told = f"{100 * difference.value:+.1f} points"
        if difference.low is not None and difference.high is not None:
            told += f", 95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
        if row.p_holm is not None:
            told += f", p = {row.p_holm:.2g}" + (f" corrected for {settings} settings" if settings > 1 else "")
        if row.better:
            return f"{self.pooled.name} is better than in-context learning on held-out demonstrations ({told})."
        return f"No setting is better than in-context learning beyond noise; the best is {self.pooled.name} ({told})."


def choose(tuned: Tuned) -> Choice:
    """Choose from the outcomes of a search."""
    asked = {task: {name: _by_demonstration(found) for name, found in tried.items()} for task, tried in _tasks(tuned)}
    rows = _rows(tuned, asked)
    pooled = _pooled(tuned, asked)
    return Choice(tuned.in_context, rows, pooled, _predictions(tuned, asked, pooled))


# Of one candidate in one task: (seed, demonstration) -> mean over the orders.
_Means = Mapping[tuple[int, int], float]
_Asked = Mapping[str, Mapping[str, _Means]]


def _tasks(tuned: Tuned) -> Sequence[tuple[str, Mapping[str, Outcomes]]]:
    return sorted(tuned.tasks.items())


def _by_demonstration(found: Outcomes) -> _Means:
    together: dict[tuple[int, int], list[int]] = {}
    for asked, right in found.items():
        together.setdefault((asked.seed, asked.demonstration), []).append(right)
    return {demonstration: sum(rights) / len(rights) for demonstration, rights in together.items()}


def _differences(asked: _Asked, one: Candidate, other: Candidate) -> dict[str, Floats]:
    """Task -> `one` less `other` for each demonstration that both were asked; without tasks that have none."""
    found = {}
    for task, tried in asked.items():
        a, b = tried.get(one.name, {}), tried.get(other.name, {})
        if common := sorted(a.keys() & b.keys()):
            found[task] = np.array([a[each] - b[each] for each in common])
    return found


def _rows(tuned: Tuned, asked: _Asked) -> tuple[Row, ...]:
    in_context = tuned.in_context
    differences: dict[str, Difference] = {}
    for candidate in tuned.candidates:
        common = _differences(asked, candidate, in_context)
        if candidate is not in_context and common:
            differences[candidate.name] = compare_few_within_tasks(list(common.values()))
    told = {name: difference.p for name, difference in differences.items() if difference.p is not None}
    corrected = dict(zip(told, holm(list(told.values())), strict=True))
    rows = []
    for candidate in tuned.candidates:
        means = [np.array(list(found.values())) for tried in asked.values() if (found := tried.get(candidate.name))]
        rows.append(
            Row(
                candidate,
                _as_share(compare_few_within_tasks(means)) if means else None,
                differences.get(candidate.name),
                corrected.get(candidate.name),
                sum(map(len, means)),
            )
        )
    return tuple(rows)


def _as_share(accuracy: Difference) -> Difference:
    low, high = accuracy.low, accuracy.high
    return replace(accuracy, low=None if low is None else max(low, 0.0), high=None if high is None else min(high, 1.0))


def _covered(asked: _Asked, candidate: Candidate) -> set[tuple[str, tuple[int, int]]]:
    return {(task, each) for task, tried in asked.items() for each in tried.get(candidate.name, {})}


def _pooled(tuned: Tuned, asked: _Asked) -> Candidate:
    """The candidate with the best mean over tasks.

    One that was dropped early is compared with the best of those that were asked more, on what both were asked. Of
    equals the first is chosen, so that in-context learning is not given up for nothing.
    """
    others = [candidate for candidate in tuned.candidates if candidate is not tuned.in_context]
    best = tuned.in_context
    for candidate in sorted(others, key=lambda one: -len(_covered(asked, one))):
        found = _differences(asked, candidate, best)
        if found and float(np.mean([values.mean() for values in found.values()])) > 1e-12:
            best = candidate
    return best


def _predictions(tuned: Tuned, asked: _Asked, pooled: Candidate) -> dict[str, dict[str, Prediction]]:
    least = _covered(asked, pooled)
    finalists = [one for one in tuned.candidates if one.fits and _covered(asked, one) >= least]
    differences = {one.name: _differences(asked, one, tuned.in_context) for one in finalists}
    between, within = _variances(list(differences.values()))
    predicted: dict[str, dict[str, Prediction]] = {task: {} for task in asked}
    for candidate in finalists:
        found = differences[candidate.name]
        if found:
            pool = float(np.mean([values.mean() for values in found.values()]))
            variance = variance_within_tasks(list(found.values()))
            for task, values in found.items():
                weight = between / (between + within / len(values)) if between > 0 else 0.0
                own = float(values.mean())
                reach = _reach(own - pool, variance, len(values), weight, len(found))
                value = pool + weight * (own - pool)
                low, high = (max(value - reach, -1.0), min(value + reach, 1.0)) if reach is not None else (None, None)
                predicted[task][candidate.name] = Prediction(candidate, value, low, high, own, weight)
    return predicted


def _variances(differences: Sequence[Mapping[str, Floats]]) -> tuple[float, float]:
    """The variance of a candidate's true difference between tasks, and that of one demonstration's within tasks.

    Both are means over the candidates. The first is 0 where they do not allow one.
    """
    between, within = [], []
    for found in differences:
        variance = variance_within_tasks(list(found.values()))
        if variance is None or len(found) < FEWEST_TASKS:
            continue
        sampling = variance * float(np.mean([1 / len(values) for values in found.values()]))
        between.append(float(np.var([values.mean() for values in found.values()], ddof=1)) - sampling)
        within.append(variance)
    if not between:
        return 0.0, 0.0
    return max(0.0, float(np.mean(between))), float(np.mean(within))


def _reach(apart: float, variance: float | None, n: int, weight: float, tasks: int) -> float | None:
    """Half of a prediction's 95 % interval.

    Morris's variance, his formula (1.19): it allows for the mean and for the weight, which are estimated as well. With
    few tasks that leaves the task's own sampling variance.

    Args:
        apart: the task's own difference less the mean of all tasks.
        variance: of one demonstration's difference within tasks.
    """
    if variance is None:
        return None
    sampling = variance / n
    if tasks < FEWEST_TASKS:
        return NORMAL_REACH * math.sqrt(sampling)
    shrunk = (tasks - 3) / (tasks - 1) * (1 - weight)
    total = sampling * (1 - (tasks - 1) / tasks * shrunk) + 2 / (tasks - 3) * (shrunk * apart) ** 2
    return NORMAL_REACH * math.sqrt(total)
