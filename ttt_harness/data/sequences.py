"""From a support set to training sequences: permuted in-context texts, then token ids and labels.

A `SupportSet` is what a request carries: the demonstrations of its task, cut into the very pieces of text that
lm-eval joins to a prompt. A training text is a prompt up to the end of its last demonstration, under a permutation of
the demonstrations. It is tokenized whole, as a prompt is, and the answers are found again by their offsets.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from ttt_harness.data.masks import label_mask
from ttt_harness.errors import DataError

# text -> (token ids, [(first character, one past the last)] of each token), special tokens included
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True)
class Demonstration:
    """One example with its answer, as it stands in a prompt: `question + answer + ending`."""

    question: str
    answer: str
    ending: str


@dataclass(frozen=True)
class SupportSet:
    """The demonstrations of a task, in drawn order, and the text before them."""

    description: str
    demonstrations: tuple[Demonstration, ...]

    @property
    def digest(self) -> str:
        """A hash of the texts, equal for equal support sets."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class AnnotatedText:
    """A training text, the character spans of its answers, and the text that would follow it in a prompt."""

    text: str
    answers: tuple[tuple[int, int], ...]
    continuation: str


@dataclass(frozen=True)
class TrainingSequence:
    """Token ids and, for each, whether the model is trained to predict it. Both have shape [tokens]."""

    tokens: tuple[int, ...]
    labelled: tuple[bool, ...]


def permutations(k: int, count: int, *, seed: int, shuffle: bool = True) -> list[tuple[int, ...]]:
    """`count` orders of k demonstrations, drawn with `seed`; no two are equal as long as k! allows.

    With `shuffle=False` each is the drawn order (0, 1, ..., k - 1).
    """
    drawn_order = tuple(range(k))
    if not shuffle:
        return [drawn_order] * count
    rng = random.Random(seed)
    distinct = math.factorial(k)
    orders: list[tuple[int, ...]] = []
    seen: set[tuple[int, ...]] = set()
    while len(orders) < count:
        if len(seen) == distinct:
            seen.clear()
        order = tuple(rng.sample(drawn_order, k))
        if order not in seen:
            seen.add(order)
            orders.append(order)
    return orders


def in_context_text(support: SupportSet, order: Sequence[int]) -> AnnotatedText:
    """Join the description and the demonstrations in `order`, as in a prompt.

    An answer's span includes the ending after it, since a model that is to stop there has to learn it.
    """
    text, answers = support.description, []
    for index in order:
        demonstration = support.demonstrations[index]
        text += demonstration.question
        start = len(text)
        text += demonstration.answer + demonstration.ending
        answers.append((start, len(text)))
    return AnnotatedText(text, tuple(answers), continuation=support.demonstrations[order[0]].question)


def tokenize(annotated: AnnotatedText, encode: Encode, *, loss_on: str) -> TrainingSequence:
    """Tokenize a training text exactly as the head of a longer prompt, and label its tokens.

    The text is tokenized together with what would follow it, and cut off again: a tokenizer may merge the ending of
    the last demonstration differently at the end of a text.

    Raises:
        DataError: no token of an answer is left to train on.
    """
    end = len(annotated.text)
    ids, offsets = encode(annotated.text + annotated.continuation)
    # A token that reaches into the continuation is not one that every prompt has.
    keep = next((index for index, (_, stop) in enumerate(offsets) if stop > end), len(offsets))
    labelled = label_mask(offsets[:keep], annotated.answers, loss_on=loss_on)
    if not any(labelled):
        raise DataError(
            f"no token to train on (loss_on={loss_on}): the answers of the demonstrations tokenize to nothing."
        )
    return TrainingSequence(tuple(ids[:keep]), tuple(labelled))


def in_context_sequences(
    support: SupportSet, encode: Encode, *, num_permutations: int, shuffle: bool, seed: int, loss_on: str
) -> list[TrainingSequence]:
    """The training sequences of test-time training: one for each permutation of the demonstrations."""
    orders = permutations(len(support.demonstrations), num_permutations, seed=seed, shuffle=shuffle)
    made = {
        order: tokenize(in_context_text(support, order), encode, loss_on=loss_on) for order in dict.fromkeys(orders)
    }
    return [made[order] for order in orders]


def single_pair_sequences(support: SupportSet, encode: Encode, *, loss_on: str) -> list[TrainingSequence]:
    """The training sequences of end-to-end fitting: each demonstration alone, as in a zero-shot prompt."""
    texts = (in_context_text(support, [index]) for index in range(len(support.demonstrations)))
    return [tokenize(text, encode, loss_on=loss_on) for text in texts]
