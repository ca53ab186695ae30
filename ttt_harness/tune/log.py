"""The log of a search: a line for each finished fit, so that a search that was stopped or killed can be resumed.

    search.jsonl   {"key": ..., "task": ..., "seed": 42, "fold": 0, "setting": ..., "outcomes": ..., "seconds": ...}

Any search with the same fit reuses the line: its key is the hash of everything that determines the outcomes.
"""

import json
import os
from pathlib import Path
from typing import Any

from ttt_harness.errors import ConfigError
from ttt_harness.tune.fitting import Fold, Tried, line_of

NAME = "search.jsonl"


class SearchLog:
    """What is done in a folder, which is there.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._done: dict[str, Tried] = {}
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}; choose another --output_path.") from None
        self._line_is_whole = not text or text.endswith("\n")
        for line in text.splitlines():
            if (found := _read(line)) is not None:
                self._done[found[0]] = found[1]

    def __len__(self) -> int:
        return len(self._done)

    def get(self, key: str) -> Tried | None:
        """What came of the fit of this key; None where it is not done."""
        return self._done.get(key)

    def add(self, key: str, fold: Fold, name: str, tried: Tried) -> None:
        """Keep what came of a fit; it is on the disk when this returns.

        Raises:
            ConfigError: the file cannot be written.
        """
        line = ("" if self._line_is_whole else "\n") + line_of(key, fold, name, tried) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {error.strerror}; what is in it is kept, and the same command goes on "
                "from there."
            ) from None
        self._line_is_whole = True
        self._done[key] = tried


def _read(line: str) -> tuple[str, Tried] | None:
    """A line's key and what it says; None of one that a process did not write to its end."""
    try:
        said: Any = json.loads(line)
        return str(said["key"]), Tried.from_dict(said)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
