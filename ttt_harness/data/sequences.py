"""From a support set to training sequences: permuted in-context texts, then token ids and a loss mask.

A training text is a prompt up to the end of its last demonstration, under a permutation of the demonstrations. It is
made by `support.py`, or by `chat.py` where the prompts go through a chat template. It is tokenized whole, as a prompt
is, and the answers are found again by their offsets.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ttt_harness.data.chat import asked_text, conversation_text
from ttt_harness.data.masks import loss_mask, spans_without_tokens
from ttt_harness.data.support import AnnotatedText, Render, SupportSet, in_context_text
from ttt_harness.errors import DataError

# text -> (token ids, [(first character, one past the last)] of each token), special tokens included
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True)
class TrainingSequence:
    """Token ids, and for each token whether the loss counts its prediction. Both have shape [tokens]."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]


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


def tokenize(annotated: AnnotatedText, encode: Encode, *, loss_on: str) -> TrainingSequence:
    """Tokenize a training text exactly as the head of a longer prompt, and mark the tokens of its loss.

    The text is tokenized together with what would follow it, and cut off again: a tokenizer may merge the ending of
    the last demonstration differently at the end of a text.

    Raises:
        DataError: no token of an answer is left to train on.
    """
    end = len(annotated.text)
    ids, offsets = encode(annotated.text + annotated.continuation)
    # A token that reaches into the continuation is not one that every prompt has.
    keep = next((index for index, (_, stop) in enumerate(offsets) if stop > end), len(offsets))
    mask = loss_mask(offsets[:keep], annotated.answers, loss_on=loss_on)
    lost = [annotated.text[slice(*span)] for span in spans_without_tokens(offsets[:keep], annotated.targets)]
    if lost or not any(mask):
        raise DataError(
            f"no token to train on (loss_on={loss_on}): the answers of the demonstrations tokenize to nothing"
            f"{f' ({lost[0]!r}, for one)' if lost else ''}; give them answers that the model's tokenizer knows "
            "(doc_to_target), or take these examples out of the data."
        )
    return TrainingSequence(tuple(ids[:keep]), tuple(mask))


def in_context_sequences(
    support: SupportSet,
    encode: Encode,
    *,
    num_permutations: int,
    shuffle: bool,
    seed: int,
    loss_on: str,
    render: Render | None = None,
) -> list[TrainingSequence]:
    """The training sequences of test-time training: one for each permutation of the demonstrations.

    `render` is the chat template, needed where `support.chat` is set.
    """
    orders = permutations(len(support.demonstrations), num_permutations, seed=seed, shuffle=shuffle)
    made = {
        order: tokenize(_annotate(support, order, render), encode, loss_on=loss_on) for order in dict.fromkeys(orders)
    }
    return [made[order] for order in orders]


def single_pair_sequences(
    support: SupportSet, encode: Encode, *, loss_on: str, render: Render | None = None
) -> list[TrainingSequence]:
    """The training sequences of end-to-end fitting: each demonstration alone, as in a zero-shot prompt."""
    texts = (_annotate(support, [index], render, alone=True) for index in range(len(support.demonstrations)))
    return [tokenize(text, encode, loss_on=loss_on) for text in texts]


def _annotate(
    support: SupportSet, order: Sequence[int], render: Render | None, *, alone: bool = False
) -> AnnotatedText:
    if support.chat is None:
        return in_context_text(support, order)
    assert render is not None, "a chat needs its template"
    make = conversation_text if support.chat == "multiturn" and not alone else asked_text
    return make(support, order, render)
