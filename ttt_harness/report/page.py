"""The report: one HTML file that needs nothing else, for people to look at runs and pass them on.

`build_page(runs)` gives its text. The page is page.html.j2 with page.css and page.js put in; what the runs say goes
into it as JSON that no browser takes for HTML or script, and page.js shows it as text only. A Content-Security-Policy
lets the browser run that one script and load nothing.

Runs that differ in nothing but the seed of the split are one *method* here. A method with one seed is shown with the
tests of compare.py; with several seeds it is shown as mean and standard deviation over the seeds.
"""

import base64
import hashlib
import json
import os.path
import statistics as descriptive
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from ttt_harness.errors import ReportError
from ttt_harness.report.compare import (
    Comparison,
    Row,
    cached_reader,
    choose_metric,
    compare_runs,
    distinct_labels,
)
from ttt_harness.report.results import Metric, Run, Sample, same_run
from ttt_harness.report.statistics import score_interval


@dataclass
class Method:
    """Runs that differ only in the seed: a label and seed -> run. The seed is None where the runs name none."""

    label: str
    runs: dict[Any, Run]

    @property
    def first(self) -> Run:
        """The run that stands for the method where one is enough."""
        return next(iter(self.runs.values()))


@dataclass
class Strings:
    """Texts by number: equal texts (prompts, answers, demonstrations) are stored once in the page."""

    texts: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        """The number of a text."""
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def build_page(
    runs: Sequence[Run],
    *,
    base: Run | None = None,
    title: str | None = None,
    metric: str | None = None,
    reference: bool = False,
) -> str:
    """The page's HTML.

    base: the run that the others are held against; by default the oldest that trained nothing. title: its heading.
    metric, reference: as in `compare_runs`. Runs that cannot be compared with the base are shown without comparison,
    and a remark says why. Raises ReportError when there is no run, or a results or samples file is damaged.
    """
    if not runs:
        raise ReportError("there is no run to report; name folders that lm_eval wrote with --output_path")
    runs, remarks = _without_doubles(runs)
    if base is None:
        untrained = [run for run in runs if run.settings.get("method") in (None, "icl")]
        base = min(untrained or runs, key=lambda run: (run.method == "0-shot", run.date or 0))
    methods, said = _methods(runs, base)
    remarks += said
    seeds = list(dict.fromkeys(seed for method in methods for seed in method.runs))
    tasks = list(dict.fromkeys(task for method in methods for run in method.runs.values() for task in run.tasks))

    reader = cached_reader()
    questions = _questions(methods, seeds, tasks, metric, reader)
    compared: dict[int, dict[Any, Comparison]] = {}
    for i, method in enumerate(methods[1:], 1):
        compared[i] = {}
        for seed, run in method.runs.items():
            against = methods[0].runs.get(seed)
            if against is None:
                remarks.append(f"{method.label}, seed {seed}: not compared, for the base has no run with this seed.")
                continue
            try:
                comparison = compare_runs(against, [run], metric=metric, reference=False, read=reader)
            except ReportError as error:
                remarks.append(f"{method.label}: not compared: {error}.")
                continue
            if reference:
                comparison = _with_reference(comparison, against, run, metric, reader)
            compared[i][seed] = comparison
    remarks += _warnings(methods, compared)

    rows = {i: _rows(by_seed) for i, by_seed in compared.items()}
    if not any(rows.values()):
        rows[0] = _rows_of_one(methods[0], metric)
    prefix = _prefix(tasks)
    data = {
        "labels": [method.label for method in methods],
        "seeds": [None if seed is None else str(seed) for seed in seeds],
        "tasks": [{"name": task, "short": task.removeprefix(prefix)} for task in tasks],
        "rows": {str(i): [_plain(row, prefix) for row in found] for i, found in rows.items()},
        "losses": _losses(methods, tasks),
        **questions,
    }
    published = next((c.reference for by in compared.values() for c in by.values() if c.reference), None)
    return _render(
        title=title or f"{' and '.join(dict.fromkeys(m.first.model for m in methods[:3]))}: test-time training report",
        methods=methods,
        seeds=seeds,
        summary=_summary(methods, rows),
        costs=_costs(methods),
        task_costs=_task_costs(methods, prefix),
        settings=_settings(methods),
        files=[(m.label, seed, run) for m in methods for seed, run in m.runs.items()],
        remarks=list(dict.fromkeys(remarks)),
        published=published,
        prefix=prefix,
        has_questions=bool(questions["questions"]["id"]),
        without_samples=[m.label for m in methods if not any(r.has_samples(t) for r in m.runs.values() for t in r.tasks)],
        has_losses=bool(data["losses"]),
        data=data,
    )


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
    base: tuple[float, float | None, float | None]
    other: tuple[float, float | None, float | None] | None
    difference: tuple[float, float | None, float | None] | None
    p: float | None
    p_holm: float | None
    won: int | None
    lost: int | None
    seeds: int
    published_base: float | None = None
    published_other: float | None = None

    @property
    def better(self) -> bool | None:
        """Whether other is clearly better (True), clearly worse (False), or neither (None)."""
        if self.difference is None or self.difference[1] is None or self.difference[2] is None:
            return None
        if self.difference[1] > 0:
            return self.higher_is_better
        return not self.higher_is_better if self.difference[2] < 0 else None


def _rows(by_seed: Mapping[Any, Comparison]) -> list[Line]:
    """The rows of one method against the base, over its seeds."""
    found: dict[str, list[Row]] = defaultdict(list)
    for comparison in by_seed.values():
        for row in comparison.others[0].rows:
            found[row.name].append(row)
    return [_line(rows[0]) if len(by_seed) == 1 else _mean_line(rows) for rows in found.values()]


def _share(row: Row) -> bool:
    return row.base.higher_is_better and 0 <= row.base.value <= 1 and 0 <= row.other.value <= 1


def _line(row: Row) -> Line:
    d = row.difference
    share = _share(row)

    def interval(side: str) -> tuple[float, float | None, float | None]:
        score = getattr(row, side)
        accuracy = share and row.level == "task" and d.test == "mcnemar_exact"
        limits = score_interval(score.value, row.n, score.stderr, accuracy=accuracy)
        return (score.value, *(limits or (None, None)))

    return Line(
        *(row.name, row.level, row.metric, share, row.base.higher_is_better, row.n),
        *(interval("base"), interval("other"), (d.value, d.low, d.high), d.p, row.p_holm, row.won, row.lost, 1),
        *(row.published_base, row.published_other),
    )


def _mean_line(rows: Sequence[Row]) -> Line:
    def spread(values: list[float]) -> tuple[float, float | None, float | None]:
        mean = descriptive.fmean(values)
        if len(values) < 2:
            return mean, None, None
        deviation = descriptive.stdev(values)
        return mean, mean - deviation, mean + deviation

    def total(side: str) -> int | None:
        counts = [getattr(row, side) for row in rows]
        return None if None in counts else sum(counts)

    first = rows[0]
    return Line(
        *(first.name, first.level, first.metric, all(map(_share, rows)), first.base.higher_is_better, total("n")),
        *(spread([r.base.value for r in rows]), spread([r.other.value for r in rows])),
        *(spread([r.difference.value for r in rows]), None, None, total("won"), total("lost"), len(rows)),
        *(first.published_base, first.published_other),
    )


def _rows_of_one(method: Method, metric: str | None) -> list[Line]:
    """The scores of a single method, where there is nothing to compare it with."""
    run = method.first
    found = []
    names = [*(group for group in run.groups if group in run.raw["results"]), *run.tasks]
    for name in names:
        chosen = choose_metric(run, run, name, metric)
        if chosen is None:
            continue
        score = run.score(name, chosen)
        task = name not in run.groups
        share = score.higher_is_better and 0 <= score.value <= 1
        n = run.questions(name) if task else None
        limits = score_interval(score.value, n, score.stderr, accuracy=False)
        value = (score.value, *(limits or (None, None)))
        level = "task" if task else "group"
        line = Line(name, level, chosen, share, score.higher_is_better, n, value, None, None, *[None] * 4, seeds=1)
        found.append(line)
    return found


def _plain(line: Line, prefix: str) -> dict[str, Any]:
    """A line as page.js reads it."""
    return {
        "name": line.name,
        "short": line.name.removeprefix(prefix) if line.level == "task" else line.name,
        "level": line.level,
        "metric": str(line.metric),
        "share": line.share,
        "up": line.higher_is_better,
        "n": line.n,
        "base": _rounded(line.base),
        "other": line.other and _rounded(line.other),
        "diff": line.difference and _rounded(line.difference),
        "p": line.p,
        "holm": line.p_holm,
        "won": line.won,
        "lost": line.lost,
        "seeds": line.seeds,
        "pub": [line.published_base, line.published_other],
    }


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 6) for value in values]


def _with_reference(comparison: Comparison, base: Run, run: Run, metric: str | None, reader: Any) -> Comparison:
    try:
        return compare_runs(base, [run], metric=metric, reference=True, read=reader)
    except ReportError:  # no published figures for these tasks
        return comparison


def _without_doubles(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs without those given twice."""
    kept: list[Run] = []
    for run in runs:
        if not any(same_run(run, other) for other in kept):
            kept.append(run)
    twice = len(runs) - len(kept)
    return kept, [f"{twice} of the results files hold a run that another holds too; shown once."] if twice else []


def _seed(run: Run) -> Any:
    found = [run.metadata(task, "seed") for task in run.tasks]
    return next((seed for seed in found if seed is not None), None)


def _methods(runs: Sequence[Run], base: Run) -> tuple[list[Method], list[str]]:
    """The methods, that of the base first, and remarks. Of runs alike in all settings and the seed the newest counts."""
    groups: dict[str, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        votes = {run.metadata(task, "vote_permutations") for task in run.tasks}
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        key = json.dumps([run.model, run.source, run.method, settings, sorted(map(str, votes))], default=str)
        groups[key][_seed(run)].append(run)
    remarks = []
    chosen: list[dict[Any, Run]] = []
    for by_seed in groups.values():
        newest = {}
        for seed, same in sorted(by_seed.items(), key=lambda item: str(item[0])):
            # a run of other tasks is no repetition: fall back to what has most of them
            newest[seed] = base if base in same else max(same, key=lambda run: (len(run.tasks), run.date or 0))
            if len(same) > 1:
                left = ", ".join(str(run.path) for run in same if run is not newest[seed])
                remarks.append(f"Runs with the same settings: {newest[seed].path} is shown, left out {left}.")
        chosen.append(newest)
    chosen.sort(key=lambda by_seed: base not in by_seed.values())
    labels = distinct_labels([base if base in c.values() else next(iter(c.values())) for c in chosen])
    if any(len(c) > 1 for c in chosen):
        labels = [label.split(" seed=")[0] for label in labels]
    return [Method(label, by_seed) for label, by_seed in zip(labels, chosen, strict=True)], remarks


def _warnings(methods: Sequence[Method], compared: Mapping[int, Mapping[Any, Comparison]]) -> list[str]:
    found = []
    for i, by_seed in compared.items():
        for seed, comparison in by_seed.items():
            for warning in comparison.others[0].warnings:
                of_seed = f", seed {seed}" if len(by_seed) > 1 else ""
                found.append(f"{methods[i].label}{of_seed}: {warning}")
    return found


def _questions(
    methods: Sequence[Method], seeds: Sequence[Any], tasks: Sequence[str], metric: str | None, reader: Any
) -> dict[str, Any]:
    """All questions with all answers, column by column; texts by their number in `strings`.

    What all prompts of a task begin with (instruction and demonstrations) is stored once per task, method and seed.
    """
    strings = Strings()
    columns: dict[str, list[Any]] = {key: [] for key in ("task", "seed", "id", "text", "target")}
    per_method = [{"answer": [], "raw": [], "score": []} for _ in methods]  # type: list[dict[str, list[Any]]]
    prefixes: dict[str, list[int]] = {}
    texts_of: list[dict[int, int]] = [{} for _ in methods]
    for s, seed in enumerate(seeds):
        for t, task in enumerate(tasks):
            places: dict[tuple[str, int], int] = {}
            for m, method in enumerate(methods):
                run = method.runs.get(seed)
                if run is None or task not in run.raw["results"]:
                    continue
                against = methods[0].runs.get(seed, run)
                other = against if task in against.raw["results"] else run
                chosen = choose_metric(other, run, task, metric) or choose_metric(run, run, task)
                if chosen is None or not run.has_samples(task):
                    continue
                samples = run.samples(task, chosen.filter)
                reader(run, task, chosen.filter, samples)
                start = _shared_start([sample.prompt for sample in samples])
                prefixes.setdefault(f"{s},{t}", [-1] * len(methods))[m] = strings.add(start)
                seen: dict[str, int] = defaultdict(int)
                for sample in sorted(samples, key=lambda x: x.doc_id):
                    key = (sample.doc_hash, seen[sample.doc_hash])
                    seen[sample.doc_hash] += 1
                    text = strings.add(sample.prompt[len(start) :])
                    if key not in places:
                        places[key] = len(columns["id"])
                        row = (t, s, sample.doc_id, text, strings.add(sample.target))
                        for name, value in zip(columns, row, strict=True):
                            columns[name].append(value)
                        for column in per_method:
                            for values in column.values():
                                values.append(None)
                    at = places[key]
                    if columns["text"][at] != text:
                        texts_of[m][at] = text
                    _put_answer(per_method[m], at, sample, chosen, strings)
    return {
        "strings": strings.texts,
        "prefixes": prefixes,
        "questions": {**columns, "methods": per_method, "texts": texts_of},
    }


def _put_answer(column: dict[str, list[Any]], at: int, sample: Sample, metric: Metric, strings: Strings) -> None:
    column["answer"][at] = strings.add(sample.answer)
    value = sample.values.get(metric.name)
    if value is not None and value == value:  # NaN is not JSON
        column["score"][at] = round(value, 6)
    raw = "\n".join(sample.responses)
    if raw.strip() != sample.answer.strip():
        column["raw"][at] = strings.add(raw)


def _shared_start(prompts: Sequence[str]) -> str:
    """What all prompts begin with, up to the end of a paragraph: the instruction and the demonstrations."""
    start = os.path.commonprefix(list(prompts))
    if len(set(prompts)) == 1:  # a single question: its last paragraph is the question
        start = start.rstrip("\n")
    for end in ("\n\n", "\n"):
        if end in start:
            return start[: start.rindex(end) + len(end)]
    return ""


def _losses(methods: Sequence[Method], tasks: Sequence[str]) -> dict[str, dict[str, list[list[float]]]]:
    """Method -> task -> one list of losses per seed, for the fits that have any."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for m, method in enumerate(methods):
        for t, task in enumerate(tasks):
            curves = [fit.losses for run in method.runs.values() if (fit := run.fit(task)) and len(fit.losses) > 1]
            if curves:
                found.setdefault(str(m), {})[str(t)] = [[round(loss, 4) for loss in curve] for curve in curves]
    return found


def _summary(methods: Sequence[Method], rows: Mapping[int, Sequence[Line]]) -> list[dict[str, Any]]:
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


def _costs(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Time and tokens per stage and method, means over its seeds."""
    found = []
    for method in methods:
        runs = list(method.runs.values())
        fits = [[fit for task in run.tasks if (fit := run.fit(task))] for run in runs]

        def mean(values: Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return descriptive.fmean(known) if known else None

        def total(name: str, fits: list[list[Any]] = fits) -> float | None:
            sums = []
            for of_run in fits:
                known = [value for fit in of_run if (value := getattr(fit, name)) is not None]
                sums.append(float(sum(known)) if known else None)
            return mean(sums)

        fit, generate, whole = total("fit_seconds"), total("generate_seconds"), mean(run.seconds for run in runs)
        tokens = total("train_tokens")
        found.append(
            {
                "label": method.label,
                "total": whole,
                "fit": fit,
                "generate": generate,
                "rest": None if whole is None else max(0.0, whole - (fit or 0) - (generate or 0)),
                "tokens": tokens,
                "sequences": total("train_sequences"),
                "rate": tokens / fit if tokens and fit else None,
                "fits": len(fits[0]) if fits else 0,
                "reused": sum(f.reused for f in fits[0]) if fits else 0,
            }
        )
    return found


def _task_costs(methods: Sequence[Method], prefix: str) -> list[dict[str, Any]]:
    return [
        {"label": method.label, "task": task.removeprefix(prefix), "fit": fit}
        for method in methods
        for task in method.first.tasks
        if (fit := method.first.fit(task))
    ]


def _settings(methods: Sequence[Method]) -> list[tuple[str, list[str], bool]]:
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
            "limit": run.config.get("limit"),
            "device": run.config.get("device"),
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


def _prefix(tasks: Sequence[str]) -> str:
    """What all task names begin with ("bbh_ttt_"), which the page shows once."""
    start = os.path.commonprefix(list(tasks)) if len(tasks) > 1 else ""
    return start[: start.rfind("_") + 1]


def embeddable(data: Any) -> str:
    """JSON that is safe inside a script element: no `<`, `>`, `&`, U+2028 or U+2029 is left as such.

    Lone surrogates, which are allowed in JSON but not in UTF-8, stay escapes too.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _render(*, data: Any, **values: Any) -> str:
    import jinja2
    from markupsafe import Markup

    folder = files("ttt_harness.report")
    parts = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters |= {"score": _score, "signed": _signed, "p": _p, "seconds": _seconds, "count": _count}
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(parts["page.js"].encode()).digest()).decode()
    page = template.render(
        css=Markup(parts["page.css"]),
        js=Markup(parts["page.js"]),
        script_hash=f"sha256-{digest}",
        data=Markup(embeddable(data)),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _score(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if share else f"{value:.4g}"


def _signed(value: float | None, share: bool) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if share else f"{value:+.3g}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
