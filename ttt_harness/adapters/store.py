"""The adapter store: PEFT directories named by a hash of everything that determines them.

An adapter is written into a hidden folder beside its place and renamed into it, so that a reader never meets half of
one, and two writers of the same adapter do not disturb each other. Next to PEFT's two files stands `ttt.json`, the
record of the fit, with the checksum that tells a damaged adapter.

Whoever fits an adapter holds its lock meanwhile (`fitting`), so that others that need it wait for it and then read it.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ttt_harness.adapters.names import adapter_key, fingerprint  # noqa: F401 - the run imports them from here
from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from ttt_harness.errors import StoreError
from ttt_harness.locks import file_lock

RECORD_NAME = "ttt.json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in the store: its key, its PEFT directory, and the record of its fit."""

    key: str
    path: Path
    record: Mapping[str, Any]


class AdapterStore:
    """Adapters under one folder, which is made when the first is written."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def load(self, key: str) -> StoredAdapter | None:
        """Return the adapter named `key`, or None where there is none or it is damaged (with a warning)."""
        path = self.root / key
        if not path.is_dir():
            return None
        try:
            record = json.loads((path / RECORD_NAME).read_text())
            json.loads((path / CONFIG_NAME).read_text())
            intact = record["sha256"] == _sha256(path / WEIGHTS_NAME)
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            _log.warning("The stored adapter %s is damaged; it is fitted again.", path)
            return None
        return StoredAdapter(key, path, record)

    @contextmanager
    def fitting(self, key: str) -> Iterator[None]:
        """Keep other processes from fitting the adapter named `key`; waits for one that does.

        It may be there at the start of the block, where another process has written it meanwhile.

        Raises:
            StoreError: the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self.root / f".{key}.lock", wait=True))
            except OSError as error:
                raise self._not_written(key, error) from error
            yield

    def files(self, key: str) -> dict[str, bytes]:
        """The files of the adapter named `key`, to be `add`ed to a store that another machine cannot see.

        Raises:
            OSError: it is not there.
        """
        return {path.name: path.read_bytes() for path in (self.root / key).iterdir()}

    def add(self, key: str, files: Mapping[str, bytes]) -> StoredAdapter:
        """Write an adapter that comes from another store.

        Raises:
            StoreError: the folder cannot be written, or the disk is full; nothing is left behind.
        """
        with self._written(key) as work:
            for name, content in files.items():
                (work / name).write_bytes(content)
        return StoredAdapter(key, self.root / key, json.loads(files[RECORD_NAME]))

    def save(
        self,
        key: str,
        weights: Mapping[str, Tensor],
        *,
        base_model: str,
        rank: int,
        alpha: float,
        dropout: float,
        record: Mapping[str, Any],
    ) -> StoredAdapter:
        """Write an adapter and its record under `key`, in the place of a damaged one if there is one.

        Raises:
            StoreError: the folder cannot be written, or the disk is full; nothing is left behind.
        """
        with self._written(key) as work:
            write_adapter(work, weights, base_model=base_model, rank=rank, alpha=alpha, dropout=dropout)
            full_record = {**record, "sha256": _sha256(work / WEIGHTS_NAME)}
            (work / RECORD_NAME).write_text(json.dumps(full_record, indent=2) + "\n")
        return StoredAdapter(key, self.root / key, full_record)

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
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                if self.load(key) is None:
                    shutil.rmtree(path, ignore_errors=True)
                    work.rename(path)
        except OSError as error:
            raise self._not_written(key, error) from error
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)

    def _not_written(self, key: str, error: OSError) -> StoreError:
        reason = error.strerror or str(error)
        return StoreError(
            f"the adapter {key} could not be written to {self.root} ({reason}); "
            "free space there or choose another folder with adapter_dir=."
        )


def _sync(folder: Path) -> None:
    """Make the disk write what was written, so that a full one is noticed before the rename."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
