"""Locks between processes, of one machine or of several that share a file system.

A lock is a file, which is there only while somebody holds it, and ends with the process, however that ends. A file that
a killed process has left is taken over, another user's too where it can be opened.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
        OSError: the file cannot be made or opened, or is no ordinary file.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with _opened(path) as file:
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
                    with suppress(OSError):  # left by another user, in a folder where each may remove his own
                        path.unlink()
            return


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of the file, which is made if it is not there; links are not followed."""
    common = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | common, 0o666)
    except PermissionError:
        file = os.open(path, os.O_RDONLY | common)  # another user's, which can be locked all the same
    try:
        yield file
    finally:
        os.close(file)


def _try_lock(file: int, kind: int) -> bool:
    """Lock an open file, or change its lock's kind. Returns False where another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then it is for the user to start one process at a time
        pass
    return True


def _is_open_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path, *, shared: bool = False) -> bool:
    """Whether a process holds the lock file `path` alone; what a killed one has left does not count.

    Args:
        shared: whether processes that share it count, too.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(file, fcntl.LOCK_EX if shared else fcntl.LOCK_SH)
    finally:
        os.close(file)
