"""`Scoring`: what becomes of a task whose answers cannot be scored, so that the others are.

lm-eval scores all tasks in one loop, and an error in one of them would lose the scores of all. A task that fails here
has no score (NaN), and lm-eval's command ends with its error after the others are scored and written.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ttt_harness.errors import TTTError
from ttt_harness.harness.results import tell_at_the_end


class Scoring:
    """The scoring of one task's answers.

    Attributes:
        failed: it has failed; what is left of it is not to be done.
    """

    def __init__(self) -> None:
        self.failed = False
        self._begun = False

    def begin(self) -> None:
        """The answers are there. Until then an error is raised as usual: nothing is lost by it."""
        self._begun = True

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Do a part of the scoring; where it raises a `TTTError`, the task has failed.

        Raises:
            TTTError: nothing was answered yet, or no command of lm-eval's is there to tell it at the end.
        """
        try:
            yield
        except TTTError as error:
            if not self._begun:
                raise
            tell_at_the_end(error)
            self.failed = True


def no_score(_: Sequence[Any]) -> float:
    """The score of a task that could not be scored. lm-eval computes no standard error with a function of ours."""
    return math.nan
