"""The settings that a search tries: in-context learning, and the fitting method at each point of a grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ttt_harness.config import TTTConfig, quoted
from ttt_harness.errors import ConfigError
from ttt_harness.methods import METHODS
from ttt_harness.sweep.axes import FIT_AXES, parse_points, point_text

# For any model: around the published 1e-4 and one epoch.
DEFAULT_GRID = ("lr=1e-4,3e-4,1e-3", "epochs=1,2,3")
# The method that fits nothing.
IN_CONTEXT = next(name for name, method in METHODS.items() if not method.fits)


@dataclass(frozen=True)
class Setting:
    """A setting to try.

    name: for people; unique in a search.
    model_args: what makes it, among the model arguments.
    config: all of its settings.
    """

    name: str
    model_args: Mapping[str, Any]
    config: TTTConfig

    @property
    def fits(self) -> bool:
        """Whether an adapter is fitted."""
        return self.config.fits

    @property
    def epochs(self) -> int:
        """Passes over the training sequences."""
        return self.config.epochs

    @property
    def shared_fit(self) -> TTTConfig:
        """What settings have in common whose epochs are all that tells them apart."""
        return replace(self.config, epochs=0)


def settings_of(model_args: Mapping[str, Any], grid: Sequence[str] | None, file: Any = None) -> list[Setting]:
    """In-context learning, then the points of the grid in its order.

    Args:
        model_args: of `ttt_vllm`; the arguments of fits among them hold for all points.
        grid, file: axes with values, or a list of points, as `ttt_harness.sweep.axes.parse_points` reads them from the
            command line and from a file; without both, `DEFAULT_GRID`.

    Raises:
        ConfigError: the method is not one whose settings can be found so, or a value is not allowed.
    """
    base = TTTConfig.from_mapping(model_args)
    _check_method(base)
    default = not grid and file is None
    points = parse_points(DEFAULT_GRID if default else grid, file)
    for axis in dict.fromkeys(axis for point in points for axis in point):
        if axis not in FIT_AXES:
            raise ConfigError(
                f"{axis} cannot be tuned: what it changes is not how an adapter is fitted; set it in --model_args, and "
                f"choose the axes of --grid from {', '.join(FIT_AXES)}."
            )
        if axis in model_args:
            if default:  # it gives way
                points = [{name: value for name, value in point.items() if name != axis} for point in points]
                continue
            raise ConfigError(f"{axis} stands in --model_args and is an axis of the grid; keep one of them.")
    stated = {axis: getattr(base, axis) for axis in FIT_AXES if axis in model_args}
    found = [Setting(IN_CONTEXT, {"method": IN_CONTEXT}, TTTConfig.from_mapping({**model_args, "method": IN_CONTEXT}))]
    for text, point in {point_text(point): point for point in points}.items():
        own = {"method": base.method, **stated, **point}
        name = ", ".join(text.split(",")) or base.method
        found.append(Setting(name, own, TTTConfig.from_mapping({**model_args, **own})))
    return found


def _check_method(base: TTTConfig) -> None:
    if base.adapter is not None:
        raise ConfigError("adapter is not allowed with tune, which fits adapters; leave it out.")
    if not base.fits or base.how.shared or not base.how.prompts_hold_demonstrations:
        possible = [
            name for name, how in METHODS.items() if how.fits and not how.shared and how.prompts_hold_demonstrations
        ]
        raise ConfigError(
            f"method={quoted(base.method)} cannot be tuned: a setting is tried by asking a demonstration after the "
            f"others, with an adapter fitted on those; use method={' or '.join(possible)}."
        )
