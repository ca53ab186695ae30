"""How the authors of BIG-Bench Extra Hard score an answer, as an lm-eval filter, a metric and a group's mean.

The rules are those of Kazemi et al. (arXiv 2502.19187) and of their code (github.com/google-deepmind/bbeh at 80d12ca).
A task YAML names the filter `bbeh_answer` and `score_bbeh` as its `process_results`, which makes the filter known.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

from ttt_harness.harness.filters import vote

PREFIXES = ("The answer is:", "The answer is ", "The final answer is:", "The final answer is ")
WRAPPERS = ("boxed{", "text{", "texttt{")


def extract_bbeh_answer(text: str) -> str:
    """Cut the answer out of a generated text.

    It follows the last of `PREFIXES`, or is all of the text. A final full stop, `$...$`, one of `WRAPPERS` and `**` do
    not belong to it. Of several lines the first counts; case does not, and "a, b" is "a,b".
    """
    start = max((place + len(prefix) for prefix in PREFIXES if (place := text.rfind(prefix)) >= 0), default=0)
    answer = text[start:].strip().removesuffix(".")
    if len(answer) > 1 and answer.startswith("$") and answer.endswith("$"):
        answer = answer[1:-1]
    for wrapper in WRAPPERS:
        _, opened, inside = answer.partition(wrapper)
        if opened and answer.endswith("}"):
            answer = inside[:-1]
    return _normal(answer).replace("**", "").partition("\n")[0].strip().removesuffix(".")


def _normal(answer: str) -> str:
    return answer.strip().lower().replace(", ", ",")


def is_right(answer: str, target: str) -> bool:
    """Whether an extracted answer counts as the target.

    It does if the two are equal, are equal numbers, or differ only in the brackets of `(a)`, in apostrophes, in square
    brackets around one of them, or in a question mark behind the answer.
    """
    target = _normal(target)
    return (
        answer == target
        or _letter(answer) == _letter(target)
        or _equal_numbers(answer, target)
        or answer.replace("'", "") == target.replace("'", "")
        or answer in (f"[{target}]", f"{target}?")
        or target == f"[{answer}]"
    )


def _letter(answer: str) -> str:
    return answer[1] if len(answer) == 3 and answer[0] == "(" and answer[2] == ")" else answer


def _equal_numbers(answer: str, target: str) -> bool:
    try:
        return float(answer) == float(target)
    except ValueError:
        return False


def score_bbeh(doc: dict[str, Any], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Score one document; lm-eval calls it as `process_results`.

    Args:
        doc: the document; its `target` is the right answer.
        results: filtered answers, one entry for each request of the document. Several are put to the vote.

    Returns:
        `{"acc": 1.0}` if the answer counts as the target, else 0.0.
    """
    return {"acc": float(is_right(vote(results), doc["target"]))}


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """The harmonic mean of accuracies from 0 to 1, to each of which one percent is added, as the authors report it.

    A task without a right answer would make it 0 otherwise. What is added is not taken away again: the mean of tasks
    that are all at 0 is 0.01.
    """
    return len(accuracies) / math.fsum(1 / (accuracy + 0.01) for accuracy in accuracies)


@register_filter("bbeh_answer")
class BBEHAnswerFilter(Filter):
    """Applies `extract_bbeh_answer` to every response."""

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:  # noqa: ARG002
        """Map the responses of each request to their answers, keeping order and number."""
        return [[extract_bbeh_answer(text) for text in texts] for texts in resps]
