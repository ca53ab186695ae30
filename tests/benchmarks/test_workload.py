"""Both pipelines are given what the project's own tasks make, and are scored as those score."""

import pytest

from benchmarks.workload import Tokenizer, Workload
from ttt_harness.config import TTTConfig

TASK = "procedural_ttt_boolean_expressions"


@pytest.fixture(scope="module")
def workload(tiny_model):
    config = TTTConfig(k=3, num_permutations=5)
    names = [TASK, "procedural_ttt"]
    return Workload(Tokenizer(tiny_model), names, limit=6, config=config, generation_budget="full")


def test_prompts_begin_like_the_training_sequences(workload):
    (work,) = workload.tasks([TASK])
    assert len(work.sequences) == 5
    assert len(work.requests) == 6
    heads = {request.tokens[: len(work.sequences[0].tokens)] for request in work.requests}
    assert len(heads) == 1  # the same demonstrations
    assert all(sorted(sequence.tokens) == sorted(*heads) for sequence in work.sequences)  # in other orders
    assert work.train_tokens == sum(len(sequence.tokens) for sequence in work.sequences)
    assert all(request.stop == ("\nQ:",) and request.text.endswith("\nA:") for request in work.requests)


def test_answers_are_scored_by_the_task(workload):
    (work,) = workload.tasks([TASK])
    right = [f" {instance.doc['target']}\n\n" for instance in work.task.instances]
    wrong = ["Perhaps"] * len(right)
    assert work.accuracy(right) == 1
    assert work.accuracy(wrong) == 0
    assert work.accuracy(right[:3] + wrong[3:]) == 0.5
    assert work.accuracy(right[:2]) == 1  # where only some were asked


def test_a_group_stands_for_its_tasks(workload):
    names = [work.name for work in workload.tasks(["procedural_ttt", TASK])]
    assert len(names) == len(set(names)) == 8
    assert TASK in names
