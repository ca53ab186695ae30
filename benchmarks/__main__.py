"""The benchmark's command line: `python -m benchmarks [compare | growth | workers | step | checkpoint] --help`."""

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT, StageError
from ttt_harness.errors import ConfigError, TTTError

TASKS = "bbh_ttt_boolean_expressions,bbh_ttt_dyck_languages,bbh_ttt_object_counting"
# For growth: the base's tasks, and as many again.
GROWTH_TASKS = "bbh_ttt_boolean_expressions,bbh_ttt_dyck_languages"
MORE_TASKS = "bbh_ttt_object_counting,bbh_ttt_navigate"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 1 where a stage failed or the input is wrong, and says why in a sentence."""
    args = _parser().parse_args(argv)
    # So that a benchmark that is told to end takes its processes along.
    signal.signal(signal.SIGTERM, _end)
    logging.getLogger("torchao").setLevel(logging.ERROR)  # its C++ extensions, which nothing here needs
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars while the tasks are prepared; not for the stages
    try:
        return int(args.run(args))
    except TTTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _end(*_: Any) -> None:
    sys.exit(143)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures this project beside the pipeline that it reimplements."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    compare = commands.add_parser("compare", help="both pipelines on the same work, stage by stage")
    _add_work(compare, tasks=TASKS, limit=40, k=10, permutations=40)
    compare.add_argument(
        "--original-tasks",
        metavar="NAMES",
        help="what the original pipeline runs, and ratios are taken on (default: --tasks)",
    )
    compare.add_argument(
        "--serve-sample",
        type=int,
        default=3,
        metavar="N",
        help="on a CPU, questions of each task that vLLM's own LoRA kernels answer, scaled to all; 0: all (default: 3)",
    )
    compare.add_argument(
        "--stages",
        metavar="NAMES",
        help="some of ours,original,same_kernels,fits,adapter,prefix,turns,engines,memory (default: all of a machine)",
    )
    compare.set_defaults(run=_compare)

    growth = commands.add_parser("growth", help="doubles tasks, k and permutations in turn")
    _add_work(growth, tasks=GROWTH_TASKS, limit=10, k=5, permutations=10)
    growth.add_argument("--more-tasks", metavar="NAMES", default=MORE_TASKS, help="the tasks to double by")
    growth.set_defaults(run=_growth)

    workers = commands.add_parser("workers", help="one run on one worker and on several, in turn")
    _add_work(workers, tasks=TASKS, limit=40, k=10, permutations=40)
    workers.add_argument("--workers", default="1,2", metavar="NUMBERS", help="default: 1,2")
    workers.set_defaults(run=_workers)

    step = commands.add_parser("step", help="one optimiser step, by this project's trainer and by transformers + peft")
    step.add_argument("--model", default="embedded", metavar="DIR", help="a model directory (default: embedded)")
    step.add_argument("--ways", default=None, metavar="NAMES", help="default: fast,general,peft,peft_checkpointing")
    step.add_argument("--tokens", default="192,514,1157,1880", metavar="NUMBERS", help="default: 192,514,1157,1880")
    step.add_argument("--sequences", type=int, default=5, help="in a step (default: 5)")
    step.add_argument("--steps", type=int, default=8, help="of each process (default: 8)")
    step.add_argument("--rank", type=int, default=64, help="of the adapter (default: 64)")
    step.add_argument("--runs", type=int, default=3, help="processes of each; medians are quoted (default: 3)")
    step.add_argument("--stage-limit", type=float, default=600, help="seconds for each process (default: 600)")
    step.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/step_<cpu|gpu>.json")
    step.add_argument("--work", type=Path, metavar="DIR", help="keep orders and logs there (a new folder)")
    step.set_defaults(run=_step)

    checkpoint = commands.add_parser("checkpoint", help="write a checkpoint of a published geometry, random weights")
    checkpoint.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    checkpoint.add_argument("--geometry", default="llama-3.1-8b", metavar="NAME", help="llama-3.1-8b or tiny")
    checkpoint.add_argument("--tokenizer", type=Path, metavar="DIR", help="model to take it from (default: embedded)")
    checkpoint.set_defaults(run=_checkpoint)
    return parser


def _add_work(parser: argparse.ArgumentParser, *, tasks: str, limit: int, k: int, permutations: int) -> None:
    parser.add_argument("--model", default="embedded", metavar="DIR", help="a model directory (default: embedded)")
    parser.add_argument("--tasks", default=tasks, metavar="NAMES", help=f"default: {tasks}")
    parser.add_argument("--limit", type=int, default=limit, help=f"questions of each task (default: {limit})")
    parser.add_argument("--k", type=int, default=k, help=f"demonstrations (default: {k})")
    parser.add_argument(
        "--permutations",
        type=int,
        default=permutations,
        help=f"training sequences of each task (default: {permutations})",
    )
    parser.add_argument("--seed", type=int, default=42, help="of the split, the permutations, the fit (default: 42)")
    parser.add_argument(
        "--generation-budget", default="full", metavar="NAME", help="full (default) or published: length of answers"
    )
    parser.add_argument(
        "--max-model-len", type=int, default=8192, help="context window, where the model's is longer (default: 8192)"
    )
    parser.add_argument("--runs", type=int, default=1, help="how often; medians are quoted (default: 1)")
    parser.add_argument("--stage-limit", type=float, default=1800, help="seconds for each stage (default: 1800)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/<cpu|gpu|growth>.json")
    parser.add_argument("--append", action="store_true", help="add to the runs in the file, of the same settings")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep logs, configs and adapters there (a new folder)")


def _settings(args: argparse.Namespace) -> Any:
    from benchmarks.compare import Settings

    if args.runs < 1:
        raise ConfigError(f"--runs {args.runs} is not allowed: it must be a whole number of at least 1.")
    tasks = _names(args.tasks)
    return Settings(
        model=args.model,
        tasks=tasks,
        original_tasks=_names(getattr(args, "original_tasks", None) or "") or tasks,
        limit=args.limit,
        k=args.k,
        permutations=args.permutations,
        seed=args.seed,
        generation_budget=args.generation_budget,
        max_model_len=args.max_model_len,
        serve_sample=getattr(args, "serve_sample", 0),
        stages=_names(getattr(args, "stages", None) or "") or None,
        stage_limit=args.stage_limit,
    )


def _compare(args: argparse.Namespace) -> int:
    from benchmarks import figures, tables
    from benchmarks.compare import Benchmark
    from benchmarks.results import ResultsFile

    settings = _settings(args)
    console, failed = tables.console(), False
    with _work_folder(args.work) as folder:
        _say("preparing the tasks, measuring the machine")
        benchmark = Benchmark(settings, folder)
        output = (
            args.output or ROOT / "benchmarks" / "results" / f"{'gpu' if benchmark.device == 'cuda' else 'cpu'}.json"
        )
        # How long a stage may take changes no figure.
        stated = {name: value for name, value in asdict(settings).items() if name != "stage_limit"}
        stated |= {"ratios_on": settings.ratios_on, **_fit_settings(settings)}
        results = ResultsFile(output, stated, figures.figures, append=args.append)
        for number in range(1, args.runs + 1):
            run = benchmark.run(results, number, functools.partial(_say, f"run {number}: "))
            tables.print_run(console, run["stages"])
            failed |= bool(run.get("failed"))
    tables.print_figures(console, results.medians, results.content)
    print(f"Written: {output}")
    return int(failed)


def _growth(args: argparse.Namespace) -> int:
    from benchmarks import growth, tables
    from benchmarks.compare import Benchmark
    from benchmarks.results import ResultsFile

    settings = _settings(args)
    asked = growth.variants(settings, _names(args.more_tasks))
    output = args.output or ROOT / "benchmarks" / "results" / "growth.json"
    failed = False
    with _work_folder(args.work) as folder:
        _say("preparing the tasks, measuring the machine")
        benchmarks = {}
        machine = None
        for name, variant in asked.items():
            benchmarks[name] = Benchmark(variant, folder, machine=machine)
            machine = benchmarks[name].machine
        stated = {**asdict(settings), "more_tasks": _names(args.more_tasks), **_fit_settings(settings)}
        results = ResultsFile(output, stated, growth.figures, append=args.append)
        for number in range(1, args.runs + 1):
            run = results.start_run()
            for name, benchmark in benchmarks.items():
                _say(f"run {number}: {name}" + ("" if name == "base" else " doubled"))
                try:
                    run["stages"][name] = benchmark.project(folder / f"run{number}" / name)
                except StageError as error:
                    run.setdefault("failed", {})[name] = str(error)
                    _say(f"  failed: {error}")
                    failed = True
                results.save()
            tables.print_growth(tables.console(), growth.rows(run["stages"]))
    for name, value in results.medians.items():
        print(f"{name}: {value:.2f}")
    print(f"Written: {output}")
    return int(failed)


def _workers(args: argparse.Namespace) -> int:
    from benchmarks import workers
    from ttt_harness.config import TTTConfig

    numbers = _numbers("--workers", args.workers)
    output = args.output or ROOT / "benchmarks" / "results" / "workers.json"
    stated = {name: getattr(args, name) for name in ("model", "limit", "k", "permutations", "seed", "max_model_len")}
    tasks = _names(args.tasks)

    def keep(found: list[dict[str, Any]]) -> None:
        output.write_text(json.dumps({"settings": {**stated, "tasks": tasks}, "runs": found}, indent=1) + "\n")

    with _work_folder(args.work) as folder:
        found = workers.measure(
            tasks,
            folder,
            workers=numbers,
            runs=args.runs,
            model=args.model,
            config=TTTConfig(k=args.k, seed=args.seed, num_permutations=args.permutations),
            limit=args.limit,
            engine={"max_model_len": args.max_model_len, "generation_budget": args.generation_budget},
            seconds=args.stage_limit,
            say=_say,
            keep=keep,
        )
    print(workers.table(found))
    print(f"Written: {output}")
    return 0


def _step(args: argparse.Namespace) -> int:
    from benchmarks import machine, step
    from ttt_harness.embedded import embedded_model_path

    ways = _names(args.ways or ",".join(step.WAYS))
    if unknown := [way for way in ways if way not in step.WAYS]:
        raise ConfigError(f"--ways {unknown[0]} is not known: use some of {', '.join(step.WAYS)}.")
    tokens = _numbers("--tokens", args.tokens)
    for name, least in {"sequences": 1, "steps": 3, "rank": 1, "runs": 1}.items():
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)} is not allowed: write a number of at least {least}.")
    here = machine.measure()
    output = (
        args.output or ROOT / "benchmarks" / "results" / f"step_{'gpu' if here['device'] == 'cuda' else 'cpu'}.json"
    )
    stated = {name: getattr(args, name) for name in ("model", "sequences", "steps", "rank")}

    def keep(found: list[dict[str, Any]]) -> None:
        written = {"settings": stated, "machine": {**machine.describe(), **here}, "versions": machine.versions()}
        output.write_text(json.dumps({**written, "runs": found}, indent=1) + "\n")

    with _work_folder(args.work) as folder:
        found = step.measure(
            folder,
            model_dir=embedded_model_path() if args.model == "embedded" else Path(args.model).resolve(),
            ways=ways,
            tokens=tokens,
            sequences=args.sequences,
            steps=args.steps,
            runs=args.runs,
            rank=args.rank,
            machine=here,
            limit=args.stage_limit,
            say=_say,
            keep=keep,
        )
    print(step.table(found))
    print(f"Written: {output}")
    return int(any("failed" in one for one in found))


def _checkpoint(args: argparse.Namespace) -> int:
    from benchmarks.checkpoint import make_checkpoint
    from ttt_harness.embedded import embedded_model_path

    start = time.monotonic()
    make_checkpoint(args.folder, args.geometry, args.tokenizer or embedded_model_path())
    print(f"{args.folder}: written in {time.monotonic() - start:.0f} s")
    return 0


def _fit_settings(settings: Any) -> dict[str, Any]:
    """The hyperparameters of both pipelines, for the record."""
    names = ("fit_batch_size", "epochs", "lr", "warmup_ratio", "lora_rank", "lora_alpha", "lora_dropout")
    return {name: getattr(settings.fit, name) for name in names}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(option: str, text: str) -> list[int]:
    """Numbers of at least 1, with commas.

    Raises:
        ConfigError: there are none, or something else stands there.
    """
    numbers = [int(part) for part in _names(text) if part.isdecimal() and int(part) > 0]
    if not numbers or len(numbers) != len(_names(text)):
        raise ConfigError(f"{option} {text} is not allowed: write numbers of at least 1, as in 1,2.")
    return numbers


def _say(*text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {''.join(text)}", flush=True)


@contextlib.contextmanager
def _work_folder(chosen: Path | None) -> Iterator[Path]:
    """A folder for what the stages write: the chosen one, which stays, or one that is removed at the end."""
    if chosen is not None:
        if chosen.exists():
            raise ConfigError(f"--work {chosen} exists already: name a new folder.")
        chosen.mkdir(parents=True)
        yield chosen.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ttt-benchmark-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
