"""A comparison as text: a table for the terminal, and Markdown, CSV, JSON and LaTeX for papers and pull requests.

The CSV's columns (`COLUMNS`) and the JSON's keys are stable: their names and meanings change only with `SCHEMA`.
Scores are in the metric's own unit there (accuracies: 0 to 1), never rounded; the other formats are for reading.
"""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, TextIO

from ttt_harness.report.compare import Against, Comparison, Row, task_prefix
from ttt_harness.report.published import Figure, place
from ttt_harness.report.results import Run
from ttt_harness.statistics import RESAMPLES
from ttt_harness.terminal import cell, console, shortened, visible, visible_json

SCHEMA = "ttt-harness.compare/1"

COLUMNS = (
    "name",  # task or group
    "level",  # task | group | mean (plain mean over the shared tasks, where no group covers them)
    "metric",
    "filter",
    "higher_is_better",  # true | false
    "base",  # label of the base run
    "other",  # label of the other run
    "n",  # questions
    "base_score",
    "other_score",
    "difference",  # other_score - base_score
    "ci_low",  # 95 % confidence interval of the difference
    "ci_high",
    "p_value",  # two-sided
    "p_holm",  # p_value corrected for the number of tasks; empty for groups
    "won",  # questions that other scored better; empty without samples
    "lost",  # questions that base scored better
    "test",  # mcnemar_exact | bootstrap_paired | bootstrap_within_tasks | z_unpaired | none
    "base_published",  # published score beside the base run; empty without --reference
    "other_published",
    "base_published_sd",  # its standard deviation over the published seeds
    "other_published_sd",
    "base_redrawn_low",  # 95 % prediction interval for the mean of as many other seeds as the base run has
    "base_redrawn_high",
    "other_redrawn_low",
    "other_redrawn_high",
)

_TESTS = {
    "mcnemar_exact": "exact McNemar",
    "bootstrap_paired": "paired bootstrap",
    "bootstrap_within_tasks": "bootstrap over questions within tasks",
    "z_unpaired": "z test, unpaired",
}


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows as plain data: one dict per row and other run, with the keys `COLUMNS`."""
    found = []
    for against in comparison.others:
        for row in against.rows:
            d = row.difference
            values = (
                *(row.name, row.level, row.metric.name, row.metric.filter, row.base.higher_is_better),
                *(comparison.base_label, against.label, row.n, row.base.value, row.other.value),
                *(d.value, d.low, d.high, d.p, row.p_holm, row.won, row.lost, d.test),
                *_published(row.published_base, row.published_other, comparison.base, against.run),
            )
            found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def _published(base: Figure | None, other: Figure | None, base_run: Run, other_run: Run) -> list[float | None]:
    """The columns from `base_published` on."""
    sides = ((base, base_run), (other, other_run))
    redrawn = [(figure.redrawn(len(run.seeds)) if figure else None) or (None, None) for figure, run in sides]
    return [
        *(figure.mean if figure else None for figure, _ in sides),
        *(figure.sd if figure else None for figure, _ in sides),
        *(end for interval in redrawn for end in interval),
    ]


def as_csv(comparison: Comparison) -> str:
    """All rows under the header `COLUMNS`; an empty cell is "not known"."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records(comparison):
        plain = {k: str(v).lower() if isinstance(v, bool) else v for k, v in record.items()}
        writer.writerow({k: visible(v) if isinstance(v, str) else v for k, v in plain.items()})
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """{"schema", "base", "others", "remarks", "reference", "rows"}; rows as in the CSV, null for "not known"."""

    def about(label: str, run: Any) -> dict[str, Any]:
        return {
            "label": label,
            "path": str(run.path),
            "model": run.model,
            "model_source": run.source,
            "method": run.method,
            "lm_eval_version": run.lm_eval_version,
        }

    reference = comparison.reference
    content = {
        "schema": SCHEMA,
        "base": about(comparison.base_label, comparison.base),
        "others": [{**about(a.label, a.run), "warnings": list(a.warnings)} for a in comparison.others],
        "remarks": list(comparison.remarks),
        "reference": reference
        and {"source": reference.source, "methods": dict(reference.methods), "differs": reference.differs},
        "rows": records(comparison),
    }
    return visible_json(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"


def as_markdown(comparison: Comparison) -> str:
    """A table per other run, for a pull request, with the notes below."""
    parts = []
    for against in comparison.others:
        header, rows = _cells(comparison, against)
        header = [h.replace("Δ", "difference") for h in header]
        lines = ["| " + " | ".join(map(markdown, header)) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
        for row, cells in zip(against.rows, rows, strict=True):
            shown = [markdown(text) for text in cells]
            if row.level != "task":
                shown = [f"**{text}**" if text else "" for text in shown]
            lines.append("| " + " | ".join(shown) + " |")
        title = f"**{markdown(comparison.base_label)} → {markdown(against.label)}**"
        parts.append(f"{title}\n\n" + "\n".join(lines))
        parts.append("\n".join(f"- {markdown(note)}" for note in notes(comparison, against)))
    return "\n\n".join(parts) + "\n"


def as_latex(comparison: Comparison) -> str:
    """A booktabs table per other run (`\\usepackage{booktabs}`), the notes as comments above it."""
    parts = []
    for against in comparison.others:
        header, rows = _cells(comparison, against)
        lines = [f"% {note}" for note in notes(comparison, against)]
        lines += [r"\begin{tabular}{l" + "r" * (len(header) - 1) + "}", r"\toprule"]
        lines += [" & ".join(map(_latex, header)) + r" \\", r"\midrule"]
        last = None
        for row, cells in zip(against.rows, rows, strict=True):
            if last not in (None, "task") and row.level == "task":
                lines.append(r"\midrule")
            last = row.level
            lines.append(" & ".join(map(_latex, cells)) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def print_table(comparison: Comparison, file: TextIO | None = None, width: int | None = None) -> None:
    """The tables for a terminal: a summary when there are several other runs, then one table per other run.

    width: columns to use; by default the terminal's, or 100 where the output is no terminal.
    """
    out = console(file, width=width)
    for remark in comparison.remarks:
        out.print(cell(remark, "yellow"))
    if len(comparison.others) > 1:
        out.print(_summary_table(comparison))
    for against in comparison.others:
        table, left_out = _rich_table(comparison, against, out.width)
        out.print(table)
        out.print()
        for warning in against.warnings:
            out.print(cell(f"! {warning}", "yellow"))
        for note in notes(comparison, against)[len(against.warnings) :]:
            out.print(cell(note, "dim"))
        if left_out:
            left = f"Left out for want of width: {', '.join(left_out)}; --format markdown has everything."
            out.print(cell(left, "dim"))
        out.print()


def notes(comparison: Comparison, against: Against) -> list[str]:
    """What a reader must know beside the numbers: the warnings first, then how to read the columns."""
    rows = against.rows
    found = list(against.warnings)
    tests = [_TESTS[t] for t in dict.fromkeys(r.difference.test for r in rows if r.level == "task") if t in _TESTS]
    means = [_TESTS[t] for t in dict.fromkeys(r.difference.test for r in rows if r.level != "task") if t in _TESTS]
    shares = all(row.is_share for row in rows)
    percent = "Scores in percent, differences in points" if shares else "Scores in the metric's unit"
    how = [f"{' and '.join(tests)} per task"] if tests else []
    how += [f"{' and '.join(means)} for the mean"] if means else []
    if how:
        resampled = f" ({RESAMPLES} draws)" if any("bootstrap" in r.difference.test for r in rows) else ""
        found.append(f"{percent}, with their 95 % interval. p: {'; '.join(how)}{resampled}.")
    if any(row.p_holm is not None for row in rows) and sum(row.level == "task" for row in rows) > 1:
        count = sum(row.p_holm is not None for row in rows)
        real = [row for row in rows if row.p_holm is not None and row.p_holm < 0.05]
        found.append(f"*: p < 0.05 also after Holm's correction for {count} tasks ({len(real)} of them).")
    if comparison.reference:
        reference = comparison.reference
        found.append(f"Published: {reference.source}.")
        found += _redrawn(comparison, against)
        found.append(f"Here instead: {reference.differs}.")
    return [visible(note) for note in found]


def _score(row: Row, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if row.is_share else f"{value:.4g}"


def _figure(row: Row, figure: Figure | None) -> str:
    if figure is None:
        return "–"
    return _score(row, figure.mean) + (f" ±{_score(row, figure.sd)}" if figure.sd is not None else "")


def _redrawn(comparison: Comparison, against: Against) -> list[str]:
    """For the first row, whether each run lies where other seeds of its published method would."""
    row, found = against.rows[0], []
    sides = (
        (comparison.base_label, comparison.base, row.base, row.published_base),
        (against.label, against.run, row.other, row.published_other),
    )
    for label, run, score, figure in sides:
        seeds = len(run.seeds)
        interval = figure and figure.redrawn(seeds)
        if figure and interval:
            low, high = interval
            what = "another seed" if seeds == 1 else f"the mean of {seeds} other seeds"
            found.append(
                f"{label}, {row.name}: {_score(row, score.value)} is {place(score.value, interval)} the 95 % "
                f"prediction interval for {what} of the published runs, {_score(row, low)} to {_score(row, high)}."
            )
    return found


def _signed(row: Row, value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{100 * value:+.1f}" if row.is_share else f"{value:+.3g}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")


def _interval(row: Row) -> str:
    d = row.difference
    return "–" if d.low is None or d.high is None else f"[{_signed(row, d.low)}, {_signed(row, d.high)}]"


def _p(row: Row) -> str:
    p = row.difference.p
    if p is None:
        return "–"
    star = "*" if row.p_holm is not None and row.p_holm < 0.05 else ""
    return ("<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}") + star


def _cells(comparison: Comparison, against: Against) -> tuple[list[str], list[list[str]]]:
    """Header and rows of visible text, the same for all formats that are for reading."""
    header, table = _raw_cells(comparison, against)
    return [visible(text) for text in header], [[visible(text) for text in row] for row in table]


def _raw_cells(comparison: Comparison, against: Against) -> tuple[list[str], list[list[str]]]:
    rows = against.rows
    metrics = {str(row.metric) for row in rows}
    paired = any(row.paired for row in rows)
    reference = comparison.reference
    header = ["task"] + (["metric"] if len(metrics) > 1 else [])
    header += [comparison.base_label, against.label, "Δ", "95 % CI", "p"]
    header += ["won", "lost"] if paired else []
    header += ["n"]
    if reference:
        header += [f"published {reference.methods[label] or '–'}" for label in (comparison.base_label, against.label)]
    prefix = task_prefix([row.name for row in rows if row.level == "task"])
    table = []
    for row in rows:
        cells = [row.name.removeprefix(prefix) if row.level == "task" else row.name]
        cells += [str(row.metric)] if len(metrics) > 1 else []
        cells += [_score(row, row.base.value), _score(row, row.other.value), _signed(row, row.difference.value)]
        cells += [_interval(row), _p(row)]
        cells += ["–" if x is None else str(x) for x in (row.won, row.lost)] if paired else []
        cells += ["–" if row.n is None else str(row.n)]
        if reference:
            cells += [_figure(row, row.published_base), _figure(row, row.published_other)]
        table.append(cells)
    return header, table


def _rich_table(comparison: Comparison, against: Against, width: int) -> tuple[Any, list[str]]:
    """The table, and the names of the columns for which `width` leaves no room."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    header, rows = _cells(comparison, against)
    header, rows = _for_terminal(header, rows)
    left_out: list[str] = []
    for spare in ("won–lost", "p", "95 % CI"):
        if _room(header, rows, width) >= _SHORTEST_NAME or spare not in header:
            continue
        left_out.append(spare)
        at = header.index(spare)
        header, *rows = [line[:at] + line[at + 1 :] for line in (header, *rows)]
    room = max(_SHORTEST_NAME, _room(header, rows, width))

    about = ", ".join(dict.fromkeys((comparison.base.model, against.run.model)))
    metrics = ", ".join(dict.fromkeys(str(row.metric) for row in against.rows))
    counts = [row.n for row in against.rows if row.level == "task"]
    questions = "" if None in counts else f" · {sum(filter(None, counts)):,} questions"
    prefix = task_prefix([row.name for row in against.rows if row.level == "task"])
    table = Table(
        title=cell(f"{comparison.base_label} → {against.label}", "bold")
        + cell(f"   {about} · {metrics}{questions}", "not bold dim"),
        title_justify="left",
        title_style="",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    table.add_column(cell(shortened(f"{prefix}…" if prefix else header[0], room)), no_wrap=True, vertical="bottom")
    for name in header[1:]:
        lines = Text("\n").join(cell(line) for line in name.split("\n"))
        table.add_column(lines, justify="right", no_wrap=True, vertical="bottom")
    for i, (row, cells) in enumerate(zip(against.rows, rows, strict=True)):
        d = row.difference
        better = d.value > 0 if row.base.higher_is_better else d.value < 0
        change = ("green" if better else "red") if d.p is not None and d.p < 0.05 else "" if d.value else "dim"
        texts = [cell(shortened(cells[0], room))]
        for name, text in zip(header[1:], cells[1:], strict=True):
            quiet = name in ("95 % CI", "won–lost") or name.startswith("published")
            texts.append(cell(text, change if name in ("Δ", "p") else "dim" if quiet else ""))
        last_mean = row.level != "task" and (i + 1 == len(rows) or against.rows[i + 1].level == "task")
        table.add_row(*texts, style="bold" if row.level != "task" else "", end_section=last_mean)
    return table, left_out


_LONGEST_LABEL = 40
_SHORTEST_NAME = 21  # in fewer columns, tasks such as logical_deduction_five_objects and ..._three_... look the same


def _room(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """Columns left for the task names: all others at full width, two columns apart."""
    others = [max(len(part) for line in (header, *rows) for part in line[i].split("\n")) for i in range(1, len(header))]
    return width - sum(others) - 2 * len(others) - 1


def _for_terminal(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The cells with won and lost in one column and without the number of questions, which the title has."""
    lines = [header, *rows]
    if "won" in header:
        at = header.index("won")
        lines = [[*line[:at], "–".join(line[at : at + 2]), *line[at + 2 :]] for line in lines]
    at = lines[0].index("n")
    header, *rows = [line[:at] + line[at + 1 :] for line in lines]
    names = [shortened(name, _LONGEST_LABEL) if i else name for i, name in enumerate(header)]
    return [name.replace("published ", "published\n") for name in names], rows


def _summary_table(comparison: Comparison) -> Any:
    """One line per other run: its first row, which is the group where there is one."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", title_justify="left", title_style="bold")
    first = comparison.others[0].rows[0]
    base = f"{comparison.base_label} ({_score(first, first.base.value)})"
    table.title = cell(f"{first.name}: all runs compared with {base}")
    for name in ("run", "score", "Δ", "95 % CI", "p", "won", "lost"):
        table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for against in comparison.others:
        row = next((r for r in against.rows if r.name == first.name), None)
        if row:
            counts = ["–" if x is None else str(x) for x in (row.won, row.lost)]
            cells = [shortened(against.label, _LONGEST_LABEL), _score(row, row.other.value)]
            cells += [_signed(row, row.difference.value), _interval(row), _p(row), *counts]
            table.add_row(*map(cell, cells))
    return table


def markdown(text: str) -> str:
    """The text as Markdown shows it, in one line: no link, emphasis, tag or end of a cell."""
    for character in "\\|*_<>`[":
        text = text.replace(character, "\\" + character)
    return visible(text.replace("\n", " "))


_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "−": "$-$",
    "–": "--",
    "Δ": r"$\Delta$",
    "→": r"$\to$",
    "<": "$<$",
    ">": "$>$",
    "*": "$^{*}$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
