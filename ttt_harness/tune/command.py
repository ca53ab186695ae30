"""The command `ttt-harness tune`: checks a command line, searches, prints the result and writes `tuned.json`."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ttt_harness.adapters.names import adapter_key, model_name
from ttt_harness.config import TaskSettings, TTTConfig, quoted
from ttt_harness.errors import ConfigError
from ttt_harness.run.progress import RunProgress
from ttt_harness.serving.environment import prepare_environment
from ttt_harness.sweep.cells import locked
from ttt_harness.sweep.grid import Call, parse_seeds
from ttt_harness.sweep.grid_file import read_grid_file
from ttt_harness.sweep.lm_eval_call import one_task_index, parse_call
from ttt_harness.sweep.loading import Loaded
from ttt_harness.terminal import INTERRUPTED, complain
from ttt_harness.tune.candidates import Setting, settings_of
from ttt_harness.tune.display import print_found
from ttt_harness.tune.fitting import Fitting
from ttt_harness.tune.loading import load_demonstrations
from ttt_harness.tune.log import SearchLog
from ttt_harness.tune.prepare import DEFAULT_FOLDS, Prepared, prepare
from ttt_harness.tune.search import Found, Search, planned_epochs
from ttt_harness.tuned import BaseModel, Candidate, Tuned, write_tuned
from ttt_harness.tuned.file import tuned_folder

FILE = "tuned.json"


@dataclass(frozen=True)
class Options:
    """What a command line asks for, checked.

    call: of lm-eval.
    settings: to try.
    """

    call: Call
    settings: list[Setting]
    seeds: list[int]
    folds: int | None
    orders: int
    sample_tasks: int | None
    full: bool


def tune(
    *,
    grid: Sequence[str] | None,
    seeds: str | None,
    folds: int | None,
    orders: int,
    sample_tasks: int | None,
    full: bool,
    config: Path | None,
    options: Sequence[str],
) -> int:
    """Search, print what was found and write it. Returns the exit status: 0, or 130 after Ctrl-C.

    Args:
        grid, seeds, folds, orders, sample_tasks, full, config: as on the command line of `ttt-harness tune`.
        options: all others, which are those of `lm_eval run`.

    Raises:
        TTTError: something is not allowed, and nothing has been fitted then; or a fit fails.
    """
    prepare_environment()
    file = read_grid_file(config) if config else {}
    asked = _checked(grid, seeds, folds, orders, sample_tasks, full, file, options)
    with one_task_index():
        loaded = {seed: load_demonstrations(_call_of(asked, seed)) for seed in asked.seeds}
    first = next(iter(loaded.values()))
    tasks = _sampled(list(first.tasks), asked)
    prepared = [
        prepare(loaded[seed], task, seed=seed, count=asked.folds, order_count=asked.orders, settings=asked.settings)
        for seed in asked.seeds
        for task in tasks
    ]
    root = _folder(asked, first, tasks)
    with locked(root):
        try:
            found = _search(asked, first, prepared, root)
        except KeyboardInterrupt:
            complain(f"Stopped; the fits that are done are in {root}, and the same command goes on from there.")
            return INTERRUPTED
        tuned = _tuned(asked, first, found)
        write_tuned(tuned, root / FILE)
    print_found(tuned, found, prepared, given=asked.call["model_args"], path=root / FILE)
    return 0


def _search(asked: Options, first: Loaded, prepared: Sequence[Prepared], root: Path) -> Found:
    log = SearchLog(root)
    folds = [fold for one in prepared for fold in one.folds]
    fitting = [setting for setting in asked.settings if setting.fits]
    with RunProgress(planned_epochs(folds, fitting, full=asked.full)) as progress:
        search = Search(folds, asked.settings, Fitting(first.lm), log, progress.advance, full=asked.full)
        return search.run()


def _tuned(asked: Options, first: Loaded, found: Found) -> Tuned:
    lm = first.lm
    candidates = [
        Candidate(setting.name, dict(setting.model_args), found.fit_seconds(setting)) for setting in asked.settings
    ]
    return Tuned(
        base_model=BaseModel(model_name(str(asked.call["model_args"]["pretrained"])), lm.fingerprint),
        method=asked.settings[-1].config.method,
        k=_k(asked.call),
        seeds=tuple(asked.seeds),
        folds=asked.folds or DEFAULT_FOLDS,
        orders=asked.orders,
        dtype=lm.answering.dtype_name,
        versions={name: version(name) for name in ("ttt-harness", "torch", "torchtune", "transformers")},
        candidates=tuple(candidates),
        tasks={
            task: {name: dict(answers) for name, answers in tried.items()} for task, tried in found.outcomes.items()
        },
    )


# What is asked for


def _checked(
    grid: Sequence[str] | None,
    seeds: str | None,
    folds: int | None,
    orders: int,
    sample_tasks: int | None,
    full: bool,
    file: dict[str, Any],
    options: Sequence[str],
) -> Options:
    """Check a command line before anything is loaded.

    Raises:
        ConfigError: something in it is not allowed.
    """
    for name, number, least in (("folds", folds, 2), ("orders", orders, 1), ("sample_tasks", sample_tasks, 1)):
        if number is not None and number < least:
            raise ConfigError(f"--{name} {number} is not allowed: it is a whole number of at least {least}.")
    if file.get("methods") is not None:
        raise ConfigError("methods is not allowed in --config of tune: set method in model_args; leave it out.")
    numbers = parse_seeds(seeds if seeds is not None else file.get("seeds", 42))
    call = parse_call({"output_path": str(tuned_folder()), **file}, options)
    _check_call(call)
    settings = settings_of({**call["model_args"], "k": _k(call)}, grid, file.get("grid"))
    return Options(call, settings, numbers, folds, orders, sample_tasks, full)


def _k(call: Call) -> int:
    """The number of demonstrations that the options ask for."""
    return TaskSettings.from_mapping({**call["model_args"], **call["metadata"]}).k


def _check_call(call: Call) -> None:
    for option, why in {
        "model": "it searches for ttt_vllm",
        "num_fewshot": "k in --model_args is the number of demonstrations",
        "seed": "--seeds draws the demonstrations and seeds the fits",
    }.items():
        if call.get(option) is not None and (option, call[option]) != ("model", "ttt_vllm"):
            raise ConfigError(f"--{option} is not an option of tune: {why}; leave it out.")
    for option in ("model_args", "metadata"):
        if "seed" in call[option]:
            raise ConfigError(f"seed must not stand in --{option}: tune sets it for each draw; use --seeds.")
    stated = {**call["model_args"], **call["metadata"]}
    for key, name in {"settings": "it is what tune finds", "choose": "it is for a run"}.items():
        if key in stated:
            raise ConfigError(f"{key} is not allowed with tune: {name}; leave it out.")
    task = TaskSettings.from_mapping(stated)
    if task.vote_permutations > 1 or task.leave_one_out:
        name = "vote_permutations" if task.vote_permutations > 1 else "leave_one_out"
        raise ConfigError(
            f"{name}={str(stated[name]).lower()} is not allowed with tune, which asks single prompts with all of the "
            "others; leave it out here, and give it to the run."
        )
    workers = stated.get("data_parallel_size")
    if workers not in (None, 1):
        raise ConfigError(
            f"data_parallel_size={quoted(workers)} is not allowed with tune, which fits in one process; leave it out."
        )
    for option in ("limit", "samples"):  # of evaluated questions, and none is asked
        call.pop(option, None)


def _call_of(asked: Options, seed: int) -> Call:
    """lm-eval's call for the demonstrations of a seed; the model has room for the largest rank."""
    rank = max(setting.config.lora_rank for setting in asked.settings)
    model_args = {**asked.call["model_args"], "lora_rank": rank, "seed": seed}
    return {**asked.call, "model": "ttt_vllm", "model_args": model_args, "output_path": None, "log_samples": False}


def _sampled(names: list[str], asked: Options) -> list[str]:
    """The tasks to search on: all, or a sample drawn with the first seed, in the tasks' own order."""
    if asked.sample_tasks is None or asked.sample_tasks >= len(names):
        return names
    drawn = set(random.Random(asked.seeds[0]).sample(sorted(names), asked.sample_tasks))
    return [name for name in names if name in drawn]


def _folder(asked: Options, first: Loaded, tasks: Sequence[str]) -> Path:
    """Where the log and the file go: --output_path, or a folder in the cache that the same command finds again."""
    given = Path(asked.call["output_path"])
    if given != tuned_folder():
        return given
    config: TTTConfig = asked.settings[-1].config
    key = adapter_key(
        {
            "base_model": first.lm.fingerprint,
            "method": config.method,
            "k": config.k,
            "settings": [dict(setting.model_args) for setting in asked.settings],
            "asked": [asked.seeds, asked.folds, asked.orders, asked.full],
            "tasks": list(tasks),
            "chat": first.chat.options(),
        }
    )
    name = re.sub(r"[^\w.-]+", "-", model_name(str(asked.call["model_args"]["pretrained"])))
    return given / f"{name}-{key[:12]}"
