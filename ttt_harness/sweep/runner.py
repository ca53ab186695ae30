"""Runs the cells of a sweep: what is wrong is found first, then each cell goes through lm-eval's own `lm_eval run`.

All cells run in this process. `ttt_vllm` keeps one engine and one base model for as long as the arguments of the
engine are the same, so every cell is given the same ones, whether its method needs adapters or not.
"""

import contextlib
import copy
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_harness.config import LMEvalSettings, TaskSettings, TTTConfig
from ttt_harness.methods import SETTINGS
from ttt_harness.run.progress import showing
from ttt_harness.serving.environment import prepare_environment
from ttt_harness.sweep.cells import BusyError, check_place, finish_left, is_partial, partial_of, written
from ttt_harness.sweep.display import SweepDisplay
from ttt_harness.sweep.found import KeptError, found
from ttt_harness.sweep.grid import Call, Cell
from ttt_harness.sweep.lm_eval_call import (
    evaluator_config,
    load_tasks,
    make_model,
    no_bars,
    one_task_index,
    run_lm_eval,
    sentence,
)
from ttt_harness.sweep.notes import note_failure, note_grid
from ttt_harness.terminal import INTERRUPTED, complain

Execute = Callable[[Call], None]


def run_cells(cells: Sequence[Cell], root: Path, execute: Execute | None = None, *, logs: bool = False) -> int:
    """Run the cells that are not done. Returns the exit status.

    Args:
        cells: of the grid, or some of them.
        root: the folder of the sweep.
        execute: runs one call; by default lm-eval does, after a check of model and tasks.
        logs: write what is printed during each cell beside its results.

    Raises:
        ConfigError: something is wrong with the grid, the model, the tasks or the folder; nothing has been run then.
    """
    todo, failed = sort_cells(cells, root)
    skipped = len(cells) - len(todo) - len(failed)
    if skipped:
        complain(f"{skipped} of {len(cells)} cells are done already: skipped.")
    if todo:
        with contextlib.ExitStack() as stack:
            engine: Mapping[str, Any] = {}
            if execute is None:
                stack.enter_context(one_task_index())
                stack.enter_context(no_bars())
                engine = _check(todo, root)
                if not logs and (remark := note_grid(cells, root)):  # SLURM's record has the cells of a job
                    complain(f"note: {remark}")
            fits = {cell.setting: SETTINGS[cell.method].fits for cell in todo}
            display = stack.enter_context(SweepDisplay([cell.setting for cell in todo], fits, skipped))
            if execute is None:
                execute = run_lm_eval
                stack.enter_context(showing(display))
            for cell in todo:
                try:
                    with _logged(cell.log(root)) if logs else contextlib.nullcontext():
                        display.begin(cell.name)
                        reason = _run(cell, root, execute, engine, trace=logs)
                        display.end(f"failed: {reason}" if reason else "done", measured=not reason)
                except KeyboardInterrupt:
                    display.print(f"Stopped at {cell.name}. The same command goes on from there.")
                    return INTERRUPTED
                if reason:
                    failed[cell.name] = reason
    return _conclude(len(cells), skipped == len(cells), failed, root)


def sort_cells(cells: Sequence[Cell], root: Path) -> tuple[list[Cell], dict[str, str]]:
    """The cells that are to run, and those that cannot, with the reason, since what is in their place is kept.

    Raises:
        ConfigError: the folder holds results of other options, or what no sweep has written.
    """
    todo, kept = [], {}
    for cell in cells:
        try:
            finish_left(cell, root)
            there = found(cell, root)
            if there.remark:
                complain(f"note: {cell.name}: {there.remark}")
            if not there.done:
                check_place(cell, root)
                todo.append(cell)
        except KeptError as error:
            kept[cell.name] = str(error)
            complain(f"{cell.name}: {error}")
    return todo, kept


def _conclude(cells: int, nothing_to_do: bool, failed: Mapping[str, str], root: Path) -> int:
    if nothing_to_do:
        return 0
    for name, reason in failed.items():
        complain(f"failed: {name}: {reason}")
    done = cells - len(failed)
    told = f"{done} of {cells} cells are in {root}; `ttt-harness summary {root}` shows them."
    complain(told if done else "No cell was finished.")
    return 1 if failed else 0


def _run(cell: Cell, root: Path, execute: Execute, engine: Mapping[str, Any], *, trace: bool) -> str | None:
    """Run one cell. Returns the reason where it fails. trace: print where in the code it did."""
    try:
        with written(cell, root) as folder:
            execute(_whole_call(cell, folder, engine))
    except BusyError as error:
        return str(error)
    except (Exception, SystemExit) as error:
        if trace or logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        reason = sentence(error)
        if is_partial(cell, root):
            reason = f"{reason.rstrip('.')}; what was computed is in {partial_of(cell, root)}."
        note_failure(cell, root, reason)
        return reason
    return None


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Append to the file `path` all that this process and those that it starts print."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        complain(f"note: {path} cannot be written ({error.strerror}); the job's own log has it.")
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        with file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in enumerate(before, 1):
            os.dup2(kept, number)
            os.close(kept)


def _whole_call(cell: Cell, folder: Path, engine: Mapping[str, Any]) -> Call:
    """The cell's call with what only the run needs: where results go, and the arguments of the shared engine."""
    call = copy.deepcopy(cell.call)
    if call.get("seed") is not None:  # of Python, numpy, torch and the demonstrations, which --seeds draws
        call["seed"] = [*evaluator_config({**call, "output_path": str(folder)}).seed[:3], cell.seed]
    shared = engine if cell.lora_rank is not None else {}
    return {**call, "model_args": {**shared, **call["model_args"]}, "output_path": str(folder)}


def shared_engine_args(cell: Cell) -> dict[str, Any]:
    """The model arguments that have all cells of a grid share one engine; `cell` is any of them.

    Raises:
        TTTError: the model is missing, or its adapters are larger than vLLM takes.
    """
    if cell.lora_rank is None:
        return {}
    prepare_environment()  # before vLLM is imported
    from ttt_harness.run.model_arguments import max_lora_rank, model_directory
    from ttt_harness.training.model_config import read_config
    from ttt_harness.training.shape import ModelShape

    args = cell.call["model_args"]
    if args.get("pretrained") is None:
        return {}  # the model says so
    settings = LMEvalSettings.from_mapping(args)
    folder = model_directory(str(args["pretrained"]), settings)
    shape = ModelShape.from_config(read_config(folder), where=str(folder))
    config = TTTConfig(method=str(args["method"]), lora_rank=cell.lora_rank)
    return {"enable_lora": True, "max_lora_rank": max_lora_rank(config, shape, settings.max_lora_rank)}


def _check(cells: Sequence[Cell], root: Path) -> dict[str, Any]:
    """Find out what is wrong with the tasks and the model before anything is fitted. Returns the shared arguments.

    Raises:
        TTTError: a task is unknown or has no data, or the model or its arguments are refused.
    """
    # the one that asks for most: fitting methods check more arguments, and random guesses none
    cell = max(cells, key=lambda cell: (SETTINGS[cell.method].fits, SETTINGS[cell.method].model == "ttt_vllm"))
    engine = shared_engine_args(cell)
    make_model(_whole_call(cell, root, engine))
    draws = {TaskSettings.from_mapping(one.call["model_args"] | one.call["metadata"]).k: one for one in cells}
    for one in draws.values():  # too many demonstrations for a task is what a draw can have wrong with it
        tasks = list(load_tasks(one.call))
    shared = [one.method for one in cells if (how := SETTINGS[one.method].method) and how.shared]
    if shared and len(tasks) == 1:
        complain(f"note: {shared[0]} is fitted on {tasks[0]} alone, the only task.")
    return engine
