"""The adapter store: PEFT directories named by a hash of everything that determines them.

An adapter is written into a hidden folder beside its place and renamed into it, so that a reader never meets half of
one, and two writers of the same adapter do not disturb each other. Next to PEFT's two files stands `ttt.json`, the
record of the fit (`ttt_harness.adapters.record`), by which a damaged or changed adapter is told.

Two locks of a key keep processes apart: whoever fits the adapter holds `fitting`, so that others that need it wait for
it and then read it; whoever serves it holds `using`. `remove` leaves an adapter alone while either is held.
"""

import errno
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_harness.adapters.peft import first_not_finite, write_adapter
from ttt_harness.adapters.record import FILES, RECORD_NAME, Damage, check, seal
from ttt_harness.adapters.size import size_text
from ttt_harness.errors import StoreError
from ttt_harness.locks import file_lock, is_locked

if TYPE_CHECKING:
    from torch import Tensor

TRASH = ".ttt-trash-"  # what is being removed, and goes with the next removal where a process was killed meanwhile
# What was in an adapter's place and may be of worth to somebody is kept under its name and this.
SET_ASIDE = ".set-aside"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in the store: its key, its PEFT directory, and the record of its fit."""

    key: str
    path: Path
    record: Mapping[str, Any]


class AdapterStore:
    """Adapters under one folder, which is made when the first is written.

    A store that cannot be written serves the adapters that it holds; only when each was last used is then not noted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, key: str) -> StoredAdapter | None:
        """Return the adapter named `key`, or None where there is none.

        One that is damaged or was changed is moved out of the way, with a warning.

        Raises:
            StoreError: something is wrong with it, and it cannot be moved.
        """
        path = self.root / key
        if not os.path.lexists(path):
            return None
        try:
            record = check(path, key)
        except Damage:
            return self._make_way(key)
        self._note_use(path)
        return StoredAdapter(key, path, record)

    def read(self, key: str) -> StoredAdapter:
        """Return the adapter named `key`, and leave everything as it is.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        path = self.root / key
        if not os.path.lexists(path):
            raise StoreError(f"there is no adapter {key} in {self.root}.")
        try:
            return StoredAdapter(key, path, check(path, key))
        except Damage as damage:
            raise StoreError(f"the adapter {path} {damage}.") from None

    @contextmanager
    def fitting(self, key: str) -> Iterator[None]:
        """Keep other processes from fitting the adapter named `key`; waits for one that does.

        It may be there at the start of the block, where another process has written it meanwhile.

        Raises:
            StoreError: the folder cannot be written.
        """
        lock = self._lock(key)
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(lock, wait=True))
            except PermissionError as error:
                if not (os.path.lexists(lock) and os.access(self.root, os.W_OK | os.X_OK)):
                    raise self._not_written(key, error) from error
                _log.warning(
                    "The lock %s belongs to another user and cannot be opened: %s is fitted without it, and another "
                    "process may fit it, too. Remove the lock if its owner no longer runs.",
                    lock,
                    key,
                )
            except OSError as error:
                if lock.is_symlink() or lock.is_dir():
                    raise StoreError(f"the lock {lock} is no file ({error.strerror}); remove it.") from error
                raise self._not_written(key, error) from error
            yield

    @contextmanager
    def using(self, key: str) -> Iterator[StoredAdapter | None]:
        """Give the adapter named `key`, which stays in the store within the block; None where there is none.

        Where the store cannot be written nothing holds it.

        Raises:
            StoreError: see `load`.
        """
        with self.holding(key):
            yield self.load(key)

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """Keep the adapter named `key` in the store within the block, if it is there.

        Where the store cannot be written nothing holds it.
        """
        with ExitStack() as stack:
            with suppress(OSError):
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self._use_lock(key), shared=True, wait=True))
            yield

    def files(self, key: str) -> dict[str, bytes]:
        """The files of the adapter named `key`, to be `add`ed to a store that another machine cannot see.

        Raises:
            OSError: it is not there.
        """
        return {name: (self.root / key / name).read_bytes() for name in FILES}

    def add(self, key: str, files: Mapping[str, bytes]) -> StoredAdapter:
        """Write an adapter that comes from another store.

        Raises:
            StoreError: it is damaged, the folder cannot be written, or the disk is full; nothing is left behind.
        """
        with self._written(key) as work:
            for name, content in files.items():
                (work / name).write_bytes(content)
            try:
                record = check(work, key)
            except Damage as damage:
                raise StoreError(f"the adapter {key} that came from another store {damage}.") from None
        return StoredAdapter(key, self.root / key, record)

    def save(
        self,
        key: str,
        weights: Mapping[str, "Tensor"],
        *,
        base_model: str,
        rank: int,
        alpha: float,
        dropout: float,
        record: Mapping[str, Any],
    ) -> StoredAdapter:
        """Write an adapter and its record under `key`.

        Raises:
            StoreError: a weight is not finite, the folder cannot be written, or the disk is full; nothing is left
                behind.
        """
        if name := first_not_finite(weights):
            raise StoreError(
                f"the adapter {key} is not stored: its fit has diverged, and {name} holds values that are not finite; "
                "use a smaller lr=, or dtype=bfloat16 in place of float16."
            )
        with self._written(key) as work:
            write_adapter(work, weights, base_model=base_model, rank=rank, alpha=alpha, dropout=dropout)
            full_record = seal(record, key, work)
            (work / RECORD_NAME).write_text(json.dumps(full_record, indent=2) + "\n", encoding="utf-8")
        return StoredAdapter(key, self.root / key, full_record)

    def remove(self, key: str) -> bool:
        """Remove the adapter named `key`. Returns False where a process is fitting or serving it.

        It is first renamed: a process that is killed meanwhile leaves a whole adapter, or none and some trash, which
        the next removal takes along.

        Raises:
            StoreError: it cannot be removed.
        """
        try:
            with file_lock(self._lock(key)), file_lock(self._use_lock(key)):
                trash = self._to_trash(key)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return True
        except OSError as error:
            raise StoreError(
                f"the adapter {self.root / key} cannot be removed ({error.strerror or error}); see who owns it."
            ) from error
        _delete(trash)
        return True

    def is_busy(self, key: str) -> bool:
        """Whether a process is fitting or serving the adapter named `key`."""
        return is_locked(self._lock(key)) or is_locked(self._use_lock(key), shared=True)

    def free_bytes(self) -> int:
        """What a user may still write to the disk of the store."""
        folder = next(path for path in (self.root, *self.root.absolute().parents) if path.is_dir())
        return shutil.disk_usage(folder).free

    def check_room(self, needed: int) -> int:
        """Check that `needed` bytes can be written, and return how many are free.

        Raises:
            StoreError: they cannot: the disk is too full, or the folder cannot be written.
        """
        if not needed:
            return self.free_bytes()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"ttt")
        except OSError as error:
            raise StoreError(
                f"adapters cannot be written to {self.root} ({error.strerror or error}); choose another folder with "
                "adapter_dir=."
            ) from error
        free = self.free_bytes()
        if needed > free:
            raise StoreError(
                f"the fits of this run take {size_text(needed)} in {self.root}, and {size_text(free)} are free there; "
                "free space (ttt-harness adapters prune), use a smaller lora_rank=, or choose another folder with "
                "adapter_dir=."
            )
        return free

    def _lock(self, key: str) -> Path:
        return self.root / f".{key}.lock"

    def _use_lock(self, key: str) -> Path:
        return self.root / f".{key}.use"

    @contextmanager
    def _written(self, key: str) -> Iterator[Path]:
        """A folder to write an adapter into, which becomes its own at the end of the block."""
        path = self.root / key
        work: Path | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{key}-"))
            yield work
            _sync(work)
            work.chmod(0o755)
            try:
                work.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                try:
                    check(path, key)  # another process was faster, and has written the same
                except Damage as damage:
                    self._clear(key, damage)
                    work.rename(path)
        except OSError as error:
            raise self._not_written(key, error) from error
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)

    def _make_way(self, key: str) -> StoredAdapter | None:
        """Move what is damaged out of an adapter's place, unless another process has the adapter's lock."""
        path = self.root / key
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(self._lock(key)))
            except BlockingIOError:
                return None  # it is being fitted
            except OSError as error:
                _log.debug("%s: %s", self._lock(key), error)  # then the rename tells what is allowed
            try:
                return StoredAdapter(key, path, check(path, key))  # written by another process meanwhile
            except Damage as damage:
                if not os.path.lexists(path):
                    return None
                try:
                    self._clear(key, damage)
                except OSError as error:
                    raise StoreError(
                        f"the stored adapter {path} {damage}, and cannot be replaced ({error.strerror or error}); "
                        "remove it, or choose another folder with adapter_dir=."
                    ) from error
        return None

    def _clear(self, key: str, damage: Damage) -> None:
        """Delete a damaged adapter. What holds anything else than a fit has written, or cannot be read, is kept."""
        path = self.root / key
        if _is_ours_alone(path):
            _log.warning("The stored adapter %s %s; it is fitted again.", path, damage)
            _delete(self._to_trash(key))
            return
        aside = path.with_name(f"{key}{SET_ASIDE}")
        while os.path.lexists(aside):
            aside = path.with_name(f"{key}{SET_ASIDE}-{uuid.uuid4().hex[:8]}")
        path.rename(aside)
        _log.warning(
            "The stored adapter %s %s; it is fitted again, and what was there is now %s.", path, damage, aside.name
        )

    def _to_trash(self, key: str) -> Path:
        trash = self.root / f"{TRASH}{key}-{uuid.uuid4().hex[:8]}"
        (self.root / key).rename(trash)
        return trash

    def _note_use(self, path: Path) -> None:
        """Have the record's time of change say when the adapter was last used; see `inventory`."""
        with suppress(OSError):  # of a store that others own
            os.utime(path / RECORD_NAME)

    def _not_written(self, key: str, error: OSError) -> StoreError:
        reason = error.strerror or str(error)
        return StoreError(
            f"the adapter {key} could not be written to {self.root} ({reason}); "
            "free space there or choose another folder with adapter_dir=."
        )


def _is_ours_alone(path: Path) -> bool:
    """Whether a folder holds nothing but files of the names that a fit writes, all of which can be read."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        for entry in path.iterdir():
            if entry.name not in FILES or entry.is_symlink() or not entry.is_file():
                return False
            with entry.open("rb") as file:
                file.read(1)
    except OSError:
        return False
    return True


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the disk write what was written, so that a full one is noticed before the rename."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
