"""The grid of a sweep: methods, points on axes, seeds, and the lm_eval call that each cell makes.

A call is a dict with the names of `lm_eval run`'s own options (`model`, `model_args`, `num_fewshot`, `limit`, ...). A
cell's call is the one that the user gave, with what its method, its point and its seed put in.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.config import TaskSettings, TTTConfig, nearest
from ttt_harness.errors import ConfigError
from ttt_harness.methods import SETTINGS
from ttt_harness.sweep.axes import Point, matters, point_text
from ttt_harness.tuned.arguments import explicit_arguments

Call = dict[str, Any]

MAX_SEEDS = 1000
MAX_CELLS = 10_000

# What the grid says for each cell; given for all of them, it would make their names wrong.
_SET_PER_CELL = {"seed", *(key for setting in SETTINGS.values() for key in setting.model_args)} - {"vote_permutations"}


@dataclass(frozen=True)
class Cell:
    """One method at one point with one seed: the lm_eval call that it stands for, without where its results go.

    call: as the user means it, by which a finished cell is known again.
    point: its place on the axes that matter to its method, `lr=1e-4,epochs=3`; empty where there are none.
    lora_rank: the largest of all cells that fit, for which the engine that they share makes room; None where the
        engine takes no adapters.
    """

    method: str
    seed: int
    call: Call
    point: str = ""
    lora_rank: int | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells the cell from the others of a sweep: method, point, seed."""
        return self.method, self.point, self.seed

    @property
    def setting(self) -> str:
        """Method and point, for people: "ttt, lr=1e-4, epochs=3"."""
        return ", ".join([self.method, *(self.point.split(",") if self.point else [])])

    @property
    def name(self) -> str:
        """For people: "ttt, lr=1e-4, epochs=3, seed 42"."""
        return f"{self.setting}, seed {self.seed}"

    def folder(self, root: Path) -> Path:
        """Where its results are, once it is done."""
        return root / self.method / self.point / f"seed{self.seed}"

    def log(self, root: Path) -> Path:
        """Where a job that runs the cell writes what it prints."""
        return self.folder(root).with_name(f"seed{self.seed}.log")


def cells_of(methods: Sequence[str], seeds: Sequence[int], call: Call, points: Sequence[Point] = ({},)) -> list[Cell]:
    """The cells of the grid, all methods of the first seed first: a sweep that is cut short compares them all.

    A method has a cell for each point that differs in an axis that matters to it: in-context learning has one for all
    learning rates.

    Raises:
        ConfigError: `call` sets what the grid sets, or holds a value that is not allowed with one of the methods; an
            axis matters to none of them; or two cells ask for the same.
    """
    _refuse_set_per_cell(call, points)
    _refuse_idle_axes(methods, points)
    _refuse_idle_votes(methods, call)
    settings: dict[tuple[str, str], Point] = {}
    for name in methods:
        for point in points:
            own = {axis: value for axis, value in point.items() if matters(axis, SETTINGS[name])}
            settings.setdefault((name, point_text(own)), own)
    if len(settings) * len(seeds) > MAX_CELLS:
        raise ConfigError(f"the grid has {len(settings) * len(seeds)} cells; a sweep takes {MAX_CELLS} at most.")
    calls = {
        (name, text, seed): _cell_call(call, name, text, point, seed)
        for seed in seeds
        for (name, text), point in settings.items()
    }
    _refuse_same(calls)
    configs = [_config(one) for (name, *_), one in calls.items() if SETTINGS[name].fits]
    rank = max((config.lora_rank for config in configs if config.fits), default=None)
    return [
        Cell(name, seed, one, text, rank if SETTINGS[name].model == "ttt_vllm" else None)
        for (name, text, seed), one in calls.items()
    ]


def _cell_call(call: Call, name: str, text: str, point: Point, seed: int) -> Call:
    """The call of one cell.

    Raises:
        ConfigError: a value is not allowed with the method.
    """
    setting = SETTINGS[name]
    own = copy.deepcopy(call) | {"model": setting.model, **setting.options}
    given = [own[option].pop("vote_permutations", None) for option in ("model_args", "metadata")]
    votes = given[1] if given[1] is not None else given[0]  # as lm-eval merges them
    own["model_args"] = {**own["model_args"], **setting.model_args, **point, "seed": seed}
    if "vote_permutations" in setting.model_args:
        if votes is not None:
            own["model_args"]["vote_permutations"] = votes
        if TaskSettings.from_mapping(own["model_args"]).vote_permutations < 2:
            raise ConfigError(
                f"vote_permutations=1 is not allowed with {name}: one answer is no vote; set it to at least 2, or "
                "choose a method that does not vote."
            )
    task = TaskSettings.from_mapping(own["model_args"] | own["metadata"])
    if task.leave_one_out and task.k < 2:
        raise ConfigError(
            f"k={task.k} is not allowed with {', '.join([name, *([text] if text else [])])}: it takes one "
            "demonstration out of the prompt, and one has to stay; set k to at least 2."
        )
    if not setting.fits:
        for option in ("settings", "choose"):  # of fits
            own["model_args"].pop(option, None)
    if setting.model == "ttt_vllm":
        fits, path = _config(own).fits, own["model_args"].get("settings")
        if path is not None and not fits:
            raise ConfigError(
                f"settings={path} chooses in-context learning, with which {name} fits nothing; use --methods icl."
            )
    return own


def _config(call: Call) -> TTTConfig:
    """The settings of a cell's fits: with `settings=`, what it stands for."""
    return TTTConfig.from_mapping(explicit_arguments(call["model_args"]))


def _refuse_set_per_cell(call: Call, points: Sequence[Point]) -> None:
    axes = {axis for point in points for axis in point}
    for option in ("model_args", "metadata"):
        for key in call.get(option) or {}:
            if key in axes:
                raise ConfigError(f"{key} stands in --{option} and is an axis of the grid; keep one of them.")
            if key in _SET_PER_CELL:
                raise ConfigError(
                    f"{key} must not stand in --{option}: the sweep sets it for each cell; use --methods, --seeds and "
                    "--grid."
                )
    for option, why in {
        "num_fewshot": "k in --model_args or --grid is the number of demonstrations, and zero_shot in --methods leaves "
        "them out",
        "model": "--methods chooses between ttt_vllm and ttt_random",
    }.items():
        if call.get(option) is not None:
            raise ConfigError(f"--{option} is not an option of a sweep: {why}; leave it out.")


def _refuse_idle_axes(methods: Sequence[str], points: Sequence[Point]) -> None:
    for axis in dict.fromkeys(axis for point in points for axis in point):
        if not any(matters(axis, SETTINGS[name]) for name in methods):
            others = [name for name, setting in SETTINGS.items() if matters(axis, setting)]
            raise ConfigError(
                f"the axis {axis} changes nothing in {', '.join(methods)}; leave it out, or add one of "
                f"{', '.join(others)}."
            )


def _refuse_idle_votes(methods: Sequence[str], call: Call) -> None:
    given = {**(call.get("model_args") or {}), **(call.get("metadata") or {})}
    voting = [name for name, setting in SETTINGS.items() if "vote_permutations" in setting.model_args]
    if "vote_permutations" in given and not set(voting) & set(methods):
        raise ConfigError(
            f"vote_permutations changes nothing in {', '.join(methods)}; leave it out, or add one of "
            f"{', '.join(voting)}."
        )


def _refuse_same(calls: dict[tuple[str, str, int], Call]) -> None:
    seen: dict[str, str] = {}
    for (name, text, _), call in calls.items():
        shown = ", ".join([name, *([text] if text else [])])
        asked = json.dumps(call, sort_keys=True, default=str)
        if seen.setdefault(asked, shown) != shown:
            raise ConfigError(f"{shown} asks for the same as {seen[asked]}; leave one of them out.")


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
                f"{_short(name)} is not a method: choose all, or some of {', '.join(SETTINGS)}."
                f"{nearest(name, SETTINGS)}"
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
            raise ConfigError(f"seeds={_short(part)} is not allowed: write whole numbers, as in 42, 42,43 or 42-46.")
        low, high = (int(end) if len(end) <= 20 else 2**32 for end in ends)
        if low > high or high >= 2**32:
            raise ConfigError(f"seeds={_short(part)} is not allowed: a range runs upwards, within 0 to 2**32 - 1.")
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
            raise ConfigError(f"{what}={_short(repr(value))} is not allowed: write a list, or a text with commas.")
    return [str(value) for value in values]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
