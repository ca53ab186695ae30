"""What a YAML's `doc_to_text`, `doc_to_target` and `doc_to_choice` make of a row.

They are read as lm-eval reads them, with these differences: a template is compiled once, a null that a target prints is
a null and not the text "None", and a text stays the text that it is. lm-eval takes what a template prints for a Python
literal where it can, so that the answer "[3, 4]" of a text column would become a list of numbers.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import utils

# Digits of the number of a choice; a longer number is a text.
_LONGEST_NUMBER = 9


def is_null(value: Any) -> bool:
    """Whether a cell is empty: None, or the NaN that tables of numbers have for it."""
    return value is None or (isinstance(value, float) and value != value)


class Template:
    """A jinja template in lm-eval's environment, compiled once, that also tells which values it prints."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._printed: list[Any] = []
        self._template = utils.env.overlay(finalize=self._note).from_string(source)

    def _note(self, value: Any) -> Any:
        self._printed.append(value)
        return value

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[Any]]:
        """The text, and the values that expressions put into it."""
        self._printed.clear()
        text = self._template.render(row)
        return text, list(self._printed)


class Fields:
    """Reads the fields of a task's rows.

    Args:
        columns: of the data set.
        numbered: the task has choices, so that digits are the number of one.
    """

    def __init__(self, columns: Sequence[str], *, numbered: bool) -> None:
        self.columns = frozenset(columns)
        self.numbered = numbered
        self._templates: dict[str, Template] = {}

    def text(self, source: str, row: Mapping[str, Any]) -> str:
        """What a template prints."""
        return self._template(source).render(row)[0]

    def question(self, source: str, row: Mapping[str, Any]) -> Any:
        """A question, or the number of a choice."""
        if source in self.columns:
            return row[source]
        text = self.text(source, row)
        return int(text) if self.numbered and _is_number(text) else text

    def target(self, source: str, row: Mapping[str, Any]) -> Any:
        """A right answer, a list of them, or numbers of choices; None where there is none."""
        if source in self.columns:
            return None if is_null(row[source]) else row[source]
        template = self._template(source)
        text, printed = template.render(row)
        if any(map(is_null, printed)):
            return None
        if self.numbered and _is_number(text):
            return int(text)
        written = not printed or template.source.lstrip().startswith("[")
        if written or any(isinstance(value, list | tuple) for value in printed):
            return self._list(text)
        return text

    def _list(self, text: str) -> Any:
        """A list that was printed as such; numbers that are no numbers of choices stay the text that they are."""
        value = _literal(text) if text.startswith("[") and text.endswith("]") else text
        if not isinstance(value, list):
            return text
        kinds = str | int if self.numbered else str
        return value if all(isinstance(item, kinds) for item in value) else text

    def choices(self, source: str, row: Mapping[str, Any]) -> Any:
        """What is to be a list of choices: the cell, or what the template prints, as a list where it is one."""
        if source in self.columns:
            return row[source]
        return _literal(self.text(source, row))

    def prints_digits(self, source: str, row: Mapping[str, Any]) -> bool:
        """Whether a template prints one text of digits and nothing else."""
        if source in self.columns:
            return False
        text, printed = self._template(source).render(row)
        return printed == [text]

    def _template(self, source: str) -> Template:
        if source not in self._templates:
            self._templates[source] = Template(source)
        return self._templates[source]


def _is_number(text: str) -> bool:
    """Whether a text is a number as a program writes it: no leading zeros, no other script's digits."""
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER and str(int(text)) == text


def _literal(text: str) -> Any:
    """The Python literal that a text is, or the text."""
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text
