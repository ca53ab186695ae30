"""Kill -9 in the middle of a real sweep: nothing finished is repeated, and the end is that of an undisturbed sweep.

Two of the cells fail in the engine's process, since their prompts are longer than the context window.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.integration

GRID = [
    *("--methods", "random,icl_vote,ttt,shared_e2e", "--seeds", "42", "--grid", "k=3,45"),
    *("--tasks", "procedural_ttt_boolean_expressions", "procedural_ttt_word_sorting"),
    *("--limit", "4", "--log_samples"),
]
SETTINGS = "num_permutations=2,lora_rank=8,lr=1e-2,epochs=1,max_model_len=768,dtype=float32"
CELLS = 8
TOO_LONG = ("icl_vote, k=45, seed 42", "ttt, k=45, seed 42")


def command(folder, model):
    arguments = f"pretrained={model},adapter_dir={folder / 'adapters'},{SETTINGS}"
    grid = [*GRID, "--model_args", arguments, "--output_path", str(folder / "out")]
    return [sys.executable, "-m", "ttt_harness.cli", "sweep", *grid]


def run(folder, model):
    result = subprocess.run(command(folder, model), capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    for cell in TOO_LONG:
        assert f"failed: {cell}: " in result.stderr
        assert "context window" in result.stderr
    return result.stderr


def scores(folder):
    """cell -> task -> its accuracies and their standard errors."""
    return {
        str(file.parents[1].relative_to(folder / "out")): {
            task: {key: value for key, value in said.items() if key.startswith("acc")}
            for task, said in json.loads(file.read_text())["results"].items()
        }
        for file in (folder / "out").rglob("results_*.json")
    }


def finished(folder):
    """The files of the finished cells, and when they were written."""
    cells = [path.parent for path in (folder / "out").glob("*/k=*/seed*/cell.json") if path.parent.suffix != ".partial"]
    return {file: file.stat().st_mtime_ns for cell in cells for file in cell.rglob("*")}


def kill_in_the_middle(folder, model):
    """Start the sweep, and kill it as soon as two cells are done and the next, the first fit's, is at work."""
    process = subprocess.Popen(command(folder, model), stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            done = list((folder / "out").glob("*/k=*/seed??/cell.json"))
            if len(done) >= 2 and list((folder / "out").glob("*/*/*.partial")):
                break
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_sweep_goes_on_where_it_stopped(tiny_model, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = CELLS - len(TOO_LONG)
    told = run(undisturbed, tiny_model)
    assert f"{whole} of {CELLS} cells are in" in told

    kill_in_the_middle(killed, tiny_model)
    before = finished(killed)
    done = len({path for path in before if path.name == "cell.json"})
    assert 2 <= done < whole

    told = run(killed, tiny_model)
    assert f"{done} of {CELLS} cells are done already: skipped." in told
    after = finished(killed)
    assert before.items() <= after.items()
    assert len({path for path in after if path.name == "cell.json"}) == whole
    assert not list((killed / "out").rglob("*.partial"))
    assert len(list((killed / "out").rglob("results_*.json"))) == whole
    assert scores(killed) == scores(undisturbed)
