"""Files that are written in one step."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a process that is killed leaves the old one or the new one.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
