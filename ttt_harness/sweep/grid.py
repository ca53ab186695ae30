"""The grid of a sweep: which methods there are, which seeds are meant, and the lm_eval call that each cell makes.

A call is a dict with the names of `lm_eval run`'s own options (`model`, `model_args`, `num_fewshot`, `limit`, ...). A
cell's call is the one that the user gave, with what its method and its seed put in.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ttt_harness.config import TaskSettings, TTTConfig, nearest
from ttt_harness.errors import ConfigError
from ttt_harness.methods import SETTINGS

Call = dict[str, Any]

MAX_SEEDS = 1000

# What tells the cells apart; given for all of them, it would make their names wrong.
_SET_PER_CELL = {"seed", *(key for method in SETTINGS.values() for key in method.model_args)}


@dataclass(frozen=True)
class Cell:
    """One method with one seed: the lm_eval call that it stands for, without where its results go.

    call: as the user means it, by which a finished cell is known again.
    engine: model arguments that only have all cells share one engine, added when the cell runs.
    """

    method: str
    seed: int
    call: Call
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people: "ttt, seed 42"."""
        return f"{self.method}, seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Where its results are, once it is done."""
        return root / self.method / f"seed{self.seed}"

    def log(self, root: Path) -> Path:
        """Where a job that runs the cell writes what it prints."""
        return root / self.method / f"seed{self.seed}.log"


def cells_of(methods: Sequence[str], seeds: Sequence[int], call: Call) -> list[Cell]:
    """The cells of the grid, all methods of the first seed first: a sweep that is cut short compares them all.

    Raises:
        ConfigError: `call` sets what the grid sets, or holds a value that is not allowed with one of the methods.
    """
    _refuse_set_per_cell(call)
    engine: dict[str, Any] = {}
    if any(SETTINGS[name].fits for name in methods):
        config = TTTConfig.from_mapping(call["model_args"])
        rank = call["model_args"].get("max_lora_rank", config.max_lora_rank)
        engine = {"enable_lora": True, "max_lora_rank": rank}
    cells = []
    for seed in seeds:
        for name in methods:
            method = SETTINGS[name]
            cell = copy.deepcopy(call) | {"model": method.model, **method.options}
            cell["model_args"] = {**cell["model_args"], **method.model_args, "seed": seed}
            task = TaskSettings.from_mapping(cell["model_args"] | (call.get("metadata") or {}))
            if task.leave_one_out and task.k < 2:
                raise ConfigError(
                    f"k={task.k} is not allowed with {name}: it takes one demonstration out of the prompt, and one "
                    "has to stay; set k to at least 2."
                )
            if method.model == "ttt_vllm":
                TTTConfig.from_mapping(cell["model_args"])
            cells.append(Cell(name, seed, cell, engine if method.model == "ttt_vllm" else {}))
    return cells


def _refuse_set_per_cell(call: Call) -> None:
    for option in ("model_args", "metadata"):
        for key in call.get(option) or {}:
            if key in _SET_PER_CELL:
                raise ConfigError(
                    f"{key} must not stand in --{option}: the sweep sets it for each cell; use --methods and --seeds."
                )
    for option, why in {
        "num_fewshot": "zero_shot in --methods leaves the demonstrations out",
        "model": "--methods chooses between ttt_vllm and ttt_random",
    }.items():
        if call.get(option) is not None:
            raise ConfigError(f"--{option} is not an option of a sweep: {why}; leave it out.")


def parse_methods(given: str | Iterable[str] | None) -> list[str]:
    """Method names, from a list or a text with commas; `all` is every published setting.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    names = [name.strip() for text in _texts(given, "methods") for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"the grid has no methods: give --methods all, or some of {', '.join(SETTINGS)}.")
    for name in names:
        if name not in SETTINGS and name != "all":
            raise ConfigError(
                f"{name} is not a method: choose all, or some of {', '.join(SETTINGS)}.{nearest(name, SETTINGS)}"
            )
    return list(dict.fromkeys(found for name in names for found in (SETTINGS if name == "all" else [name])))


def parse_seeds(given: str | int | Iterable[str | int] | None) -> list[int]:
    """Seeds, from numbers or texts such as `42`, `42,43` and `42-46` (both ends meant).

    Raises:
        ConfigError: something is not a number from 0 to 2**32 - 1, a range runs backwards, or there are none or
            more than `MAX_SEEDS`.
    """
    parts = [part.strip() for text in _texts(given, "seeds") for part in text.split(",") if part.strip()]
    seeds: dict[int, None] = {}
    for part in parts:
        first, dash, last = part.partition("-")
        ends = [first.strip(), last.strip() if dash else first.strip()]
        if not all(end.isascii() and end.isdigit() for end in ends):
            raise ConfigError(f"seeds={part} is not allowed: write whole numbers, as in 42, 42,43 or 42-46.")
        low, high = map(int, ends)
        if low > high or high >= 2**32:
            raise ConfigError(f"seeds={part} is not allowed: a range runs upwards, within 0 to 2**32 - 1.")
        if len(seeds) + high - low >= MAX_SEEDS:
            raise ConfigError(f"seeds={part} is not allowed: a sweep takes {MAX_SEEDS} seeds at most.")
        seeds |= dict.fromkeys(range(low, high + 1))
    if not seeds:
        raise ConfigError("the grid has no seeds: give some with --seeds, as in 42, 42,43 or 42-46.")
    return list(seeds)


def _texts(given: Any, what: str) -> list[str]:
    values = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for value in values:
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise ConfigError(f"{what}={value!r} is not allowed: write a list, or a text with commas.")
    return [str(value) for value in values]


def read_yaml(path: Path) -> Call:
    """A grid file: the keys `methods` and `seeds`, and beside them those of lm-eval's own `--config` files.

    Raises:
        ConfigError: the file cannot be read or is no such mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"--config {path} must hold keys with values, as in `methods: [icl, ttt]`.")
    return content
