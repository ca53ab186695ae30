"""`make demo`: test-time training on real tasks with a real model.

Runs `procedural_ttt` with the embedded model in-context, then with test-time training, and compares the two results.
Both are ordinary lm_eval runs, made by `ttt-harness sweep` so that they share one start of the engine. The fits are
smaller than the published ones, so that all of it takes minutes on two cores; the README has the real figures.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import time

from ttt_harness import cli
from ttt_harness.config import cache_dir
from ttt_harness.embedded import embedded_model_path

SETTINGS = "pretrained=embedded,k=3,num_permutations=6,fit_batch_size=2,lr=1e-3"
OPTIONS = ["--tasks", "procedural_ttt", "--limit", "20", "--log_samples", "--model_args", SETTINGS]


def main() -> int:
    """Run the demonstration; returns the exit status of the first step that fails, or 0."""
    start = time.monotonic()
    # Other options have another folder: a sweep refuses to mix results.
    folder = cache_dir() / f"demo-{hashlib.sha256(shlex.join(OPTIONS).encode()).hexdigest()[:8]}"
    print("Test-time training against in-context learning: SmolLM2-135M on eight generated tasks.", flush=True)
    embedded_model_path()
    sweep = ["sweep", "--methods", "icl,ttt", "--seeds", "42", "--output_path", str(folder), *OPTIONS]
    print(f"\n$ ttt-harness {shlex.join(sweep)}\n", flush=True)
    quiet = {**os.environ, "LMEVAL_LOG_LEVEL": "ERROR"}
    result = subprocess.run([sys.executable, "-m", "ttt_harness.cli", *sweep], env=quiet)
    if result.returncode:
        return result.returncode
    compare = ["compare", f"in-context={folder / 'icl'}", f"TTT={folder / 'ttt'}"]
    print(f"\n$ ttt-harness {shlex.join(compare)}\n", flush=True)
    status = cli.main(compare)
    alone = ["lm_eval", "--model", "ttt_vllm", *OPTIONS[:-1], f"{SETTINGS},method=ttt", "--output_path", "results"]
    print(f"One of the two alone: {shlex.join(alone)}")
    print(f"Done in {time.monotonic() - start:.0f} s. Results and answers: {folder}")
    return status


if __name__ == "__main__":
    sys.exit(main())
