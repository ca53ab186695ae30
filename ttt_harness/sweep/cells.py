"""The folder of a cell: `DIR/<method>/seed<N>/`, which is there when the cell is done, whole, and never before.

lm-eval writes its results bit by bit into `seed<N>.partial` beside it; that folder is renamed when all of it is there.
`cell.json` in it states the lm_eval call, so that a cell is known to be done with the same options and not with others.
`seed<N>.failed` holds the reason for which the cell failed the last time. `DIR/grid.json` lists the cells of the last
sweep in one process, so that those that it has not come to are known as well.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ttt_harness.errors import ConfigError, ReportError, TTTError
from ttt_harness.locks import file_lock
from ttt_harness.report.results import Run, find_runs
from ttt_harness.sweep.grid import Cell

RECORD = "cell.json"
PARTIAL = ".partial"
FAILED = ".failed"
LOCK = ".sweep.lock"
GRID = "grid.json"

# Options that change no result. Those of the loggers may also hold passwords, which have no place in a record.
_NOT_RECORDED = {
    *("output_path", "verbosity", "show_config", "write_out", "device", "batch_size", "max_batch_size"),
    *("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args", "trust_remote_code"),
    *("confirm_run_unsafe_code", "check_integrity", "cache_requests"),
}


@contextmanager
def locked(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Make the folder of a sweep, and keep other sweeps out of it. The lock ends with the process, however it ends.

    An empty folder that was made here is removed at the end, so that a sweep that is refused leaves nothing behind.

    Args:
        root: the folder.
        shared: others that say so may write there too. Each cell has a lock of its own.

    Raises:
        ConfigError: the folder cannot be written, or another sweep is writing there.
    """
    there = root.exists()
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not there:
                stack.callback(_remove_empty, root)
            stack.enter_context(file_lock(root / LOCK, shared=shared))
        except BlockingIOError:
            raise ConfigError(f"another sweep is writing to {root}; wait for it, or choose another folder.") from None
        except OSError as error:
            raise ConfigError(
                f"--output_path {root} cannot be written: {error.strerror}; choose another folder."
            ) from None
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def settings_of(cell: Cell) -> dict[str, Any]:
    """What a cell's results depend on, as it is written in its record."""
    call = {key: value for key, value in cell.call.items() if key not in _NOT_RECORDED and value not in (None, {}, [])}
    call.pop("config", None)
    return json.loads(json.dumps(call, default=str))


def is_done(cell: Cell, root: Path) -> bool:
    """Whether the cell's folder holds its complete results.

    Raises:
        ConfigError: the folder holds something else: results of other options, or no cell's at all. Nothing there is
            overwritten; hours of work may be in it.
    """
    folder = cell.folder(root)
    if not folder.exists():
        return False
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))["call"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{folder} was not written by a sweep; move it away, or choose another --output_path."
        ) from None
    changed = _changed(recorded, settings_of(cell))
    if changed:
        raise ConfigError(
            f"{folder} holds results of other options ({changed}); choose another --output_path, or delete the folder."
        )
    try:
        find_runs(folder)
    except ReportError:  # somebody deleted or damaged the results
        shutil.rmtree(folder)
        return False
    return True


def _changed(old: Any, new: dict[str, Any]) -> str:
    """The options that differ, for people: "limit 40, now 80"."""
    if not isinstance(old, dict):
        return "unknown"
    flat = [_flat(old), _flat(new)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    values = [{name: str(one.get(name, "not given")).removesuffix(".0") for name in names} for one in flat]
    shown = [f"{name} {values[0][name]}, now {values[1][name]}" for name in names[:3]]
    return "; ".join(shown + (["..."] if len(names) > 3 else []))


def _flat(call: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in call.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


@contextmanager
def written(cell: Cell, root: Path) -> Iterator[Path]:
    """A folder to write a cell's results into; becomes the cell's own when the block ends well, else is removed.

    Raises:
        TTTError: another process is at the cell, or has done it; or, at the end, lm-eval has not written all of its
            results. (It only logs when writing fails.)
    """
    folder = cell.folder(root)
    partial = _partial(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked_cell(folder):
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process has left of it
        _failed(folder).unlink(missing_ok=True)
        partial.mkdir()
        try:
            yield partial
            check_complete(partial, samples=bool(cell.call.get("log_samples") or cell.call.get("predict_only")))
            record = {"method": cell.method, "seed": cell.seed, "call": settings_of(cell)}
            (partial / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _locked_cell(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder.with_name(f".{folder.name}.lock")))
        except BlockingIOError:
            raise TTTError(f"another job is writing {folder}.") from None
        if folder.exists():
            raise TTTError(f"another job has written {folder} meanwhile.")
        yield


def note_grid(cells: Sequence[Cell], root: Path) -> None:
    """Keep the methods and seeds of a sweep that is about to run its cells."""
    with suppress(OSError):  # only `--status` misses it
        (root / GRID).write_text(json.dumps([[cell.method, cell.seed] for cell in cells]) + "\n", encoding="utf-8")


def noted_grid(root: Path) -> list[tuple[str, int]]:
    """Method and seed of each cell of the last sweep that ran in one process; empty where there was none."""
    try:
        return [(method, seed) for method, seed in json.loads((root / GRID).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def is_partial(cell: Cell, root: Path) -> bool:
    """Whether a process is at the cell, or was when it was killed."""
    return _partial(cell.folder(root)).exists()


def note_failure(cell: Cell, root: Path, reason: str) -> None:
    """Keep the reason for which a cell failed, until it is run again."""
    with suppress(OSError):  # a full disk may be that reason
        _failed(cell.folder(root)).write_text(reason + "\n", encoding="utf-8")


def failure(cell: Cell, root: Path) -> str:
    """The reason for which the cell failed when it was run last; empty where there is none."""
    try:
        return _failed(cell.folder(root)).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def check_complete(folder: Path, *, samples: bool) -> Run:
    """The run that lm-eval has written into the folder.

    Raises:
        TTTError: there is none, or it has no samples where it should.
    """
    try:
        run = find_runs(folder)[-1]
    except ReportError:
        raise TTTError(f"lm-eval could not write its results to {folder}; is the disk full?") from None
    missing: Sequence[str] = [task for task in run.tasks if samples and not run.has_samples(task)]
    if missing:
        raise TTTError(f"lm-eval could not write the samples of {missing[0]} to {folder}; is the disk full?")
    return run


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _failed(folder: Path) -> Path:
    return folder.with_name(folder.name + FAILED)
