"""The results as plain tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Row, original_rows, own_rows, peak_flops

GIB = 2**30
# figure -> its meaning, and how it is written
MEANINGS = {
    "ratio_total": "original / this project, whole job",
    "ratio_total_same_kernels": "the same, the original with this project's LoRA kernels",
    "ratio_total_scaled": "the same, the original's tasks beyond those that it ran estimated from them",
    "ratio_fit_per_token": "fit: original / this project, seconds per token, training loops alone",
    "ratio_fit_with_start": "fit: the same with the start of the original's processes",
    "fit_peak_fraction": "fit: part of the measured matmul peak",
    "fit_peak_fraction_alone": "the same, with nothing beside the fits",
    "ratio_generate_adapter": "generation: with adapter / without",
    "ratio_generate_prefix_caching": "generation: without prefix caching / with",
    "total_seconds": "this project: first request to last answer, s",
    "process_seconds": "this project: whole process, s",
    "gpu_peak_bytes": "this project: peak of the card's memory, GiB",
    "turns_gpu_peak_bytes": "the same, where it may use 24 GiB",
    "fit_peak_bytes": "fit: peak memory, GiB",
    "fit_limit_bytes": "fit: the limit, 2.5 x base weights + 1 GiB, GiB",
    "serve_peak_bytes": "serving: peak memory, GiB",
}


def console() -> Console:
    """Where tables go; wide enough for them where the output is no terminal."""
    chosen = Console()
    return chosen if chosen.is_terminal else Console(width=120)


def print_run(console: Console, stages: Mapping[str, Any]) -> None:
    """The stages of one run, pipeline by pipeline."""
    peak = peak_flops(stages)
    for label, rows in original_rows(stages).items():
        _print_rows(console, label, rows, peak)
    for label, name in (("this project", "ours"), ("this project, the compared tasks", "ours_compared")):
        if done := stages.get(name):
            _print_rows(console, label, own_rows(done), peak)
    _print_accuracy(console, stages)
    _print_engines(console, stages.get("engines", {}))
    _print_memory(console, stages)


def print_figures(console: Console, medians: Mapping[str, float], content: Mapping[str, Any]) -> None:
    """The quoted figures, and what they were measured on."""
    machine = content["machine"]
    gpu = f", {machine['gpu']} (driver {machine['driver']})" if "gpu" in machine else ""
    flags = " ".join(machine["cpu_flags"])
    memory = machine["memory_bytes"] / GIB
    console.print(f"Machine: {machine['cpu']}, {machine['cores']} cores ({flags}), {memory:.0f} GiB{gpu}")
    console.print("Versions: " + ", ".join(f"{name} {number}" for name, number in content["versions"].items()))
    measured = [run["stages"][name] for run in content["runs"] for name in ("peak_before", "peak_after")
                if name in run["stages"]]  # fmt: skip
    peaks = {name: max(one["peak_flops"][name] for one in measured) for name in measured[0]["peak_flops"]}
    console.print("Matmul peak: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in peaks.items()))
    native = "" if measured[0]["native_bf16"] else "; this machine does not multiply in bfloat16"
    console.print(f"Both pipelines compute in {measured[0]['dtype']}{native}.")
    console.print(f"Ratios are taken on {content['settings']['ratios_on']}.")
    served = [run["stages"]["original_serve"] for run in content["runs"] if "original_serve" in run["stages"]]
    if served and any(task["answered"] < task["requests"] for task in served[0]["tasks"].values()):
        sample = content["settings"]["serve_sample"]
        console.print(
            f"vLLM's own LoRA kernels answered {sample} questions of each task; their generation time is scaled by "
            "tokens (--serve-sample 0 asks all)."
        )
    runs = len(content["runs"])
    table = Table("figure", "median" if runs > 1 else "value", "meaning", box=box.SIMPLE, title=f"{runs} run(s)")
    for name, value in medians.items():
        text = f"{value / GIB:.2f}" if name.endswith("_bytes") else f"{value:.3g}"
        table.add_row(name, text, MEANINGS[name])
    console.print(table)


def _print_rows(console: Console, title: str, rows: Sequence[Row], peak: float) -> None:
    table = Table("stage", title=title, box=box.SIMPLE, title_justify="left")
    for heading in ("seconds", "tokens", "tokens/s", "GFLOP/s", "% of peak"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row.seconds:.1f}"]
        if row.tokens is not None and row.flops is not None and row.seconds > 0:
            rate = row.flops / row.seconds
            cells += [
                f"{row.tokens}",
                f"{row.tokens / row.seconds:.0f}",
                f"{rate / 1e9:.0f}",
                f"{100 * rate / peak:.1f}",
            ]
        table.add_row(row.stage, *cells)
    console.print(table)


def _print_accuracy(console: Console, stages: Mapping[str, Any]) -> None:
    sides = {"original": "original_serve", "same kernels": "original_serve_same_kernels", "this project": "ours"}
    present = {label: stages[name]["tasks"] for label, name in sides.items() if name in stages}
    if not present:
        return
    table = Table("accuracy", *present, box=box.SIMPLE)
    for task in dict.fromkeys(name for tasks in present.values() for name in tasks):
        cells = [f"{100 * tasks[task]['accuracy']:.1f} %" if task in tasks else "" for tasks in present.values()]
        table.add_row(task, *cells)
    console.print(table)


def _print_engines(console: Console, engines: Mapping[str, Any]) -> None:
    if not engines:
        return
    table = Table("our engine", box=box.SIMPLE)
    for heading in ("start, s", "task by task, s", "all in one batch, s"):
        table.add_column(heading, justify="right")
    for name, done in engines.items():
        fastest = [
            min((one["seconds"] for one in done["passes"] if one["together"] is together), default=None)
            for together in (False, True)
        ]
        table.add_row(name, *(f"{seconds:.2f}" for seconds in (done["start_seconds"], *fastest)))
    console.print(table)


def _print_memory(console: Console, stages: Mapping[str, Any]) -> None:
    table = Table("peak memory", box=box.SIMPLE)
    for heading in ("GiB", "limit", "on the card"):
        table.add_column(heading, justify="right")

    def add(what: str, done: Mapping[str, Any], peak: str = "peak_bytes") -> None:
        cells = (done.get(name) for name in (peak, "limit_bytes", "gpu_peak_bytes"))
        table.add_row(what, *("" if value is None else f"{value / GIB:.2f}" for value in cells))

    if fits := stages.get("original_fits"):
        add("original: process of a fit", max(fits.values(), key=lambda fit: fit["peak_bytes"]))
    for label, name in (
        ("original: serving", "original_serve"),
        ("this project: its process", "ours"),
        ("this project, on 24 GiB", "turns"),
    ):
        if done := stages.get(name):
            add(label, done)
    for name in ("memory_short", "memory_full"):
        if done := stages.get(name):
            add(f"this project: a fit alone, {done['tokens']} tokens a sequence", done)
    if done := stages.get("adapter"):
        add("this project: the engine alone", done, "serve_peak_bytes")
    if table.row_count:
        console.print(table)


def print_growth(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """How seconds grow with tokens as one thing is doubled."""
    if not rows:
        console.print("No doubling was measured: the base or its doublings failed.")
        return
    table = Table("doubled", "stage", box=box.SIMPLE)
    for heading in ("tokens", "x", "seconds", "x", "exponent"):
        table.add_column(heading, justify="right")
    for row in rows:
        exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        table.add_row(
            row["doubled"],
            row["stage"],
            f"{row['tokens'][0]} → {row['tokens'][1]}",
            f"{row['token_ratio']:.2f}",
            f"{row['seconds'][0]:.1f} → {row['seconds'][1]:.1f}",
            f"{row['time_ratio']:.2f}",
            exponent,
        )
    console.print(table)
    faster = [f"{row['stage']} ({row['doubled']})" for row in rows if row["faster_than_tokens"]]
    console.print("Grows faster than the tokens: " + (", ".join(faster) if faster else "nothing") + ".")
