"""The folder of a cell: `DIR/<method>/[<point>/]seed<N>/`, which is there when the cell is done, whole, never before.

lm-eval writes its results bit by bit into `seed<N>.partial` beside it; that folder is renamed when all of it is there.
`cell.json` in it states the lm_eval call, so that a cell is known to be done with the same options and not with others.
`seed<N>.failed` holds the reason for which the cell failed the last time. `DIR/grid.json` lists the cells of the last
sweep in one process, so that those that it has not come to are known as well.

A sweep removes only what it knows for its own: a `.partial` folder with its mark and without a finished record, a note
of a failure with its mark, and a record whose results somebody deleted. All else that stands in a cell's place is kept
and named: a folder of another program, results that cannot be read now, links, files where folders should be.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.config import TTTConfig
from ttt_harness.errors import ConfigError, ReportError, TTTError
from ttt_harness.locks import file_lock
from ttt_harness.methods import SETTINGS
from ttt_harness.report.results import Run, find_runs, read_run
from ttt_harness.sweep.axes import FIT_AXES
from ttt_harness.sweep.grid import Cell

RECORD = "cell.json"
PARTIAL = ".partial"
FAILED = ".failed"
LOCK = ".sweep.lock"
GRID = "grid.json"
# A file in a `.partial` folder that says whose it is; it stays in the finished one.
MARK = ".ttt-harness-sweep"
# The last line of a `.failed` file says the same.
_FAILED_MARK = "# noted by ttt-harness sweep"
_MOST_NOTE_BYTES = 100_000

# Options that change no result. Those of the loggers may also hold passwords, which have no place in a record.
_NOT_RECORDED = {
    *("output_path", "verbosity", "show_config", "write_out", "device", "batch_size", "max_batch_size"),
    *("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args", "trust_remote_code"),
    *("confirm_run_unsafe_code", "check_integrity", "cache_requests"),
}


class KeptError(TTTError):
    """What is in a cell's place cannot be read, or is not a sweep's. It is kept, and the cell is not run."""


@dataclass(frozen=True)
class Found:
    """What is in a cell's folder.

    done: results that can be read, and the record of the call.
    remark: on what else is there, for people; empty where there is nothing to say.
    run: the newest of the results.
    record: what `cell.json` holds.
    """

    done: bool
    remark: str = ""
    run: Run | None = None
    record: Any = None


@contextmanager
def locked(root: Path, *, shared: bool = False) -> Iterator[None]:
    """Make the folder of a sweep, and keep other sweeps out of it. The lock ends with the process, however it ends.

    Empty folders that were made here are removed at the end, so that a sweep that is refused leaves nothing behind.

    Args:
        root: the folder.
        shared: others that say so may write there too. Each cell has a lock of its own.

    Raises:
        ConfigError: the folder cannot be written, or another sweep is writing there.
    """
    with ExitStack() as stack:
        try:
            made = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            stack.enter_context(_own_lock(root / LOCK, shared=shared))
        except BlockingIOError:
            raise ConfigError(f"another sweep is writing to {root}; wait for it, or choose another folder.") from None
        except OSError as error:
            raise ConfigError(
                f"--output_path {root} cannot be written: {error.strerror}; choose another folder."
            ) from None
        yield


@contextmanager
def _own_lock(path: Path, *, shared: bool = False) -> Iterator[None]:
    """A lock on the file `path`, unless it is a file that holds something: such a one is not ours to remove.

    Raises:
        KeptError: it holds something, or is no file.
        BlockingIOError: another process holds the lock.
    """
    with suppress(FileNotFoundError):
        there = path.lstat()
        if there.st_size or not stat.S_ISREG(there.st_mode):
            raise KeptError(f"{path} is not the lock file of a sweep, and is kept; move it away.")
    with file_lock(path, shared=shared):
        yield


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def settings_of(cell: Cell) -> dict[str, Any]:
    """What a cell's results depend on, as it is written in its record."""
    call = {key: value for key, value in cell.call.items() if key not in _NOT_RECORDED and value not in (None, {}, [])}
    call.pop("config", None)
    return json.loads(json.dumps(call, default=str))


def found(cell: Cell, root: Path) -> Found:
    """What is in the cell's folder, after a check that it is of this cell.

    Raises:
        ConfigError: the folder holds something else: results of other options, or no cell's at all. Nothing there is
            overwritten; hours of work may be in it.
        KeptError: what is there cannot be read now.
    """
    folder = cell.folder(root)
    there = look(folder)
    if there.record is not None:
        changed = _changed(there.record, settings_of(cell)) or (there.run and _other_defaults(cell, there.run))
        if changed:
            raise ConfigError(
                f"{folder} holds results of other options ({changed}); choose another --output_path, or move the "
                "folder away."
            )
    return there


def look(folder: Path) -> Found:
    """What is in the folder of a cell. Changes nothing.

    Raises:
        ConfigError: something that no sweep has written.
        KeptError: something that cannot be read now.
    """
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Found(done=False)
    except OSError as error:
        raise _unreadable(folder, error) from None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))["call"]
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise KeptError(f"{folder} is a link to what is not there, and is kept; restore it or remove it.") from None
        raise ConfigError(
            f"{folder} was not written by a sweep; move it away, or choose another --output_path."
        ) from None
    except OSError as error:
        raise _unreadable(folder / RECORD, error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeptError(
            f"{folder / RECORD} is damaged, and is kept; move {folder} away to run the cell again."
        ) from None
    return _look_at_results(folder, record)


def _look_at_results(folder: Path, record: Any) -> Found:
    runs, wrong = _runs_in(folder)
    if runs:
        return Found(done=True, remark=wrong[0] if wrong else "", run=runs[-1], record=record)
    if wrong:
        raise KeptError(f"{wrong[0].rstrip('.')}; {folder} is kept, so move it away to run the cell again.")
    others = [file for file in _files_in(folder) if file.name not in (RECORD, MARK)]
    if others:
        raise KeptError(
            f"the results of {folder} are gone, but not {others[0].relative_to(folder)}; the folder is kept, so move "
            "it away to run the cell again."
        )
    return Found(done=False, record=record)  # somebody deleted the results


def _runs_in(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder, oldest first, and what is wrong with files that are named like one.

    Raises:
        KeptError: the folder cannot be read.
    """
    files = [file for file in _files_in(folder) if file.name.startswith("results") and file.suffix == ".json"]
    try:
        return find_runs(folder), []
    except (ReportError, OSError):
        pass
    runs, wrong = [], []
    for file in sorted(files):
        try:
            runs.append(read_run(file))
        except ReportError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{file} cannot be read: {error.strerror}")
    return runs, wrong


def _files_in(folder: Path) -> list[Path]:
    """All that is in the folder to any depth and is no folder, links to folders among them.

    Raises:
        KeptError: not all of it can be read.
    """

    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error)

    found = []
    for where, folders, files in os.walk(folder, onerror=fail):
        found += [Path(where, name) for name in files]
        found += [path for name in folders if (path := Path(where, name)).is_symlink()]
    return found


def _unreadable(path: Path, error: OSError) -> KeptError:
    return KeptError(f"{path} cannot be read ({error.strerror}), and is kept; try again when it can.")


def _changed(old: Any, new: dict[str, Any]) -> str:
    """The options that differ, for people: "limit 40, now 80"."""
    if not isinstance(old, dict):
        return "unknown"
    flat = [_flat(old), _flat(new)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    return _differences(names, *flat)


def _other_defaults(cell: Cell, run: Run) -> str:
    """The settings of the fits that a version with other defaults has run the cell with, for people."""
    if not SETTINGS[cell.method].fits:
        return ""
    now = TTTConfig.from_mapping(cell.call["model_args"])
    new = {name: getattr(now, name) for name in FIT_AXES}
    return _differences([name for name in new if run.settings.get(name, new[name]) != new[name]], run.settings, new)


def _differences(names: Sequence[str], old: Any, new: Any) -> str:
    values = [{name: str(one.get(name, "not given")).removesuffix(".0") for name in names} for one in (old, new)]
    shown = [f"{name} {values[0][name]}, now {values[1][name]}" for name in names[:3]]
    return "; ".join(shown + (["..."] if len(names) > 3 else []))


def _flat(call: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in call.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def check_place(cell: Cell, root: Path) -> None:
    """Check that a cell that is not done can be written, and that nothing of another's is in its way.

    Raises:
        ConfigError: it cannot, or there is.
    """
    folder = cell.folder(root)
    try:
        for parent in (folder.parent, *folder.parent.parents):
            if os.path.lexists(parent):
                if not parent.is_dir():
                    raise ConfigError(f"{parent} is no folder, and is kept; move it away, or choose another folder.")
                if not os.access(parent, os.W_OK | os.X_OK):
                    raise ConfigError(f"{parent} cannot be written: permission denied; choose another --output_path.")
                break
        _refuse_foreign(_partial(folder))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; choose another --output_path.") from None


def _refuse_foreign(partial: Path) -> None:
    """Raises ConfigError where `partial` is there and no sweep has left it."""
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not partial.is_dir() or not (_has(partial, MARK) or _left_by_first_version(partial)):
        raise ConfigError(
            f"{partial} was not left by a sweep, and is kept; move it away, or choose another --output_path."
        )


def _has(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)


def _left_by_first_version(partial: Path) -> bool:
    """Whether a killed sweep of version 0.1, which set no mark, has left the folder: nothing, or parts of results."""
    files = _files_in(partial)
    own = all(file.name.startswith(("results_", "samples_")) or file == partial / RECORD for file in files)
    return own and ((partial / RECORD) in files or not _runs_in(partial)[0])


@contextmanager
def written(cell: Cell, root: Path) -> Iterator[Path]:
    """A folder to write a cell's results into; becomes the cell's own when the block ends well, else is removed.

    Raises:
        TTTError: another process is at the cell, or has done it; or, at the end, lm-eval has not written all of its
            results. (It only logs when writing fails.)
    """
    folder = cell.folder(root)
    partial = _partial(folder)
    check_place(cell, root)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(folder, error) from None
    with _locked_cell(folder):
        _clear(cell, root)
        try:
            partial.mkdir()
            (partial / MARK).touch()
        except OSError as error:
            raise _not_written(folder, error) from None
        try:
            yield partial
            check_complete(partial, samples=bool(cell.call.get("log_samples") or cell.call.get("predict_only")))
            record = {"method": cell.method, "point": cell.point, "seed": cell.seed, "call": settings_of(cell)}
            _write_whole(partial / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(partial)
            raise
        _finish(partial, folder)


def _finish(partial: Path, folder: Path) -> None:
    """Give the complete folder its name; what an emptied one has left in its place goes."""
    try:
        if os.path.lexists(folder):
            _remove_emptied(folder)
        partial.rename(folder)
    except (TTTError, OSError) as error:
        why = f"{folder} cannot be written: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise TTTError(f"{why.rstrip('.')}. The cell's results are in {partial}.") from None


def _clear(cell: Cell, root: Path) -> None:
    """Remove what an earlier try of the cell has left half-written.

    Raises:
        TTTError: it is complete, is not a sweep's, or cannot be removed.
    """
    folder = cell.folder(root)
    partial = _partial(folder)
    try:
        if _is_own_note(_failed(folder)):
            _failed(folder).unlink()
        if not os.path.lexists(partial):
            return
        _refuse_foreign(partial)
        if _is_complete(partial):
            raise TTTError(f"{partial} holds complete results; the same command makes them the cell's.")
        shutil.rmtree(partial)
    except OSError as error:
        raise _not_written(partial, error) from None


def finish_left(cell: Cell, root: Path) -> None:
    """Give a cell its name whose process was killed between its last file and that.

    Raises:
        ConfigError, KeptError: as `is_done`.
    """
    folder = cell.folder(root)
    partial = _partial(folder)
    if not os.path.lexists(partial) or look(folder).done:
        return
    _refuse_foreign(partial)
    with suppress(BlockingIOError, OSError), _own_lock(_lock(folder)):
        if _is_complete(partial):
            _finish(partial, folder)


def _is_complete(partial: Path) -> bool:
    """Whether the folder holds the record, which is written last, and results that can be read."""
    try:
        return look(partial).done
    except TTTError:
        return False


def _remove_emptied(folder: Path) -> None:
    """Remove the folder of a cell whose results somebody deleted: its record, and empty folders.

    Raises:
        TTTError, OSError: there is something else in it.
    """
    if look(folder).done:
        raise TTTError(f"another job has written {folder} meanwhile.")
    for name in (RECORD, MARK):
        (folder / name).unlink(missing_ok=True)
    for where, _, _ in os.walk(folder, topdown=False):
        os.rmdir(where)


def _not_written(path: Path, error: OSError) -> TTTError:
    return TTTError(f"{path} cannot be written: {error.strerror}.")


def _write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a process that is killed leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _locked_cell(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(_own_lock(_lock(folder)))
        except BlockingIOError:
            raise TTTError(f"another job is writing {folder}.") from None
        except OSError as error:
            raise _not_written(folder, error) from None
        if look(folder).done:
            raise TTTError(f"another job has written {folder} meanwhile.")
        yield


def note_grid(cells: Sequence[Cell], root: Path) -> str:
    """Keep the cells of a sweep that is about to run. Returns why that is not possible, for people."""
    if os.path.lexists(root / GRID) and not noted_grid(root):
        return f"{root / GRID} was not written by a sweep, and is kept; --status lists no cells that have not begun."
    rows = [[cell.method, cell.seed, *([cell.point] if cell.point else [])] for cell in cells]
    with suppress(OSError):  # only `--status` misses it
        _write_whole(root / GRID, json.dumps(rows) + "\n")
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


def is_partial(cell: Cell, root: Path) -> bool:
    """Whether a process is at the cell, or was when it was killed."""
    return os.path.lexists(_partial(cell.folder(root)))


def note_failure(cell: Cell, root: Path, reason: str) -> None:
    """Keep the reason for which a cell failed, until it is run again; a file of another's with that name is kept."""
    note = _failed(cell.folder(root))
    with suppress(OSError):  # a full disk may be that reason
        if not os.path.lexists(note) or _is_own_note(note):
            _write_whole(note, f"{' '.join(reason.split())}\n{_FAILED_MARK}\n")


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


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
