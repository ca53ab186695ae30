"""From generated text to a score: the answer rules of the published BBH figures, as an lm-eval filter and metric.

A task YAML names the filter `bbh_answer` with one of the rules in its `filter_list`, and `score_answer` as its
`process_results`. The latter also makes the filter known to lm-eval, which imports this module to resolve the name.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

from ttt_harness.errors import ConfigError

Rule = Literal["word", "sequence", "letter"]


def extract_answer(text: str, rule: Rule) -> str:
    """Cut the answer out of a generated text.

    The rules cost "-12" nothing but cut "3.5" to "3" and, in a sequence, "a-b" to "a". They stay as they are because
    the published figures were computed with them.

    Args:
        text: what the model generated after `A:`.
        rule: `word` keeps the first word. `sequence` (of words or brackets) keeps the first line, up to the first `-`.
            `letter` keeps the first word and writes anything that does not begin with `(` as its first character in
            parentheses. All three stop before the first `.`.

    Returns:
        The answer in lower case, without white space around it; empty where nothing is left.
    """
    answer = text.strip().lower()
    if rule == "sequence":
        line = answer.partition("\n")[0]
        answer = line.partition("-")[0]
    else:
        answer = next(iter(answer.split()), "")
    answer = answer.partition(".")[0].strip()
    if rule == "letter" and answer and not answer.startswith("("):
        answer = f"({answer[0]})"
    return answer


def majority(answers: Iterable[str]) -> str:
    """The most frequent answer; of several, the one that sorts first. Empty where there is none."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer), default="")


def vote(results: Iterable[str | Sequence[str]]) -> str:
    """The majority among the answers of one document: one entry for each request, a text or a list of texts."""
    return majority(answer for result in results for answer in ([result] if isinstance(result, str) else result))


def score_answer(doc: dict[str, Any], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Score one document; lm-eval calls it as `process_results`.

    Args:
        doc: the document; its `target` is the right answer.
        results: filtered answers, one entry for each request of the document: a text, or a list of texts where
            requests are repeated. Several answers are put to the vote.

    Returns:
        `{"acc": 1.0}` if the answer equals the target without regard to case and outer white space, else 0.0.
    """
    return {"acc": float(vote(results) == doc["target"].strip().lower())}


@register_filter("bbh_answer")
class AnswerFilter(Filter):
    """Applies `extract_answer` to every response, in a YAML as `{function: bbh_answer, rule: letter}`."""

    def __init__(self, rule: Rule, **kwargs: Any) -> None:
        if rule not in get_args(Rule):
            raise ConfigError(f"The filter bbh_answer has no rule {rule!r}: use one of {', '.join(get_args(Rule))}.")
        super().__init__(**kwargs)
        self.rule = rule

    def apply(self, resps: Iterable[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:  # noqa: ARG002
        """Map the responses of each request to their answers, keeping order and number."""
        return [[extract_answer(text, self.rule) for text in texts] for texts in resps]
