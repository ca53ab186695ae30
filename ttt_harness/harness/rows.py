"""What a row has to be, so that it can be asked and its answers scored.

Each function returns what is wrong, as a sentence without its full stop, or None. `place` names the row.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ttt_harness.harness.fields import is_null
from ttt_harness.harness.user_code import Row, shown

# Rows that a message lists by their places.
_LISTED = 10
_TEXTS = " | map('string') | list"


def has_no_answer(target: Any) -> bool:
    """Whether a row's target is null, blank, or a list that is empty or has such a thing in it."""
    if isinstance(target, list | tuple):
        return not target or any(map(has_no_answer, target))
    return is_null(target) or (isinstance(target, str) and not target.strip())


def without_answers(missing: Sequence[Row]) -> str:
    """What to say of rows that have no right answer."""
    by_split: dict[str | None, list[int]] = defaultdict(list)
    for row in missing:
        by_split[row.split].append(row.number)
    places = "; ".join(
        f"{_and(_first(sorted(numbers)))} of {f'the {split}' if split else 'fewshot_config.samples'}"
        for split, numbers in by_split.items()
    )
    rows, have = ("rows", "have") if len(missing) > 1 else ("row", "has")
    return (
        f"{len(missing)} {rows} {have} no right answer, but a null or a blank text ({rows} {places}); correct "
        "doc_to_target, or take such rows out of the data or with process_docs"
    )


def _first(numbers: list[int]) -> list[Any]:
    more = len(numbers) - _LISTED
    return [*numbers[:_LISTED], f"{more} more"] if more > 0 else numbers


def choices_problem(place: str, choices: Any, source: Any) -> str | None:
    """Whether what `doc_to_choice`, given as `source`, made of a row is a list of texts."""
    if isinstance(choices, Mapping):
        lists = [name for name, value in choices.items() if isinstance(value, list)] or list(choices)
        return (
            f"the choices of {place} are a record of {_and(choices)}, and no list; name the list in it: "
            f"doc_to_choice: {_expression(source, f'.{lists[0]}' if lists else '')}"
        )
    if not isinstance(choices, list | tuple):
        return (
            f"the choices of {place} are {shown(choices)}, and no list of texts; name a column of lists, or print a "
            'list, in which each text is quoted as it needs: doc_to_choice: "{{[first, second]}}"'
        )
    if not choices:
        return f"{place} has no choices; correct doc_to_choice, or take the row out of the data"
    for number, choice in enumerate(choices):
        if problem := _choice_problem(choice, source):
            return f"choice {number} of {place} is {shown(choice)}, {problem}"
    return None


def _choice_problem(choice: Any, source: Any) -> str | None:
    if choice == "":
        return "an empty text, and a model gives no likelihood to nothing; give it words, or take it out"
    if isinstance(choice, str):
        return None
    if isinstance(choice, bool):
        return (
            "which is no text: YAML takes no, off, false, yes, on and true for truth values; write them in quotes, "
            "e.g. doc_to_choice: ['no', 'yes']"
        )
    if isinstance(choice, Mapping):
        field = next(iter(choice), "text")
        return (
            f"a record and no text; take a field of each: {_expression(source, f' | map(attribute={field!r}) | list')}"
        )
    if is_null(choice):
        return "an empty cell and no text; correct doc_to_choice, or take the row out of the data"
    return f"which is no text; write it in quotes, or print texts: {_expression(source, _TEXTS)}"


def question_problem(place: str, question: Any, choices: Sequence[str] | None, *, numbered: bool) -> str | None:
    """Whether a question is a text or, with `numbered`, where the choices are the questions, the number of one."""
    number = isinstance(question, int) and not isinstance(question, bool)
    if numbered and not (number and choices is not None and 0 <= question < len(choices)):
        return (
            f"the question of {place} is {shown(question)}, but that of the first row is the number of a choice: "
            "digits alone are read as such a number where there are choices; have doc_to_text print more than the "
            "digits, e.g. a 'Q: ' before them, or the number of a choice for every row"
        )
    if numbered or isinstance(question, str):
        return None
    if number and choices:
        return (
            f"the question of {place} is {question}: digits alone are read as the number of a choice where there are "
            "choices; have doc_to_text print more than the digits, e.g. a 'Q: ' before them"
        )
    return (
        f"the question of {place} is {shown(question)}, which is no text; make it one, e.g. with a template in "
        'doc_to_text such as "{{question}}"'
    )


def target_problem(
    place: str, target: Any, choices: Sequence[str] | None, kind: str, *, numbered: bool = False
) -> str | None:
    """Whether the right answer of a row that has one can be compared with what a model of `kind` answers."""
    if choices is None or numbered or kind == "loglikelihood":
        texts = target if isinstance(target, list | tuple) and kind == "generate_until" else [target]
        if all(isinstance(text, str) for text in texts):
            return None
        if numbered:
            return (
                f"the right answer of {place} is {shown(target)} and no text, but the question of the first row is the "
                "number of a choice: digits alone are read as such a number where there are choices; have doc_to_text "
                "print more than the digits, e.g. a 'Q: ' before them"
            )
        return (
            f"the right answer of {place} is {shown(target)}, which is neither a text nor a list of texts; print it "
            'as a text: doc_to_target: "{{answer}}"'
        )
    several = isinstance(target, list | tuple) and kind == "multiple_choice"
    for one in target if several else [target]:
        if isinstance(one, int):  # a truth value too, as in lm-eval
            if not 0 <= one < len(choices):
                return (
                    f"the right answer of {place} is the label {int(one)}, the number of none of its "
                    f"{len(choices)} choices, counted from 0; correct doc_to_target or doc_to_choice, or take rows "
                    "without a label out with process_docs"
                )
        elif isinstance(one, str) and kind == "multiple_choice" and not several:
            if one not in choices:
                return (
                    f"the right answer of {place} is {shown(one)}, which is none of its choices "
                    f"{shown(list(choices))}{_nearest_choice(one, choices)}; correct doc_to_target or doc_to_choice"
                )
        else:
            text = " or the text" if kind == "multiple_choice" and not several else ""
            return (
                f"the right answer of {place} is {shown(target)}, where the number{text} of a choice belongs "
                f"({shown(list(choices))}); correct doc_to_target"
            )
    return None


def _nearest_choice(answer: str, choices: Sequence[str]) -> str:
    same = [choice for choice in choices if choice.strip().casefold() == answer.strip().casefold()]
    near = same or difflib.get_close_matches(answer, choices, n=1, cutoff=0.5)
    return f" (the nearest is {shown(near[0])})" if near else ""


def unlike_the_first(place: str, target: Any, *, several: bool) -> str | None:
    """Whether a row has a list of right answers and the first row one, or the reverse.

    lm-eval looks at the first row alone, and would take the letters of a text for so many answers.
    """
    if isinstance(target, list | tuple) == several:
        return None
    here, first = ("one right answer", "a list") if several else ("a list of right answers", "one")
    return (
        f"{place} has {here} ({shown(target)}) and the first row {first}; have doc_to_target make a list for every "
        "row, or one answer"
    )


def digits_problem(place: str, target: int, choices: Sequence[str]) -> str | None:
    """Whether a text of digits, read as the number of a choice, is itself another choice."""
    digits = str(int(target))
    if digits not in choices or (0 <= target < len(choices) and choices[target] == digits):
        return None
    return (
        f"the right answer of {place} is the text '{digits}', which is one of its choices {shown(list(choices))}, but "
        "a template's digits are read as the number of a choice; name the column in place of the template for the "
        'text, or print a number, e.g. "{{answer|int}}", for the number'
    )


def _and(names: Iterable[Any]) -> str:
    *most, last = map(str, names)
    return f"{', '.join(most)} and {last}" if most else last


def _expression(source: Any, then: str) -> str:
    """A template that goes on from the column that a YAML names."""
    column = source if isinstance(source, str) and source.isidentifier() else "choices"
    return f'"{{{{{column}{then}}}}}"'
