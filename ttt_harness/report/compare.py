"""One run compared with others: what changed, by how much, and whether the two may be compared at all.

`compare_runs(base, others)` gives a `Comparison`: a row per task and per group with both scores, their difference with
its interval and p-value, and the questions won and lost. Where both runs kept their samples the questions are paired
one by one; else the scores are compared by their standard errors, and the row says so. tables.py and page.py show it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ttt_harness.errors import ReportError
from ttt_harness.report import published
from ttt_harness.report.results import Metric, Run, Score, same_run
from ttt_harness.report.samples import Sample
from ttt_harness.statistics import (
    Difference,
    Floats,
    compare_mean_of_tasks,
    compare_paired,
    compare_right_wrong,
    compare_unpaired,
    holm,
)

MEAN_ROW = "mean of tasks"

Reader = Callable[[Run, str, str], list[Sample]]  # (run, task, filter) -> the samples, as Run.samples gives them


@dataclass(frozen=True)
class Row:
    """One task, or one mean over tasks, of one run compared with the base.

    level: "task"; "group" for a group of lm-eval; "mean" for the plain mean over the shared tasks.
    n: questions compared (None when unknown); won, lost: questions on which other, or base, scored better (None
    without samples). p_holm: p corrected for the number of tasks in this comparison, None for groups.
    published_base, published_other: published figures beside (None when there are none).
    """

    name: str
    level: Literal["task", "group", "mean"]
    metric: Metric
    n: int | None
    base: Score
    other: Score
    difference: Difference
    won: int | None = None
    lost: int | None = None
    p_holm: float | None = None
    published_base: published.Figure | None = None
    published_other: published.Figure | None = None

    @property
    def is_share(self) -> bool:
        """Whether its scores read best in percent."""
        return self.base.is_share and self.other.is_share

    @property
    def paired(self) -> bool:
        """Whether the two runs were compared question by question."""
        return self.won is not None


@dataclass(frozen=True)
class Against:
    """One run compared with the base: its rows, groups first, then tasks in file order, and what to know of them."""

    label: str
    run: Run
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """The base run and each other run against it. base_label, and the label in each of `others`, are unique."""

    base_label: str
    base: Run
    others: tuple[Against, ...]
    remarks: tuple[str, ...] = ()
    reference: "Reference | None" = None


@dataclass(frozen=True)
class Reference:
    """Published figures beside a comparison: their source, the method beside each label, and what differs."""

    source: str
    methods: Mapping[str, str | None]
    differs: str


@dataclass
class _Paired:
    """A task's questions, paired: scores of both runs by place, (n,) each."""

    base: Floats
    other: Floats
    sign: int  # 1 where higher is better, else -1
    won: int = field(init=False)
    lost: int = field(init=False)

    def __post_init__(self) -> None:
        gain = (self.other - self.base) * self.sign
        self.won, self.lost = int(np.sum(gain > 0)), int(np.sum(gain < 0))


def compare_runs(
    base: Run,
    others: Sequence[Run],
    *,
    labels: Sequence[str | None] = (),
    metric: str | None = None,
    reference: bool = False,
    allow_same_run: bool = False,
    remarks: Sequence[str] = (),
    read: Reader | None = None,
) -> Comparison:
    """Compare `others` with `base`.

    labels: a name for base and for each of `others`; None for one that the settings give.
    metric: "name" or "name,filter" instead of each task's first metric. reference: add the published figures.
    allow_same_run: compare a run even with itself. remarks: kept for the reader. read: gives a run's samples of a task
    under a filter, where they are not to be read from the files once more.

    Raises ReportError when there is nothing to compare, the questions
    differ, or a score is NaN.
    """
    runs = [base, *others]
    if not allow_same_run:
        _refuse_same_runs(runs)
    names = distinct_labels(runs, labels)
    read = read or KeptSamples(only=base).read
    against = []
    for label, other in zip(names[1:], others, strict=True):
        rows, warnings = _compare(base, other, metric, read)
        if reference:
            rows = _with_published(rows, base, other)
        against.append(Against(label, other, tuple(rows), tuple(warnings)))
    beside = _reference(runs, names) if reference else None
    return Comparison(names[0], base, tuple(against), tuple(remarks), beside)


class KeptSamples:
    """Reads each samples file once and remembers what pairing needs of it, which is all but the texts."""

    def __init__(self, only: Run | None = None) -> None:
        """only: remember the samples of this run alone; by default those of all."""
        self._only = only
        self._kept: dict[tuple[Path, str, str], list[Sample]] = {}

    def read(self, run: Run, task: str, filter_name: str) -> list[Sample]:
        """The samples as `Run.samples` gives them, their texts perhaps left out."""
        kept = self._kept.get((run.path, task, filter_name))
        return self.keep(run, task, filter_name, run.samples(task, filter_name)) if kept is None else kept

    def keep(self, run: Run, task: str, filter_name: str, samples: list[Sample]) -> list[Sample]:
        """Remember samples that were read elsewhere; returns what `read` will."""
        if self._only not in (None, run):
            return samples
        lean = [replace(s, prompt="", answer="", target="", responses=()) for s in samples]
        self._kept[(run.path, task, filter_name)] = lean
        return lean


def distinct_labels(runs: Sequence[Run], given: Sequence[str | None] = (), ignore: Sequence[str] = ()) -> list[str]:
    """A short name for each run: its method, and as much of its setup, folder and date as tells them apart.

    given: names to use instead, None for none; ignore: settings that must not be used to tell runs apart.
    """
    labels = [*given, *[None] * (len(runs) - len(given))]
    setups = [{**run.setup, "seed": run.seed} for run in runs]
    keys = dict.fromkeys(key for setup in setups for key in setup)
    parts = [
        *[[_setting(key, setup.get(key)) for setup in setups] for key in keys if key not in ignore],
        [run.path.parent.parent.name or run.path.parent.name for run in runs],
        [run.path.stem.removeprefix("results_") for run in runs],
    ]
    names = [label or run.method for label, run in zip(labels, runs, strict=True)]
    for part in parts:
        # a part is added only where two runs still share a name, and only if it tells some of them apart
        for name in {name for name, count in Counter(names).items() if count > 1}:
            same = [i for i, other in enumerate(names) if other == name]
            if len({part[i] for i in same}) > 1:
                for i in same:
                    names[i] = f"{name} {part[i]}".strip()
    seen = Counter(names)
    if max(seen.values()) > 1:
        count: Counter[str] = Counter()
        for i, name in enumerate(names):
            count[name] += 1
            if seen[name] > 1:
                names[i] = f"{name} #{count[name]}"
    return names


def _setting(key: str, value: Any) -> str:
    """What a run's name says of a part of its setup: most by name and value, what is not set not at all."""
    text = "" if value is None else some(value, 1) if isinstance(value, list) else str(value)
    return text if key in ("method", "model", "tasks", "lm-eval model") or not text else f"{key}={text}"


def choose_metric(base: Run, other: Run, task: str, wanted: str | None = None) -> Metric | None:
    """The metric to compare a task by: the one wanted, else the first that both runs have; None when there is none."""
    shared = [metric for metric in base.metrics(task) if metric in other.metrics(task)]
    if wanted is not None:
        shared = [metric for metric in shared if wanted in (str(metric), metric.name)]
    return shared[0] if shared else None


def pair_samples(base: Sequence[Sample], other: Sequence[Sample], task: str, where: str) -> list[tuple[Sample, Sample]]:
    """Base and other samples of the same questions, in the base's order.

    Paired by the hash of the question; questions that stand twice in a task, by their place. where: the two runs, for
    the message of the ReportError that says that the questions differ.
    """
    waiting: dict[str, list[Sample]] = defaultdict(list)
    for sample in sorted(other, key=lambda s: -s.doc_id):
        waiting[sample.doc_hash].append(sample)
    pairs, alone = [], 0
    for sample in sorted(base, key=lambda s: s.doc_id):
        if waiting[sample.doc_hash]:
            pairs.append((sample, waiting[sample.doc_hash].pop()))
        else:
            alone += 1
    left = sum(map(len, waiting.values()))
    if alone or left:
        raise ReportError(
            f"the questions of {task} differ between {where}: {alone} of {len(base)} are only in the first and {left} "
            f"of {len(other)} only in the second; run both with the same seed, k, --limit and task version."
        )
    return pairs


def offered_metrics(run: Run, tasks: Sequence[str]) -> str:
    """The metrics that `run` has for any of `tasks`, with commas; none where it has none."""
    return ", ".join(sorted({str(metric) for task in tasks for metric in run.metrics(task)})) or "none"


def _compare(base: Run, other: Run, wanted: str | None, read: Reader) -> tuple[list[Row], list[str]]:
    where = f"{base.path} and {other.path}"
    tasks = [task for task in base.tasks if task in other.results]
    if not tasks:
        raise ReportError(
            f"{where} have no task in common: the first has {some(base.tasks)}, the second {some(other.tasks)}."
        )
    chosen = {task: found for task in tasks if (found := choose_metric(base, other, task, wanted))}
    if not chosen:
        if answered := [run for run in (base, other) if all(run.predicted_only(task) for task in tasks)]:
            raise ReportError(
                f"{answered[0].path} has no score for {some(tasks)}: it was run with --predict_only; "
                f"run it without, or look at its answers with ttt-harness report."
            )
        raise ReportError(
            f"no shared task has the metric {wanted}; choose from {offered_metrics(base, tasks)}."
            if wanted
            else f"{where} have no metric in common for {some(tasks)}."
        )
    warnings = comparability_warnings(base, other, list(chosen))
    if wanted and len(chosen) < len(tasks):
        warnings.append(f"No {wanted} in {some([t for t in tasks if t not in chosen])}: left out.")

    rows: list[Row] = []
    paired: dict[str, _Paired] = {}
    unpaired: list[str] = []
    prompts_differ: list[str] = []
    not_a_mean: list[str] = []
    for task, metric in chosen.items():
        one, two = base.score(task, metric), other.score(task, metric)
        pairs = []
        if base.has_samples(task) and other.has_samples(task):
            pairs = pair_samples(read(base, task, metric.filter), read(other, task, metric.filter), task, where)
        if pairs and any(a.prompt_hash != b.prompt_hash for a, b in pairs):
            prompts_differ.append(task)
        data = _paired_scores(pairs, metric, one, two)
        if pairs and data is None:
            not_a_mean.append(task)
        if data is None:
            unpaired.append(task)
            difference = compare_unpaired(one.value, two.value, one.stderr, two.stderr)
            rows.append(Row(task, "task", metric, base.questions(task), one, two, difference))
            continue
        paired[task] = data
        right_wrong = bool(np.isin(data.base, (0, 1)).all() and np.isin(data.other, (0, 1)).all())
        difference = (
            compare_right_wrong(data.base, data.other) if right_wrong else compare_paired(data.base, data.other, task)
        )
        rows.append(Row(task, "task", metric, len(pairs), one, two, difference, data.won, data.lost))

    if prompts_differ:
        warnings.append(f"Prompts differ in {some(prompts_differ)}.")
    if not_a_mean:
        warnings.append(f"Not paired, for the score is not the mean of its questions' scores: {some(not_a_mean)}.")
    without = [task for task in unpaired if task not in not_a_mean]
    if without:
        warnings.append(
            f"Unpaired, with wider intervals, for want of samples: {some(without)}. "
            f"Run both with --log_samples to compare question by question."
        )
    tested = [(i, row.difference.p) for i, row in enumerate(rows) if row.difference.p is not None]
    for (i, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        rows[i] = replace(rows[i], p_holm=p)
    means, remarks = _mean_rows(base, other, rows, paired)
    return [*means, *rows], [*warnings, *remarks]


def _paired_scores(pairs: Sequence[tuple[Sample, Sample]], metric: Metric, one: Score, two: Score) -> _Paired | None:
    """The two columns of scores; None unless the runs' scores are the means of these."""
    if not pairs or not all(metric.name in a.values and metric.name in b.values for a, b in pairs):
        return None
    base = np.array([a.values[metric.name] for a, _ in pairs])
    other = np.array([b.values[metric.name] for _, b in pairs])
    if not (abs(base.mean() - one.value) <= 1e-6 and abs(other.mean() - two.value) <= 1e-6):
        return None  # perplexities, corpus BLEU, macro F1, or samples of another run
    return _Paired(base, other, 1 if one.higher_is_better else -1)


def _mean_rows(
    base: Run, other: Run, rows: Sequence[Row], paired: Mapping[str, _Paired]
) -> tuple[list[Row], list[str]]:
    """A row per group that both runs scored over the same tasks; without one over all tasks, their plain mean."""
    by_name = {row.name: row for row in rows}
    found: list[Row] = []
    remarks: list[str] = []
    covered = False
    for group, tasks in base.groups.items():
        if group not in other.groups or group not in base.results or group not in other.results:
            continue
        metrics = {by_name[task].metric for task in tasks if task in by_name}
        shared = [m for m in metrics if m in base.metrics(group) and m in other.metrics(group)]
        scored = [task for task in tasks if task in by_name and by_name[task].metric in shared]
        if len(shared) != 1 or not scored:
            continue
        if set(tasks) != set(other.groups[group]):
            only = sorted(set(tasks) ^ set(other.groups[group]))
            remarks.append(f"No row for the group {group}, whose tasks differ: {some(only)} in one run only.")
            continue
        found.append(_group_row(base, other, group, shared[0], [by_name[task] for task in scored], paired))
        covered = covered or set(scored) == set(by_name)
    if not covered and len(rows) > 1 and len({row.metric.name for row in rows}) == 1:
        found.append(_mean_row(rows, paired, [1.0] * len(rows), MEAN_ROW, "mean"))
    return found, remarks


def _group_row(
    base: Run, other: Run, group: str, metric: Metric, rows: Sequence[Row], paired: Mapping[str, _Paired]
) -> Row:
    one, two = base.score(group, metric), other.score(group, metric)
    # lm-eval averages a group by task or by question and does not write down which: its score tells
    for weights in ([1.0] * len(rows), [float(row.n or 0) for row in rows]):
        if sum(weights) > 0:
            row = _mean_row(rows, paired, weights, group, "group")
            if abs(row.base.value - one.value) <= 1e-6 and abs(row.other.value - two.value) <= 1e-6:
                return replace(row, base=one, other=two, metric=metric)
    difference = compare_unpaired(one.value, two.value, one.stderr, two.stderr)
    return Row(group, "group", metric, _total([row.n for row in rows]), one, two, difference)


def _mean_row(
    rows: Sequence[Row],
    paired: Mapping[str, _Paired],
    weights: Sequence[float],
    name: str,
    level: Literal["group", "mean"],
) -> Row:
    share = np.asarray(weights) / np.sum(weights)
    higher = rows[0].base.higher_is_better
    one = Score(float(sum(w * r.base.value for w, r in zip(share, rows, strict=True))), None, higher)
    two = Score(float(sum(w * r.other.value for w, r in zip(share, rows, strict=True))), None, higher)
    n = _total([row.n for row in rows])
    if all(row.name in paired for row in rows):
        difference = compare_mean_of_tasks(
            [(row.name, paired[row.name].other - paired[row.name].base) for row in rows], weights
        )
        won, lost = (sum(getattr(paired[row.name], side) for row in rows) for side in ("won", "lost"))
        return Row(name, level, rows[0].metric, n, one, two, difference, won, lost)

    def stderr(side: str) -> float | None:
        known = [getattr(row, side).stderr for row in rows]
        return None if None in known else float(np.sqrt(sum((w * s) ** 2 for w, s in zip(share, known, strict=True))))

    difference = compare_unpaired(one.value, two.value, stderr("base"), stderr("other"))
    return Row(name, level, rows[0].metric, n, one, two, difference)


def comparability_warnings(base: Run, other: Run, tasks: Sequence[str]) -> list[str]:
    """What sets two runs apart besides the model and the method, a sentence each; prompts are told from samples."""
    found = []
    if base.lm_eval_version != other.lm_eval_version:
        found.append(f"lm-eval versions differ: {base.lm_eval_version} and {other.lm_eval_version}.")
    aspects: list[tuple[str, Any]] = [
        ("Task versions differ", lambda run, task: run.version(task)),
        ("Seeds of the split differ", lambda run, task: run.metadata(task, "seed")),
        ("Numbers of demonstrations k differ", lambda run, task: run.metadata(task, "k")),
        ("Data sets or splits differ", _split),
        ("Numbers of demonstrations in the prompt differ", lambda run, task: run.shots(task)),
        ("Numbers of questions differ", lambda run, task: run.questions(task)),
        ("Answer budgets differ", lambda run, task: run.metadata(task, "generation_budget")),
        ("Generation settings differ", lambda run, task: run.task_config(task).get("generation_kwargs")),
    ]
    for sentence, value in aspects:
        differing: dict[str, list[str]] = defaultdict(list)
        for task in tasks:
            one, two = value(base, task), value(other, task)
            if one != two:
                differing[f"{_short(one)} and {_short(two)}"].append(task)
        if differing:
            found.append(f"{sentence}: {'; '.join(f'{v} in {some(t)}' for v, t in differing.items())}.")
    for sentence, key in (
        ("Chat templates differ", "chat_template_sha"),
        ("System instructions differ", "system_instruction_sha"),
    ):
        if base.raw.get(key) != other.raw.get(key):
            found.append(f"{sentence}.")
    hashed = [
        task
        for task in tasks
        if (one := base.task_hash(task))
        and (two := other.task_hash(task))
        and one != two
        and not (base.has_samples(task) and other.has_samples(task))
    ]
    if hashed:
        found.append(f"Questions or prompts differ in {some(hashed)} (by lm-eval's task hashes).")
    only = [t for t in [*base.tasks, *other.tasks] if (t in base.tasks) != (t in other.tasks)]
    if only:
        found.append(f"In one run only, and left out: {some(only)}.")
    return found


def _split(run: Run, task: str) -> Any:
    config = run.task_config(task)
    return [config.get(key) for key in ("dataset_path", "dataset_name", "test_split", "fewshot_split")]


def _refuse_same_runs(runs: Sequence[Run]) -> None:
    for i, one in enumerate(runs):
        for two in runs[i + 1 :]:
            if same_run(one, two):
                what = f"{one.path} twice" if one.path.resolve() == two.path.resolve() else f"{one.path} and {two.path}"
                raise ReportError(
                    f"{what}: the same run, so every difference would be 0; "
                    f"name two runs, or add --allow-same-run to see just that."
                )


def _with_published(rows: Sequence[Row], base: Run, other: Run) -> list[Row]:
    tasks = [row.name for row in rows if row.level == "task"]

    def beside(run: Run, row: Row) -> published.Figure | None:
        found = published.published_for(run)
        if found is None:
            return None
        return found.mean_of(tasks) if row.level == "mean" else found.figure(row.name)

    return [replace(row, published_base=beside(base, row), published_other=beside(other, row)) for row in rows]


def _reference(runs: Sequence[Run], labels: Sequence[str]) -> Reference:
    beside = {label: published.published_for(run) for label, run in zip(labels, runs, strict=True)}
    methods = {label: found.method if found else None for label, found in beside.items()}
    tasks = [task for task in runs[0].tasks if task.startswith(published.TASK_PREFIX)]
    if not published.covers(runs):
        raise ReportError(
            "there are no published figures for these runs: they cover the tasks bbh_ttt_<name> only; "
            "leave out --reference."
        )
    return Reference(published.source(), methods, published.differences(runs, tasks))


def common_start(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    if not texts:
        return ""
    first, last = min(texts), max(texts)  # whatever these two share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def task_prefix(tasks: Sequence[str]) -> str:
    """What all task names begin with, up to an underscore ("bbh_ttt_"): said once, it need not be said again."""
    start = common_start(tasks) if len(tasks) > 1 else ""
    return start[: start.rfind("_") + 1]


def _total(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(c for c in counts if c is not None)


def some(values: Sequence[Any], limit: int = 3) -> str:
    """The first of the values, and how many more there are."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
