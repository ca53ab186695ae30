"""Locks between processes, of one machine or of several that share a file system.

A lock is a file, which is there only while somebody holds it, and ends with the process, however that ends.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SECONDS_BETWEEN_TRIES = 0.2


@contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock on the file `path` within the block.

    Args:
        path: in a folder that is there; the file is made here.
        shared: others that say so may hold it, too.
        wait: until the others have let it go.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
        OSError: the file cannot be made.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with path.open("a+") as file:
            if not _try_lock(file, kind):
                if not wait:
                    raise BlockingIOError
                time.sleep(SECONDS_BETWEEN_TRIES)
                continue
            if not _is_open_at(file, path):
                continue  # removed by the process that held it, after it was opened here
            try:
                yield
            finally:
                if _try_lock(file, fcntl.LOCK_EX):  # else others share it, and the last one removes it
                    path.unlink(missing_ok=True)
            return


def _try_lock(file: IO[str], kind: int) -> bool:
    """Lock an open file, or change its lock's kind. Returns False where another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then it is for the user to start one process at a time
        pass
    return True


def _is_open_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`; what a killed one has left does not count."""
    try:
        with path.open() as file:
            return not _try_lock(file, fcntl.LOCK_SH)
    except OSError:
        return False
