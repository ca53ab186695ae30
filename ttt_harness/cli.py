"""The command `ttt-harness`: what lm-eval does not do itself.

Each subcommand is one function that adds its parser and names what runs (`COMMANDS`). Nothing heavy is imported before
a subcommand runs, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ttt_harness import __version__
from ttt_harness.errors import ConfigError, ReportError, TTTError
from ttt_harness.extras import missing_part
from ttt_harness.terminal import complain, run_command

Subparsers = Any  # argparse._SubParsersAction has no public name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (by default the process's own). Returns the exit status; bad input is one sentence."""
    return run_command(lambda: _run(argv), TTTError)


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ttt-harness", description="Sweep, compare and show lm_eval runs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(subparsers)
    args, others = parser.parse_known_args(argv)
    if others and not getattr(args, "passes_options", False):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.options = others
    try:
        return int(args.run(args))
    except ModuleNotFoundError as error:  # where only what reports need is installed
        if missing := missing_part(error):
            raise missing from error
        raise


def _add_compare(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="scores of runs beside each other, with differences, intervals and p-values",
        description="Compare lm-eval runs with a base run, question by question where both logged their samples.",
    )
    what = "results file of lm-eval, or a folder with one; NAME=PATH gives it a name"
    parser.add_argument("base", metavar="BASE", help=what)
    parser.add_argument("others", metavar="OTHER", nargs="+", help="one or more of the same")
    parser.add_argument(
        "--format", choices=("table", "markdown", "csv", "json", "latex"), default="table", help="default: table"
    )
    parser.add_argument("--reference", choices=("published",), help="put the published Llama-3.1-8B figures beside")
    parser.add_argument(
        "--metric", metavar="NAME[,FILTER]", help="compare by this metric (default: each task's first one)"
    )
    parser.add_argument("--allow-same-run", action="store_true", help="compare a run even with itself")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from ttt_harness.report import tables
    from ttt_harness.report.compare import compare_runs
    from ttt_harness.report.seeds import find_compared

    labels: list[str | None] = []
    runs, remarks = [], []
    for name, path in _named([args.base, *args.others]):
        run, said = find_compared(path)
        labels.append(name)
        runs.append(run)
        remarks += said
    comparison = compare_runs(
        runs[0],
        runs[1:],
        labels=labels,
        metric=args.metric,
        reference=bool(args.reference),
        allow_same_run=args.allow_same_run,
        remarks=remarks,
    )
    if args.format == "table":
        tables.print_table(comparison)
    else:
        writers = {
            "markdown": tables.as_markdown,
            "csv": tables.as_csv,
            "json": tables.as_json,
            "latex": tables.as_latex,
        }
        sys.stdout.write(writers[args.format](comparison))
        for warning in [*remarks, *(f"{a.label}: {w}" for a in comparison.others for w in a.warnings)]:
            complain(f"warning: {warning}")
    sys.stdout.flush()
    return 0


def _named(given: Sequence[str]) -> list[tuple[str | None, str]]:
    """The name, None where there is none, and the path of each `PATH` or `NAME=PATH`.

    Raises:
        ReportError: two have the same name.
    """
    found: list[tuple[str | None, str]] = []
    for text in given:
        name, equals, path = text.partition("=")
        whole = os.path.exists(text)  # not Path.exists, which raises for what cannot be a path
        found.append((name, path) if equals and name and not whole else (None, text))
    names = [name for name, _ in found if name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ReportError(f"the name {', '.join(twice)} is given to two runs; give each its own.")
    return found


def _add_report(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="one HTML page of runs: scores, training, costs, and every changed answer",
        description="Write one self-contained HTML page that shows lm-eval runs, with no network, to whoever opens it.",
    )
    what = "results files of lm-eval, or folders with any number; NAME=DIR gives their runs a name"
    parser.add_argument("paths", metavar="DIR", nargs="+", help=what)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")
    parser.add_argument("--base", metavar="PATH", help="the run to compare the others with (default: oldest untrained)")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument("--metric", metavar="NAME[,FILTER]", help="show this metric (default: each task's first one)")
    parser.add_argument("--reference", choices=("published",), help="put the published Llama-3.1-8B figures beside")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from ttt_harness.report.page.page import build_page
    from ttt_harness.report.page.tuned import find_tuned
    from ttt_harness.report.results import find_run, holds_results, same_run, search_runs

    named, remarks, tuned = [], [], []
    for name, path in _named(args.paths):
        settings, said = find_tuned(path)
        tuned += settings
        remarks += said
        if settings and not holds_results(path):
            continue
        found, said = search_runs(path)
        named += [(run, name) for run in found]
        remarks += said
    runs = [run for run, _ in named]
    base = None
    if args.base:
        base, said = find_run(args.base)
        base = next((run for run in runs if same_run(run, base)), base)
        remarks += said
    for remark in remarks:
        complain(f"warning: {remark}")
    page = build_page(
        runs,
        names={run: name for run, name in named if name},
        base=base,
        title=args.title,
        metric=args.metric,
        reference=bool(args.reference),
        tuned=tuned,
    )
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{args.output} cannot be written: {error.strerror}; choose another file with -o.") from error
    print(f"{args.output}  ({args.output.stat().st_size / 1e6:.1f} MB)")
    return 0


def _add_sweep(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="evaluate a grid of methods, hyperparameters and seeds, with one engine start",
        description="Evaluate a grid of methods, hyperparameters and seeds in one process. Cells that are done are "
        "skipped.",
        epilog="All other options are those of `lm_eval run` (see its --help): --tasks, --model_args, --limit, ... "
        "--output_path is the folder for the whole grid; each cell gets its own in it, <method>/seed<N> or "
        "<method>/<axis=value,...>/seed<N>.",
        usage="ttt-harness sweep --methods M1,M2 --seeds 42-46 --tasks T --model_args pretrained=... --output_path DIR "
        "[any option of lm_eval run]",
        allow_abbrev=False,  # --seed is lm-eval's
    )
    parser.add_argument("--methods", metavar="NAMES", help="with commas; all: every published setting")
    parser.add_argument("--seeds", metavar="SEEDS", help="42-46, 42,43 or 42: of the demonstrations and of the fits")
    _add_grid(parser)
    parser.add_argument(
        "--status", action="store_true", help="only show what is done, running, waiting, failed and why: needs "
        "--output_path"
    )  # fmt: skip
    cluster = parser.add_argument_group("on a SLURM cluster")
    cluster.add_argument("--slurm", action="store_true", help="submit the cells as an array job, and return")
    cluster.add_argument("--time", help="of each job, in SLURM's notation: 90 (minutes), 4:00:00, 1-12 (days-hours)")
    cluster.add_argument("--gpus", type=int, metavar="N", help="of each job (default: 1; 0: ask for none)")
    cluster.add_argument("--partition", metavar="NAME")
    cluster.add_argument("--account", metavar="NAME")
    cluster.add_argument("--cells_per_job", type=int, metavar="N", help="cells that share an engine (default: 1)")
    cluster.add_argument("--sbatch", metavar="FLAGS", help='other flags: --sbatch="--qos=high --cpus-per-task=16"')
    parser.set_defaults(run=_sweep, passes_options=True)


def _add_grid(parser: argparse.ArgumentParser, *, keys: str = "methods, seeds, grid") -> None:
    parser.add_argument(
        "--grid", action="append", metavar="AXIS=VALUES",
        help="an axis and its values, e.g. lr=1e-4,3e-4; given again for another one",
    )  # fmt: skip
    parser.add_argument("--config", "-C", type=Path, metavar="FILE", help=f"YAML with {keys} and any option of lm_eval")


def _sweep(args: argparse.Namespace) -> int:
    from ttt_harness.sweep import command
    from ttt_harness.sweep.slurm import Resources

    names = ("methods", "seeds", "grid", "config", "options")
    grid = {name: getattr(args, name) for name in names}
    if args.status:
        return command.status(**grid)
    given = {"time": args.time, "gpus": args.gpus, "partition": args.partition, "account": args.account}
    given |= {"cells_per_job": args.cells_per_job, "flags": args.sbatch}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.slurm:
        raise ConfigError("--time, --gpus, --partition, --account, --cells_per_job and --sbatch go with --slurm.")
    return command.sweep(**grid, resources=Resources(**{"time": None, **given}) if args.slurm else None)


def _add_fit(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "fit",
        help="fit the adapters of tasks without evaluating, and print where they are",
        description="Fit the adapters that lm_eval would fit with these options, and print their directories. "
        "No engine is started.",
        epilog="All other options are those of `lm_eval run` (see its --help): --tasks, --model_args, --limit, ...",
        usage="ttt-harness fit --tasks T --model_args pretrained=... [--format json] [any option of lm_eval run]",
        allow_abbrev=False,
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    parser.set_defaults(run=_fit, passes_options=True)


def _fit(args: argparse.Namespace) -> int:
    from ttt_harness.sweep.fit import fit

    return fit(args.options, form=args.format)


def _add_tune(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="which settings suit a model, found from demonstrations alone, and whether they gain anything",
        description="Try settings on held-out demonstrations, and write tuned.json. No evaluated question is read, no "
        "engine is started and no fit is stored. A search that was stopped goes on.",
        epilog="All other options are those of `lm_eval run` (see its --help): --tasks, --model_args, ... "
        "--output_path is the folder for tuned.json and the log (default: in the cache, where settings=auto looks).",
        usage="ttt-harness tune --tasks T --model_args pretrained=... [--grid AXIS=VALUES] [any option of lm_eval run]",
        allow_abbrev=False,
    )
    _add_grid(parser, keys="seeds, grid")
    parser.add_argument("--seeds", metavar="SEEDS", help="42-46, 42,43 or 42: of the demonstrations and of the fits")
    parser.add_argument(
        "--folds", type=int, metavar="N", help="folds of the demonstrations, each held out once (default: 5, or k)"
    )
    parser.add_argument(
        "--orders", type=int, default=2, metavar="N", help="orders of the others before each question (default: 2)"
    )
    parser.add_argument("--sample_tasks", type=int, metavar="N", help="search on N of the tasks, drawn at random")
    parser.add_argument("--full", action="store_true", help="try every setting on every fold, and drop none early")
    parser.set_defaults(run=_tune, passes_options=True)


def _tune(args: argparse.Namespace) -> int:
    from ttt_harness.tune.command import tune

    names = ("grid", "seeds", "folds", "orders", "sample_tasks", "full", "config", "options")
    return tune(**{name: getattr(args, name) for name in names})


def _add_plan(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="how long a grid takes on 1 to 64 GPUs, and how many meet a deadline",
        description="Count the tokens of a grid, and tell how long it takes on 1, 2, 4, ... 64 GPUs at measured rates.",
        epilog="All other options are those of `lm_eval run` (see its --help): --tasks, --model_args, --limit, ...",
        usage="ttt-harness plan --methods M1,M2 --seeds 42-46 --tasks T --model_args pretrained=... "
        "[--measured PATH] [--deadline 2h]",
        allow_abbrev=False,
    )
    parser.add_argument("--methods", metavar="NAMES", help="with commas; all: every published setting")
    parser.add_argument("--seeds", metavar="SEEDS", help="42-46, 42,43 or 42")
    _add_grid(parser)
    parser.add_argument(
        "--measured", type=Path, metavar="PATH",
        help="results of a run to take the rates from (default: the newest in benchmarks/results)",
    )  # fmt: skip
    parser.add_argument("--fit_rate", type=float, metavar="TOKENS", help="that one worker fits in a second")
    parser.add_argument("--answer_rate", type=float, metavar="TOKENS", help="that one worker reads and writes")
    parser.add_argument("--start_seconds", type=float, metavar="S", help="until a worker is ready")
    parser.add_argument("--deadline", metavar="TIME", help="90 (seconds), 40m, 2h, 1.5d: find the fewest GPUs for it")
    parser.set_defaults(run=_plan, passes_options=True)


def _plan(args: argparse.Namespace) -> int:
    from ttt_harness.estimate.plan import plan

    grid = ("methods", "seeds", "grid", "config", "options")
    rates = ("measured", "fit_rate", "answer_rate", "start_seconds", "deadline")
    return plan(**{name: getattr(args, name) for name in (*grid, *rates)})


def _add_summary(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "summary",
        help="mean and standard deviation over the seeds, per method, beside the published figures",
        description="Show the mean over seeds of each method in these folders, per task and for the group.",
    )
    parser.add_argument("paths", metavar="DIR", nargs="+", help="results files of lm-eval, or folders with any number")
    parser.add_argument(
        "--format", choices=("table", "markdown", "csv", "json"), default="table", help="default: table"
    )
    parser.set_defaults(run=_summary)


def _summary(args: argparse.Namespace) -> int:
    from ttt_harness.report import summary_tables
    from ttt_harness.report.summary import read

    found = read(args.paths)
    if args.format == "table":
        summary_tables.print_summary(found)
    else:
        writers = {
            "markdown": summary_tables.as_markdown,
            "csv": summary_tables.as_csv,
            "json": summary_tables.as_json,
        }
        sys.stdout.write(writers[args.format](found))
        if args.format == "csv":
            for remark in found.remarks:
                complain(f"note: {remark}")
    sys.stdout.flush()
    return 0


def _add_adapters(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "adapters",
        help="list, show, prune, verify and export the adapters that runs have fitted",
        description="See and keep in order what a store of adapters holds.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    results = "results file of lm-eval, or a folder with any number; say which adapters they name"

    def add(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.add_argument("--adapter_dir", type=Path, metavar="DIR", help="the store (default: that of runs)")
        command.set_defaults(run=run)
        return command

    listing = add("list", _adapters_list, "one line an adapter: task, model, method, settings, size, age, last use")
    listing.add_argument("--sort", choices=ADAPTER_ORDERS, default="used", help="default: used, the last first")
    listing.add_argument("--method", metavar="NAME", help="those of this method")
    listing.add_argument("--results", metavar="PATH", nargs="+", help=results)
    listing.add_argument("--format", choices=("table", "csv", "json"), default="table", help="default: table")
    showing = add("show", _adapters_show, "all that determines an adapter, its losses, and whether it is intact")
    showing.add_argument("key", metavar="KEY", help="its key, or the beginning of it")
    showing.add_argument("--results", metavar="PATH", nargs="+", help=results)
    showing.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    pruning = add("prune", _adapters_prune, "remove adapters, after saying which and asking")
    pruning.add_argument("--older", metavar="TIME", help="not used for so long: 30d, 12h, 2w")
    pruning.add_argument("--keep", metavar="SIZE", help="until so much is left, those first that were used longest ago")
    pruning.add_argument("--unused-by", metavar="PATH", nargs="+", help="that no results file here names")
    pruning.add_argument("--damaged", action="store_true", help="that verify complains of, and what was set aside")
    pruning.add_argument("--yes", "-y", action="store_true", help="do not ask")
    for command in (listing, pruning):
        command.add_argument("--model", metavar="NAME", help="those of this base model; * and ? stand for anything")
        command.add_argument("--task", metavar="NAME", help="those of this task; * and ? stand for anything")
    verifying = add("verify", _adapters_verify, "check that adapters are as they were written, and finite")
    verifying.add_argument("keys", metavar="KEY", nargs="*", help="which (default: all)")
    verifying.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    exporting = add("export", _adapters_export, "write an adapter as a PEFT directory with a model card")
    exporting.add_argument("key", metavar="KEY", help="its key, or the beginning of it")
    exporting.add_argument("folder", metavar="DIR", type=Path, help="a new or an empty folder")
    exporting.add_argument("--base_model", metavar="NAME", help="the base model's name, where the fit had a path")
    exporting.add_argument("--results", metavar="PATH", nargs="+", help="whose scores the card is to show")


# The names of ttt_harness.adapters.inventory.ORDERS, so that --help imports nothing for them.
ADAPTER_ORDERS = ("used", "age", "size", "task", "model", "method", "key")


def _adapter_store(args: argparse.Namespace) -> Any:
    from ttt_harness.adapters.store import AdapterStore
    from ttt_harness.config import TTTConfig

    return AdapterStore(TTTConfig(adapter_dir=args.adapter_dir and str(args.adapter_dir)).adapter_store)


def _uses(paths: Sequence[str] | None) -> dict[str, Any] | None:
    """The results that name adapters, by the adapters' keys; None where no results are given."""
    if paths is None:
        return None
    from ttt_harness.adapters.inventory import Use
    from ttt_harness.report.results import find_runs

    uses: dict[str, Any] = {}
    for run in (run for path in paths for run in find_runs(path)):
        stated = run.config.get("ttt")
        stated = stated.get("tasks") if isinstance(stated, dict) else None
        for task in stated if isinstance(stated, dict) else ():
            fit = run.fit(task)
            if fit is not None and fit.adapter:
                scored = run.metrics(task) if task in run.tasks else []
                scores = {str(metric): run.score(task, metric).value for metric in scored}
                use = Use(str(run.path), task, scores, fit.served_check)
                uses.setdefault(Path(fit.adapter).name, []).append(use)
    return uses


def _adapters_list(args: argparse.Namespace) -> int:
    from ttt_harness.adapters.command import list_adapters

    return list_adapters(
        _adapter_store(args),
        sort=args.sort,
        model=args.model,
        task=args.task,
        method=args.method,
        uses=_uses(args.results),
        form=args.format,
    )


def _adapters_show(args: argparse.Namespace) -> int:
    from ttt_harness.adapters.command import show

    return show(_adapter_store(args), args.key, uses=_uses(args.results), form=args.format)


def _adapters_prune(args: argparse.Namespace) -> int:
    from ttt_harness.adapters.command import prune

    return prune(
        _adapter_store(args),
        model=args.model,
        task=args.task,
        older=args.older,
        keep=args.keep,
        uses=_uses(args.unused_by),
        damaged=args.damaged,
        yes=args.yes,
    )


def _adapters_verify(args: argparse.Namespace) -> int:
    from ttt_harness.adapters.command import verify

    return verify(_adapter_store(args), args.keys, form=args.format)


def _adapters_export(args: argparse.Namespace) -> int:
    from ttt_harness.adapters.command import export_adapter

    return export_adapter(
        _adapter_store(args), args.key, args.folder, base_model=args.base_model, uses=_uses(args.results)
    )


def _add_model(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "model",
        help="fetch the embedded model and print where it is",
        description="Fetch the small model that `pretrained=embedded` stands for, once, and print its folder.",
    )
    parser.set_defaults(run=_model)


def _model(_: argparse.Namespace) -> int:
    from ttt_harness.embedded import embedded_model_path

    print(embedded_model_path())
    return 0


def _add_ray_in_slurm(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "ray-in-slurm",
        help="print where the script is that has one run use several nodes of a SLURM cluster",
        description="Print the path of a script for sbatch, which starts Ray on each node of its job and then runs a "
        "command: sbatch --nodes=4 --gpus-per-node=8 $(ttt-harness ray-in-slurm) lm_eval ...",
    )
    parser.set_defaults(run=_ray_in_slurm)


def _ray_in_slurm(_: argparse.Namespace) -> int:
    import ttt_harness.cluster

    print(Path(ttt_harness.cluster.__file__).with_name("ray_in_slurm.sh"))
    return 0


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    _add_sweep,
    _add_fit,
    _add_tune,
    _add_plan,
    _add_summary,
    _add_compare,
    _add_report,
    _add_adapters,
    _add_model,
    _add_ray_in_slurm,
)

if __name__ == "__main__":
    sys.exit(main())
