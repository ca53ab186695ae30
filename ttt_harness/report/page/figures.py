"""The figures that a report shows per method: scores and differences, over one seed or several, costs, settings.

Runs that differ in nothing but the seed of the split are one *method*. A method with one seed is shown with the tests
of compare.py; with several seeds it is shown as mean and standard deviation over the seeds. questions.py has the
single answers, page.py puts both on the page.
"""

import json
import statistics as descriptive
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt_harness.report.compare import Comparison, Row, choose_metric, distinct_labels
from ttt_harness.report.published import Figure
from ttt_harness.report.results import Metric, Run, same_run
from ttt_harness.statistics import score_interval

Bounds = tuple[float, float | None, float | None]  # a value, and the low and high end of its interval where known


@dataclass
class Method:
    """Runs that differ only in the seed: a label and seed -> run. The seed is None where the runs name none."""

    label: str
    runs: dict[Any, Run]

    @property
    def first(self) -> Run:
        """The run that stands for the method where one is enough."""
        return next(iter(self.runs.values()))


@dataclass(frozen=True)
class Line:
    """A row of the page: what `Row` is for one pair of runs, or its mean over several seeds.

    base, other, difference: (value, low, high); low and high are None where not known. seeds: how many it is the mean
    of; with more than one, low and high are one standard deviation over the seeds away, and there is no p-value.
    """

    name: str
    level: str
    metric: Metric
    share: bool
    higher_is_better: bool
    n: int | None
    base: Bounds
    other: Bounds | None = None
    difference: Bounds | None = None
    p: float | None = None
    p_holm: float | None = None
    won: int | None = None
    lost: int | None = None
    seeds: int = 1
    published_base: Figure | None = None
    published_other: Figure | None = None

    @property
    def better(self) -> bool | None:
        """Whether other is clearly better (True), clearly worse (False), or neither (None), by the interval."""
        if self.seeds > 1:  # a standard deviation is no test
            return None
        if self.difference is None or self.difference[1] is None or self.difference[2] is None:
            return None
        if self.difference[1] > 0:
            return self.higher_is_better
        return not self.higher_is_better if self.difference[2] < 0 else None


def without_doubles(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs without those given twice."""
    kept: list[Run] = []
    for run in runs:
        if not any(same_run(run, other) for other in kept):
            kept.append(run)
    twice = len(runs) - len(kept)
    return kept, [f"{twice} of the results files hold a run that another holds too; shown once."] if twice > 0 else []


def group_by_seed(runs: Sequence[Run], base: Run, names: Mapping[Run, str]) -> tuple[list[Method], list[str]]:
    """The methods, that of the base first, and remarks. Of runs alike in name, settings and seed one is shown."""
    groups: dict[str, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[json.dumps([names.get(run), run.setup], sort_keys=True)][run.seed].append(run)
    remarks = []
    chosen: list[dict[Any, Run]] = []
    for by_seed in groups.values():
        newest = {}
        for seed, same in sorted(by_seed.items(), key=lambda item: str(item[0])):
            newest[seed] = base if base in same else max(same, key=lambda run: run.date or 0)
            if len(same) > 1:
                left = ", ".join(str(run.path) for run in same if run is not newest[seed])
                remarks.append(f"Runs with the same settings: {newest[seed].path} is shown, left out {left}.")
        chosen.append(newest)
    chosen.sort(key=lambda by_seed: base not in by_seed.values())
    first = [base if base in by_seed.values() else next(iter(by_seed.values())) for by_seed in chosen]
    labels = distinct_labels(first, [names.get(run) for run in first], ignore=("seed",))
    return [Method(label, by_seed) for label, by_seed in zip(labels, chosen, strict=True)], remarks


def lines(by_seed: Mapping[Any, Comparison]) -> list[Line]:
    """The rows of one method compared with the base, over its seeds."""
    found: dict[str, list[Row]] = defaultdict(list)
    for comparison in by_seed.values():
        for row in comparison.others[0].rows:
            found[row.name].append(row)
    return [_line(rows[0]) if len(by_seed) == 1 else _mean_line(rows) for rows in found.values()]


def _line(row: Row) -> Line:
    d = row.difference
    share = row.is_share

    def interval(side: str) -> Bounds:
        score = getattr(row, side)
        accuracy = share and row.level == "task" and d.test == "mcnemar_exact"
        limits = score_interval(score.value, row.n, score.stderr, accuracy=accuracy)
        return (score.value, *(limits or (None, None)))

    return Line(
        name=row.name,
        level=row.level,
        metric=row.metric,
        share=share,
        higher_is_better=row.base.higher_is_better,
        n=row.n,
        base=interval("base"),
        other=interval("other"),
        difference=(d.value, d.low, d.high),
        p=d.p,
        p_holm=row.p_holm,
        won=row.won,
        lost=row.lost,
        published_base=row.published_base,
        published_other=row.published_other,
    )


def _spread(values: Sequence[float]) -> Bounds:
    """Their mean, and one standard deviation to both sides."""
    mean = descriptive.fmean(values)
    if len(values) < 2:
        return mean, None, None
    deviation = descriptive.stdev(values)
    return mean, mean - deviation, mean + deviation


def _mean_line(rows: Sequence[Row]) -> Line:
    def total(side: str) -> int | None:
        counts = [getattr(row, side) for row in rows]
        return None if None in counts else sum(counts)

    first = rows[0]
    return Line(
        name=first.name,
        level=first.level,
        metric=first.metric,
        share=all(row.is_share for row in rows),
        higher_is_better=first.base.higher_is_better,
        n=total("n"),
        base=_spread([row.base.value for row in rows]),
        other=_spread([row.other.value for row in rows]),
        difference=_spread([row.difference.value for row in rows]),
        won=total("won"),
        lost=total("lost"),
        seeds=len(rows),
        published_base=first.published_base,
        published_other=first.published_other,
    )


def lines_of_one(method: Method, metric: str | None) -> list[Line]:
    """The scores of a single method, where there is nothing to compare it with; their means over its seeds."""
    run, runs = method.first, list(method.runs.values())
    found = []
    names = [*(group for group in run.groups if group in run.results), *run.tasks]
    for name in names:
        chosen = choose_metric(run, run, name, metric)
        if chosen is None:
            continue
        scored = [other for other in runs if name in other.results and chosen in other.metrics(name)]
        scores = [other.score(name, chosen) for other in scored]
        score = scores[0]
        task = name not in run.groups
        share = all(one.is_share for one in scores)
        n = run.questions(name) if task else None
        if len(scores) > 1:
            value = _spread([one.value for one in scores])
            n = None if n is None else sum(other.questions(name) or 0 for other in scored)
        else:
            value = (score.value, *(score_interval(score.value, n, score.stderr, accuracy=False) or (None, None)))
        line = Line(
            name, "task" if task else "group", chosen, share, score.higher_is_better, n, value, seeds=len(scores)
        )
        found.append(line)
    return found


def loss_curves(methods: Sequence[Method], tasks: Sequence[str]) -> dict[str, dict[str, list[list[float]]]]:
    """Method -> task -> one list of losses per seed, for the fits that have any."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for m, method in enumerate(methods):
        for t, task in enumerate(tasks):
            curves = [fit.losses for run in method.runs.values() if (fit := run.fit(task)) and len(fit.losses) > 1]
            if curves:
                found.setdefault(str(m), {})[str(t)] = [[round(loss, 4) for loss in curve] for curve in curves]
    return found


def summary(methods: Sequence[Method], rows: Mapping[int, Sequence[Line]]) -> list[dict[str, Any]]:
    """A line per method: its first row (the group, or the mean, or the only task) and the tasks clearly changed."""
    lines = []
    for i, method in enumerate(methods):
        own = rows.get(i) or []
        line = own[0] if own else None
        if i == 0:
            line = next((found[0] for found in rows.values() if found), None)
        single = [row for row in own if row.level == "task"]
        lines.append(
            {
                "label": method.label,
                "base": i == 0,
                "row": line,
                "score": line and (line.base if i == 0 else line.other),
                "better": sum(row.better is True for row in single),
                "worse": sum(row.better is False for row in single),
                "tasks": len(single),
                "seeds": len(method.runs),
            }
        )
    return lines


def costs(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Time and tokens per stage and method, means over its seeds."""
    found = []
    for method in methods:
        runs = list(method.runs.values())
        answered = [[fit for task in run.tasks if (fit := run.fit(task))] for run in runs]
        # an adapter that tasks share is fitted once
        served = [list({fit.adapter: fit for fit in reversed(of_run) if fit.adapter}.values()) for of_run in answered]
        # what a fit took that an earlier run made is not of this one
        fits = [[fit for fit in of_run if not fit.reused] for of_run in served]

        def mean(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return descriptive.fmean(known) if known else None

        def total(name: str, fits: list[list[Any]] = fits) -> float | None:
            sums = []
            for of_run in fits:
                known = [value for fit in of_run if (value := getattr(fit, name)) is not None]
                sums.append(float(sum(known)) if known else None)
            return mean(sums)

        training, generate = total("fit_seconds"), total("generate_seconds", answered)
        whole = mean(run.seconds for run in runs)
        tokens = total("train_tokens")
        staged = (training or 0) + (generate or 0)
        found.append(
            {
                "label": method.label,
                "total": whole,
                "fit": training,
                "generate": generate,
                "rest": None if whole is None else max(0.0, whole - staged),  # on a GPU stages overlap
                "tokens": tokens,
                "sequences": total("train_sequences"),
                "rate": tokens / training if tokens and training else None,
                "fits": len(served[0]) if served else 0,
                "reused": sum(fit.reused for fit in served[0]) if served else 0,
            }
        )
    return found


def task_costs(methods: Sequence[Method], prefix: str) -> list[dict[str, Any]]:
    return [
        {"label": method.label, "task": task.removeprefix(prefix), "fit": fit}
        for method in methods
        for task in method.first.tasks
        if (fit := method.first.fit(task))
    ]


def settings_table(methods: Sequence[Method]) -> list[tuple[str, list[str], bool]]:
    """(setting, its value per method, whether the methods differ in it)."""

    def of(run: Run) -> dict[str, Any]:
        shots = sorted({str(s) for task in run.tasks if (s := run.shots(task)) is not None})
        votes = sorted({str(v) for task in run.tasks if (v := run.metadata(task, "vote_permutations")) is not None})
        budgets = sorted({str(v) for task in run.tasks if (v := run.metadata(task, "generation_budget")) is not None})
        ks = sorted({str(v) for task in run.tasks if (v := run.metadata(task, "k")) is not None})
        about = {
            "model": run.model,
            "lm-eval model": run.source,
            "lm-eval": run.lm_eval_version,
            "demonstrations (k)": ", ".join(ks) or None,
            "demonstrations in the prompt": ", ".join(shots) or None,
            "vote_permutations": ", ".join(votes) or None,
            "generation_budget": ", ".join(budgets) or None,
            "limit": run.limit,
        }
        return {**about, **{k: v for k, v in run.settings.items() if k not in ("k", "seed", "vote_permutations")}}

    all_settings = [of(method.first) for method in methods]
    found = []
    for key in dict.fromkeys(key for settings in all_settings for key in settings):
        values = ["" if (value := settings.get(key)) is None else str(value) for settings in all_settings]
        if any(values):
            found.append((key, values, len({value for value in values if value}) > 1))
    seeds = [", ".join(str(seed) for seed in method.runs if seed is not None) for method in methods]
    return [*found, ("seed", seeds, len(set(seeds)) > 1)] if any(seeds) else found
