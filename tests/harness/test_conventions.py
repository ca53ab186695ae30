"""lm-eval's own options mean for a TTT task what they mean for others; each is tried with lm-eval as it is.

`--num_fewshot N` is k, the few-shot part of `--seed` draws the demonstrations, `--limit` and `--samples` select.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lm_eval import evaluate, simple_evaluate
from lm_eval._cli.run import Run
from lm_eval.api.model import LM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.stated import Unstated, is_stated_seed, states_few_shot_seed

ROWS = [{"q": f"q{i}?", "a": f"answer {i}"} for i in range(12)]
BODY = """
dataset_path: json
dataset_kwargs: {data_files: d.jsonl}
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: a
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
"""


class Silent(LM):
    """Answers nothing."""

    def generate_until(self, requests, disable_tqdm=False):  # noqa: ARG002
        return ["" for _ in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    head = "class: !function ttt_harness.TTTTask\n"
    listed = "fewshot_config: {samples: [{q: x, a: 1}, {q: y, a: 2}, {q: z, a: 3}]}\n"
    for name, more in {
        "plain": "",
        "stated": "metadata: {k: 3, seed: 7}\n",
        "shots": "num_fewshot: 4\n",
        "none": "num_fewshot: 0\n",
        "listed": listed,
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{head}{BODY}{more}", encoding="utf-8")
    return tmp_path


def run(folder, task, metadata=None, **options):
    """The demonstrations of the first prompt, and what the results state."""
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata)
    results = simple_evaluate(Silent(), tasks=[task], task_manager=manager, bootstrap_iters=0, limit=1, **options)
    prompt = results["samples"][task][0]["arguments"][0][0]
    return prompt.split("\n\n")[:-1], results["configs"][task]["metadata"]


def drawn(k, seed):
    rows = list(ROWS)
    random.Random(seed).shuffle(rows)
    return [f"Q: {row['q']}\nA: {row['a']}" for row in rows[:k]]


# k


@pytest.mark.parametrize(
    ("task", "metadata", "shots", "k", "origin"),
    [
        ("plain", {}, None, 10, "the default"),
        ("plain", {}, 5, 5, "--num_fewshot"),
        ("plain", {"k": 4}, None, 4, "the command line"),
        ("plain", {"k": 4}, 4, 4, "--num_fewshot"),
        ("stated", {}, None, 3, "the metadata"),
        ("stated", {}, 5, 5, "--num_fewshot"),
        ("stated", {"k": 2}, None, 2, "the command line"),
        ("shots", {}, None, 4, "the YAML's num_fewshot"),
        ("shots", {}, 2, 2, "--num_fewshot"),
        ("none", {}, None, 0, "the YAML's num_fewshot"),
        ("none", {}, 5, 0, "the YAML's num_fewshot"),  # a task that says 0 is left alone, as in lm-eval
        ("none", {"k": 2}, None, 2, "the command line"),
    ],
)
def test_the_number_of_shots_is_k(folder, task, metadata, shots, k, origin):
    demonstrations, stated = run(folder, task, metadata, num_fewshot=shots)
    assert demonstrations == drawn(k, 7 if task == "stated" else 42)
    assert (stated["k"], stated["k_from"]) == (k, origin)


@pytest.mark.parametrize(
    ("task", "metadata", "shots", "telling"),
    [
        ("plain", {"k": 4}, 5, "--num_fewshot 5 and k=4 are both given for plain"),
        ("stated", {"k": 3}, 5, "--num_fewshot 5 and k=3 are both given"),
        ("plain", {}, 12, "k=12 is not allowed"),
        ("plain", {}, -1, "k=-1 is not allowed"),
        ("plain", {}, 2.5, "k=2.5 is not allowed"),
        ("plain", {"leave_one_out": True}, 1, "leave_one_out=true is not allowed"),
        ("listed", {}, 4, "lists 3 demonstrations"),
    ],
)
def test_contradictions_and_numbers_that_cannot_be_are_refused(folder, task, metadata, shots, telling):
    with pytest.raises(ConfigError) as refusal:
        run(folder, task, metadata, num_fewshot=shots)
    assert telling in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_no_shots_leave_the_demonstrations_to_the_fit(folder):
    demonstrations, stated = run(folder, "plain", {"k": 4}, num_fewshot=0)
    assert demonstrations == []
    assert stated["k"] == 4


@pytest.mark.parametrize("shots", [1, 2, 3, None])
def test_of_listed_demonstrations_the_first_are_taken(folder, shots):
    demonstrations, stated = run(folder, "listed", num_fewshot=shots)
    assert demonstrations == ["Q: x\nA: 1", "Q: y\nA: 2", "Q: z\nA: 3"][:shots]
    assert stated["demonstrations"] == "fewshot_config.samples"


@pytest.mark.parametrize(("options", "shots"), [({"leave_one_out": True}, 4), ({"method": "e2e"}, 0)])
def test_shots_count_the_demonstrations_and_not_what_a_prompt_holds(folder, options, shots):
    demonstrations, stated = run(folder, "plain", options, num_fewshot=5)
    assert demonstrations == drawn(5, 42)[:shots]
    assert stated["k"] == 5


# Seeds


@pytest.mark.parametrize(
    ("task", "metadata", "options", "seed", "origin"),
    [
        ("plain", {}, {}, 42, "the default"),
        ("plain", {}, {"fewshot_random_seed": 43}, 43, "--seed"),
        ("plain", {}, {"fewshot_random_seed": 1234}, 1234, "--seed"),
        ("plain", {}, {"fewshot_random_seed": None}, 42, "the default"),
        ("plain", {}, {"random_seed": 5, "numpy_random_seed": 5, "torch_random_seed": 5}, 42, "the default"),
        ("plain", {"seed": 43}, {}, 43, "the command line"),
        ("plain", {"seed": 43}, {"fewshot_random_seed": 43}, 43, "--seed"),
        ("stated", {}, {}, 7, "the metadata"),
        ("stated", {}, {"fewshot_random_seed": 8}, 8, "--seed"),
    ],
)
def test_a_few_shot_seed_that_is_given_draws_the_demonstrations(folder, task, metadata, options, seed, origin):
    demonstrations, stated = run(folder, task, metadata, **options)
    assert demonstrations == drawn(3 if task == "stated" else 10, seed)
    assert (stated["seed"], stated["seed_from"]) == (seed, origin)


@pytest.mark.parametrize(
    ("metadata", "seed", "telling"),
    [
        ({"seed": 43}, 44, "--seed 44 and seed=43 are both given for plain"),
        ({"seed": 43}, 1234, "--seed 1234 and seed=43 are both given"),
        ({}, -1, "seed=-1 is not allowed"),
        ({}, 2**40, "is not allowed"),
    ],
)
def test_seeds_that_contradict_each_other_are_refused(folder, metadata, seed, telling):
    with pytest.raises(ConfigError) as refusal:
        run(folder, "plain", metadata, fewshot_random_seed=seed)
    assert telling in str(refusal.value)


def test_seed_and_shots_together_draw_once_for_all(folder):
    demonstrations, stated = run(folder, "plain", num_fewshot=5, fewshot_random_seed=9)
    assert demonstrations == drawn(5, 9)
    assert stated["demonstrations"] == "split train, and not evaluated"


@pytest.mark.parametrize(
    ("options", "file", "seed"),
    [
        ([], None, None),
        (["--seed", "43"], None, 43),
        (["--seed", "1234"], None, 1234),
        (["--seed", "1,2,3,4"], None, 4),
        (["--seed", "1,2,3"], None, None),  # lm-eval adds its default
        (["--seed", "1,2,3,None"], None, None),
        ([], {"seed": 43}, 43),
        ([], {"seed": [1, 2, 3, 4]}, 4),
        ([], {"seed": [1, 2, 3]}, None),
        ([], {"limit": 3}, None),
        (["--seed", "44"], {"seed": 43}, 44),
    ],
)
def test_what_the_command_line_states_is_told_from_what_lm_eval_fills_in(tmp_path, options, file, seed):
    import argparse

    parser = argparse.ArgumentParser()
    Run.create(parser.add_subparsers())
    if file is not None:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"tasks": "plain", **file}), encoding="utf-8")
        options = [*options, "--config", str(tmp_path / "run.yaml")]
    config = EvaluatorConfig.from_cli(parser.parse_args(["run", "--tasks", "plain", *options]))
    found = config.seed[3]
    assert is_stated_seed(found) == (seed is not None)
    assert found == (1234 if seed is None and options[1:2] != ["1,2,3,None"] else seed)
    assert json.loads(json.dumps(config.seed)) == config.seed


def test_a_default_is_a_number_like_any_other():
    assert json.dumps({"seed": Unstated(1234)}) == '{"seed": 1234}'
    assert random.Random(Unstated(5)).random() == random.Random(5).random()
    assert not states_few_shot_seed(None)


# Selection


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        ({"limit": float("inf")}, "--limit inf is not allowed"),
        ({"limit": float("nan")}, "--limit nan is not allowed"),
        ({"limit": -1.0}, "--limit -1 is not allowed"),
        ({"limit": 2.5}, "--limit 2.5 is not allowed"),
        ({"limit": 10**400}, "is not allowed"),
        ({"limit": "3"}, "--limit '3' is not allowed"),
        ({"samples": {"other": [1]}}, "--samples names 'other', which is none of the tasks that are run (plain)"),
        ({"samples": {"plian": [1]}}, "Did you mean 'plain'?"),
        ({"samples": {"plain": [0], "other": [1]}}, "--samples names 'other'"),
        ({"samples": {}}, "--samples is {}"),
        ({"samples": [0, 1]}, "--samples is [0, 1]"),
        ({"samples": "none.json"}, "--samples is 'none.json'"),
        ({"samples": {"plain": None}}, "--samples has None"),
        ({"samples": {"plain": 3}}, "--samples has 3"),
    ],
)
def test_what_selects_nothing_is_refused_as_it_was_given(folder, options, telling):
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(["plain"])
    with pytest.raises(ConfigError) as refusal:
        evaluate(Silent(), tasks, bootstrap_iters=0, **options)
    assert telling in str(refusal.value)


# Files that cannot be read as YAML, or not as a task


@pytest.mark.parametrize(
    ("line", "telling"),
    [
        (f"metadata: {{k: {'9' * 5000}}}", "Exceeds the limit (4300 digits)"),
        ('doc_to_text: "unclosed', "found unexpected end of stream in line"),
        ("doc_to_text: [", "in line"),
        ("x: *nothing", "found undefined alias"),
        ("a: " + "[" * 5000 + "]" * 5000, "maximum nesting depth"),
        ("process_docs: !function missing.f", "ImportError: Cannot import module 'missing'"),
        ("process_docs: !function broken.f", "SyntaxError"),
        ("process_docs: !function working.g", "has no function 'g'"),
        ("process_docs: !function f", "no module path"),
        ("include: nowhere.yaml", "FileNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, line, telling):
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (tmp_path / "working.py").write_text("f = len\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(f"task: mine\nclass: !function ttt_harness.TTTTask\n{line}\n", encoding="utf-8")
    with pytest.raises(TTTError) as refusal:
        TaskManager(include_path=str(tmp_path), include_defaults=False).load(["mine"])
    message = str(refusal.value)
    assert message.startswith(f"the task in {tmp_path}/mine.yaml cannot be read (")
    assert telling in message
    assert "\n" not in message
    assert len(message) < 600


def test_other_peoples_files_are_left_to_lm_eval(tmp_path, folder):
    (tmp_path / "theirs.yaml").write_text("task: [\n", encoding="utf-8")
    assert "plain" in TaskManager(include_path=str(folder), include_defaults=False).all_tasks


@pytest.mark.parametrize(
    ("options", "telling"),
    [(["--limit", "inf"], "--limit inf"), (["--num_fewshot", "5", "--metadata", "k=4"], "both given")],
)
def test_the_command_ends_with_one_sentence(folder, options, telling):
    """The one run of the real command: hook, parser, metadata and evaluator together."""
    command = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "ttt_random", "--tasks", "plain"]
    ended = subprocess.run(
        [*command, "--include_path", str(folder), *options],
        capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("error: ")
    assert telling in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr


# --gen_kwargs


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_a_budget_on_the_command_line_wins_under_any_name(folder, name):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"task_manager": manager, "bootstrap_iters": 0, "limit": 1}
    results = simple_evaluate(Silent(), tasks=["plain"], gen_kwargs={name: 3}, **options)
    arguments = results["samples"]["plain"][0]["arguments"][0][1]
    assert {key: value for key, value in arguments.items() if key.startswith("max_")} == {name: 3}
