"""Right or wrong by one forward pass is right or wrong by greedy decoding, step by step, with the same model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.tune.yes_no import FIT, loaded, prepared, write_tasks
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.run.local import trainer_of
from ttt_harness.tune.held_out import begin_of_greedy

WORDS = {1: " yes", 2: " no", 3: "\n", 4: "\n\n", 5: " indeed", 9: "</s>"}


def begin(likeliest, *, forced=(1, 3, 3, 9), until=("\n",), budget=8):
    def written(tokens):
        return "".join(WORDS[token] for token in tokens)

    return begin_of_greedy(forced, likeliest, written=written, until=until, ends={9}, budget=budget)


@pytest.mark.parametrize(
    ("likeliest", "known"),
    [
        ((1, 3, 3, 9), (" yes", True)),  # all as forced: it ends at the stop sequence
        ((1, 4, 3, 9), (" yes", True)),  # other tokens behind the answer that hold a stop sequence
        ((1, 9, 5, 5), (" yes", True)),  # an end token; what would follow it is not read
        ((1, 5, 3, 9), (" yes indeed", False)),  # it goes on
        ((2, 3, 3, 9), (" no", False)),  # another answer
        ((9, 3, 3, 9), ("", True)),
    ],
)
def test_what_one_pass_tells_of_a_greedy_answer(likeliest, known):
    assert begin(likeliest) == known


def test_a_budget_ends_an_answer():
    assert begin((1, 5, 3, 9), budget=1) == (" yes", True)
    assert begin((1, 1, 1, 9), forced=(1, 1, 1, 9), budget=2) == (" yes yes", True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def of(tiny_model, tasks):
    return loaded(tiny_model, tasks)


@pytest.fixture(scope="module")
def trainer(of):
    return trainer_of(replace(of.lm.arguments, config=FIT), of.lm.answering.dtype)


def greedy(trainer, state, prompt, count):
    """The tokens of greedy decoding, one forward pass for each."""
    tokens = list(prompt)
    for _ in range(count):
        mask = (False,) * len(tokens) + (True,)
        tokens.append(trainer.predict([TrainingSequence((*tokens, 0), mask)], state)[0].likeliest[0])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("task", ["whole", "first_word"])
def test_the_answer_of_one_pass_is_that_of_decoding(of, trainer, task):
    """With a model that has learned the form of the answers, and with one that has learned nothing."""
    answering, harness = of.lm.answering, of.tasks[task]
    until, seen = harness.config.generation_kwargs["until"], set()
    for fold in prepared(of, task).folds:
        if {(True, True), (True, False)} <= seen:
            break
        fit = trainer.fit(
            fold.sequences(FIT), batch_size=2, epochs=4, lr=3e-3, warmup_ratio=0.1, seed=1
        ).tune_state_dict
        for state in (fit, None):
            for question in fold.questions:
                (sequence,) = question.sequences
                prompt = sequence.tokens[: sequence.loss_mask.index(True)]
                text = answering.tokenizer.decode(greedy(trainer, state, prompt, 8)).partition("</s>")[0]
                for end in until:
                    text = text.partition(end)[0]
                doc = harness.fewshot_docs()[question.asked.demonstration]
                assert answering.tokenizer.decode(prompt).endswith(f"Q: is {doc['number']} large?\nA:")
                text = text.strip().split(" ")[0] if task == "first_word" else text
                wanted = doc["answer"].split(" ")[0] if task == "first_word" else doc["answer"]
                right = question.is_right(trainer.predict(question.sequences, state))
                assert right == (text.strip() == wanted), (text, doc)
                seen.add((state is fit, right))
    assert seen == {(True, True), (True, False), (False, False)}


def test_a_choice_is_right_as_lm_eval_scores_it(of):
    for fold in prepared(of, "chosen").folds:
        for question in fold.questions:
            doc = of.tasks["chosen"].fewshot_docs()[question.asked.demonstration]
            lengths = [sum(sequence.loss_mask) for sequence in question.sequences]
            for number, choice in enumerate(["yes", "no", "not at all"]):
                said = [
                    SimpleNamespace(log_probabilities=(-(1.0 + (place != number)) / n,) * n, likeliest=(0,) * n)
                    for place, n in enumerate(lengths)
                ]
                assert question.is_right(said) == (doc["answer"] == choice)


@pytest.mark.parametrize("task", ["whole", "chosen"])
def test_nothing_of_a_held_out_demonstration_is_trained_on_or_stands_before_it(of, task):
    for fold in prepared(of, task).folds:
        docs = of.tasks[task].fewshot_docs()
        held_out = {f"is {docs[question.asked.demonstration]['number']} large" for question in fold.questions}
        decode = of.lm.answering.tokenizer.decode
        for sequence in fold.sequences(FIT):
            assert not any(text in decode(sequence.tokens) for text in held_out)
        for question in fold.questions:
            for sequence in question.sequences:
                prompt = decode(sequence.tokens[: sequence.loss_mask.index(True)])
                assert sum(prompt.count(text) for text in held_out) == 1
                assert prompt.count("large?") == 7


def test_chats_are_asked_as_chats(tiny_model, tasks, tmp_path):
    import json
    import shutil

    model = tmp_path / "chat"
    shutil.copytree(tiny_model, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}#{{ m.role }} {{ m.content }}</s>{% endfor %}#assistant "
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    of = loaded(model, tasks, "--apply_chat_template", "--fewshot_as_multiturn")
    fold = prepared(of, "whole").folds[0]
    for question in fold.questions:
        (sequence,) = question.sequences
        start = sequence.loss_mask.index(True)
        text = of.lm.answering.tokenizer.decode(sequence.tokens[:start])
        assert text.count("#user") == 7
        assert text.endswith("#assistant ")
        answer = of.lm.answering.tokenizer.decode(sequence.tokens[start:])
        assert answer == of.tasks["whole"].fewshot_docs()[question.asked.demonstration]["answer"] + "</s>"
