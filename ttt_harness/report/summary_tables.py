"""A summary as text: tables for the terminal and in Markdown, CSV and JSON.

The CSV's columns (`COLUMNS`) and the JSON's keys are stable: their names and meanings change only with `SCHEMA`.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from ttt_harness.report import published
from ttt_harness.report.axes import Point, Sweep, plain, point_text, value_text
from ttt_harness.report.compare import task_prefix
from ttt_harness.report.summary import Line, Summary
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
    "settings",  # those that the sweep has varied: "lr=0.0001 epochs=3"; empty where there is one setting
    "median",  # over the tasks of a group, of their means
    "published_sd",  # standard deviation over the published seeds
    "published_median",
    "redrawn_low",  # 95 % prediction interval for the mean of as many other seeds of the published runs
    "redrawn_high",
)


def records(summary: Summary) -> list[dict[str, Any]]:
    """The lines as plain data, with the keys `COLUMNS`."""
    found = []
    for line in summary.lines:
        low, high = line.redrawn or (None, None)
        values = (
            *(line.method, line.name, line.level, line.metric.name, line.metric.filter),
            *(line.mean, line.sd, len(line.seeds), line.beside and line.beside.mean, line.expected),
            *(" ".join(point_text(line.settings)), line.median, line.beside and line.beside.sd, line.beside_median),
            *(low, high),
        )
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def as_csv(summary: Summary) -> str:
    """All lines under the header `COLUMNS`; an empty cell is "there is none"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: visible(v) if isinstance(v, str) else v for k, v in row.items()} for row in records(summary))
    return text.getvalue()


def as_json(summary: Summary) -> str:
    """{"schema", "remarks", "rows", "sweeps"}; rows as in the CSV, null for "there is none", `seeds` as a list."""
    rows = [
        {**record, "seeds": list(line.seeds), "settings": plain(line.settings)}
        for record, line in zip(records(summary), summary.lines, strict=True)
    ]
    sweeps = [
        {
            "method": sweep.method,
            "axes": list(sweep.axes),
            "name": sweep.name,
            "best": plain(sweep.best.settings),
            "within_noise": [plain(rival.point.settings) for rival in sweep.rivals if rival.within_noise],
        }
        for sweep in summary.sweeps
    ]
    content = {"schema": SCHEMA, "remarks": list(summary.remarks), "rows": rows, "sweeps": sweeps}
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
    """How to read the tables, what the sweeps over settings show, and the remarks."""
    unit = "percent" if all(line.share for line in summary.lines) else "percent, or in the metric's unit"
    how = f"Scores in {unit}: mean over the seeds ± standard deviation (n - 1)"
    known = any(line.beside is not None for line in summary.lines)
    found = [f"{how}{'; in parentheses the published figure' if known else ''}."]
    if any(line.median is not None for line in summary.lines):
        found.append("Median: over the tasks, of their means.")
    if any(line.redrawn for line in summary.lines):
        found.append(
            "Redrawn: where the mean of as many other seeds of the published runs would lie (95 % prediction interval)."
        )
    if any(line.mean is None for line in summary.lines):
        found.append(f"{NO_SCORE.capitalize()}: answered with --predict_only.")
    if summary.sweeps:
        found.append(
            "Interval: 95 %, from the seeds' standard deviation, or one seed's standard error. Within noise: not "
            "clearly other than the best (p 0.05 or more after Holm's correction)."
        )
    verdicts = [sweep.verdict for sweep in summary.sweeps]
    return [visible(note) for note in [*verdicts, *found, *summary.remarks]]


def tables(summary: Summary) -> list[list[list[str]]]:
    """The tables of texts, header first: the groups' methods, the settings of a sweep, then all tasks by method."""
    return [[[visible(text) for text in row] for row in table] for table in _tables(summary)]


def _tables(summary: Summary) -> list[list[list[str]]]:
    found = []
    for name in summary.names:
        lines = [line for label in summary.labels if (line := summary.line(label, name))]
        if lines[0].level != "task":
            found.append(_methods_table(name, lines))
    found += [_settings_table(sweep) for sweep in summary.sweeps]
    return [*found, _tasks_table(summary)]


def _tasks_table(summary: Summary) -> list[list[str]]:
    prefix = task_prefix([name for name in summary.names if _level(summary, name) == "task"])
    exact = {line.label for line in summary.lines if line.expected is not None}
    header = [f"{prefix}…" if prefix else "task"]
    for label in summary.labels:
        header += [label, f"{label}, exact"] if label in exact else [label]
    table = [header]
    for name in summary.names:
        row = [name.removeprefix(prefix) if _level(summary, name) == "task" else name]
        for label in summary.labels:
            line = summary.line(label, name)
            row.append(_cell(line))
            if label in exact:
                row.append(_percent(line.expected) if line else "–")
        table.append(row)
    return table


def _methods_table(name: str, lines: Sequence[Line]) -> list[list[str]]:
    columns = [
        (name, [line.label for line in lines]),
        ("mean", [NO_SCORE if line.mean is None else _score(line, line.mean) for line in lines]),
        ("sd", [_score(line, line.sd) for line in lines]),
        ("median", [_score(line, line.median) for line in lines]),
        ("seeds", [str(len(line.seeds)) for line in lines]),
        ("published", [_figure(line.beside) for line in lines]),
    ]
    if any(line.beside_median is not None for line in lines):
        columns.append(("its median", [_percent(line.beside_median) for line in lines]))
    if any(line.redrawn for line in lines):
        columns.append(("redrawn", [_redrawn(line) for line in lines]))
    if any(line.expected is not None for line in lines):
        columns.append(("exact", [_percent(line.expected) for line in lines]))
    return [[header for header, _ in columns], *map(list, zip(*(texts for _, texts in columns), strict=True))]


def _settings_table(sweep: Sweep) -> list[list[str]]:
    """One row a setting: its values on the axes, its score with its interval, and its difference from the best."""
    table = [
        [f"{sweep.method}: {sweep.axes[0]}", *sweep.axes[1:], sweep.name, "95 % CI", "seeds", "from the best", "p"]
    ]
    for point in sweep.points:
        row = [value_text(point.settings[axis]) for axis in sweep.axes]
        row += [_number(point.mean, sweep.share), _interval(point, sweep.share), str(point.seeds)]
        rival = sweep.rival(point)
        if rival is None:
            row += ["best", ""]
        else:
            p = "–" if rival.p_holm is None else "<0.001" if rival.p_holm < 0.001 else f"{rival.p_holm:.2g}"
            noise = ", within noise" if rival.within_noise else ""
            row += [f"{_number(rival.difference.value, sweep.share)}{noise}".replace("-", "−"), p]
        table.append(row)
    return table


def _interval(point: Point, share: bool) -> str:
    if point.low is None or point.high is None:
        return "–"
    return f"[{_number(point.low, share)}, {_number(point.high, share)}]"


def _figure(figure: published.Figure | None) -> str:
    if figure is None:
        return "–"
    return _percent(figure.mean) + (f" ±{_percent(figure.sd)}" if figure.sd is not None else "")


def _redrawn(line: Line) -> str:
    if line.redrawn is None or line.mean is None:
        return "–"
    low, high = line.redrawn
    return f"[{_percent(low)}, {_percent(high)}] {published.place(line.mean, line.redrawn)}"


def _level(summary: Summary, name: str) -> str:
    return next(line.level for line in summary.lines if line.name == name)


def _cell(line: Line | None) -> str:
    if line is None:
        return "–"
    if line.mean is None:
        return NO_SCORE
    text = _score(line, line.mean)
    text += f" ±{_score(line, line.sd)}" if line.sd is not None else ""
    return text + (f" ({_figure(line.beside)})" if line.beside is not None else "")


def _score(line: Line, value: float | None) -> str:
    """A score, or its deviation, as a person reads it."""
    if value is None:
        return "–"
    return _number(value, line.share)


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.4g}"


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
