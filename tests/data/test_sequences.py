"""Training sequences: permutations, the tokens a prompt has, and masks."""

import itertools
import random

import pytest
from transformers import AutoTokenizer

from ttt_harness.data.masks import loss_mask, spans_without_tokens
from ttt_harness.data.sequences import in_context_sequences, permutations, single_pair_sequences, tokenize
from ttt_harness.data.support import Demonstration, SupportSet, in_context_text
from ttt_harness.errors import DataError

SUPPORT = SupportSet(
    "Evaluate the result.\n\n",
    tuple(
        Demonstration(f"Q: {question}\nA: ", answer, "\n\n")
        for question, answer in [("not True", "False"), ("[ <", "> ]"), ("2 apples", "2"), ("naïve", "é")]
    ),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def encode(tokenizer):
    def encode(text):
        encoding = tokenizer(text, return_offsets_mapping=True)
        return encoding.input_ids, encoding.offset_mapping

    return encode


def test_masks_are_what_their_definition_says_of_each_token_and_span():
    rng = random.Random(0)
    for _ in range(300):
        cuts = sorted(rng.sample(range(1, 30), rng.randint(2, 12)))
        tokens = [(0, 0), *itertools.pairwise([0, *cuts]), (0, 0)]  # special tokens stand for no characters
        if rng.random() < 0.5:
            tokens.insert(3, tokens[2])  # one character in two tokens
        borders = sorted(rng.sample(range(35), 6))
        spans = [(borders[0], borders[1]), (borders[2], borders[3]), (borders[4], borders[5])]
        expected = [
            index > 0 and stop > 0 and any(start < stop <= end for start, end in spans)
            for index, (_, stop) in enumerate(tokens)
        ]
        assert loss_mask(tokens, spans, loss_on="outputs") == expected
        assert sum(loss_mask(tokens, spans, loss_on="all")) == len(tokens) - 2
        assert spans_without_tokens(tokens, spans) == [
            (start, end) for start, end in spans if not any(a < end and start < b and a < b for a, b in tokens)
        ]


def test_permutations_are_repeatable_and_distinct_as_long_as_there_are_others():
    orders = permutations(4, 24, seed=1)
    assert len(set(orders)) == 24
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert orders == permutations(4, 24, seed=1) != permutations(4, 24, seed=2)
    assert len(permutations(2, 5, seed=1)) == 5


def test_without_shuffling_every_sequence_is_in_drawn_order():
    assert permutations(3, 4, seed=1, shuffle=False) == [(0, 1, 2)] * 4


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_a_training_sequence_is_the_head_of_every_prompt(tokenizer, encode, order):
    annotated = in_context_text(SUPPORT, order)
    sequence = tokenize(annotated, encode, loss_on="outputs")
    for question in ("Q: not ( True )\nA:", "Q: I have\nA:"):
        prompt = tokenizer(annotated.text + question).input_ids
        assert tuple(prompt[: len(sequence.tokens)]) == sequence.tokens
    assert tokenizer.decode(sequence.tokens) == annotated.text


def labelled_texts(tokenizer, sequence):
    """The labelled tokens as texts, one for each run of them."""
    runs, open_run = [], False
    for token, labelled in zip(sequence.tokens, sequence.loss_mask, strict=True):
        if labelled and not open_run:
            runs.append([])
        if labelled:
            runs[-1].append(token)
        open_run = labelled
    return [tokenizer.decode(run) for run in runs]


def test_loss_on_outputs_labels_each_answer_with_its_ending(tokenizer, encode):
    (sequence,) = in_context_sequences(SUPPORT, encode, num_permutations=1, shuffle=False, seed=0, loss_on="outputs")
    assert [text.strip() for text in labelled_texts(tokenizer, sequence)] == ["False", "> ]", "2", "é"]
    assert all(text.endswith("\n\n") for text in labelled_texts(tokenizer, sequence))


def test_loss_on_last_labels_the_last_answer_of_the_permutation(tokenizer, encode):
    for order in permutations(4, 5, seed=3):
        sequence = tokenize(in_context_text(SUPPORT, order), encode, loss_on="last")
        (text,) = labelled_texts(tokenizer, sequence)
        assert text.strip() == SUPPORT.demonstrations[order[-1]].answer


def test_masks_partition_the_tokens(encode):
    rng = random.Random(0)
    for _ in range(20):
        order = tuple(rng.sample(range(4), 4))
        annotated = in_context_text(SUPPORT, order)
        masks = {on: tokenize(annotated, encode, loss_on=on).loss_mask for on in ("all", "outputs", "last")}
        assert masks["all"] == (False,) + (True,) * (len(masks["all"]) - 1)
        assert all(a or not b for a, b in zip(masks["outputs"], masks["last"], strict=True))
        # Each answer's tokens are found, and no answer shares a token with another.
        pieces = [
            tokenize(
                type(annotated)(annotated.text, (span,), annotated.continuation), encode, loss_on="outputs"
            ).loss_mask
            for span in annotated.answers
        ]
        assert [sum(column) for column in zip(*pieces, strict=True)] == [int(m) for m in masks["outputs"]]


def test_single_pairs_are_zero_shot_prompts_with_their_answer(tokenizer, encode):
    sequences = single_pair_sequences(SUPPORT, encode, loss_on="outputs")
    assert [tokenizer.decode(s.tokens) for s in sequences] == [
        SUPPORT.description + d.question + d.answer + d.ending for d in SUPPORT.demonstrations
    ]


def test_a_special_token_at_the_start_is_never_labelled(tokenizer):
    def encode_with_bos(text):
        encoding = tokenizer(text, return_offsets_mapping=True)
        return [tokenizer.bos_token_id, *encoding.input_ids], [(0, 0), *encoding.offset_mapping]

    sequence = tokenize(in_context_text(SUPPORT, (0, 1, 2, 3)), encode_with_bos, loss_on="all")
    assert sequence.loss_mask[0] is False
    assert sequence.loss_mask[1] is True


def test_answers_without_a_token_are_refused(encode):
    empty = SupportSet("", (Demonstration("Q: x\nA:", "", ""),))
    with pytest.raises(DataError, match="tokenize to nothing"):
        single_pair_sequences(empty, encode, loss_on="outputs")
