"""What may go from a store, and its going.

An adapter goes whole or stays whole (`AdapterStore.remove`), and none goes that a process is fitting or serving. What
killed processes have left behind, half-written or half-removed, goes along.
"""

import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttt_harness.adapters.inventory import Entry, entries, folder_bytes
from ttt_harness.adapters.record import FILES
from ttt_harness.adapters.size import size_text
from ttt_harness.adapters.store import SET_ASIDE, TRASH, AdapterStore
from ttt_harness.errors import ConfigError, StoreError

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
# A half-written folder whose writer may be alive: no writing takes that long.
_WRITING = 3600
# As tempfile.mkdtemp names what is being written.
_WORK = re.compile(r"\..+-[a-z0-9_]{8}")


def parse_age(text: str, *, of: str) -> float:
    """Read "30d", "12h", "2w" or "90m" (minutes), as seconds.

    Raises:
        ConfigError: it is no such time.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([mhdw])\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{of}={text[:40]} is no time; write for example 30d, 12h or 2w.")
    return float(found[1]) * _UNITS[found[2].lower()]


def choose(
    found: Sequence[Entry], *, among: Iterable[Entry], older: float | None = None, keep: int | None = None
) -> list[Entry]:
    """The adapters that are to go, those first that were used longest ago.

    Args:
        found: all of the store.
        among: those that may go.
        older: seconds since the last use, at least.
        keep: bytes that the store may hold afterwards; no more go than that takes.
    """
    candidates = sorted(among, key=lambda entry: entry.used)
    if older is not None:
        candidates = [entry for entry in candidates if time.time() - entry.used >= older]
    if keep is None:
        return candidates
    left = sum(entry.size for entry in found)
    chosen = []
    for entry in candidates:
        if left <= keep:
            break
        chosen.append(entry)
        left -= entry.size
    return chosen


@dataclass(frozen=True)
class Leftover:
    """A hidden folder that a killed process has left, or something that the store has set aside; `what` says which."""

    path: Path
    size: int
    what: str


def leftovers(root: Path) -> list[Leftover]:
    """What was being removed, or written more than an hour ago, when its process was killed."""
    found = []
    for path in _children(root):
        if path.name.startswith(TRASH) or _is_half_written(path):
            found.append(Leftover(path, folder_bytes(path), "left by a process that was killed"))
    return found


def _is_half_written(path: Path) -> bool:
    """Whether a folder is one that an adapter was being written into: a person's hidden folder may have such a name."""
    try:
        return (
            _WORK.fullmatch(path.name) is not None
            and not path.is_symlink()
            and time.time() - path.stat().st_mtime > _WRITING
            and set(os.listdir(path)) <= set(FILES)
        )
    except OSError:
        return False


def set_aside(root: Path) -> list[Leftover]:
    """What the store has found in adapters' places, and kept since no fit has written it."""
    kept = [path for path in _children(root) if SET_ASIDE in path.name]
    return [Leftover(path, folder_bytes(path), "set aside, as no fit has written it") for path in kept]


def _children(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError:
        return []


def sweep_up(found: Iterable[Leftover]) -> None:
    """Delete what is left over; what cannot be deleted stays."""
    for leftover in found:
        if leftover.path.is_dir() and not leftover.path.is_symlink():
            shutil.rmtree(leftover.path, ignore_errors=True)
        else:
            leftover.path.unlink(missing_ok=True)


def keep_below(store: AdapterStore, limit: int, *, needed: int = 0, keep: Collection[str] = ()) -> list[Entry]:
    """Remove adapters, those first that were used longest ago, until a store and what comes to it are within a limit.

    Args:
        limit: bytes that the store may hold.
        needed: bytes that are about to be written.
        keep: the keys of adapters that are about to be used.

    Returns:
        What was removed.

    Raises:
        StoreError: what is needed, kept, or in use by other processes is more than that.
    """
    found = entries(store.root) if os.path.isdir(store.root) else []
    kept = sum(entry.size for entry in found if entry.key in keep)
    if needed + kept > limit:
        raise StoreError(
            f"adapter_limit={size_text(limit)} is less than what this run's adapters take, {size_text(needed + kept)}; "
            "give a larger one, or use a smaller lora_rank=."
        )
    removed = []
    left = sum(entry.size for entry in found)
    for entry in choose(found, among=[entry for entry in found if entry.key not in keep]):
        if left + needed <= limit:
            break
        if store.remove(entry.key):
            removed.append(entry)
            left -= entry.size
    if left + needed > limit:
        raise StoreError(
            f"adapter_limit={size_text(limit)} cannot be kept now: other processes use adapters in {store.root}, and "
            f"{size_text(left + needed)} would be there; wait for them, or give a larger limit."
        )
    return removed
