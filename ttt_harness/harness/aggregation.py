"""`Aggregation`: a task's aggregation function that says what failed and where."""

from collections.abc import Callable, Sequence
from typing import Any

from ttt_harness.harness.scoring import Scoring, no_score
from ttt_harness.harness.user_code import user_code


class Aggregation:
    """An aggregation function whose errors are one sentence, and part of the task's scoring.

    It equals the function it wraps, since lm-eval looks up by the function how its standard error is computed.
    """

    def __init__(self, function: Callable[[Sequence[Any]], Any], metric: str, task: str, scoring: Scoring) -> None:
        self.function, self.metric, self.task, self.scoring = function, metric, task, scoring

    def __call__(self, values: Sequence[Any]) -> Any:
        """Aggregate the scores of all documents.

        Raises:
            DataError: the function raised something; see `Scoring.attempt`.
        """
        what = f"the aggregation of the metric {self.metric} over {len(values)} scores"
        with self.scoring.attempt(), user_code(self.task, what):
            return self.function(values)
        return no_score(values)

    def __eq__(self, other: object) -> bool:
        return self.function == (other.function if isinstance(other, Aggregation) else other)

    def __hash__(self) -> int:
        return hash(self.function)
