"""Notes of a sweep beside its cells: the cells of the last grid, and why a cell failed.

    DIR/grid.json       the cells of the last sweep in one process, so that those that it has not come to are known
    seed<N>.failed      the reason for which a cell failed the last time

A file of that name that no sweep has written is kept.
"""

import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ttt_harness.files import write_whole
from ttt_harness.sweep.grid import Cell

GRID = "grid.json"
FAILED = ".failed"

# The last line of a note of a failure, which says whose it is.
_FAILED_MARK = "# noted by ttt-harness sweep"
_MOST_NOTE_BYTES = 100_000


def note_grid(cells: Sequence[Cell], root: Path) -> str:
    """Keep the cells of a sweep that is about to run. Returns why that is not possible, for people."""
    if os.path.lexists(root / GRID) and not noted_grid(root):
        return f"{root / GRID} was not written by a sweep, and is kept; --status lists no cells that have not begun."
    rows = [[cell.method, cell.seed, *([cell.point] if cell.point else [])] for cell in cells]
    with suppress(OSError):  # only `--status` misses it
        write_whole(root / GRID, json.dumps(rows) + "\n")
    return ""


def noted_grid(root: Path) -> list[Cell]:
    """The cells of the last sweep that ran in one process, without their calls; empty where there was none."""
    try:
        return [named_cell(*row) for row in json.loads((root / GRID).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def named_cell(method: str, seed: int, point: str = "") -> Cell:
    """A cell by its name alone.

    Raises:
        ValueError: that is no name of a cell.
    """
    for text in (method, point):
        if not isinstance(text, str) or "/" in text or text in (".", ".."):
            raise ValueError(text)
    if type(seed) is not int or not method:
        raise ValueError(seed)
    return Cell(method, seed, {}, point)


def note_failure(cell: Cell, root: Path, reason: str) -> None:
    """Keep the reason for which a cell failed, until it is run again; a file of another's with that name is kept."""
    note = _failed(cell.folder(root))
    with suppress(OSError):  # a full disk may be that reason
        if not os.path.lexists(note) or _is_own_note(note):
            write_whole(note, f"{' '.join(reason.split())}\n{_FAILED_MARK}\n")


def failure(cell: Cell, root: Path) -> str:
    """The reason for which the cell failed when it was run last; empty where there is none."""
    lines = _note(_failed(cell.folder(root))).splitlines()
    return lines[0].strip() if lines else ""


def _is_own_note(path: Path) -> bool:
    return _note(path).rstrip().endswith(_FAILED_MARK)


def _note(path: Path) -> str:
    try:
        there = path.lstat()
        if not stat.S_ISREG(there.st_mode) or there.st_size > _MOST_NOTE_BYTES:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def clear_failure(cell: Cell, root: Path) -> None:
    """Remove the note of a failure.

    Raises:
        OSError: it cannot be removed.
    """
    note = _failed(cell.folder(root))
    if _is_own_note(note):
        note.unlink()


def _failed(folder: Path) -> Path:
    return folder.with_name(folder.name + FAILED)
