"""What can be found wrong with a task before any model is used.

`TTTTask` calls these when lm-eval builds its requests, which it does for all tasks before the first request is
answered: every row that will be evaluated is read and checked, and made-up right answers to the first rows go through
the task's own filters, `process_results` and aggregations.
"""

import copy
import numbers
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, mean_stderr

from ttt_harness.errors import ConfigError, DataError
from ttt_harness.harness import rows
from ttt_harness.harness.aggregation import Aggregation
from ttt_harness.harness.fields import Fields
from ttt_harness.harness.user_code import Row, shown

# Rows whose made-up answers are scored; several, since some aggregations need more than one.
SCORED = 8
# lm-eval's names for the longest answer, in tokens.
BUDGETS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Checked(Protocol):
    """What is asked of a task here; `TTTTask` has it."""

    where: str
    config: Any
    fields: Fields
    instances: list[Instance]
    metric_names: list[str]
    multiple_input: int
    multiple_target: int
    OUTPUT_TYPE: Any

    def doc_to_text(self, doc: Row) -> Any: ...
    def doc_to_target(self, doc: Row) -> Any: ...
    def doc_to_choice(self, doc: Row) -> list[str]: ...
    def filter_answers(self, instances: list[Instance]) -> None: ...
    def process_results(self, doc: Row, results: list[Any]) -> dict[str, Any]: ...
    def aggregation(self) -> Mapping[str, Aggregation]: ...


def check_rows(task: Checked, evaluated: Iterable[Row]) -> None:
    """Read every row's question, choices and right answer, and check that they go together.

    Raises:
        DataError: a field cannot be read, or a row is not what the task's kind needs; the message names the row.
    """
    missing = []
    # What a function of the user's compares an answer with is its own affair.
    own_scores = callable(task.config.process_results)
    for row in evaluated:
        question, target = task.doc_to_text(row), task.doc_to_target(row)
        choices = task.doc_to_choice(row) if task.config.doc_to_choice else None
        if problem := rows.question_problem(row.place, question, choices, numbered=bool(task.multiple_input)):
            raise DataError(f"{task.where}: {problem}.")
        if rows.has_no_answer(target) and not (own_scores and isinstance(target, str)):
            missing.append(row)
        elif not own_scores and (problem := _target_problem(task, row, target, choices)):
            raise DataError(f"{task.where}: {problem}.")
    if missing:
        raise DataError(f"{task.where}: {rows.without_answers(missing)}.")


def _target_problem(task: Checked, row: Row, target: Any, choices: Sequence[str] | None) -> str | None:
    numbered, source = bool(task.multiple_input), task.config.doc_to_target
    problem = rows.target_problem(row.place, target, choices, task.OUTPUT_TYPE, numbered=numbered)
    problem = problem or rows.unlike_the_first(row.place, target, several=bool(task.multiple_target))
    if problem or not choices or numbered or not isinstance(source, str) or not isinstance(target, int):
        return problem
    digits = task.fields.prints_digits(source, row)
    return rows.digits_problem(row.place, target, choices) if digits else None


def check_ends(where: str, arguments: Mapping[str, Any]) -> None:
    """Check what ends an answer: a number of tokens, and stop sequences.

    Raises:
        ConfigError: a budget is no number of tokens of at least 1, or a stop sequence is empty or no text.
    """
    for name in BUDGETS:
        budget = arguments.get(name)
        if budget is not None and not (type(budget) in (int, float) and budget >= 1 and budget % 1 == 0):
            raise ConfigError(
                f"{where}: the generation argument {name}={shown(budget)} is not allowed; it is a whole number of "
                "tokens, at least 1."
            )
    until = arguments.get("until")
    stops = until if isinstance(until, list | tuple) else [] if until is None else [until]
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ConfigError(
            f"{where}: the generation argument until={shown(until)} is not allowed; it is a text that ends an answer, "
            "or a list of such, none of them empty."
        )


def try_scoring(task: Checked) -> None:
    """Put made-up right answers to the first rows through filters, `process_results` and aggregations.

    Nothing of the task is changed by it, and no random numbers are used up.

    Raises:
        DataError: one of them raises something, or a metric is not computed.
    """
    by_row: dict[Any, list[Instance]] = {}
    for instance in task.instances:
        if instance.doc_id not in by_row and len(by_row) == SCORED:
            break
        by_row.setdefault(instance.doc_id, []).append(instance)
    with _unchanged(task):
        answered = [_answered(task, instances) for instances in by_row.values()]
        task.filter_answers([instance for instances in answered for instance in instances])
        scores: dict[tuple[str, str], list[Any]] = {}
        for instances in answered:
            for name in instances[0].filtered_resps:
                results = [instance.filtered_resps[name] for instance in instances]
                for metric, value in task.process_results(instances[0].doc, results).items():
                    scores.setdefault((metric, name), []).append(value)
        _check_metrics(task, {metric for metric, _ in scores})
        aggregations = task.aggregation()
        for (metric, _), values in scores.items():
            aggregation = aggregations[metric]
            if not isinstance(score := aggregation(values), numbers.Real):
                what = f"the aggregation of the metric {metric} gives {shown(score)}"
                raise DataError(f"{task.where}: {what}, and no number; correct it.")
            if aggregation.function is mean and len(values) > 1:
                aggregation.standard_error(values, mean_stderr)


def _answered(task: Checked, instances: Sequence[Instance]) -> list[Instance]:
    """Copies of a row's requests, with right answers."""
    row = copy.deepcopy(instances[0].doc)
    right = _right_answer(task, row)
    made = []
    for instance in instances:
        likely = instance.idx == right if task.OUTPUT_TYPE == "multiple_choice" else True
        answer = f" {right}" if task.OUTPUT_TYPE == "generate_until" else (-1.0 if likely else -2.0, likely)
        made.append(replace(instance, doc=row, resps=[answer] * (instance.repeats or 1), filtered_resps={}))
    return made


def _right_answer(task: Checked, row: Row) -> Any:
    """The text of the right answer or, for multiple_choice, the number of the right choice."""
    target = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    if isinstance(target, list | tuple) and target:
        target = target[0]
    if not task.config.doc_to_choice:
        return target
    choices = task.doc_to_choice(row)
    if task.OUTPUT_TYPE == "multiple_choice":
        return choices.index(target) if target in choices else target
    return choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target


def _check_metrics(task: Checked, scored: set[str]) -> None:
    """Of these kinds lm-eval knows a few metrics, and leaves others out without a word."""
    if callable(task.config.process_results) or task.OUTPUT_TYPE == "generate_until":
        return
    if unscored := [name for name in task.metric_names if name not in scored and name != "bypass"]:
        known = ", ".join(sorted(scored)) or "acc"
        raise DataError(
            f"{task.where}: the metric {unscored[0]} is not computed for output_type {task.OUTPUT_TYPE}; use another, "
            f"e.g. {known}, or write a process_results."
        )


@contextmanager
def _unchanged(task: Checked) -> Iterator[None]:
    """Leave random numbers, and the tables that lm-eval extends while it scores, as they were."""
    numbers, arrays = random.getstate(), np.random.get_state()
    tables: Mapping[str, dict[str, Any]] = {
        name: dict(getattr(task, name)) for name in ("_aggregation_list", "_higher_is_better")
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a metric about so few answers
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)
        for name, table in tables.items():
            getattr(task, name).clear()
            getattr(task, name).update(table)
