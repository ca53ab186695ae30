"""The `config.json` of a model in the hub's layout: read from its directory, and as transformers completes it.

Importing this module imports neither torch nor transformers.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_harness.errors import ModelError


def read_config(model_dir: Path) -> dict[str, Any]:
    """Read the `config.json` of a model directory.

    Raises:
        ModelError: the directory, its config or its safetensors files are missing or damaged.
    """
    if not model_dir.is_dir():
        raise ModelError(
            f"pretrained={model_dir}: there is no such directory; "
            "give a local model directory, a name on the hub, or embedded."
        )
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"pretrained={model_dir} has no config.json; a model directory in the hub's layout is needed."
        ) from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); copy the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is a JSON {type(config).__name__}, where an object is needed; copy the model again.")
    if not any(model_dir.glob("*.safetensors")):
        pickled = next((file.name for kind in ("*.bin", "*.pt", "*.pth") for file in model_dir.glob(kind)), None)
        raise ModelError(
            f"pretrained={model_dir} has no *.safetensors file, and only those are read"
            f"{f' ({pickled} is a pickle, which may run any code)' if pickled else ''}; save the model with "
            "transformers' save_pretrained."
        )
    return config


def completed_config(config: Mapping[str, Any], *, where: str, model_type: str | None = None) -> dict[str, Any]:
    """`config` with what it leaves out, and in the form of transformers' version 5.

    Raises:
        ModelError: transformers refuses it.
    """
    return as_transformers_config(config, where=where, model_type=model_type).to_dict()


def as_transformers_config(config: Mapping[str, Any], *, where: str, model_type: str | None = None) -> Any:
    """The transformers config object of a `config.json`, of `model_type` where that is known.

    Raises:
        ModelError: transformers does not know its model type, or refuses a value.
    """
    from transformers import CONFIG_MAPPING  # takes seconds, and torch

    model_type = model_type or config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        asks_for_code = " and asks for code of its own (auto_map), which is never run" if "auto_map" in config else ""
        raise ModelError(
            f"{where} has a config.json with model_type={model_type!r}, which this version of transformers does not "
            f"know{asks_for_code}; use a model that it knows, or a newer transformers."
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))  # transformers changes what it gets
    except Exception as error:  # of transformers' validators, whose messages end in the reason
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip().strip('".')
        raise ModelError(f"{where} has a config.json that transformers refuses ({reason}); correct it.") from None


def one_line(error: Exception) -> str:
    """The beginning of an exception's message, on one line."""
    words = " ".join(str(error).split()) or type(error).__name__
    return (words if len(words) <= 300 else f"{words[:300]} ...").rstrip(".")
