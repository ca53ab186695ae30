"""The command line: bad input is one sentence; marked integration, both pipelines on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import _parser, _settings, main
from benchmarks.compare import Benchmark

ROOT = Path(__file__).resolve().parents[2]
TASK, OTHER = "procedural_ttt_boolean_expressions", "procedural_ttt_navigate"


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["compare", "--limit", "0"], "--limit 0 is not allowed"),
        (["compare", "--runs", "0"], "--runs 0 is not allowed"),
        (["compare", "--stage-limit", "0"], "--stage-limit 0.0 is not allowed"),
        (["compare", "--permutations", "7"], "use a multiple of 5"),
        (["compare", "--stages", "orignal"], "Did you mean 'original'?"),
        (["compare", "--stages", "adapter"], "add ours"),
        (["compare", "--stages", "ours,same_kernels"], "add original"),
        (["compare", "--stages", "engines"], "add ours"),
        pytest.param(
            ["compare", "--stages", "turns", "--tasks", TASK],
            "needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
        (["compare", "--tasks", TASK, "--original-tasks", f"{TASK},{OTHER}"], f"{OTHER} is not among --tasks"),
        (["compare", "--tasks", TASK, "--original-tasks", "procedural_ttt"], "is not among --tasks"),
        (["compare", "--serve-sample", "-1"], "--serve-sample -1 is not allowed"),
        (["compare", "--k", "0"], "k=0 is not allowed"),
        (["compare", "--model", "/nowhere/model"], "there is no such directory"),
        (["compare", "--generation-budget", "short"], "one of full, published"),
        (["compare", "--tasks", "bbh_ttt_navigat"], "Did you mean 'bbh_ttt_navigate'?"),
        (["growth", "--limit", "-1"], "--limit -1 is not allowed"),
        (["checkpoint", "/", "--geometry", "tiny"], "exists already"),
    ],
)
def test_bad_input_is_one_sentence_before_the_machine_is_measured(arguments, telling, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(Benchmark, "_peak", lambda _: pytest.fail("measured"))
    options = [] if "--model" in arguments or arguments[0] == "checkpoint" else ["--model", str(tiny_model)]
    options += ["--tokenizer", str(tiny_model)] if arguments[0] == "checkpoint" else []
    assert main([*arguments, *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert telling in error[-1]


def test_the_originals_tasks_may_be_some_of_a_group(tiny_model, tmp_path):
    options = ["--model", str(tiny_model), "--limit", "2", "--tasks", "procedural_ttt", "--original-tasks", TASK]
    benchmark = Benchmark(_settings(_parser().parse_args(["compare", *options])), tmp_path, machine={"device": "cpu"})
    assert [task.name for task in benchmark.compared] == [TASK]


@pytest.mark.integration
def test_both_pipelines_do_the_same_work(tiny_model, tmp_path):
    output, work = tmp_path / "cpu.json", tmp_path / "work"
    command = [
        *(sys.executable, "-m", "benchmarks", "compare", "--model", str(tiny_model), "--tasks", TASK),
        *("--k", "3", "--permutations", "5", "--limit", "4", "--max-model-len", "1024"),
        *("--stages", "ours,original,engines", "--output", str(output), "--work", str(work)),
    ]
    # the engine in the same process, which starts sooner
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TTT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "% of peak" in done.stdout
    content = json.loads(output.read_text())
    stages = content["runs"][0]["stages"]
    ours, fit, served = stages["ours"], stages["original_fits"][TASK], stages["original_serve"]
    assert ours["tasks"][TASK]["train_tokens"] == fit["train_tokens"]
    assert ours["tasks"][TASK]["prompt_tokens"] == served["tasks"][TASK]["prompt_tokens"]
    assert ours["tasks"][TASK]["fit_flops"] == fit["fit_flops"] > 0
    assert 0 < fit["loop_seconds"] < fit["seconds"]
    assert content["ratio_total"] == pytest.approx((fit["seconds"] + served["seconds"]) / ours["seconds"])
    assert "ratio_total_same_kernels" not in content  # its stage was not asked for
    assert stages["engines"].keys() >= {"default", "max_loras=4"}
    for variant in stages["engines"].values():
        assert [one["together"] for one in variant["passes"]] == [False, False, True, True]
        assert all(one["seconds"] > 0 for one in variant["passes"])
    assert not list((work / "run1" / "original" / TASK / "out").glob("epoch_0/model*"))  # the adapter, no base weights
