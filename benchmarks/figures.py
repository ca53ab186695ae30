"""From the stages of one run to the figures that are quoted, and to the rows of its table.

Pure arithmetic on what `compare` recorded; a figure whose stages are missing is left out.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Stages = Mapping[str, Any]


def peak_flops(stages: Stages) -> float:
    """The machine's matmul peak in the dtype that both pipelines used, FLOP/s: the better of before and after."""
    measured = [stages[name] for name in ("peak_before", "peak_after") if name in stages]
    return max(one["peak_flops"][one["dtype"]] for one in measured)


def figures(stages: Stages) -> dict[str, float]:
    """The figures of one run.

    ratio_total, ratio_total_same_kernels: wall-clock of the original pipeline over this project's, on the same tasks.
    ratio_total_scaled: where the original ran fewer tasks, the whole of its work estimated from them (see
        `original_scaled`) over this project's.
    ratio_fit_per_token: seconds per trained token within the original's training loops over this project's fits.
    ratio_fit_with_start: the same with the original's whole processes.
    fit_peak_fraction, fit_peak_fraction_alone: useful operations per second of this project's fits over the measured
        matmul peak, in the whole run and with nothing beside them.
    ratio_generate_adapter: generation with adapters over without, medians of passes.
    ratio_generate_prefix_caching: generation without prefix caching over with, the same requests and adapters.
    total_seconds: from the first request to the last answer of this project; process_seconds: its whole process.
    gpu_peak_bytes, turns_gpu_peak_bytes: the card's memory in use at most, in the whole run and on a card of 24 GiB.
    fit_peak_bytes, fit_limit_bytes, serve_peak_bytes: memory, the fit's where it comes nearest to its limit.
    """
    found: dict[str, float] = {}
    mine = stages.get("ours")
    for name, stage in (("gpu_peak_bytes", "ours"), ("turns_gpu_peak_bytes", "turns")):
        if peak := stages.get(stage, {}).get("gpu_peak_bytes"):
            found[name] = peak
    if mine:
        found["total_seconds"] = mine["run_seconds"]
        found["process_seconds"] = mine["seconds"]
        work = sum(task["fit_flops"] for task in mine["tasks"].values())
        if mine["fit_seconds"]:
            found["fit_peak_fraction"] = work / mine["fit_seconds"] / peak_flops(stages)
    if alone := list(stages.get("fits", {}).get("tasks", {}).values()):
        rate = sum(task["fit_flops"] for task in alone) / sum(task["fit_seconds"] for task in alone)
        found["fit_peak_fraction_alone"] = rate / peak_flops(stages)
    compared = stages.get("ours_compared") or mine
    fits = stages.get("original_fits", {})
    if mine and fits:
        names = [name for name in fits if name in mine["tasks"]]
        own = [mine["tasks"][name] for name in names]
        own_rate = _rate(own, "fit_seconds")
        if names and own_rate:
            theirs = [fits[name] for name in names]
            found["ratio_fit_per_token"] = _rate(theirs, "loop_seconds") / own_rate
            found["ratio_fit_with_start"] = _rate(theirs, "seconds") / own_rate
    for name, stage in (
        ("ratio_total", "original_serve"),
        ("ratio_total_same_kernels", "original_serve_same_kernels"),
    ):
        served = stages.get(stage)
        if compared and served and set(served["tasks"]) == set(compared["tasks"]) == set(fits):
            total = sum(fit["seconds"] for fit in fits.values()) + served["seconds"]
            found[name] = total / compared["seconds"]
    if mine and (scaled := original_scaled(stages)):
        found["ratio_total_scaled"] = scaled / mine["seconds"]
    if "adapter" in stages:
        adapter, plain = (_pass_seconds(stages["adapter"], with_adapter) for with_adapter in (True, False))
        found["ratio_generate_adapter"] = sum(adapter.values()) / sum(plain.values())
        found["serve_peak_bytes"] = stages["adapter"]["serve_peak_bytes"]
        if "prefix" in stages:
            without = _pass_seconds(stages["prefix"], True)
            found["ratio_generate_prefix_caching"] = sum(without.values()) / sum(adapter[name] for name in without)
    measured = [stages[name] for name in ("memory_short", "memory_full") if name in stages]
    if measured:
        worst = max(measured, key=lambda one: one["peak_bytes"] / one["limit_bytes"])
        found["fit_peak_bytes"] = worst["peak_bytes"]
        found["fit_limit_bytes"] = worst["limit_bytes"]
    return found


def original_scaled(stages: Stages) -> float | None:
    """Seconds that the original would take for all of this project's tasks, estimated from fewer that it ran.

    Training loops by trained tokens, the rest of their processes by tasks, answers by tokens of prompts and answers;
    the engine starts once. None where it ran all of them, or some of its stages are missing.
    """
    mine, fits, served = stages["ours"]["tasks"], stages.get("original_fits", {}), stages.get("original_serve")
    if not served or set(served["tasks"]) != set(fits) or not set(fits) < set(mine):
        return None
    loops = sum(fit["loop_seconds"] for fit in fits.values())
    trained = sum(task["train_tokens"] for task in mine.values()) / sum(fit["train_tokens"] for fit in fits.values())
    around = (sum(fit["seconds"] for fit in fits.values()) - loops) / len(fits)
    asked = _asked(mine.values()) / _asked(mine[name] for name in fits)
    answers = served["generate_seconds"]
    return loops * trained + around * len(mine) + served["seconds"] - answers + answers * asked


def _rate(tasks: list[dict[str, Any]], seconds: str) -> float:
    """Seconds for each trained token."""
    return sum(task[seconds] for task in tasks) / sum(task["train_tokens"] for task in tasks)


def _pass_seconds(stage: Mapping[str, Any], with_adapter: bool) -> dict[str, float]:
    """Task -> median seconds over the passes with adapters, or without."""
    passes = [one["tasks"] for one in stage["passes"] if one["adapter"] is with_adapter and not one.get("together")]
    return {name: statistics.median(one[name] for one in passes) for name in passes[0]}


@dataclass(frozen=True)
class Row:
    """One stage of one pipeline: its seconds, and, where tokens are computed in it, tokens and useful operations."""

    stage: str
    seconds: float
    tokens: int | None = None
    flops: float | None = None


def original_rows(stages: Stages) -> dict[str, list[Row]]:
    """The original pipeline's stages: once for each way of serving it that ran."""
    fits = stages.get("original_fits", {}).values()
    if not fits:
        return {}
    loop = sum(fit["loop_seconds"] for fit in fits)
    fit_rows = [
        Row("processes of the fits: start, loading, saving", sum(fit["seconds"] for fit in fits) - loop),
        Row("fit", loop, sum(fit["train_tokens"] for fit in fits), sum(fit["fit_flops"] for fit in fits)),
    ]
    found = {}
    for label, name in (
        ("original", "original_serve"),
        ("original, this project's LoRA kernels", "original_serve_same_kernels"),
    ):
        if served := stages.get(name):
            tasks = served["tasks"].values()
            rows = [
                *fit_rows,
                Row("start of the engine", served["seconds"] - served["generate_seconds"]),
                Row("generate", served["generate_seconds"], _asked(tasks), sum(t["generate_flops"] for t in tasks)),
            ]
            answered, asked = (sum(task[part] for task in tasks) for part in ("answered", "requests"))
            if answered < asked:
                label += f" (generation scaled by tokens from {answered} of {asked} questions)"
            found[label] = [*rows, Row("total", sum(row.seconds for row in rows))]
    return found or {"original": fit_rows}


def own_rows(done: Mapping[str, Any]) -> list[Row]:
    """This project's stages. The rest is negative where stages overlapped."""
    tasks = done["tasks"].values()
    fit, generate, start = done["fit_seconds"], done["generate_seconds"], done["start_seconds"]
    fit_work = sum(task["fit_flops"] for task in tasks)
    return [
        Row("start of the process", start),
        Row("fit", fit, sum(task["train_tokens"] for task in tasks), fit_work),
        Row("generate", generate, _asked(tasks), sum(task["generate_flops"] for task in tasks)),
        Row("loading, engine start, scoring, the rest", done["seconds"] - start - fit - generate),
        Row("total", done["seconds"]),
    ]


def _asked(tasks: Any) -> int:
    """Tokens of prompts and answers."""
    return sum(task["prompt_tokens"] + sum(task["answer_tokens"]) for task in tasks)
