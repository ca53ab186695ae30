"""What names an adapter: the hash of all that determines it, the base model's weights among that."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 2**24  # bytes of a base model's file that are hashed at a time
# Where the hub's cache keeps a model: .../models--<organisation>--<name>/snapshots/<revision>
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)/snapshots/[^/]+")


def adapter_key(determinants: Mapping[str, Any]) -> str:
    """The name of the adapter that `determinants` (JSON values) lead to: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(model_dir: Path) -> str:
    """A hash of a base model's config and weights, by content: 64 hexadecimal digits."""
    paths = sorted([model_dir / "config.json", *model_dir.glob("*.safetensors")])
    digest = hashlib.sha256()
    # Hashing runs outside Python's lock, and pieces keep all cores at it: few large files alone would not.
    with ThreadPoolExecutor() as hashers:
        for path in paths:
            digest.update(path.name.encode() + b"\0")
            name = path.resolve().name
            if len(name) == 64 and all(c in "0123456789abcdef" for c in name):
                digest.update(name.encode())  # the hub's cache names its files by their sha256
            else:
                for piece in hashers.map(_piece_hash, itertools.repeat(path), range(0, path.stat().st_size, PIECE)):
                    digest.update(piece)
    return digest.hexdigest()


def _piece_hash(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(PIECE)).digest()


def model_name(model_dir: str | Path) -> str:
    """What people call a model: its name on the hub where it has one or lies in the hub's cache, else its folder's."""
    path = str(model_dir).rstrip("/")
    if found := _SNAPSHOT.search(path):
        return f"{found[1]}/{found[2]}"
    return path if is_hub_name(path) else path.rpartition("/")[2]


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of the hub's, organisation/model, rather than of a path."""
    return re.fullmatch(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", name) is not None
