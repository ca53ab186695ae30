"""`Aggregation`: a task's aggregation function that says what failed and where."""

from collections.abc import Callable, Sequence
from typing import Any

from ttt_harness.harness.user_code import user_code


class Aggregation:
    """An aggregation function whose errors are one sentence.

    It equals the function it wraps, since lm-eval looks up by the function how its standard error is computed.
    """

    def __init__(self, function: Callable[[Sequence[Any]], Any], metric: str, task: str) -> None:
        self.function, self.metric, self.task = function, metric, task

    def __call__(self, values: Sequence[Any]) -> Any:
        """Aggregate the scores of all documents.

        Raises:
            DataError: the function raised something.
        """
        with user_code(self.task, f"the aggregation of the metric {self.metric} over {len(values)} scores"):
            return self.function(values)

    def __eq__(self, other: object) -> bool:
        return self.function == (other.function if isinstance(other, Aggregation) else other)

    def __hash__(self) -> int:
        return hash(self.function)
