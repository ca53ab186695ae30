"""What `ttt-harness sweep` runs: the grid of a command line and a file, on this machine or as jobs of SLURM."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_harness.errors import ConfigError
from ttt_harness.sweep.axes import parse_points
from ttt_harness.sweep.cells import locked
from ttt_harness.sweep.grid import Cell, cells_of, parse_methods, parse_seeds
from ttt_harness.sweep.grid_file import read_grid_file
from ttt_harness.sweep.lm_eval_call import parse_call
from ttt_harness.sweep.runner import run_cells
from ttt_harness.sweep.slurm import Resources, submit
from ttt_harness.sweep.status import print_status
from ttt_harness.terminal import INTERRUPTED, complain


def sweep(
    *,
    methods: str | None,
    seeds: str | None,
    grid: Sequence[str] | None,
    config: Path | None,
    options: Sequence[str],
    resources: Resources | None = None,
) -> int:
    """Run the grid. Returns the exit status: 0, 1 where a cell failed, 130 after Ctrl-C.

    Args:
        methods, seeds, grid, config: as on the command line of `ttt-harness sweep`.
        options: all others, which are those of `lm_eval run`.
        resources: submit the grid to SLURM, and have each job ask for these.

    Raises:
        ConfigError: something in the grid or the options is not allowed; nothing has been run then.
    """
    try:
        file = read_grid_file(config) if config else {}
        cells, root = grid_of(methods=methods, seeds=seeds, grid=grid, file=file, options=options)
        if resources is not None:
            return submit(cells, root, resources)
        with locked(root):
            return run_cells(cells, root)
    except KeyboardInterrupt:
        complain("Stopped before the first cell.")
        return INTERRUPTED


def grid_of(
    *,
    methods: str | None,
    seeds: str | None,
    grid: Sequence[str] | None,
    file: dict[str, Any],
    options: Sequence[str],
) -> tuple[list[Cell], Path]:
    """The cells of a grid, and the folder of its results; the command line wins over the file.

    Raises:
        ConfigError: something in them is not allowed.
    """
    names = parse_methods(methods if methods is not None else file.get("methods"))
    numbers = parse_seeds(seeds if seeds is not None else file.get("seeds"))
    points = parse_points(grid, file.get("grid"))
    call = parse_call(file, options)
    root = Path(call.pop("output_path"))
    return cells_of(names, numbers, call, points), root


def status(
    *, methods: str | None, seeds: str | None, grid: Sequence[str] | None, config: Path | None, options: Sequence[str]
) -> int:
    """Print what has become of a sweep's cells; the arguments are those of `sweep`, and may leave out the grid.

    Raises:
        ConfigError: the folder is missing.
    """
    file = read_grid_file(config) if config else {}
    parser = argparse.ArgumentParser(prog="ttt-harness sweep", add_help=False, allow_abbrev=False)
    parser.add_argument("--output_path", "-o", default=file.get("output_path"))
    root = parser.parse_known_args(options)[0].output_path
    if not root or not isinstance(root, str):
        raise ConfigError("output_path is missing: give the folder of the sweep with --output_path.")
    methods, seeds = methods or file.get("methods"), seeds or file.get("seeds")
    cells: list[Cell] = []
    if methods and seeds:
        points = parse_points(grid, file.get("grid"))
        cells = cells_of(parse_methods(methods), parse_seeds(seeds), {"model_args": {}, "metadata": {}}, points)
    print_status(Path(root), cells)
    return 0
