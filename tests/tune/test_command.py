"""`ttt-harness tune` on a tiny model: what it reads, what it writes, what it refuses; no engine starts."""

import json
from pathlib import Path

import pytest
import vllm

from ttt_harness import cli
from ttt_harness.serving import engine
from ttt_harness.tuned import read_tuned

TASKS = Path(__file__).parents[1] / "user_tasks"
FIT = "num_permutations=4,fit_batch_size=2,lora_rank=4,lora_alpha=8,dtype=float32,k=4"


@pytest.fixture
def call(tiny_model, tmp_path, monkeypatch, capsys):
    """Runs the command with a small grid; an engine that starts, or an adapter that is stored, fails the test."""

    def no_engine(*_, **__):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(vllm.LLM, "__init__", no_engine)
    monkeypatch.setattr(engine.LLM, "__init__", no_engine)
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))

    def run(*options, args="", tasks="capitals,antonyms", fit=FIT, include=TASKS):
        model_args = ",".join(text for text in (f"pretrained={tiny_model}", fit, args) if text)
        given = ["--include_path", str(include), "--tasks", tasks, "--model_args", model_args]
        status = cli.main(["tune", *given, *options])
        captured = capsys.readouterr()
        assert not (tmp_path / "cache" / "adapters").exists()
        return status, captured.out, captured.err

    return run


GRID = ("--grid", "lr=1e-3,1e-2", "--grid", "epochs=1,2", "--folds", "2")


def test_smoke(call, tmp_path):
    status, out, err = call(*GRID, "--output_path", str(tmp_path / "out"))
    print(out, err)
    assert status == 0, err
    tuned = read_tuned(tmp_path / "out" / "tuned.json")
    print(json.dumps(tuned.to_dict())[:3000])
    assert 0
