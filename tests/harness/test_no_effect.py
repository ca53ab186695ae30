"""A task of ours changes nothing of a process in which another model class runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = [{"question": f"{a} + 1", "answer": str(a + 1)} for a in range(8)]
YAML = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: rows.jsonl}
test_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
output_type: multiple_choice
doc_to_choice: ["1", "2"]
doc_to_target: 0
metadata: {k: 2, version: 1}
"""
STATE = """
import json, logging, os, sys, warnings
import lm_eval
from lm_eval.tasks import TaskManager

manager = TaskManager(include_path=".", include_defaults=False)
results = lm_eval.simple_evaluate("dummy", tasks=["sums"], task_manager=manager, bootstrap_iters=0)
assert results["n-samples"]["sums"]["effective"]
loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
state = {
    "environment": dict(os.environ),
    "excepthook": repr(sys.excepthook),
    "unraisablehook": repr(sys.unraisablehook),
    "filters": repr(warnings.filters),
    "showwarning": repr(warnings.showwarning.__module__),
    "levels": {logger.name: logger.level for logger in loggers if not logger.name.startswith("ttt_harness")},
    "signals": repr([__import__("signal").getsignal(number) for number in (2, 15)]),
    "folders": sorted(str(path) for path in __import__("pathlib").Path.home().rglob("*") if path.is_dir()),
    "heavy": sorted({"torch", "vllm", "torchtune", "torchao"} & set(sys.modules)),
}
import pathlib
pathlib.Path(sys.argv[1]).write_text(json.dumps(state))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (tmp_path / "home").mkdir()
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    ours = ("TTT_", "VLLM_", "TORCH", "PYTORCH_ALLOC", "OMP_", "TOKENIZERS_", "TRANSFORMERS_", "RAY_", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "HOME": str(folder / "home"), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


def state_after(folder: Path, line: str) -> dict[str, object]:
    (folder / "sums.yaml").write_text(YAML + line)
    script, out = folder / "script.py", folder / "state.json"
    script.write_text(STATE)
    done = subprocess.run(
        [sys.executable, str(script), str(out)], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_a_baseline_runs_in_the_environment_that_it_has_without_us(folder):
    without = state_after(folder, "")
    assert state_after(folder, "class: !function ttt_harness.TTTTask\n") == without


def test_errors_of_a_task_are_one_sentence_under_another_model_class(folder):
    (folder / "sums.yaml").write_text(YAML.replace("k: 2", "k: 20") + "class: !function ttt_harness.TTTTask\n")
    command = [sys.executable, "-m", "lm_eval", "--model", "dummy", "--tasks", "sums", "--include_path", "."]

    def run(**extra):
        env = environment(folder) | extra
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: k=20 is not allowed for sums")
    done = run(LMEVAL_LOG_LEVEL="DEBUG")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: k=20 is not allowed for sums")
