"""The axes of a grid: model arguments and task metadata that take several values, and the points that they make.

    --grid lr=1e-4,3e-4 --grid epochs=1,3                   each value of one with each value of the other: 4 points
    grid: {lr: [1e-4, 3e-4], epochs: [1, 3]}                the same in a file
    grid: [{lr: 1e-4, epochs: 1}, {lr: 3e-4, epochs: 3}]    these pairs only: 2 points

A point is a mapping of axes to values, in the order of `AXES`. Its text, `lr=1e-4,epochs=3`, is the name of a folder:
the same values give the same text however they were written, and an axis that is added to `AXES` goes to its end.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ttt_harness.config import TaskSettings, TTTConfig, nearest
from ttt_harness.errors import ConfigError
from ttt_harness.methods import Sequences, Setting

Point = Mapping[str, Any]

MAX_POINTS = 1000


def _fits(setting: Setting) -> bool:
    return setting.fits


def _fits_in_context(setting: Setting) -> bool:
    return setting.method is not None and setting.method.sequences is Sequences.IN_CONTEXT


def _answers(setting: Setting) -> bool:
    return setting.method is not None


def _shows_demonstrations(setting: Setting) -> bool:
    method = setting.method
    return method is not None and method.prompts_hold_demonstrations and setting.options.get("num_fewshot") != 0


def _votes(setting: Setting) -> bool:
    return "vote_permutations" in setting.model_args


def _always(setting: Setting) -> bool:  # noqa: ARG001 - k also decides which questions are left to ask
    return True


# axis -> the settings whose results depend on it. The order is that of folder names: do not change it.
AXES: dict[str, Callable[[Setting], bool]] = {
    "lr": _fits,
    "epochs": _fits,
    "lora_rank": _fits,
    "lora_alpha": _fits,
    "lora_dropout": _fits,
    "num_permutations": _fits_in_context,
    "shuffle": _fits_in_context,
    "fit_batch_size": _fits,
    "warmup_ratio": _fits,
    "loss_on": _fits,
    "k": _always,
    "vote_permutations": _votes,
    "leave_one_out": _shows_demonstrations,
    "generation_budget": _answers,
}

# Those that determine an adapter.
FIT_AXES = tuple(axis for axis, of in AXES.items() if of in (_fits, _fits_in_context))

# Settings that are none, and what to use instead.
NOT_AXES = {
    "method": "--methods chooses the methods",
    "seed": "--seeds chooses the seeds",
    "adapter_dir": "it does not change a result",
    "adapter_limit": "it does not change a result",
    "adapter": "it is one that you bring; give it to all cells in --model_args",
    "on_plain_task": "it does not change the result of a TTT task",
    "overlap": "it does not change the result of a task that is allowed",
    "truncate": "it says what becomes of prompts beyond the context window, in all cells alike; set it in --model_args",
    "settings": "it sets the axes of fits itself; give it to all cells in --model_args",
    "choose": "give it to all cells in --model_args, beside settings=",
    "num_fewshot": "k is the number of demonstrations",
}


def matters(axis: str, setting: Setting) -> bool:
    """Whether the results of `setting` depend on the axis: it makes a difference there, and is not part of its name."""
    return AXES[axis](setting) and (axis == "vote_permutations" or axis not in setting.model_args)


def point_text(point: Point) -> str:
    """The point as it stands in names of folders: `lr=1e-4,epochs=3`; empty without axes."""
    return ",".join(f"{axis}={value_text(point[axis])}" for axis in AXES if axis in point)


def value_text(value: Any) -> str:
    """A value in the shortest way that reads back as the same: `1e-4`, `0.05`, `64`, `true`."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    if value == 0:
        return "0"
    plain = repr(value).removesuffix(".0")
    digits = plain.partition("e")[0].replace(".", "").replace("-", "").strip("0") or "0"
    exponent = math.floor(math.log10(abs(value)))
    mantissa = digits[0] + (f".{digits[1:]}" if digits[1:] else "")
    scientific = f"{'-' * (value < 0)}{mantissa}e{exponent}"
    return scientific if len(scientific) < len(plain) and float(scientific) == value else plain


def parse_points(options: Sequence[str] | None, file: Any) -> list[Point]:
    """The points of a grid; one without axes where there are none.

    Args:
        options: `axis=value,value`, as given to each --grid. Where there are some, `file` does not count.
        file: what stands under `grid` in a file: a mapping of axes to values, or a list of such mappings.

    Raises:
        ConfigError: an axis is unknown or stands there twice, a value is not allowed, or there are too many points.
    """
    if options:
        grids = [_of_options(options)]
    elif file is None:
        return [{}]
    else:
        grids = [_of_mapping(one) for one in (file if isinstance(file, list) else [file])]
    if not grids:
        raise ConfigError("grid=[] is not allowed: name an axis with its values, as in grid: {lr: [1e-4, 3e-4]}.")
    count = sum(math.prod(len(values) for values in grid.values()) for grid in grids)
    if count > MAX_POINTS:
        raise ConfigError(f"the grid has {count} points; a sweep takes {MAX_POINTS} at most.")
    points = [dict(zip(grid, values, strict=True)) for grid in grids for values in itertools.product(*grid.values())]
    return list({point_text(point): point for point in points}.values())


def _of_options(options: Sequence[str]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for option in options:
        axis, equals, values = option.partition("=")
        axis = axis.strip()
        if not equals:
            raise ConfigError(f"--grid {option} is not allowed: write an axis and its values, as in lr=1e-4,3e-4.")
        if axis in grid:
            raise ConfigError(f"--grid {axis} is given twice; write all its values after one {axis}=, with commas.")
        grid[axis] = _values(axis, values)
    return _ordered(grid)


def _of_mapping(given: Any) -> dict[str, list[Any]]:
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"grid: {str(given)[:60]} is not allowed: write axes with their values, as in {{lr: [1e-4, 3e-4]}}, or a "
            "list of such mappings."
        )
    return _ordered({axis: _values(axis, values) for axis, values in given.items()})


def _ordered(grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {axis: grid[axis] for axis in AXES if axis in grid}


def _values(axis: str, given: Any) -> list[Any]:
    """The values of an axis, each once, as the settings have them."""
    if axis not in AXES:
        if axis in NOT_AXES:
            raise ConfigError(f"{axis} cannot be an axis of a grid: {NOT_AXES[axis]}.")
        raise ConfigError(f"{axis[:60]} is no axis of a grid: choose from {', '.join(AXES)}.{nearest(axis, AXES)}")
    values = list(dict.fromkeys(_value(axis, one) for one in _single(given)))
    if not values:
        raise ConfigError(f"the axis {axis} has no values: write some, as in {axis}=1,2.")
    return values


def _single(given: Any) -> Iterator[Any]:
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str):
            yield from (text.strip() for text in one.split(",") if text.strip())
        else:
            yield one


def _value(axis: str, given: Any) -> Any:
    shown = repr(given) if isinstance(given, list | dict) or given is None else str(given)
    if given is None or isinstance(given, list | dict) or len(shown) > 40:
        raise ConfigError(f"{axis}={shown[:40]} is not allowed: write a value, or several with commas.")
    if axis in TTTConfig.names():
        # of a method that takes all values; those that it does not allow are found with each cell
        return getattr(TTTConfig.from_mapping({"method": "icl", axis: given}), axis)
    return getattr(TaskSettings.from_mapping({axis: given}), axis)
