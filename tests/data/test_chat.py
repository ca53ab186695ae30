"""Training texts through chat templates of several kinds: heads of prompts, with the loss on the replies."""

import pytest
from transformers import AutoTokenizer

from ttt_harness.data.chat import asked_text, conversation_text
from ttt_harness.data.sequences import in_context_sequences, single_pair_sequences, tokenize
from ttt_harness.data.support import Demonstration, SupportSet
from ttt_harness.errors import DataError

TURNS = "{% for m in messages %}<{{m.role}}>{{m.content}}</s>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "plain": TURNS + ASK,
    "with bos, trimming": "<s>" + TURNS.replace("m.content", "m.content|trim") + ASK,
    "ends with eos": TURNS.replace("</s>", "<end>") + ASK + "{% if not add_generation_prompt %}</s>{% endif %}",
    "default system turn": "{% if messages[0].role != 'system' %}<system>Be good.</s>\n{% endif %}" + TURNS + ASK,
    "system in the last turn": (
        "<s>{% set head = messages[0].content + '\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{ head if loop.last else '' }}{{m.content}}[/I]"
        "{% elif m.role == 'assistant' %}{{m.content}}</s>{% endif %}{% endfor %}"
    ),
}
PAIRS = [("Is 1 odd?", "yes"), ("assistant", "a"), ("Is 2 odd?", "no, it is even"), ("A drum?", "3")]
SUPPORT = SupportSet(
    "Answer.",
    tuple(Demonstration(f"{q} It is ", a, "\n\n", turn=q, prefix="It is ") for q, a in PAIRS),
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def encode(tokenizer):
    def encode(text):
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return encoding.input_ids, encoding.offset_mapping

    return encode


@pytest.fixture(params=TEMPLATES)
def render(request, tokenizer):
    template = TEMPLATES[request.param]

    def render(messages, asked):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asked, chat_template=template
        )

    return render


def turns(*texts, head="Answer."):
    roles = ["user", "assistant"] * len(texts)
    spoken = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": head}, *spoken]


def labelled_runs(tokenizer, sequence):
    runs, before = [], False
    for token, labelled in zip(sequence.tokens, sequence.loss_mask, strict=True):
        if labelled:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = labelled
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_a_conversation_is_the_head_of_every_prompt_and_its_replies_carry_the_loss(tokenizer, encode, render, order):
    annotated = conversation_text(SUPPORT, order, render)
    sequence = tokenize(annotated, encode, loss_on="outputs")
    for question in ("Is 3 odd?", "[ < ("):
        said = [text for index in order for text in (PAIRS[index][0], "It is " + PAIRS[index][1])]
        prompt = render(turns(*said, question), True)
        assert prompt.startswith(annotated.text)
        assert tuple(encode(prompt)[0][: len(sequence.tokens)]) == sequence.tokens
    assert [annotated.text[slice(*span)] for span in annotated.targets] == [PAIRS[index][1] for index in order]
    end = "<end>" if "<end>" in annotated.text else "</s>"
    runs = labelled_runs(tokenizer, sequence)
    assert [run.strip() for run in runs] == [PAIRS[index][1] + end for index in order]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (1,)])
def test_a_single_turn_asks_the_last_question_and_is_followed_by_its_answer(tokenizer, encode, render, order):
    annotated = asked_text(SUPPORT, order, render)
    *before, last = order
    asked = "".join(f"{PAIRS[index][0]} It is {PAIRS[index][1]}\n\n" for index in before) + PAIRS[last][0]
    prompt = render(turns(asked), True)
    assert annotated.text.startswith(prompt + "It is " + PAIRS[last][1])
    sequence = tokenize(annotated, encode, loss_on="outputs")
    assert [run.strip() for run in labelled_runs(tokenizer, sequence)][:-1] == [PAIRS[index][1] for index in before]
    (reply,) = labelled_runs(tokenizer, tokenize(annotated, encode, loss_on="last"))
    assert reply.strip() in (PAIRS[last][1] + "</s>", PAIRS[last][1] + "<end>")


def test_both_kinds_of_sequences_follow_the_support_set(encode, render):
    settings = {"num_permutations": 1, "shuffle": False, "seed": 0, "loss_on": "outputs", "render": render}
    made = {}
    for chat, text in (("multiturn", conversation_text), ("singleturn", asked_text)):
        support = SupportSet("Answer.", SUPPORT.demonstrations, chat)
        (made[chat],) = in_context_sequences(support, encode, **settings)
        assert made[chat] == tokenize(text(SUPPORT, (0, 1, 2, 3), render), encode, loss_on="outputs")
        pairs = single_pair_sequences(support, encode, loss_on="outputs", render=render)
        alone = [asked_text(SUPPORT, [index], render) for index in range(4)]
        assert pairs == [tokenize(text, encode, loss_on="outputs") for text in alone]
    assert made["multiturn"] != made["singleturn"]


def test_a_template_that_rewrites_replies_is_refused(tokenizer):
    def render(messages, asked):
        template = TURNS.replace("m.content", "m.content|upper") + ASK
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asked, chat_template=template
        )

    with pytest.raises(DataError, match="does not repeat the answers"):
        conversation_text(SUPPORT, (0, 1), render)
