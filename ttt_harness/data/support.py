"""A task's demonstrations as texts: what a request carries, and a training text made of it.

A `SupportSet` holds the demonstrations of a task, cut into the very pieces of text that lm-eval joins to a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

# messages, whether the next reply is asked for -> text: a chat template
Render = Callable[[list[dict[str, str]], bool], str]
# each demonstration as two turns, or all of them in one
Chat = Literal["multiturn", "singleturn"]


@dataclass(frozen=True)
class Demonstration:
    """One example with its answer.

    question, answer, ending: the pieces in which it stands in a plain prompt, `question + answer + ending`.
    turn: the question alone, as the user's turn of a chat.
    prefix: what stands before the answer in a reply (`gen_prefix`); `question` ends with it.
    description: of the prompts that ask this example, where it is not that of the support set.
    """

    question: str
    answer: str
    ending: str
    turn: str = ""
    prefix: str = ""
    description: str | None = None


@dataclass(frozen=True)
class SupportSet:
    """The demonstrations of a task, in drawn order, and the text before them.

    chat: how prompts go through a chat template, if they do.
    source: the task and its file, for messages.
    """

    description: str
    demonstrations: tuple[Demonstration, ...]
    chat: Chat | None = None
    source: str = ""

    def head(self, last: Demonstration) -> str:
        """The text before the demonstrations in a prompt that asks `last`."""
        return self.description if last.description is None else last.description


@dataclass(frozen=True)
class AnnotatedText:
    """A training text and where its answers are.

    answers: the character spans of the answers, each with the ending after it.
    continuation: the text that would follow in a prompt.
    targets: the spans of the answers alone.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    continuation: str
    targets: tuple[tuple[int, int], ...] = ()


def in_context_text(support: SupportSet, order: Sequence[int]) -> AnnotatedText:
    """Join the description and the demonstrations in `order`, as in a plain prompt.

    An answer's span includes the ending after it, since a model that is to stop there has to learn it.
    """
    demonstrations = [support.demonstrations[index] for index in order]
    text, answers, targets = support.head(demonstrations[-1]), [], []
    for demonstration in demonstrations:
        text += demonstration.question
        start = len(text)
        text += demonstration.answer
        targets.append((start, len(text)))
        text += demonstration.ending
        answers.append((start, len(text)))
    return AnnotatedText(text, tuple(answers), demonstrations[0].question, tuple(targets))
