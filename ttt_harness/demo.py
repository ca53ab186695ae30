"""`make demo`: test-time training on real tasks with a real model, through lm-eval's ordinary command line.

Runs `procedural_ttt` with the embedded model in-context, then with test-time training, and compares the two results.
The fits are smaller than the published ones, so that all of it takes minutes on two cores; the README has the rest.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ttt_harness.config import cache_dir
from ttt_harness.report import cli

TASKS = "procedural_ttt"
QUESTIONS = 20
SETTINGS = "pretrained=embedded,k=4,num_permutations=6,fit_batch_size=2,lr=1e-3"


def main() -> int:
    """Run the demonstration; returns the exit status of the first step that fails, or 0."""
    start = time.monotonic()
    folder = cache_dir() / "demo"
    print("Test-time training against in-context learning: SmolLM2-135M on eight generated tasks.", flush=True)
    for number, method in enumerate(("icl", "ttt"), 1):
        options = ["--model", "ttt_vllm", "--model_args", f"{SETTINGS},method={method}", "--tasks", TASKS]
        options += ["--limit", str(QUESTIONS), "--output_path", str(folder / method), "--log_samples"]
        print(f"\n[{number}/2] lm_eval {shlex.join(options)}\n", flush=True)
        quiet = {**os.environ, "LMEVAL_LOG_LEVEL": "WARNING"}
        result = subprocess.run([sys.executable, "-m", "lm_eval", "run", *options], env=quiet)
        if result.returncode:
            return result.returncode
    print()
    status = cli.main(["compare", f"in-context={_newest(folder / 'icl')}", f"TTT={_newest(folder / 'ttt')}"])
    print(f"\nDone in {time.monotonic() - start:.0f} s. Results and answers: {folder}")
    return status


def _newest(folder: Path) -> Path:
    return max(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    sys.exit(main())
