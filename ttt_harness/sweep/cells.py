"""The folder of a cell: `DIR/<method>/[<point>/]seed<N>/`, which is there when the cell is done, whole, never before.

lm-eval writes its results bit by bit into `seed<N>.partial` beside it; that folder is renamed when all of it is there.

A sweep removes only what it knows for its own: a `.partial` folder with its mark and without a finished record, a note
of a failure with its mark, and a record whose results somebody deleted. All else that stands in a cell's place is kept
and named: a folder of another program, results that cannot be read now, links, files where folders should be.
"""

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.files import write_whole
from ttt_harness.locks import file_lock
from ttt_harness.sweep.found import MARK, RECORD, KeptError, check_complete, files_in, look, runs_in, settings_of
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.notes import clear_failure

PARTIAL = ".partial"
UNFINISHED = ".unfinished"
# The beginning of the names of `ttt_vllm`'s files of answers that were not scored (`harness.answer_log`).
ANSWERS = "answers_"
LOCK = ".sweep.lock"


class BusyError(TTTError):
    """Another process is at the cell, or was and has done it."""


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
            if root.exists() and not root.is_dir():
                raise ConfigError(f"--output_path {root} is no folder; choose another one.")
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
    files = files_in(partial)
    own = all(file.name.startswith(("answers_", "results_", "samples_")) or file == partial / RECORD for file in files)
    return own and ((partial / RECORD) in files or not runs_in(partial)[0])


@contextmanager
def written(cell: Cell, root: Path) -> Iterator[Path]:
    """A folder to write a cell's results into; becomes the cell's own when the block ends well.

    Raises:
        BusyError: another process is at the cell, or has done it.
        TTTError: something is in the way; or, at the end, lm-eval has not written all of its results. (It only logs
            when writing fails.)
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
            write_whole(partial / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except BaseException as error:
            _leave_computed(partial, interrupted=isinstance(error, KeyboardInterrupt))
            raise
        _finish(partial, folder)


def _leave_computed(partial: Path, *, interrupted: bool) -> None:
    """Keep the answers and results of a cell that fails until it is run again; remove the folder where there are none.

    Results get a name by which no report takes them for those of a whole run.
    """
    with suppress(OSError, KeptError):
        files = [file for file in files_in(partial) if file != partial / MARK]
        answered = any(file.name.startswith(ANSWERS) for file in files)
        if not answered and (interrupted or not files):
            shutil.rmtree(partial)
        for file in files:
            if file.suffix == ".json" and file.exists():
                file.rename(file.with_name(file.name + UNFINISHED))


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
        clear_failure(cell, root)
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


@contextmanager
def _locked_cell(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(_own_lock(_lock(folder)))
        except BlockingIOError:
            raise BusyError(f"another job is writing {folder}.") from None
        except OSError as error:
            raise _not_written(folder, error) from None
        if look(folder).done:
            raise BusyError(f"another job has written {folder} meanwhile.")
        yield


def is_partial(cell: Cell, root: Path) -> bool:
    """Whether a process is at the cell, or was when it was killed."""
    return os.path.lexists(partial_of(cell, root))


def partial_of(cell: Cell, root: Path) -> Path:
    """Where a process writes the cell's results, until they are complete."""
    return _partial(cell.folder(root))


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + PARTIAL)


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")
