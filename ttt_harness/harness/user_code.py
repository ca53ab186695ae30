"""What a task brings along: templates, `!function`s, metrics, aggregations and filters, and what they raise.

Whatever that is becomes one sentence:

    with user_code("h04 (tasks/h04.yaml)", "doc_to_target", row):
        target = render(row)
"""

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets.exceptions
import jinja2

from ttt_harness.errors import DataError, TTTError

_LONGEST = 200
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxdict = _short.maxlist = 8
_short.maxlevel = 3


class Row(dict[str, Any]):
    """A row of a data set that knows where it stands there.

    Attributes:
        split: the split, and whether `process_docs` came before; None for a demonstration that a YAML lists.
        number: its place in the split, counted from 1.
        demonstration: its place among the demonstrations, counted from 1; None where it is evaluated.
    """

    __slots__ = ("demonstration", "number", "split")

    def __init__(
        self, values: Mapping[str, Any], split: str | None, number: int, demonstration: int | None = None
    ) -> None:
        super().__init__(values)
        self.split, self.number, self.demonstration = split, number, demonstration

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        if self.split is None:
            return f"demonstration {self.number} of fewshot_config.samples"
        row = f"row {self.number} of the {self.split}"
        return f"demonstration {self.demonstration} ({row})" if self.demonstration else row


def shown(value: Any) -> str:
    """A value as messages quote it: as Python writes it, cut to about a line."""
    try:
        text = _short.repr(dict(value) if isinstance(value, Row) else value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def printable(text: str) -> str:
    """A text in which control characters stand as Python writes them, so that none reaches a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def own_words(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, without its full stop.

    An error that only wraps another, or that comes of a second try to call the same function, is told by the first.
    """
    error = _first_cause(error)
    try:
        said = error.message if isinstance(error, jinja2.TemplateError) else str(error)
    except Exception:  # of a user's own class
        said = ""
    line = next((line.strip() for line in (said or "").splitlines() if line.strip()), "").rstrip(".")
    line = printable(line)
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _first_cause(error: BaseException) -> BaseException:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return _first_cause(error.__cause__)
    # lm-eval calls a metric in another way after a TypeError, whose cause may be a mistyped argument.
    again = isinstance(error, TypeError) and isinstance(error.__context__, TypeError) and error.__cause__ is None
    return _first_cause(error.__context__) if again and error.__context__ is not None else error


@contextmanager
def user_code(task: str, what: str, row: Row | None = None, remedy: str = "") -> Iterator[None]:
    """Turn whatever `what` of a task raises into one sentence.

    Args:
        task: the task and its YAML, as messages name it.
        what: the YAML's key, or what else is being run.
        row: what it is run on.
        remedy: what to do about it; by default, to correct it or to take the row out.

    Raises:
        DataError: `what` raised something. A `TTTError` stays what it is, and names the task.
    """
    try:
        yield
    except TTTError as error:
        if task in str(error):
            raise
        raise type(error)(f"{task}: {error}") from error
    except (Exception, SystemExit) as error:  # a function that exits would end the run without a word
        on, out = "", ""
        if row is not None:
            on, out = f" for {row.place}, {shown(row)}", ", or take the row out of the data"
        if isinstance(error, jinja2.TemplateError) and row is not None:
            out = f" (the row's columns are {', '.join(map(str, row))}){out}"
        raise DataError(f"{task}: {what} fails{on} ({own_words(error)}); {remedy or f'correct it{out}'}.") from error
