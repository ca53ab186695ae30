"""Reports are for laptops too: they need neither torch, vLLM, lm-eval nor transformers."""

import subprocess
import sys

import pytest

from tests.report.runs import ttt, write_run

HEAVY = ("torch", "vllm", "lm_eval", "transformers", "torchtune", "ray", "datasets", "pandas", "peft")

# Importing one of them fails, as where it is not installed.
BLOCKED = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from ttt_harness.cli import main
status = main(sys.argv[1:])
assert not set(sys.modules) & set({HEAVY!r})
sys.exit(status)
"""


@pytest.mark.parametrize("command", ["compare", "summary", "report"])
def test_it_works_without_them(tmp_path, command):
    tasks = ["bbh_ttt_snarks", "bbh_ttt_navigate"]
    scores = {task: [1.0, 0.0, 1.0] for task in tasks}
    base = write_run(tmp_path / "icl", scores, group="bbh_ttt")
    others = [
        write_run(tmp_path / f"{lr}", scores, group="bbh_ttt", source="ttt_vllm", ttt=ttt(tasks, lr=lr))
        for lr in (1e-4, 3e-4)
    ]
    arguments = {
        "compare": ["compare", base, *others, "--reference", "published"],
        "summary": ["summary", tmp_path],
        "report": ["report", tmp_path, "-o", tmp_path / "page.html", "--reference", "published"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
