"""Writes runs as lm-eval 0.4.13 leaves them, from a few numbers: for tests that need no engine.

`write_run(folder, {"task": [1, 0, 1]})` writes `folder/<model>/results_<date>.json` and a samples file per task. That
the layout is lm-eval's own is proven in test_results.py against files that lm-eval wrote.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_count = 0


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_run(
    folder: Path,
    scores: Mapping[str, Sequence[float]],
    *,
    model: str = "SmolLM2-135M-Instruct",
    source: str = "vllm",
    metric: str = "acc",
    filter_name: str = "answer",
    samples: bool = True,
    group: str | None = None,
    weight_by_size: bool = False,
    ttt: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    shots: int = 10,
    question: Callable[[str, int], str] = lambda task, i: f"{task} question {i}",
    prompt: Callable[[str, int], str] | None = None,
    target: Callable[[str, int], str] = lambda _task, _i: "True",
    answer: Callable[[str, int, float], str] = lambda _task, _i, score: "True" if score else "False",
    higher_is_better: bool = True,
    change: Mapping[str, Any] | None = None,
    limit: int | None = None,
) -> Path:
    """Write a run with these scores per question; returns the results file.

    change: top-level entries of the results file to replace or add.
    """
    global _count
    _count += 1
    date = f"2026-11-23T12-51-56.{_count:06d}"
    where = folder / model
    where.mkdir(parents=True, exist_ok=True)
    key, error_key = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
    results: dict[str, Any] = {}
    hashes = {}
    for task, values in scores.items():
        n = len(values)
        mean = sum(values) / n
        error: float | str = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else "N/A"
        results[task] = {"name": task, "alias": task, "sample_len": n, key: mean, error_key: error}
        lines: list[dict[str, Any]] = []
        for i, value in enumerate(values):
            text = question(task, i)
            shown = prompt(task, i) if prompt else f"{task}\n\nQ: one\nA: True\n\nQ: {text}\nA:"
            lines.append(
                {
                    "doc_id": i,
                    "doc": {"input": text, "target": target(task, i)},
                    "target": target(task, i),
                    "arguments": {"gen_args_0": {"arg_0": shown, "arg_1": {"until": ["\nQ:"]}}},
                    "resps": [[" " + answer(task, i, value)]],
                    "filtered_resps": [answer(task, i, value)],
                    "filter": filter_name,
                    "metrics": [metric],
                    "doc_hash": sha(text),
                    "prompt_hash": sha(shown),
                    "target_hash": sha(target(task, i)),
                    metric: value,
                }
            )
        if samples:
            hashes[task] = sha("".join(x["doc_hash"] + x["prompt_hash"] + x["target_hash"] for x in lines))
            file = where / f"samples_{task}_{date}.jsonl"
            file.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    groups = {}
    if group:
        sizes = [len(v) if weight_by_size else 1 for v in scores.values()]
        mean = sum(s * results[t][key] for s, t in zip(sizes, scores, strict=True)) / sum(sizes)
        errors = [s * results[t][error_key] for s, t in zip(sizes, scores, strict=True)]
        error = math.hypot(*errors) / sum(sizes)
        groups[group] = {"name": group, "alias": group, "sample_len": sum(map(len, scores.values()))}
        groups[group] |= {key: mean, error_key: error}
        results = {group: groups[group], **results}
    content: dict[str, Any] = {
        "results": results,
        **({"groups": groups} if groups else {}),
        "group_subtasks": {group: list(scores)} if group else {},
        "configs": {
            task: {
                "task": task,
                "test_split": "test",
                "metric_list": [{"metric": metric}],
                "metadata": {"version": 1.0, "k": 10, "seed": 42, **(metadata or {})},
            }
            for task in scores
        },
        "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, shots),
        "higher_is_better": {name: {metric: higher_is_better} for name in results},
        "n-samples": {task: {"original": len(v), "effective": len(v)} for task, v in scores.items()},
        "config": {"model": source, "model_args": {}, "limit": limit, **({"ttt": ttt} if ttt else {})},
        "date": 1700000000.0 + _count,
        "lm_eval_version": "0.4.13",
        "task_hashes": hashes,
        "model_source": source,
        "model_name": model,
        "total_evaluation_time_seconds": str(800.0 + _count),
        **(change or {}),
    }
    path = where / f"results_{date}.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def ttt(tasks: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What `ttt_vllm` adds to a results file: settings, and a fit per task."""
    return {
        "settings": {
            "method": "ttt",
            "loss_on": "outputs",
            "num_permutations": 40,
            "shuffle": True,
            "fit_batch_size": 5,
            "epochs": 1,
            "lr": 1e-4,
            "lora_rank": 64,
            "lora_alpha": 64,
            "lora_dropout": 0.05,
            "seed": 42,
            "k": 10,
            **settings,
        },
        "tasks": {
            task: {
                "adapter": f"/cache/{task}",
                "reused": False,
                "train_tokens": 12000 + 500 * i,
                "train_sequences": 40,
                "losses": [2.0 / (1 + step / 2) + i / 40 for step in range(8)],
                "first_loss": 2.0 + i / 40,
                "last_loss": 2.0 / 4.5 + i / 40,
                "fit_seconds": 12.3 + i / 3,
                "generate_seconds": 4.5 + i / 7,
            }
            for i, task in enumerate(tasks)
        },
    }
