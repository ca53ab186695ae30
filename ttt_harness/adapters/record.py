"""The record of a fit (`ttt.json`), which names its adapter and covers all that is read of it.

`seal` makes a record: the adapter's key, the SHA-256 of each file beside it, and a digest of the record itself.
`check` reads a folder and says what is wrong with it. Records of older versions hold the weights' hash alone. What
can be checked of those adapters is checked in another way: the config must be the one that was written for these
weights and settings, and weights and losses must be finite. Whether a folder was given another key cannot be told.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ttt_harness.adapters.peft import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_config,
    first_not_finite,
    read_adapter,
    read_shapes,
)

RECORD_NAME = "ttt.json"
FILES = (CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME)
# A file of another name is a person's own, but for those that PEFT or vLLM may take for a part of the adapter.
_PARTS = (".safetensors", ".bin", ".pt")

_SEALED = {"key", "config_sha256", "digest"}  # what older versions did not state
_NUMBERS = ("train_sequences", "train_tokens", "fit_seconds")


class Damage(Exception):
    """What is wrong with an adapter's folder, as the end of a sentence about it."""


def seal(record: Mapping[str, Any], key: str, folder: Path) -> dict[str, Any]:
    """The record of the adapter named `key`, whose PEFT files are in `folder`."""
    sealed = {
        **record,
        "key": key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": file_hash(folder / WEIGHTS_NAME),  # the name of older versions
        "config_sha256": file_hash(folder / CONFIG_NAME),
    }
    return {**sealed, "digest": _digest(sealed)}


def check(folder: Path, key: str) -> dict[str, Any]:
    """The record in `folder`, if everything in there is the adapter named `key` as it was written.

    Raises:
        Damage: something is wrong with it.
    """
    if not os.path.isdir(folder):
        raise Damage("is a link to nothing" if os.path.islink(folder) else "is no folder")
    try:
        for name in os.listdir(folder):
            if name not in FILES and name.endswith(_PARTS):
                raise Damage(f"holds {name}, which no fit has written")
        record = read_record(folder)
        _check_types(record)
        if _SEALED & record.keys():
            _check_sealed(record, folder, key)
        else:
            _check_unsealed(record, folder)
    except OSError as error:
        name = Path(error.filename).name if error.filename else folder.name
        raise Damage(f"cannot be read ({name}: {error.strerror or error})") from error
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """The record in `folder`, unchecked.

    Raises:
        OSError: it is not there, or cannot be read.
        Damage: it is no JSON object.
    """
    return _read_object(folder / RECORD_NAME)


def read_config(folder: Path) -> dict[str, Any]:
    """The config in `folder`, unchecked; errors as of `read_record`."""
    return _read_object(folder / CONFIG_NAME)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise Damage(f"has a {path.name} that is not JSON") from None
    if not isinstance(said, dict):
        raise Damage(f"has a {path.name} that holds no JSON object")
    return said


def _check_types(record: Mapping[str, Any]) -> None:
    """Refuse values that no fit states; what an older version did not state may be missing."""
    wrong = [name for name in _NUMBERS if name in record and not _is_number(record[name])]
    losses = record.get("losses", [])
    if not isinstance(losses, list) or not all(map(_is_number, losses)):
        wrong.append("losses")
    if not isinstance(record.get("settings", {}), dict):
        wrong.append("settings")
    wrong += [name for name in ("task", "dtype") if not isinstance(record.get(name, ""), str)]
    if wrong:
        raise Damage(f"states {wrong[0]}={record[wrong[0]]!r:.60} in its {RECORD_NAME}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _check_sealed(record: Mapping[str, Any], folder: Path, key: str) -> None:
    if record.get("digest") != _digest({name: value for name, value in record.items() if name != "digest"}):
        raise Damage(f"has a {RECORD_NAME} that was changed")
    if record["key"] != key:
        raise Damage(f"holds another adapter, {record['key']}")
    for name, stated in ((CONFIG_NAME, "config_sha256"), (WEIGHTS_NAME, "sha256")):
        if file_hash(folder / name) != record[stated]:
            raise Damage(f"has a {name} that is damaged or was changed")


def _check_unsealed(record: Mapping[str, Any], folder: Path) -> None:
    config = read_config(folder)
    if record.get("sha256") != file_hash(folder / WEIGHTS_NAME):
        raise Damage(f"has a {WEIGHTS_NAME} that is damaged or was changed")
    shapes = read_shapes(folder)
    settings = record.get("settings", {})
    # Without settings only the config itself can say what it was written with.
    rank, alpha = settings.get("lora_rank", config.get("r")), settings.get("lora_alpha", config.get("lora_alpha"))
    if not all(_is_number(value) and value > 0 for value in (rank, alpha)):
        raise Damage(f"has a {CONFIG_NAME} that was changed")
    written = adapter_config(shapes, base_model="", rank=rank, alpha=alpha, dropout=0.0)
    for name, value in written.items():
        if name not in ("base_model_name_or_path", "lora_dropout") and config.get(name) != value:
            raise Damage(f"has a {CONFIG_NAME} that was changed ({name})")
    if (not_finite := first_not_finite(read_adapter(folder))) is not None:
        raise Damage(f"holds values that are not finite ({not_finite})")


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
