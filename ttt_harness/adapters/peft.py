"""PEFT directories: the layout in which transformers + peft, and vLLM, read a LoRA adapter.

Tensors come and go under PEFT's own names (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`); turning
a trainer's names into those is the business of `ttt_harness.training.families`.

torch is imported where tensors are read or written, so that a store can be listed without it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def adapter_config(
    shapes: Mapping[str, tuple[int, ...]], *, base_model: str, rank: int, alpha: float, dropout: float
) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA adapter.

    Args:
        shapes: PEFT name -> shape; `lora_A` is [width, in], `lora_B` [out, width], of one width.
        base_model: name or path of the model that the adapter belongs to.
        rank: the rank of the fit. The width is larger where the base model fuses projections that were fitted each
            with its own matrices; the file then states the width as its rank, and the same alpha / rank.
        alpha: the update is scaled by alpha / rank.
        dropout: the dropout that the fit used; it has no effect on inference.
    """
    width = next((shape[0] for name, shape in shapes.items() if ".lora_A." in name), rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": width,
        "lora_alpha": alpha * width / rank,
        "lora_dropout": dropout,
        "target_modules": sorted({name.split(".")[-3] for name in shapes if name.count(".") >= 2}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def write_adapter(
    folder: Path, weights: Mapping[str, "Tensor"], *, base_model: str, rank: int, alpha: float, dropout: float
) -> None:
    """Write a LoRA adapter into the existing `folder`; for the arguments see `adapter_config`.

    Args:
        weights: PEFT name -> tensor.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = adapter_config(shapes, base_model=base_model, rank=rank, alpha=alpha, dropout=dropout)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    try:
        save_file({name: tensor.contiguous() for name, tensor in sorted(weights.items())}, folder / WEIGHTS_NAME)
    except SafetensorError as error:  # safetensors reports a full disk as an error of its own
        raise OSError(str(error)) from error
    # safetensors makes files for their owner alone; a store may be shared.
    (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)


def read_adapter(folder: Path) -> dict[str, "Tensor"]:
    """Read the tensors of a LoRA adapter: PEFT name -> tensor.

    Raises:
        OSError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise OSError(f"{WEIGHTS_NAME} is no safetensors file: {error}") from error


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a LoRA adapter, by their PEFT names; reads the header of the file alone.

    Raises:
        OSError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{WEIGHTS_NAME} is no safetensors file: {error}") from error


def first_not_finite(weights: Mapping[str, "Tensor"]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where there is none."""
    import torch

    # A sum shows infinities and NaN, and is several times as fast as looking at each value.
    suspects = ((name, tensor) for name, tensor in weights.items() if not tensor.sum(dtype=torch.float32).isfinite())
    return next((name for name, tensor in suspects if not tensor.isfinite().all()), None)
