"""A TTT task is answered greedily by every model class of lm-eval, unless sampling is asked for."""

import json
import logging

import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from ttt_harness.errors import ConfigError
from ttt_harness.serving.generation import greedy_unless_sampled

GREEDY = {"do_sample": False, "temperature": 0.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, GREEDY),
        ({"until": ["\n"], "max_gen_toks": 8}, {"until": ["\n"], "max_gen_toks": 8, **GREEDY}),
        ({"do_sample": False}, GREEDY),
        ({"temperature": 0}, GREEDY),
        ({"top_p": 0.9}, {"top_p": 0.9, **GREEDY}),  # of no effect on a greedy answer
        ({"do_sample": None}, GREEDY),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"do_sample": True, "temperature": 0.5, "seed": 3}, {"do_sample": True, "temperature": 0.5, "seed": 3}),
    ],
)
def test_answers_are_greedy_unless_sampling_is_asked_for(given, expected):
    assert greedy_unless_sampled(given, "mine") == expected


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": "false"},
        {"do_sample": 1},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
    ],
)
def test_what_is_neither_is_refused_with_the_task(given):
    (name, value), *_ = given.items()
    with pytest.raises(ConfigError, match=rf"^mine: the generation argument {name}={value!r} is not allowed"):
        greedy_unless_sampled(given, "mine")


def test_a_temperature_without_effect_is_said(caplog):
    caplog.set_level(logging.WARNING)
    greedy_unless_sampled({"do_sample": False, "temperature": 0.7}, "mine")
    assert "temperature=0.7 has no effect" in caplog.text


@pytest.fixture
def capitals(tmp_path):
    """A task that says nothing about sampling, as in the guide."""
    rows = [{"country": f"country {i}", "capital": f"city {i}"} for i in range(8)]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "capitals.yaml").write_text(
        "task: capitals\nclass: !function ttt_harness.TTTTask\ndataset_path: json\n"
        "dataset_kwargs: {data_files: capitals.jsonl}\n"
        'doc_to_text: "Country: {{country}}\\nCapital:"\ndoc_to_target: capital\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\nmetadata: {k: 3}\n',
        encoding="utf-8",
    )
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.parametrize(
    ("gen_kwargs", "sampled"), [(None, False), ("top_k=5", False), ("temperature=0.5,do_sample=True", True)]
)
def test_lm_evals_own_classes_are_told(capitals, tiny_model, monkeypatch, gen_kwargs, sampled):
    """`hf` by a run; `vllm` by the function that makes its sampling parameters, since it asks for an engine."""
    model = HFLM(str(tiny_model), device="cpu", dtype="float32")
    told, generate = [], model.model.generate

    def spy(**options):
        told.append(options)
        return generate(**options)

    monkeypatch.setattr(model.model, "generate", spy)
    results = simple_evaluate(
        model, tasks=["capitals"], task_manager=capitals, gen_kwargs=gen_kwargs, limit=2, bootstrap_iters=0
    )
    assert told
    assert all(options["do_sample"] == sampled for options in told)
    (arguments,) = {json.dumps(sample["arguments"][0][1]) for sample in results["samples"]["capitals"]}
    vllm = normalize_gen_kwargs(json.loads(arguments))
    assert vllm["temperature"] == (0.5 if sampled else 0.0)
    stated = results["configs"]["capitals"]["generation_kwargs"]
    assert (stated["do_sample"], stated["temperature"]) == (sampled, vllm["temperature"])
