"""The report: one HTML file that needs nothing else, for people to look at runs and pass them on.

`build_page(runs)` gives its text. The page is page.html.j2 with page.css and page.js put in; what the runs say goes
into it as JSON that no browser takes for HTML or script, and page.js shows it as text only. A Content-Security-Policy
lets the browser run that one script and load nothing.
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from ttt_harness.errors import ReportError
from ttt_harness.report import published
from ttt_harness.report.axes import Sweep, in_order, sweep_of, value_text, varied
from ttt_harness.report.compare import (
    Comparison,
    KeptSamples,
    Reference,
    compare_runs,
    offered_metrics,
    some,
    task_prefix,
)
from ttt_harness.report.page import figures
from ttt_harness.report.page.figures import Line, Method
from ttt_harness.report.page.plots import HeatMap, LinePlot, number, plot_of
from ttt_harness.report.page.questions import question_columns
from ttt_harness.report.page.tuned import tuned_figures
from ttt_harness.report.results import Run
from ttt_harness.terminal import visible
from ttt_harness.tuned import Tuned

MOST_CARDS = 4


def build_page(
    runs: Sequence[Run],
    *,
    names: Mapping[Run, str] | None = None,
    base: Run | None = None,
    title: str | None = None,
    metric: str | None = None,
    reference: bool = False,
    tuned: Sequence[tuple[str, Tuned]] = (),
) -> str:
    """The page's HTML.

    names: what to call runs, in place of their methods; runs that have other names are not one method.
    base: the run that the others are compared with; by default the oldest that trained nothing. title: its heading.
    tuned: the paths and contents of files of tuned settings that are shown beside the runs.
    metric, reference: as in `compare_runs`. Runs that cannot be compared with the base are shown without comparison,
    and a remark says why. Raises ReportError when there is no run, or a results or samples file is damaged.
    """
    if not runs and base is None:
        raise ReportError("there is no run to report; name folders that lm_eval wrote with --output_path.")
    runs, remarks = figures.without_doubles([*([base] if base else []), *(run for run in runs if run is not base)])
    if base is None:
        untrained = [run for run in runs if not run.fits]
        base = min(untrained or runs, key=lambda run: (run.zero_shot, run.date or 0))
    methods, said = figures.group_by_seed(runs, base, names or {})
    remarks += said
    seeds = list(dict.fromkeys(seed for method in methods for seed in method.runs))
    tasks = list(dict.fromkeys(task for method in methods for run in method.runs.values() for task in run.tasks))

    kept = KeptSamples()
    questions = question_columns(methods, seeds, tasks, metric, kept)
    compared: dict[int, dict[Any, Comparison]] = {}
    for i, method in enumerate(methods[1:], 1):
        compared[i] = {}
        for seed, run in method.runs.items():
            against = methods[0].runs.get(seed)
            if against is None:
                remarks.append(f"{method.label}, seed {seed}: not compared, for the base has no run with this seed.")
                continue
            try:
                compared[i][seed] = compare_runs(
                    against,
                    [run],
                    metric=metric,
                    reference=reference and published.covers([against, run]),
                    read=kept.read,
                )
            except ReportError as error:
                remarks.append(f"{method.label}: not compared: {error}")
    remarks += _warnings(methods, compared)

    rows = {i: figures.lines(by_seed) for i, by_seed in compared.items()}
    if not any(rows.values()):
        rows[0] = figures.lines_of_one(methods[0], metric)
        if metric and not rows[0]:
            raise ReportError(f"no run has the metric {metric}; choose from {offered_metrics(base, base.tasks)}.")
    sweeps, said = _sweeps(methods, names or {}, metric)
    remarks += said
    prefix = task_prefix(tasks)
    data = {
        "labels": [visible(method.label) for method in methods],
        "seeds": [None if seed is None else visible(seed) for seed in seeds],
        "tasks": [{"name": visible(task), "short": visible(task.removeprefix(prefix))} for task in tasks],
        "rows": {str(i): [_plain(row, prefix) for row in found] for i, found in rows.items()},
        "losses": figures.loss_curves(methods, tasks),
        **questions,
    }
    summary = figures.summary(methods, rows)
    return _render(
        title=title or _title(methods),
        methods=methods,
        seeds=seeds,
        summary=summary,
        cards=_most_changed(summary),
        costs=figures.costs(methods),
        task_costs=figures.task_costs(methods, prefix),
        settings=figures.settings_table(methods),
        files=[(m.label, seed, run) for m in methods for seed, run in m.runs.items()],
        remarks=list(dict.fromkeys(remarks)),
        published=_reference([run for method in methods for run in method.runs.values()], compared),
        sweeps=sweeps,
        tuned=tuned_figures(tuned, prefix),
        prefix=prefix,
        names=some([method.label for method in methods], 5),
        has_questions=bool(questions["questions"]["id"]),
        without_samples=[
            m.label for m in methods if not any(r.has_samples(t) for r in m.runs.values() for t in r.tasks)
        ],
        has_losses=bool(data["losses"]),
        data=data,
    )


def _sweeps(
    methods: Sequence[Method], names: Mapping[Run, str], metric: str | None
) -> tuple[list[tuple[str, Sweep, LinePlot | HeatMap | None]], list[str]]:
    """What each method with several settings is called, its sweep and its plot; and remarks on what cannot be shown."""
    alike: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for method in methods:
        alike[names.get(method.first, ""), method.first.method] += method.runs.values()
    found, remarks = [], []
    for (name, method_name), runs in alike.items():
        axes = varied(runs)
        points = [(settings, {run.seed: run for run in of_point}) for settings, of_point in in_order(runs, axes)]
        label = f"{name} {method_name}".strip()
        try:
            sweep = sweep_of(label, axes, points, metric) if axes else None
        except ReportError as error:
            remarks.append(f"{label}: its settings are not compared: {error}")
            continue
        if sweep:
            found.append((label, sweep, plot_of(sweep)))
    return found, remarks


def _reference(runs: Sequence[Run], compared: Mapping[int, Mapping[Any, Comparison]]) -> Reference | None:
    """The published figures that stand on the page, and what sets any of its runs apart from them; None without."""
    beside = [c.reference for by_seed in compared.values() for c in by_seed.values() if c.reference]
    if not beside:
        return None
    runs = [run for run in runs if run.has_model and published.covers([run])]
    tasks = [task for run in runs for task in run.tasks if task.startswith(published.TASK_PREFIX)]
    return replace(beside[0], differs=published.differences(runs, list(dict.fromkeys(tasks))))


def _most_changed(summary: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The methods with a card of their own: the four that gain most, in the order of the page."""
    others = [one for one in summary[1:] if one["row"] and one["row"].difference]

    def gain(one: Mapping[str, Any]) -> float:
        return float(one["row"].difference[0] * (1 if one["row"].higher_is_better else -1))

    chosen = sorted(others, key=gain, reverse=True)[:MOST_CARDS]
    return [one for one in others if one in chosen]


def _title(methods: Sequence[Method]) -> str:
    models = ", ".join(dict.fromkeys(method.first.model for method in methods))
    trained = any(method.first.fits for method in methods)
    return f"Test-time training of {models}" if trained else f"Results of {models}"


def _plain(line: Line, prefix: str) -> dict[str, Any]:
    """A line as page.js reads it."""
    return {
        "name": visible(line.name),
        "short": visible(line.name.removeprefix(prefix) if line.level == "task" else line.name),
        "level": line.level,
        "metric": visible(line.metric),
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
        "pub": [figure and round(figure.mean, 6) for figure in (line.published_base, line.published_other)],
    }


def _rounded(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 6) for value in values]


def _warnings(methods: Sequence[Method], compared: Mapping[int, Mapping[Any, Comparison]]) -> list[str]:
    found = []
    for i, by_seed in compared.items():
        for seed, comparison in by_seed.items():
            for warning in comparison.others[0].warnings:
                of_seed = f", seed {seed}" if len(by_seed) > 1 else ""
                found.append(f"{methods[i].label}{of_seed}: {warning}")
    return found


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

    folder = files("ttt_harness.report.page")
    parts = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.finalize = lambda value: visible(value) if type(value) is str else value  # Markup stays as it is
    environment.filters |= {"score": _score, "signed": _signed, "p": _p, "seconds": _seconds, "count": _count}
    environment.filters |= {"number": number, "value": value_text}
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
