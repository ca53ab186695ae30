"""The same work through this project, the way a user runs it: one `lm_eval` command, with an empty adapter store."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import process
from ttt_harness.config import TTTConfig

# lm-eval's own log lines: right before it hands over the requests, and once every answer is scored.
RUN_MARKS = {"asked": "Running generate_until requests", "saved": "Saving results aggregated"}


def evaluate(
    names: Sequence[str],
    folder: Path,
    *,
    model: str,
    config: TTTConfig,
    limit: int,
    engine: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Run `lm_eval --model ttt_vllm` and return what it took, the texts in `answers`, and how a GPU was shared.

    Args:
        names: tasks.
        folder: for results, adapters and log; made here.
        model: `pretrained`.
        config: `k`, `seed` and the number of permutations are passed on; the rest are defaults.
        limit: questions of each task.
        engine: further model arguments.
        seconds: time limit.

    Raises:
        StageError: the process failed or took longer than `seconds`.
    """
    folder.mkdir(parents=True)
    arguments = {
        "pretrained": model,
        "k": config.k,
        "seed": config.seed,
        "num_permutations": config.num_permutations,
        "adapter_dir": folder / "adapters",
        **engine,
    }
    options = {
        "--model": "ttt_vllm",
        "--model_args": ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks": ",".join(names),
        "--limit": limit,
        "--output_path": folder / "results",
    }
    command = process.python("lm_eval", *(part for option in options.items() for part in option), "--log_samples")
    done = process.run("this project", command, log=folder / "log.txt", limit=seconds, marks=RUN_MARKS)
    if missing := RUN_MARKS.keys() - done.marks.keys():
        raise process.StageError(f"this project: no {', '.join(sorted(missing))} in its log ({folder / 'log.txt'}).")
    (path,) = (folder / "results").rglob("results_*.json")
    results = json.loads(path.read_text())
    tasks, answers = {}, {}
    for name, record in results["config"]["ttt"]["tasks"].items():
        (samples,) = path.parent.glob(f"samples_{name}_*.jsonl")
        rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers[name] = {
            "prompts": [row["arguments"]["gen_args_0"]["arg_0"] for row in rows],
            "texts": [row["resps"][0][0] for row in rows],
        }
        tasks[name] = {
            "fit_seconds": 0.0 if record.get("reused") else record["fit_seconds"],
            "generate_seconds": record["generate_seconds"],
            "train_tokens": record["train_tokens"],
            "requests": record["requests"],
            "accuracy": results["results"][name]["acc,answer"],
            "adapter": record["adapter"],
        }
    plan = re.search(r"memory: (.*?) \(\d+% done", (folder / "log.txt").read_text(errors="replace"))
    return {
        "seconds": done.seconds,
        "run_seconds": done.marks["saved"] - done.marks["asked"],
        "start_seconds": done.marks["asked"],
        "fit_seconds": sum(task["fit_seconds"] for task in tasks.values()),
        "generate_seconds": sum(task["generate_seconds"] for task in tasks.values()),
        "dtype": results["config"]["ttt"]["settings"]["dtype"],
        "tasks": tasks,
        "peak_bytes": done.peak_bytes,
        "gpu_peak_bytes": done.gpu_peak_bytes,
        "memory_plan": plan and plan[1],
        "answers": answers,
    }
