"""Scores per method over several seeds: mean, standard deviation, and the published figures beside.

`read(folders)` sorts runs by what their results files say of the method and of the settings that a sweep has varied,
and takes, for each task and group, the mean over the seeds. summary_tables.py shows it. A sweep's folder is one source
of such runs; any lm-eval results with the same settings are another.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ttt_harness.errors import ReportError
from ttt_harness.methods import SETTINGS
from ttt_harness.report import published
from ttt_harness.report.axes import SHARED, Sweep, in_order, point_text, sweep_of, varied
from ttt_harness.report.compare import MEAN_ROW, some
from ttt_harness.report.results import Metric, Run, search_runs


@dataclass(frozen=True)
class Line:
    """One method's score of one task or group.

    settings: those that a sweep has varied, by name; empty where there is one setting. metric: its name is empty, and
    mean is None, where the task was answered but not scored. mean, sd: over the seeds, in the metric's own unit.
    median: over the tasks of a group, of their means. beside, beside_median: the published figures. expected: of random
    guesses, exactly. share: the score reads best in percent.
    """

    method: str
    settings: Mapping[str, Any]
    name: str
    level: Literal["task", "group", "mean"]
    metric: Metric
    mean: float | None
    sd: float | None
    seeds: tuple[Any, ...]
    median: float | None = None
    beside: published.Figure | None = None
    beside_median: float | None = None
    expected: float | None = None
    share: bool = True

    @property
    def label(self) -> str:
        """Method and settings: "ttt, lr=0.0001"."""
        return ", ".join([self.method, *point_text(self.settings)])

    @property
    def redrawn(self) -> tuple[float, float] | None:
        """The 95 % prediction interval for the mean of as many other seeds of the published runs."""
        return self.beside.redrawn(len(self.seeds)) if self.beside else None


@dataclass(frozen=True)
class Summary:
    """Lines, groups first within each method; the sweeps over settings; and what the reader must know."""

    lines: tuple[Line, ...]
    sweeps: tuple[Sweep, ...]
    remarks: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The methods, each with its settings, in order."""
        return list(dict.fromkeys(line.label for line in self.lines))

    @property
    def names(self) -> list[str]:
        """Groups, then tasks, in order."""
        levels: dict[str, str] = {line.name: line.level for line in self.lines}
        return sorted(levels, key=lambda name: levels[name] == "task")

    @cached_property
    def _by_place(self) -> dict[tuple[str, str], Line]:
        return {(line.label, line.name): line for line in reversed(self.lines)}

    def line(self, label: str, name: str) -> Line | None:
        """The line of a method (with its settings) and a task or group."""
        return self._by_place.get((label, name))


def read(folders: Sequence[str | Path]) -> Summary:
    """The summary of all runs in these folders; what a sweep is still writing (`*.partial`) is left out.

    Raises:
        ReportError: there are no results, or a file is damaged.
    """
    found = [search_runs(folder) for folder in folders]
    return summarize([run for runs, _ in found for run in runs], [said for _, remarks in found for said in remarks])


def summarize(runs: Sequence[Run], remarks: Sequence[str] = ()) -> Summary:
    """Means over the seeds of each method and setting. Of two runs alike the newer counts, and a remark says so.

    remarks: on the reading of the runs, kept for the reader.

    Raises:
        ReportError: there is no run, or they are of several sweeps.
    """
    if not runs:
        raise ReportError("there is no finished run to summarize.")
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.date or 0):
        by_method[run.method].append(run)
    _refuse_several_sweeps(by_method)
    lines: list[Line] = []
    sweeps: list[Sweep] = []
    remarks, seeds, chosen = list(remarks), {}, []
    order = list(SETTINGS)
    for method in sorted(by_method, key=lambda name: (order.index(name) if name in order else len(order), name)):
        axes = varied(by_method[method])
        points = []
        for settings, of_point in in_order(by_method[method], axes):
            by_seed, said = _newest(of_point)
            points.append((settings, by_seed))
            own = _lines(method, settings, by_seed)
            lines += own
            label = own[0].label if own else method
            remarks += [f"{label}, {one}" for one in said]
            remarks += [f"{label}: the seeds differ in {what}." for what in _differences(by_seed.values(), SHARED)]
            seeds[label] = frozenset(by_seed)
            chosen += list(by_seed.values())
        if axes and (sweep := sweep_of(method, axes, points)):
            sweeps.append(sweep)
    if len(set(seeds.values())) > 1:
        told = "; ".join(f"{label} {', '.join(map(str, sorted(s, key=str)))}" for label, s in seeds.items())
        remarks.append(f"The methods have different seeds: {told}.")
    if any(line.beside is not None for line in lines):
        tasks = [task for run in chosen for task in run.tasks if task.startswith(published.TASK_PREFIX)]
        remarks.append(f"Published: {published.source()}.")
        model_runs = [run for run in chosen if run.has_model]
        differs = published.differences(model_runs, list(dict.fromkeys(tasks))) if model_runs else ""
        remarks += [f"Here instead: {differs}."] if differs else []
    return Summary(tuple(lines), tuple(sweeps), tuple(dict.fromkeys(remarks)))


def _newest(runs: Sequence[Run]) -> tuple[dict[Any, Run], list[str]]:
    """The newest run of each seed, the seeds in order, and a remark on each seed with more than one."""
    by_seed: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        by_seed[run.seed].append(run)
    ordered = dict(sorted(by_seed.items(), key=lambda item: str(item[0])))
    remarks = [
        f"seed {seed}: {same[-1].path} counts, older results of the same are left out."
        for seed, same in ordered.items()
        if len(same) > 1
    ]
    return {seed: same[-1] for seed, same in ordered.items()}, remarks


def _lines(method: str, settings: Mapping[str, Any], by_seed: Mapping[Any, Run]) -> list[Line]:
    """A line per group and task; without a group, one for the plain mean of the tasks in its place."""
    runs = list(by_seed.values())
    groups = list(dict.fromkeys(group for run in runs for group in run.groups if group in run.results))
    found = {task: line for task in runs[0].tasks if (line := _line(method, settings, task, by_seed)) is not None}
    scored = {task: line for task, line in found.items() if line.mean is not None}
    means = []
    for group in groups:
        below = [scored[task] for task in runs[0].groups.get(group, ()) if task in scored]
        if line := _line(method, settings, group, by_seed, below):
            means.append(line)
    if not groups and len(scored) > 1 and len({line.metric for line in scored.values()}) == 1:
        means += _mean_line(method, settings, by_seed, list(scored.values()))
    return [*means, *found.values()]


def _mean_line(
    method: str, settings: Mapping[str, Any], by_seed: Mapping[Any, Run], scored: Sequence[Line]
) -> list[Line]:
    """The line of the plain mean of these tasks, over the seeds that have scored all of them; empty without one."""
    metric, names = scored[0].metric, [line.name for line in scored]
    complete = {seed: run for seed, run in by_seed.items() if all(metric in run.metrics(name) for name in names)}
    means = [statistics.fmean(run.score(name, metric).value for name in names) for run in complete.values()]
    if not means:
        return []
    beside = published.published_for(next(iter(complete.values())))
    return [
        Line(
            method,
            settings,
            MEAN_ROW,
            "mean",
            metric,
            mean=statistics.fmean(means),
            sd=statistics.stdev(means) if len(means) > 1 else None,
            seeds=tuple(complete),
            median=_median(scored),
            beside=beside.mean_of(names) if beside else None,
            beside_median=beside.median_of(names) if beside else None,
            expected=_mean([line.expected for line in scored]),
            share=all(line.share for line in scored),
        )
    ]


def _line(
    method: str, settings: Mapping[str, Any], name: str, by_seed: Mapping[Any, Run], below: Sequence[Line] = ()
) -> Line | None:
    """The line of a task, or of a group with the lines of the tasks below it; None where there is nothing to tell."""
    evaluated = {seed: run for seed, run in by_seed.items() if name in run.results}
    run = next((run for run in evaluated.values() if run.metrics(name)), None)
    if run is None:
        run = next((run for run in evaluated.values() if run.predicted_only(name)), None)
        metric = Metric("", run.filters(name)[0]) if run else None
        return metric and Line(method, settings, name, "task", metric, None, None, tuple(evaluated))
    metric = run.metrics(name)[0]
    scored = {seed: run for seed, run in evaluated.items() if metric in run.metrics(name)}
    scores = [run.score(name, metric) for run in scored.values()]
    values = [score.value for score in scores]
    beside = published.published_for(run)
    return Line(
        method,
        settings,
        name,
        "group" if name in run.groups else "task",
        metric,
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        seeds=tuple(scored),
        median=_median(below),
        beside=beside.figure(name) if beside else None,
        beside_median=beside.median_of(line.name for line in below) if beside and below else None,
        expected=None if run.has_model else expected_of_guessing(run, name),
        share=all(score.is_share for score in scores),
    )


def _median(lines: Sequence[Line]) -> float | None:
    """The median over tasks of their means, where they are in one unit."""
    if not lines or len({line.metric for line in lines}) > 1:
        return None
    return statistics.median(line.mean for line in lines if line.mean is not None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def expected_of_guessing(run: Run, name: str) -> float | None:
    """The exact expectation of guessing: 1 / choices; 0 for free-form answers; for a group the mean of its tasks.

    None for a task that is scored by log-likelihoods, whose choices the results file does not tell.
    """
    if name in run.groups:
        return _mean([expected_of_guessing(run, task) for task in run.groups[name]])
    config = run.task_config(name)
    choices = run.metadata(name, "choices")
    if isinstance(choices, list) and choices:
        return 1 / len(choices)
    return 0.0 if config.get("output_type", "generate_until") == "generate_until" else None


def _refuse_several_sweeps(by_method: Mapping[str, Sequence[Run]]) -> None:
    """Raise ReportError where a table would mix runs of other questions, models or texts around the questions."""
    runs = list(chain(*by_method.values()))
    what = {"": _differences([run for run in runs if run.has_model], ["model"]) + _differences(runs, ["limit"])}
    for method, of_method in by_method.items():
        what[f" of {method}"] = _differences(of_method, ["tasks"])
        for seed in dict.fromkeys(run.seed for run in of_method):
            same = [run for run in of_method if run.seed == seed]
            what[f" of {method}, seed {seed},"] = _differences(same, SHARED)
    for whose, differences in what.items():
        if differences:
            raise ReportError(
                f"the runs{whose} differ in {', '.join(differences)}, and a summary is of one sweep; give each sweep's "
                "folder, or results file, on its own."
            )


def _differences(runs: Iterable[Run], keys: Sequence[str]) -> list[str]:
    """Which of `keys` differ between the setups of the runs: "limit (40, 80)"."""
    setups = [run.setup for run in runs]
    found = []
    for key in keys:
        values = [setup.get(key) for setup in setups]
        if any(value != values[0] for value in values):
            shown = ["not given" if v is None else some(v, 1) if isinstance(v, list) else str(v) for v in values]
            if len(set(shown)) == 1:  # long lists that begin alike
                lists: list[set[str]] = [set(map(str, v)) for v in values if isinstance(v, list)]
                in_some = set().union(*lists) - lists[0].intersection(*lists[1:])
                shown = [f"only some have {some(sorted(in_some))}"]
            found.append(f"{key} ({', '.join(dict.fromkeys(shown))})")
    return found
