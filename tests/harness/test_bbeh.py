"""BIG-Bench Extra Hard: its authors' scoring, and that the YAMLs ask every example with three demonstrations.

`TTT_BBEH_DIR` names the data; without it, small files stand in for them.
"""

import json
import os
import random
import statistics
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from ttt_harness.harness.bbeh import extract_bbeh_answer, harmonic_mean, is_right, score_bbeh

FOLDER = Path(__file__).resolve().parents[2] / "task_configs" / "bbeh_ttt"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))
DATA = os.environ.get("TTT_BBEH_DIR")
needs_data = pytest.mark.skipif(DATA is None, reason="TTT_BBEH_DIR is not set: there is no BBEH to read")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        (" 42.\n\nMore", "42"),
        ("So. The answer is: (A).", "(a)"),
        ("The answer is 7. No: the final answer is 8. The answer is: 9", "9"),
        ("The final answer is: **Ambiguous**", "ambiguous"),
        ("The final answer is $5$.", "5"),
        ("The answer is: $\\boxed{12}$", "12"),
        ("The answer is: \\boxed{\\text{no}}", "no"),
        ("The answer is: \\texttt{[a, b]}", "[a,b]"),
        ("yes, no, yes", "yes,no,yes"),
        ("the answer is 3", "the answer is 3"),  # not with a small letter
        ("The answer is: first\nsecond", "first"),
        ("", ""),
        ("The answer is:", ""),
        ("$", "$"),
        ("3.5", "3.5"),
    ],
)
def test_the_answer_is_what_follows_the_last_prefix(text, answer):
    assert extract_bbeh_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("yes", "Yes", True),
        ("a", "(A)", True),
        ("(a)", "A", True),
        ("(b)", "A", False),
        ("(ab)", "ab", False),
        ("404", "404.0", True),
        ("2.180", "2.18", True),
        ("2.19", "2.18", False),
        ("yes,no,yes", "yes, no, yes", True),
        ("john's", "johns", True),
        ("[emma,lily]", "emma, lily", True),
        ("emma,lily", "[emma, lily]", True),
        ("really?", "Really", True),
        ("really", "really?", False),
        ("", "a", False),
        ("[]", "[]", True),
        ("nan", "7", False),
    ],
)
def test_what_counts_as_right(answer, target, right):
    assert is_right(answer, target) is right


def test_several_answers_are_put_to_the_vote():
    assert score_bbeh({"target": "(A)"}, ["a", ["(a)", "b"], "(a)"]) == {"acc": 1.0}
    assert score_bbeh({"target": "(A)"}, ["b", "b", "(a)"]) == {"acc": 0.0}


@pytest.mark.parametrize("accuracies", [[0.0, 0.0], [1.0, 1.0, 1.0], [0.1, 0.5, 0.9], [0.0, 1.0]])
def test_the_harmonic_mean_has_one_percent_added_to_each_task(accuracies):
    percent = statistics.harmonic_mean([100 * accuracy + 1 for accuracy in accuracies])
    assert harmonic_mean(accuracies) == pytest.approx(percent / 100)
    assert harmonic_mean(accuracies) <= statistics.fmean(accuracies) + 0.01 + 1e-9


def declared(name):
    """The task's own YAML as plain data."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader)


def examples_of(folder, name):
    return json.loads((Path(folder) / f"bbeh_{name}.json").read_text(encoding="utf-8"))["examples"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder in which every task has a few examples."""
    for name in NAMES:
        examples = [{"input": f"{name} {i}?", "target": f"({'ABC'[i % 3]})"} for i in range(9)]
        (tmp_path / f"bbeh_{name}.json").write_text(json.dumps({"examples": examples}), encoding="utf-8")
    monkeypatch.setenv("TTT_BBEH_DIR", str(tmp_path))
    return tmp_path


def manager(**metadata):
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)


def test_names_and_group_are_complete():
    assert len(NAMES) == 23
    for name in NAMES:
        config = declared(name)
        assert config["task"] == f"bbeh_ttt_{name}"
        assert config["dataset_kwargs"] == {"bbeh_task": name}
    assert declared("_bbeh_ttt")["task"] == [f"bbeh_ttt_{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [42, 7])
def test_prompts_hold_three_drawn_demonstrations(small, name, seed):
    examples = examples_of(small, name)
    random.Random(seed).shuffle(examples)
    task = manager(seed=seed).load([f"bbeh_ttt_{name}"])["tasks"][f"bbeh_ttt_{name}"]
    task.build_all_requests()
    prefix = "Answer each question with only the final answer.\n\n" + "".join(
        f"Q: {example['input']}\nA: {example['target']}\n\n" for example in examples[:3]
    )
    expected = [f"{prefix}Q: {example['input']}\nA:" for example in examples[3:]]
    assert [instance.args[0] for instance in task.instances] == expected


class Oracle(LM):
    """Right in every n-th task, in the authors' form."""

    def generate_until(self, requests, disable_tqdm=False):  # noqa: ARG002
        return [f"The answer is: **{r.doc['target']}**." if len(r.task_name) % 2 else "?" for r in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.mark.usefixtures("small")
def test_the_group_has_both_means_over_its_tasks():
    results = simple_evaluate(Oracle(), tasks=["bbeh_ttt"], task_manager=manager(), bootstrap_iters=0)
    scores = {name: result["acc,answer"] for name, result in results["results"].items()}
    mean = scores.pop("bbeh_ttt")
    assert scores == {f"bbeh_ttt_{name}": float(len(f"bbeh_ttt_{name}") % 2) for name in NAMES}
    assert mean == pytest.approx(statistics.fmean(scores.values()))
    found = results["groups"]["bbeh_ttt"]["acc_harmonic_mean,answer"]
    assert found == pytest.approx(harmonic_mean(list(scores.values())))
    assert found < mean
    assert json.loads(json.dumps(results, default=handle_non_serializable))["groups"]


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_of_the_real_data_every_answer_counts_and_fits_the_budget(name):
    examples, config = examples_of(DATA, name), declared(name)
    assert len(examples) == (120 if name == "disambiguation_qa" else 200)
    budget = config["generation_kwargs"]["max_gen_toks"]
    for example in examples:
        if example["target"].endswith("."):  # by the authors' rules no answer ends so, and none to this one is right
            assert name == "linguini"
            continue
        said = f" The answer is: {example['target']}"
        assert is_right(extract_bbeh_answer(said), example["target"])
        assert is_right(extract_bbeh_answer(f" {example['target']}\n"), example["target"])
        assert len(said.encode()) < budget
    if choices := config["metadata"].get("choices"):
        assert {example["target"] for example in examples} <= set(choices)


@needs_data
@pytest.mark.parametrize("seed", range(42, 47))
def test_the_real_data_is_asked_whole_with_every_seed_of_the_study(seed):
    tasks = manager(seed=seed).load(["bbeh_ttt"])["tasks"]
    assert len(tasks) == 23
    for name, task in tasks.items():
        assert len(task.eval_docs) == (117 if name.endswith("disambiguation_qa") else 197)
    short = tasks["bbeh_ttt_causal_understanding"]
    short.build_all_requests()
    assert len(short.instances) == 197
