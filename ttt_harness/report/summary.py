"""Scores per method over several seeds: mean, standard deviation, and the published figure beside.

`summarize(runs)` sorts runs by what their results files say of the method and takes, for each task and group, the mean
over the seeds; `as_markdown`, `as_csv`, `as_json` and `print_summary` show it. A sweep's folder is one source of such
runs; any lm-eval results with the same settings are another.
"""

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO

from ttt_harness.errors import ReportError
from ttt_harness.methods import SETTINGS
from ttt_harness.report import published
from ttt_harness.report.compare import MEAN_ROW, some, task_prefix
from ttt_harness.report.results import Metric, Run, search_runs
from ttt_harness.report.tables import markdown
from ttt_harness.terminal import cell, console, shortened, visible, visible_json

SCHEMA = "ttt-harness.summary/1"
NO_SCORE = "no score"

COLUMNS = (
    "method",
    "name",  # task or group
    "level",  # task | group | mean (plain mean of the tasks, where they are in no group)
    "metric",
    "filter",
    "mean",  # over the seeds, in the metric's own unit (accuracies: 0 to 1)
    "sd",  # standard deviation over the seeds (n - 1); empty for one seed
    "seeds",  # how many
    "published",  # published accuracy, 0 to 1; empty where there is none
    "expected",  # for random guesses: the exact expectation; empty for others
)


@dataclass(frozen=True)
class Line:
    """One method's score of one task or group; see `COLUMNS`.

    mean: None where the task was answered but not scored. share: the score reads best in percent.
    """

    method: str
    name: str
    level: Literal["task", "group", "mean"]
    metric: Metric
    mean: float | None
    sd: float | None
    seeds: tuple[Any, ...]
    published: float | None
    expected: float | None
    share: bool = True


@dataclass(frozen=True)
class Summary:
    """Lines, groups first within each method; and what the reader must know."""

    lines: tuple[Line, ...]
    remarks: tuple[str, ...]

    @property
    def methods(self) -> list[str]:
        """The methods, in order."""
        return list(dict.fromkeys(line.method for line in self.lines))

    @property
    def names(self) -> list[str]:
        """Groups, then tasks, in order."""
        levels: dict[str, str] = {line.name: line.level for line in self.lines}
        return sorted(levels, key=lambda name: levels[name] == "task")

    def line(self, method: str, name: str) -> Line | None:
        """The line of a method and a task or group."""
        return next((line for line in self.lines if (line.method, line.name) == (method, name)), None)


def read(folders: Sequence[str | Path]) -> Summary:
    """The summary of all runs in these folders; what a sweep is still writing (`*.partial`) is left out.

    Raises:
        ReportError: there are no results, or a file is damaged.
    """
    found = [search_runs(folder) for folder in folders]
    return summarize([run for runs, _ in found for run in runs], [said for _, remarks in found for said in remarks])


def summarize(runs: Sequence[Run], remarks: Sequence[str] = ()) -> Summary:
    """Means over the seeds of each method. Of two runs alike the newer counts, and a remark says so.

    remarks: on the reading of the runs, kept for the reader.

    Raises:
        ReportError: there is no run, or they are of several sweeps.
    """
    if not runs:
        raise ReportError("there is no finished run to summarize.")
    found: dict[str, dict[Any, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda run: run.date or 0):
        found[run.method][run.seed].append(run)
    _refuse_several_sweeps(found)
    by_method: dict[str, dict[Any, Run]] = {}
    lines: list[Line] = []
    remarks = list(remarks)
    order = list(SETTINGS)
    methods = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    for method in methods:
        by_method[method] = {}
        for seed, same in sorted(found[method].items(), key=lambda item: str(item[0])):
            newest = by_method[method][seed] = same[-1]
            if len(same) > 1:
                remarks.append(f"{method}, seed {seed}: {newest.path} counts, older results of the same are left out.")
        lines += _lines(method, by_method[method])
        remarks += [f"{method}: the seeds differ in {what}." for what in _differences(by_method[method].values())]
    chosen = [run for by_seed in by_method.values() for run in by_seed.values()]
    seeds = {method: frozenset(by_method[method]) for method in methods}
    if len(set(seeds.values())) > 1:
        told = "; ".join(f"{method} {', '.join(map(str, sorted(s, key=str)))}" for method, s in seeds.items())
        remarks.append(f"The methods have different seeds: {told}.")
    if any(line.published is not None for line in lines):
        tasks = [task for run in chosen for task in run.tasks if task.startswith(published.TASK_PREFIX)]
        remarks.append(f"Published: {published.source()}.")
        model_runs = [run for run in chosen if run.has_model]
        differs = published.differences(model_runs, list(dict.fromkeys(tasks))) if model_runs else ""
        remarks += [f"Here instead: {differs}."] if differs else []
    return Summary(tuple(lines), tuple(dict.fromkeys(remarks)))


def _lines(method: str, by_seed: dict[Any, Run]) -> list[Line]:
    """A line per group and task; without a group, one for the plain mean of the tasks in its place."""
    runs = list(by_seed.values())
    groups = list(dict.fromkeys(group for run in runs for group in run.groups if group in run.results))
    tasks = runs[0].tasks
    lines = [line for name in (*groups, *tasks) if (line := _line(method, name, by_seed))]
    scored = [line for line in lines if line.level == "task" and line.mean is not None]
    if not groups and len(scored) > 1 and len({line.metric for line in scored}) == 1:
        metric, names = scored[0].metric, [line.name for line in scored]
        by_seed = {seed: run for seed, run in by_seed.items() if all(metric in run.metrics(name) for name in names)}
        means = [statistics.fmean(run.score(name, metric).value for name in names) for run in by_seed.values()]
        if not means:
            return lines
        mean = Line(
            method=method,
            name=MEAN_ROW,
            level="mean",
            metric=metric,
            mean=statistics.fmean(means),
            sd=statistics.stdev(means) if len(means) > 1 else None,
            seeds=tuple(by_seed),
            published=_mean([line.published for line in scored]),
            expected=_mean([line.expected for line in scored]),
            share=all(line.share for line in scored),
        )
        return [mean, *lines]
    return lines


def _line(method: str, name: str, by_seed: dict[Any, Run]) -> Line | None:
    evaluated = {seed: run for seed, run in by_seed.items() if name in run.results}
    run = next((run for run in evaluated.values() if run.metrics(name)), None)
    if run is None:
        return _line_without_score(method, name, evaluated)
    metric = run.metrics(name)[0]
    scored = {seed: run for seed, run in evaluated.items() if metric in run.metrics(name)}
    scores = [run.score(name, metric) for run in scored.values()]
    values = [score.value for score in scores]
    beside = published.published_for(run)
    return Line(
        method=method,
        name=name,
        level="group" if name in run.groups else "task",
        metric=metric,
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
        seeds=tuple(scored),
        published=beside.score(name) if beside else None,
        expected=None if run.has_model else expected_of_guessing(run, name),
        share=all(score.is_share for score in scores),
    )


def _line_without_score(method: str, name: str, evaluated: Mapping[Any, Run]) -> Line | None:
    """The line of a task that was answered with `--predict_only`."""
    run = next((run for run in evaluated.values() if run.predicted_only(name)), None)
    if run is None:
        return None
    metric = Metric("", run.filters(name)[0])
    return Line(method, name, "task", metric, None, None, tuple(evaluated), None, None)


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


def _refuse_several_sweeps(found: Mapping[str, Mapping[Any, Sequence[Run]]]) -> None:
    """Raise ReportError where a table would mix runs of other questions or models, or leave out runs of other settings.

    found: method -> seed -> runs.
    """
    of_method = {method: list(chain(*by_seed.values())) for method, by_seed in found.items()}
    with_model = [run for runs in of_method.values() for run in runs if run.has_model]
    what = {"": _differences(with_model, ["model"]) + _differences(chain(*of_method.values()), ["limit"])}
    what |= {f" of {method}": _differences(runs, ["tasks"]) for method, runs in of_method.items()}
    what |= {
        f" of {method}, seed {seed},": _differences(same)
        for method, by_seed in found.items()
        for seed, same in by_seed.items()
    }
    for whose, differences in what.items():
        if differences:
            raise ReportError(
                f"the runs{whose} differ in {', '.join(differences)}, and a summary is of one sweep; give each sweep's "
                "folder, or results file, on its own."
            )


def _differences(runs: Iterable[Run], keys: Sequence[str] = ()) -> list[str]:
    """What differs between the setups of the runs, "lr (0.0001, 0.001)"; of `keys` alone, where they are given."""
    setups = [run.setup for run in runs]
    found = []
    for key in keys or dict.fromkeys(key for setup in setups for key in setup):
        values = [setup.get(key) for setup in setups]
        if any(value != values[0] for value in values):
            shown = ["not given" if v is None else some(v, 1) if isinstance(v, list) else str(v) for v in values]
            found.append(f"{key} ({', '.join(dict.fromkeys(shown))})")
    return found


def records(summary: Summary) -> list[dict[str, Any]]:
    """The lines as plain data, with the keys `COLUMNS`."""
    found = []
    for line in summary.lines:
        record = asdict(line) | {"metric": line.metric.name, "filter": line.metric.filter, "seeds": len(line.seeds)}
        found.append({column: record[column] for column in COLUMNS})
    return found


def as_csv(summary: Summary) -> str:
    """All lines under the header `COLUMNS`; an empty cell is "there is none"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: visible(v) if isinstance(v, str) else v for k, v in row.items()} for row in records(summary))
    return text.getvalue()


def as_json(summary: Summary) -> str:
    """{"schema", "remarks", "rows"}; rows as in the CSV, null for "there is none", `seeds` as a list."""
    rows = [{**record, "seeds": list(line.seeds)} for record, line in zip(records(summary), summary.lines, strict=True)]
    content = {"schema": SCHEMA, "remarks": list(summary.remarks), "rows": rows}
    return visible_json(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def as_markdown(summary: Summary) -> str:
    """A table of the methods for each group, then one of all tasks, then the remarks."""
    parts = [_markdown(table) for table in tables(summary)]
    parts.append("\n".join(f"- {markdown(note)}" for note in notes(summary)))
    return "\n\n".join(parts) + "\n"


def print_summary(summary: Summary, file: TextIO | None = None, width: int | None = None) -> None:
    """The same tables for a terminal; the one of the tasks in as many parts as its width asks for."""
    from rich import box
    from rich.table import Table

    out = console(file, width=width, otherwise=120)
    for whole in tables(summary):
        for header, *rows in _fitting(whole, out.width):
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="dim")
            for i, name in enumerate(header):
                table.add_column(cell(name), justify="right" if i else "left", no_wrap=True)
            for row in rows:
                table.add_row(*map(cell, row))
            out.print(table)
            out.print()
    for note in notes(summary):
        out.print(cell(note, "dim"))


def notes(summary: Summary) -> list[str]:
    """How to read the tables, and the remarks."""
    unit = "percent" if all(line.share for line in summary.lines) else "percent, or in the metric's unit"
    how = f"Scores in {unit}: mean over the seeds ± standard deviation (n - 1)"
    known = any(line.published is not None for line in summary.lines)
    found = [f"{how}{'; in parentheses the published figure' if known else ''}."]
    if any(line.mean is None for line in summary.lines):
        found.append(f"{NO_SCORE.capitalize()}: answered with --predict_only.")
    return [*found, *map(visible, summary.remarks)]


def tables(summary: Summary) -> list[list[list[str]]]:
    """The tables of texts, header first: for each group its methods; then all tasks and groups by method."""
    return [[[visible(text) for text in row] for row in table] for table in _tables(summary)]


def _tables(summary: Summary) -> list[list[list[str]]]:
    found = []
    for name in summary.names:
        lines = [line for method in summary.methods if (line := summary.line(method, name))]
        if lines[0].level != "task":
            found.append(_methods_table(name, lines))
    prefix = task_prefix([name for name in summary.names if _level(summary, name) == "task"])
    exact = {line.method for line in summary.lines if line.expected is not None}
    header = [f"{prefix}…" if prefix else "task"]
    for method in summary.methods:
        header += [method, f"{method}, exact"] if method in exact else [method]
    matrix = [header]
    for name in summary.names:
        row = [name.removeprefix(prefix) if _level(summary, name) == "task" else name]
        for method in summary.methods:
            line = summary.line(method, name)
            row.append(_cell(line))
            if method in exact:
                row.append(_percent(line.expected) if line else "–")
        matrix.append(row)
    return [*found, matrix]


def _methods_table(name: str, lines: Sequence[Line]) -> list[list[str]]:
    exact = any(line.expected is not None for line in lines)
    table = [[name, "mean", "sd", "seeds", "published", *(["exact"] if exact else [])]]
    for line in lines:
        cells = [line.method, _value(line, line.mean), _value(line, line.sd), str(len(line.seeds))]
        cells += [_percent(line.published), *([_percent(line.expected)] if exact else [])]
        table.append(cells)
    return table


def _level(summary: Summary, name: str) -> str:
    return next(line.level for line in summary.lines if line.name == name)


def _cell(line: Line | None) -> str:
    if line is None:
        return "–"
    text = _value(line, line.mean)
    text += f" ±{_value(line, line.sd)}" if line.sd is not None else ""
    return text + (f" ({_percent(line.published)})" if line.published is not None else "")


def _value(line: Line, value: float | None) -> str:
    """A score, or its deviation, as a person reads it."""
    if line.mean is None:
        return NO_SCORE
    return _percent(value) if line.share or value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _markdown(table: list[list[str]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(map(markdown, cells)) + " |"

    header, *rows = table
    return "\n".join([line(header), "|---" + "|---:" * (len(header) - 1) + "|", *map(line, rows)])


_SHORTEST_NAME = 40  # long enough for every task name of a published benchmark


def _fitting(table: list[list[str]], width: int) -> Iterable[list[list[str]]]:
    """The table in parts that fit the width, each with the first column; names that leave no room are shortened."""
    room = max(_SHORTEST_NAME, width // 2)
    table = [[shortened(text, room) for text in row] for row in table]
    widths = [max(len(row[i]) for row in table) + 2 for i in range(len(table[0]))]
    start = 1
    while start < len(widths):
        end = start + 1
        while end < len(widths) and widths[0] + sum(widths[start : end + 1]) <= width:
            end += 1
        yield [[row[0], *row[start:end]] for row in table]
        start = end
