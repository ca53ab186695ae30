"""Random guesses: uniform, repeatable, and right as often as the published figures say."""

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ttt_harness.errors import ConfigError
from ttt_harness.harness.filters import extract_answer
from ttt_harness.harness.random_guess import RandomGuess

FOLDER = Path(__file__).resolve().parents[2] / "task_configs"
PUBLISHED = json.loads(files("ttt_harness.report").joinpath("published_results.json").read_text(encoding="utf-8"))


def requests(count, choices=("yes", "no", "(A)"), task="t"):
    return [SimpleNamespace(task_name=task, choices=choices and list(choices), args=("", {})) for _ in range(count)]


def read_yaml(path):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load(path.read_text(encoding="utf-8"), Loader)


GROUPS = ("bbh_ttt", "procedural_ttt")  # the others are scored by log-likelihood, or have free-form answers
YAMLS = [
    pytest.param(read_yaml(path), id=path.stem) for g in GROUPS for path in sorted((FOLDER / g).glob("[!_]*.yaml"))
]


def test_guesses_are_uniform_among_the_choices():
    counts = Counter(RandomGuess(seed=1).generate_until(requests(3000)))
    assert set(counts) == {"yes", "no", "(A)"}
    assert all(abs(count - 1000) < 100 for count in counts.values())


def test_the_seed_decides():
    assert RandomGuess(seed=1).generate_until(requests(50)) == RandomGuess(seed=1).generate_until(requests(50))
    assert RandomGuess(seed=1).generate_until(requests(50)) != RandomGuess(seed=2).generate_until(requests(50))


def test_a_task_is_guessed_alike_with_any_limit_and_beside_other_tasks():
    alone = RandomGuess().generate_until(requests(50))
    assert RandomGuess().generate_until(requests(20)) == alone[:20]
    mixed = [request for pair in zip(requests(50, task="u"), requests(50), strict=True) for request in pair]
    assert RandomGuess().generate_until(mixed)[1::2] == alone


def test_the_prompts_of_a_vote_are_guessed_each():
    assert len(set(RandomGuess().generate_until(requests(1) * 20))) == 3


def test_free_form_answers_are_empty():
    assert RandomGuess().generate_until(requests(2, choices=None)) == ["", ""]
    assert RandomGuess().generate_until([SimpleNamespace(task_name="t", args=("", {}))]) == [""]


def test_log_likelihoods_are_random():
    scores = RandomGuess().loglikelihood(requests(50))
    assert len({score for score, _ in scores}) == 50
    assert all(-1 <= score <= 0 for score, _ in scores)
    assert RandomGuess().loglikelihood_rolling(requests(50)) == [score for score, _ in scores]


def test_arguments_of_another_model_may_stay():
    model = RandomGuess.create_from_arg_obj({"pretrained": "m", "seed": 7, "lr": 1e-4}, {"batch_size": 1})
    assert model.get_model_info()["ttt"]["settings"] == {"method": "random", "seed": 7}


@pytest.mark.parametrize("seed", [-1, "x", 2**32, 1.5])
def test_a_seed_that_is_none(seed):
    with pytest.raises(ConfigError, match="seed="):
        RandomGuess(seed=seed)


@pytest.mark.parametrize("config", YAMLS)
def test_choices_are_as_many_as_published(config):
    name = config["task"].partition("_ttt_")[2]
    choices = config["metadata"].get("choices")
    expected = 100 / len(choices) if choices else 0.0
    assert expected == pytest.approx(PUBLISHED["per_task"]["random"][name], abs=0.005)


@pytest.mark.parametrize("config", YAMLS)
def test_a_guess_passes_the_filter_unchanged(config):
    rule = config["filter_list"][0]["filter"][0]["rule"]
    for choice in config["metadata"].get("choices", []):
        assert extract_answer(choice, rule) == choice.lower()


def test_the_mean_of_the_expectations_is_the_published_average():
    yamls: list[Any] = [param.values[0] for param in YAMLS]
    configs = [config for config in yamls if config["task"].startswith("bbh_ttt_")]
    chances = [1 / len(choices) if (choices := config["metadata"].get("choices")) else 0.0 for config in configs]
    assert len(chances) == 27
    assert 100 * sum(chances) / 27 == pytest.approx(PUBLISHED["average"]["random"], abs=0.005)


def test_a_run_through_lm_eval_scores_about_what_is_expected():
    import lm_eval.models  # noqa: F401 - fills the registry
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    tasks = ["procedural_ttt_navigate", "procedural_ttt_word_sorting"]
    results = simple_evaluate("ttt_random", {"seed": 42}, tasks, task_manager=manager, bootstrap_iters=0)
    scores = {task: results["results"][task]["acc,answer"] for task in tasks}
    assert abs(scores["procedural_ttt_navigate"] - 0.5) < 0.13  # four standard errors of 240 guesses
    assert scores["procedural_ttt_word_sorting"] == 0.0
    assert {s["resps"][0][0] for s in results["samples"]["procedural_ttt_navigate"]} == {"Yes", "No"}
    assert results["config"]["ttt"]["settings"]["method"] == "random"
