"""Prints the result of a search: the settings, the predicted gain of each task, and the arguments for a run."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_harness.sweep.axes import value_text
from ttt_harness.sweep.display import duration
from ttt_harness.terminal import visible
from ttt_harness.tune.prepare import Prepared
from ttt_harness.tune.search import Found
from ttt_harness.tuned import Candidate, Tuned
from ttt_harness.tuned.choice import Choice, Row, choose
from ttt_harness.tuned.file import TUNABLE


def print_found(
    tuned: Tuned, found: Found, prepared: Sequence[Prepared], *, given: Mapping[str, Any], path: Path
) -> None:
    """Print what was found.

    Args:
        given: the model arguments of the command line, to which the setting is added.
        path: where it was written.
    """
    choice = choose(tuned)
    _print_settings(choice, found)
    _print_tasks(choice)
    print()
    print(visible(choice.verdict))
    print(visible(cost(found, prepared)))
    for name, said in found.diverged.items():
        print(visible(f"{name}: {said}"))
    print()
    print("For a run with one setting for all tasks:")
    print(visible(f"  --model_args {model_args_text(given, choice.pooled)}"))
    print("The same, with this file; and each task with its own setting:")
    others = {name: value for name, value in given.items() if name not in TUNABLE}  # a run takes those from the file
    stated = ",".join(f"{name}={value_text(value)}" for name, value in {**others, "settings": path}.items())
    print(visible(f"  --model_args {stated}"))
    print(visible(f"  --model_args {stated},choose=task"))
    sys.stdout.flush()


def _print_settings(choice: Choice, found: Found) -> None:
    rows = [("setting", "held-out accuracy", "against in-context", "asked", "a fit")]
    bracketed = False
    for row in choice.rows:
        name = row.candidate.name
        if row.accuracy is None:
            bracketed = True
            share = f"({100 * found.accuracy(name):.1f})"
        else:
            share = _with_interval(row.accuracy.value, row.accuracy.low, row.accuracy.high)
        rows.append((_marked(row, choice), share, _against(row), str(row.demonstrations), _seconds(row.candidate)))
    _print_table(rows)
    if bracketed:
        print("In brackets: read off a longer fit on the first fold, to decide what is tried further; see the guide.")


def _marked(row: Row, choice: Choice) -> str:
    return row.candidate.name + (" *" if row.candidate is choice.pooled else "")


def _against(row: Row) -> str:
    if row.difference is None:
        return ""
    return _with_interval(row.difference.value, row.difference.low, row.difference.high, sign=True)


def _with_interval(value: float, low: float | None, high: float | None, *, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    text = f"{100 * value:{form}}"
    return text if low is None or high is None else f"{text} [{100 * low:{form}}, {100 * high:{form}}]"


def _seconds(candidate: Candidate) -> str:
    return f"{candidate.fit_seconds:.3g} s" if candidate.fit_seconds else ""


def _print_tasks(choice: Choice) -> None:
    """The setting of each task, and the gain over in-context learning that it can expect."""
    rows = [("task", "its own setting", "predicted gain")]
    for task, chosen in choice.by_task.items():
        prediction = choice.predictions[task].get(chosen.name)
        best = max(choice.predictions[task].values(), key=lambda one: one.value, default=None)
        told = prediction or best
        gain = _with_interval(told.value, told.low, told.high, sign=True) if told else ""
        rows.append((task, chosen.name, gain if prediction or not told else f"{gain} ({told.candidate.name})"))
    print()
    _print_table(rows)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(visible(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(visible(text).ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def cost(found: Found, prepared: Sequence[Prepared]) -> str:
    """What the search took: in fits on a fold, and in fits of a run, by their tokens."""
    worth = found.tokens / max(1.0, sum(one.tokens for one in prepared))
    seconds = duration(found.fit_time)
    before = f", {found.read} of them done before" if found.read else ""
    return (
        f"{found.fits} fits on folds{before}, in {seconds}: as many tokens as {worth:.1f} fits of a run for each task "
        "and seed."
    )


def model_args_text(given: Mapping[str, Any], candidate: Candidate) -> str:
    """The model arguments of a run, as the command line writes them."""
    others = {name: value for name, value in given.items() if name not in candidate.model_args and name != "method"}
    named = {**others, **candidate.model_args}
    return ",".join(f"{name}={value_text(value)}" for name, value in named.items())
