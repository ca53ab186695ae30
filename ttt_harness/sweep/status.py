"""What has become of the cells of a sweep: done, running, waiting, failed and why. Changes nothing.

It is told from the folder of the sweep, and from SLURM where cells were submitted.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.locks import is_locked
from ttt_harness.sweep.axes import AXES
from ttt_harness.sweep.cells import LOCK, PARTIAL, is_partial
from ttt_harness.sweep.found import look
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.notes import FAILED, failure, named_cell, noted_grid
from ttt_harness.sweep.queue import ACTIVE, QUEUED, job_states, last_words, submitted_cells
from ttt_harness.terminal import visible

STATES = DONE, RUNNING, WAITING, FAILED_STATE, STOPPED, UNREADABLE, NEW = (
    *("done", "running", "waiting", "failed", "stopped"),
    *("unreadable", "not started"),
)

_CELL = re.compile(rf"seed(\d{{1,10}})(?:{re.escape(PARTIAL)}|{re.escape(FAILED)})?")
_POINT = re.compile(rf"(?:{'|'.join(AXES)})=[^/]*")


@dataclass(frozen=True)
class Row:
    """The state of one cell, and why it is so, or where it is."""

    cell: Cell
    state: str
    note: str


def print_status(root: Path, cells: Iterable[Cell]) -> None:
    """Print the state of each cell of the last grid, of those that ran or were submitted before, and of those given.

    Raises:
        ConfigError: there is no such folder, or SLURM does not answer.
    """
    if not root.is_dir():
        raise ConfigError(f"--output_path {root} is no folder: give the one that the sweep was started with.")
    rows = rows_of(root, cells)
    width = max((len(row.cell.name) for row in rows), default=0)
    for row in rows:
        print(visible(f"{row.cell.name:{width}}  {row.state:11}  {row.note}".rstrip()))
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "No cell has been started.")


def rows_of(root: Path, cells: Iterable[Cell]) -> list[Row]:
    """One row for each cell that is given, in the last grid, submitted, or has left something in the folder."""
    jobs = submitted_cells(root)
    known = [*cells, *noted_grid(root), *(cell for cell, _ in jobs.values()), *_cells_in(root)]
    found = {cell.key: cell for cell in reversed(known)}
    found = {cell.key: found[cell.key] for cell in known}  # in the order in which they were named
    open_jobs = {job for key, (cell, job) in jobs.items() if not _is_done(found[key], root)}
    states = job_states(open_jobs) if open_jobs else {}
    alone = is_locked(root / LOCK)
    return [_row(root, cell, jobs.get(key, (cell, None))[1], states, alone) for key, cell in found.items()]


def _cells_in(root: Path) -> list[Cell]:
    """The cells that have left something in the folder."""
    found = []
    for path in sorted([*root.glob("*/seed*"), *root.glob("*/*/seed*")]):
        method, *point = path.parent.relative_to(root).parts
        match = _CELL.fullmatch(path.name)
        if match and (not point or _POINT.fullmatch(point[0])):
            found.append(named_cell(method, int(match[1]), *point))
    return found


def _is_done(cell: Cell, root: Path) -> bool:
    try:
        return look(cell.folder(root)).done
    except TTTError:
        return False


def _row(root: Path, cell: Cell, job: str | None, states: Mapping[str, tuple[str, str]], alone: bool) -> Row:
    try:
        if (found := look(cell.folder(root))).done:
            return Row(cell, DONE, f"{cell.folder(root)}{f'; {found.remark}' if found.remark else ''}")
    except TTTError as error:
        return Row(cell, UNREADABLE, str(error))
    log = cell.log(root)
    see = f"; see {log}" if log.exists() else ""
    reason = failure(cell, root)
    state, why = states.get(job, ("", "")) if job else ("", "")
    if state in QUEUED:
        return Row(cell, WAITING, f"job {job}: {state}{f' ({why})' if why not in ('', 'None') else ''}")
    if state in ACTIVE or (not job and alone):
        if reason:  # a cell that begins anew has none
            return Row(cell, FAILED_STATE, reason + see)
        if is_partial(cell, root):
            return Row(cell, RUNNING, f"job {job}{see}" if job else "")
        return Row(cell, WAITING, f"job {job} comes to it" if job else "")
    if reason:
        return Row(cell, FAILED_STATE, reason + see)
    if job:
        said = last_words(root, job)
        ended = f"job {job} ended without its results: {state or 'SLURM does not know it'}{f', {said}' if said else ''}"
        return Row(cell, FAILED_STATE, ended + see)
    if is_partial(cell, root):
        return Row(cell, STOPPED, "the same command goes on from there")
    return Row(cell, NEW, "")
