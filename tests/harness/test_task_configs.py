"""The task YAMLs: that lm-eval reads them, and that prompts, splits, budgets and scores are those of the definition.

The definition is written out again here, in a few lines that share nothing with the package: a shuffled list, and
strings put together by hand.
"""

import hashlib
import json
import os
import random
from functools import cache
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

import ttt_harness
from ttt_harness.data.procedural import PROCEDURAL_TASKS, generate_examples

FOLDER = Path(__file__).resolve().parents[2] / "task_configs"
RULES = {
    "Answer with only a sequence of space-separated parentheses.": "sequence",
    "Answer with only a sequence of words.": "sequence",
    "Answer with only an integer.": "word",
    "Answer with only 'True' or 'False'.": "word",
    "Answer with only 'Yes' or 'No'.": "word",
    "Answer with only 'yes' or 'no'.": "word",
    "Answer with only 'valid' or 'invalid'.": "word",
    "Answer with only the corresponding letter (e.g. (A)).": "letter",
}
needs_bbh = pytest.mark.skipif(
    "TTT_BBH_DIR" not in os.environ, reason="TTT_BBH_DIR is not set: there is no BBH to read"
)


def names(group):
    return sorted(path.stem for path in (FOLDER / group).glob("[!_]*.yaml"))


def read_yaml(group, name):
    """The task's own YAML as plain data: references to functions as text, and without what it includes."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load((FOLDER / group / f"{name}.yaml").read_text(encoding="utf-8"), Loader)


@cache
def manager(**metadata):
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)


def load(name, **metadata):
    return manager(**metadata).load([name])["tasks"][name]


def examples_of(group, name):
    if group == "procedural_ttt":
        return generate_examples(name, 250, 0)
    path = Path(os.environ["TTT_BBH_DIR"]) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["examples"]


@pytest.fixture
def small_bbh(monkeypatch, tmp_path):
    """BBH folder in which every task has its own, small number of examples, 14 to 40."""
    for i, name in enumerate(names("bbh_ttt")):
        examples = [{"input": f"{name} {j}?", "target": f"({'ABC'[j % 3]})"} for j in range(14 + i)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"examples": examples}), encoding="utf-8")
    monkeypatch.setenv("TTT_BBH_DIR", str(tmp_path))


ALL_TASKS = [(group, name) for group in ("bbh_ttt", "procedural_ttt") for name in names(group)]
REAL_TASKS = [pytest.param(*task, marks=needs_bbh if task[0] == "bbh_ttt" else ()) for task in ALL_TASKS]


@pytest.mark.parametrize("seed", [42, 43])
@pytest.mark.parametrize(("group", "name"), REAL_TASKS)
def test_split_and_prompts_equal_the_definition(group, name, seed):
    examples = examples_of(group, name)
    random.Random(seed).shuffle(examples)
    demonstrations, rest = examples[:10], examples[10:]
    prefix = read_yaml(group, name)["description"]
    for example in demonstrations:
        prefix += "Q: " + example["input"] + "\nA: " + example["target"] + "\n\n"

    task = load(f"{group}_{name}", seed=seed)
    assert list(task.fewshot_docs()) == demonstrations
    assert list(task.test_docs()) == rest
    task.build_all_requests(limit=4)
    prompts = [instance.args[0] for instance in task.instances]
    assert prompts == [prefix + "Q: " + example["input"] + "\nA:" for example in rest[:4]]


@pytest.mark.parametrize(("group", "name"), REAL_TASKS)
def test_without_shots_the_prompt_is_description_and_question(group, name):
    task = load(f"{group}_{name}")
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=1)
    question = task.test_docs()[0]["input"]
    assert task.instances[0].args[0] == read_yaml(group, name)["description"] + f"Q: {question}\nA:"


@pytest.mark.parametrize(("group", "name"), REAL_TASKS)
def test_the_budget_holds_the_longest_target_under_any_tokenizer(group, name):
    longest = max(len(f" {example['target']}".encode()) for example in examples_of(group, name))
    budget = read_yaml(group, name)["generation_kwargs"]["max_gen_toks"]
    assert budget > longest
    if group == "procedural_ttt":
        for data_seed in range(20):
            examples = generate_examples(name, 250, data_seed)
            assert budget > max(len(f" {example['target']}".encode()) for example in examples)


@pytest.mark.usefixtures("small_bbh")
@pytest.mark.parametrize(("group", "name"), ALL_TASKS)
def test_a_task_generates_greedily_up_to_the_next_question(group, name):
    task = load(f"{group}_{name}")
    assert isinstance(task, ttt_harness.TTTTask)
    budget = read_yaml(group, name)["generation_kwargs"]["max_gen_toks"]
    task.build_all_requests(limit=1)
    generation = {"until": ["\nQ:"], "do_sample": False, "temperature": 0.0, "max_gen_toks": budget}
    assert task.instances[0].args[1] == generation


@pytest.mark.parametrize(("group", "name"), ALL_TASKS)
def test_the_answer_rule_is_that_of_the_answer_format(group, name):
    config = read_yaml(group, name)
    (pipeline,) = config["filter_list"]
    formats = [text for text in RULES if config["description"].endswith(f" {text}\n\n")]
    assert pipeline == {"name": "answer", "filter": [{"function": "bbh_answer", "rule": RULES[formats[0]]}]}


def test_descriptions_and_published_budgets_are_the_published_ones():
    """The digest of {name: [f"{task_prompt} {answer_format}\\n\\n", tokens]} over the project's reference file."""
    published = {}
    for name in names("bbh_ttt"):
        config = read_yaml("bbh_ttt", name)
        published[name] = [config["description"], config["metadata"]["published_max_gen_toks"]]
    digest = hashlib.sha256(json.dumps(published, sort_keys=True).encode()).hexdigest()
    assert digest == "fac258f3e8b98a9c5446027a8656fb473378ff9d6516e91ef83e0b77ee83e247"


@pytest.mark.parametrize("name", PROCEDURAL_TASKS)
def test_a_procedural_task_differs_from_its_twin_only_in_the_data(name):
    procedural, twin = read_yaml("procedural_ttt", name), read_yaml("bbh_ttt", name)
    for config in (procedural, twin):
        for key in ("task", "custom_dataset", "dataset_kwargs"):
            del config[key]
        del config["generation_kwargs"]["max_gen_toks"]
    assert procedural == twin


def test_names_and_groups_are_complete():
    assert len(names("bbh_ttt")) == 27
    assert names("procedural_ttt") == sorted(PROCEDURAL_TASKS)
    for group, name in ALL_TASKS:
        config = read_yaml(group, name)
        assert config["task"] == f"{group}_{name}"
        assert list(config["dataset_kwargs"].values()) == [name]
    for group in ("bbh_ttt", "procedural_ttt"):
        assert read_yaml(group, f"_{group}")["task"] == [f"{group}_{name}" for name in names(group)]
    assert {"bbh_ttt", "procedural_ttt"} <= set(manager().all_groups)


class Oracle(LM):
    """Knows every answer of the tasks whose names have an even length, and none of the others."""

    def generate_until(self, requests, disable_tqdm=False):  # noqa: ARG002
        return [f" {r.doc['target']}\n\nQ: And now?" if len(r.task_name) % 2 == 0 else "?" for r in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.mark.usefixtures("small_bbh")
def test_the_group_score_is_the_plain_mean_over_tasks_of_different_size():
    results = simple_evaluate(Oracle(), tasks=["bbh_ttt"], task_manager=manager(), bootstrap_iters=0)
    scores = {name: result["acc,answer"] for name, result in results["results"].items()}
    mean = scores.pop("bbh_ttt")
    assert scores == {f"bbh_ttt_{name}": float(len(f"bbh_ttt_{name}") % 2 == 0) for name in names("bbh_ttt")}
    assert results["n-samples"]["bbh_ttt_word_sorting"]["effective"] == 30
    assert mean == pytest.approx(sum(scores.values()) / 27)
    sizes = {name: samples["effective"] for name, samples in results["n-samples"].items()}
    weighted = sum(scores[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean != pytest.approx(weighted, abs=1e-3)


def test_the_metadata_of_a_procedural_task_change_its_data():
    task = load("procedural_ttt_word_sorting", num_examples=30, data_seed=9, k=4)
    examples = generate_examples("word_sorting", 30, 9)
    random.Random(42).shuffle(examples)
    assert [*task.fewshot_docs(), *task.test_docs()] == examples
