"""Runs a sweep: everything that can be wrong is found first, then each cell goes through lm-eval's own `lm_eval run`.

All cells run in this process. `ttt_vllm` keeps one engine and one base model for as long as the arguments of the
engine are the same, so every cell is given the same ones, whether its method needs adapters or not.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from ttt_harness.config import nearest, quoted
from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.methods import SETTINGS
from ttt_harness.run.progress import showing
from ttt_harness.sweep import slurm
from ttt_harness.sweep.cells import is_done, is_partial, locked, note_failure, note_grid, written
from ttt_harness.sweep.display import SweepDisplay
from ttt_harness.sweep.grid import Call, Cell, cells_of, parse_methods, parse_seeds, read_yaml

Execute = Callable[[Call], None]


def sweep(
    *,
    methods: str | None,
    seeds: str | None,
    config: Path | None,
    options: Sequence[str],
    resources: slurm.Resources | None = None,
) -> int:
    """Run the grid. Returns the exit status: 0, 1 where a cell failed, 130 after Ctrl-C.

    Args:
        methods, seeds, config: as on the command line of `ttt-harness sweep`.
        options: all others, which are those of `lm_eval run`.
        resources: submit the grid to SLURM, and have each job ask for these.

    Raises:
        ConfigError: something in the grid or the options is not allowed; nothing has been run then.
    """
    file = read_yaml(config) if config else {}
    names = parse_methods(methods if methods is not None else file.pop("methods", None))
    numbers = parse_seeds(seeds if seeds is not None else file.pop("seeds", None))
    call = lm_eval_call(file, options)
    root = Path(call.pop("output_path"))
    cells = cells_of(names, numbers, call)
    if resources is not None:
        return slurm.submit(cells, root, resources)
    with locked(root):
        try:
            return run_cells(cells, root)
        except KeyboardInterrupt:
            print("Stopped before the first cell.", file=sys.stderr)
            return 130


def status(*, methods: str | None, seeds: str | None, config: Path | None, options: Sequence[str]) -> int:
    """Print what has become of a sweep's cells; the arguments are those of `sweep`, and may leave out the grid.

    Raises:
        ConfigError: the folder is missing.
    """
    file = read_yaml(config) if config else {}
    parser = argparse.ArgumentParser(prog="ttt-harness sweep", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_path", default=file.get("output_path"))
    root = parser.parse_known_args(options)[0].output_path
    if not root:
        raise ConfigError("output_path is missing: give the folder of the sweep with --output_path.")
    methods, seeds = methods or file.get("methods"), seeds or file.get("seeds")
    return slurm.status(Path(root), parse_methods(methods) if methods else [], parse_seeds(seeds) if seeds else [])


def lm_eval_call(file: Call, options: Sequence[str]) -> Call:
    """The options of `lm_eval run`: those of the command line, and of `file` where the command line gives none.

    Raises:
        ConfigError: an option is missing or lm-eval refuses it.
    """
    from lm_eval._cli.run import Run
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging, simple_parse_args_string

    parser = argparse.ArgumentParser(prog="ttt-harness sweep")
    Run.create(parser.add_subparsers())
    parsed, unknown = parser.parse_known_args(["run", *options])
    # One display; LMEVAL_LOG_LEVEL, which lm-eval reads here, brings the rest back. Not before lm-eval has parsed the
    # options: it warns of one that is given twice.
    setup_logging(logging.ERROR)
    if unknown:
        raise ConfigError(f"{' '.join(unknown)} is no option of this command or of lm_eval run; see --help of both.")
    given = vars(parsed)
    call = {key: value for key, value in file.items() if key not in ("methods", "seeds")}
    known = {field.name for field in dataclasses.fields(EvaluatorConfig)} - {"config"}
    for key in call:
        if key not in known:
            raise ConfigError(
                f"{key} in --config is neither methods, nor seeds, nor an option of lm_eval.{nearest(key, known)}"
            )
    call |= {key: value for key, value in given.items() if key in known and value is not None}
    for key in ("model_args", "metadata"):
        value = call.get(key) or {}
        call[key] = simple_parse_args_string(value) if isinstance(value, str) else value
        if not isinstance(call[key], dict):
            raise ConfigError(f"{key}={value!r} is not allowed: write key=value pairs.")
    tasks = call.get("tasks") or []
    call["tasks"] = tasks.split(",") if isinstance(tasks, str) else [str(task) for task in tasks]
    for key, example in {"tasks": "bbh_ttt", "output_path": "results"}.items():
        if not call.get(key):
            raise ConfigError(f"{key} is missing: give one with --{key}, e.g. --{key} {example}.")
    limit = call.get("limit")
    if limit is not None and not (
        type(limit) in (int, float) and 0 < limit < math.inf and (limit < 1 or float(limit).is_integer())
    ):
        raise ConfigError(
            f"--limit {quoted(limit)} is not allowed: it must be a number of questions, at least 1, or a share of "
            "them between 0 and 1; leave it out for all of them."
        )
    if call.get("use_cache"):
        raise ConfigError(
            "--use_cache is not allowed in a sweep: lm-eval's cache knows an answer by its prompt, not by the method "
            "that gave it; leave it out (cells that are done, and fitted adapters, are kept without it)."
        )
    try:
        EvaluatorConfig.from_cli(argparse.Namespace(**copy.deepcopy(call)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lm-eval refuses these options: {_sentence(error)}") from None
    return call


def run_cells(cells: Sequence[Cell], root: Path, execute: Execute | None = None, *, logs: bool = False) -> int:
    """Run the cells that are not done. Returns the exit status.

    Args:
        cells: of the grid, or some of them.
        root: the folder of the sweep.
        execute: runs one call; by default lm-eval does, after a check of model and tasks.
        logs: write what is printed during each cell beside its results.
    """
    todo = [cell for cell in cells if not is_done(cell, root)]
    skipped = len(cells) - len(todo)
    if skipped:
        print(f"{skipped} of {len(cells)} cells are done already: skipped.", file=sys.stderr)
    if not todo:
        return 0
    failed: dict[str, str] = {}
    fits = {name: method.fits for name, method in SETTINGS.items()}
    with contextlib.ExitStack() as stack:
        if execute is None:
            stack.enter_context(one_task_index())
            stack.enter_context(_no_bars())
            _check(todo, root)
            if not logs:  # SLURM's record has the cells of a job
                note_grid(cells, root)
        display = stack.enter_context(SweepDisplay([cell.method for cell in todo], fits, skipped))
        if execute is None:
            execute = run_lm_eval
            stack.enter_context(showing(display))
        try:
            for cell in todo:
                with _logged(cell.log(root)) if logs else contextlib.nullcontext():
                    display.begin(cell.name)
                    reason = _run(cell, root, execute, trace=logs)
                    display.end(f"failed: {reason}" if reason else "done", measured=not reason)
                if reason:
                    failed[cell.name] = reason
        except KeyboardInterrupt:
            display.print(f"Stopped at {cell.name}. The same command goes on from there.")
            return 130
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    done = len(cells) - len(failed)
    told = f"{done} of {len(cells)} cells are in {root}; `ttt-harness summary {root}` shows them."
    print(told if done else "No cell was finished.", file=sys.stderr)
    return 1 if failed else 0


def _run(cell: Cell, root: Path, execute: Execute, *, trace: bool) -> str | None:
    """Run one cell. Returns the reason where it fails. trace: print where in the code it did."""
    try:
        with written(cell, root) as folder:
            execute(_whole_call(cell, folder))
    except (Exception, SystemExit) as error:
        if trace or logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        if not is_partial(cell, root):  # else another job is at it
            note_failure(cell, root, _sentence(error))
        return _sentence(error)
    return None


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append to the file `path` all that this process and those that it starts print."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in enumerate(before, 1):
            os.dup2(kept, number)
            os.close(kept)


def _whole_call(cell: Cell, folder: Path) -> Call:
    """The cell's call with what only the run needs: where results go, and the arguments of the shared engine."""
    call = copy.deepcopy(cell.call)
    return {**call, "model_args": {**cell.engine, **call["model_args"]}, "output_path": str(folder)}


def run_lm_eval(call: Call) -> None:
    """What `lm_eval run` does with these options. Its tables are not printed, unless there is more to see in them."""
    from lm_eval._cli.run import Run

    seen = call.get("write_out") or call.get("show_config")
    with contextlib.nullcontext() if seen else contextlib.redirect_stdout(io.StringIO()):
        Run._execute(argparse.Namespace(**call))


def _check(cells: Sequence[Cell], root: Path) -> None:
    """Find out what is wrong with the tasks and the model before anything is fitted.

    Raises:
        TTTError: a task is unknown or has no data, or the model or its arguments are refused.
    """
    import lm_eval.models  # noqa: F401 - fills the registry
    from lm_eval.api.registry import get_model

    # the one that asks for most: fitting methods check more arguments, and random guesses none
    cell = max(cells, key=lambda cell: (SETTINGS[cell.method].fits, SETTINGS[cell.method].model == "ttt_vllm"))
    config = _lm_eval_config(_whole_call(cell, root))
    others = {name: getattr(config, name) for name in ("batch_size", "max_batch_size", "device")}
    get_model(config.model).create_from_arg_obj(config.model_args, others)
    tasks = list(load_tasks(cell))
    shared = [cell.method for cell in cells if cell.method.startswith("shared_")]
    if shared and len(tasks) == 1:
        print(f"note: {shared[0]} is fitted on {tasks[0]} alone, the only task.", file=sys.stderr)


def load_tasks(cell: Cell) -> dict[str, Any]:
    """The cell's tasks by their names.

    Raises:
        TTTError: a task is unknown or has no data.
    """
    # lm-eval wants a folder where samples are to be logged; nothing is written here.
    config = _lm_eval_config({**cell.call, "output_path": "."})
    try:
        manager = config.process_tasks(config.metadata)
    except ValueError as error:
        raise ConfigError(_unknown_task(str(error))) from None
    try:
        return manager.load(config.tasks)["tasks"]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"lm-eval refuses these tasks: {_sentence(error)}") from None


def _lm_eval_config(call: Call) -> Any:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    return EvaluatorConfig.from_cli(argparse.Namespace(**copy.deepcopy(call)))


def _unknown_task(message: str) -> str:
    """lm-eval's message, and the nearest name to the first task that it names."""
    from lm_eval.tasks import TaskManager

    name = message.partition(":")[2].split(",")[0].strip()
    return f"{name or message} is not a task of lm-eval or of this project.{nearest(name, TaskManager().all_tasks)}"


@contextlib.contextmanager
def one_task_index() -> Iterator[None]:
    """Build lm-eval's index of all tasks once, instead of 12 s for each cell."""
    from lm_eval.tasks import _index

    build, kept = _index.TaskIndex.build, {}

    def build_once(paths: Any, **options: Any) -> Any:
        key = (*map(str, paths := list(paths)), str(options))
        if key not in kept:
            kept[key] = build(paths, **options)
        return dict(kept[key])  # a group adds names to it

    with mock.patch.object(_index.TaskIndex, "build", staticmethod(build_once)):
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Leave out lm-eval's own progress bars, one for each task of each cell."""
    import tqdm

    silent = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    with mock.patch.object(tqdm.tqdm, "__init__", silent):
        yield


def _sentence(error: BaseException) -> str:
    """The reason of a failure, in one sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, TTTError):
        return text
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    short = text if len(text) <= 300 else text[:300] + " ..."
    return f"{type(error).__name__}: {short}" if short else type(error).__name__
