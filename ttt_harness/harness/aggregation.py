"""`Aggregation`: a task's aggregation function that says what failed and where; `Aggregations`: all of a task's."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.metrics import mean

from ttt_harness import patches
from ttt_harness.harness.scoring import Scoring, no_score
from ttt_harness.harness.user_code import user_code

_log = logging.getLogger(__name__)


class Aggregation:
    """An aggregation function whose errors, and those of its standard error, are one sentence and part of the scoring.

    lm-eval computes a standard error by what the function is, so it gets the function that is wrapped here.
    """

    def __init__(self, function: Callable[[Sequence[Any]], Any], metric: str, task: str, scoring: Scoring) -> None:
        patches.apply("lm_eval: standard errors", of_wrapped)
        self.function, self.metric, self.task, self.scoring = function, metric, task, scoring

    def __call__(self, values: Sequence[Any]) -> Any:
        """Aggregate the scores of all documents.

        Raises:
            DataError: the function raised something; see `Scoring.attempt`.
        """
        return self._attempt(self.function, "the aggregation", values)

    def standard_error(self, values: Sequence[Any], estimate: Callable[[Sequence[Any]], Any]) -> Any:
        """The standard error that lm-eval's `estimate` gives for the scores of all documents.

        Raises:
            DataError: it raised something; see `Scoring.attempt`.
        """
        return self._attempt(estimate, "the standard error", values)

    def _attempt(self, compute: Callable[[Sequence[Any]], Any], what: str, values: Sequence[Any]) -> Any:
        where = f"{what} of the metric {self.metric} over {len(values)} scores"
        with self.scoring.attempt(), user_code(self.task, where):
            return compute(values)
        return no_score(values)


class Aggregations(dict[str, Aggregation]):
    """A task's aggregations by metric; of a metric that has none the mean, as lm-eval takes it."""

    def __init__(self, functions: Mapping[str, Callable[[Sequence[Any]], Any]], task: str, scoring: Scoring) -> None:
        super().__init__({metric: Aggregation(of, metric, task, scoring) for metric, of in functions.items()})
        self.task, self.scoring = task, scoring

    def __missing__(self, metric: str) -> Aggregation:
        _log.warning("%s: the metric %s has no aggregation; its mean is taken.", self.task, metric)
        self[metric] = Aggregation(mean, metric, self.task, self.scoring)
        return self[metric]


def of_wrapped(standard_error_of: Callable[..., Any]) -> Callable[..., Any]:
    """Have lm-eval's `stderr_for_metric` look at the function within an `Aggregation`."""

    def stderr_for_metric(metric: Any, bootstrap_iters: int) -> Any:
        if not isinstance(metric, Aggregation):
            return standard_error_of(metric, bootstrap_iters)
        estimate = standard_error_of(metric.function, bootstrap_iters)
        return None if estimate is None else lambda values: metric.standard_error(values, estimate)

    return stderr_for_metric
