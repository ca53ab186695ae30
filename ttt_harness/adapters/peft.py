"""PEFT directories: the layout in which transformers + peft, and vLLM, read a LoRA adapter.

Tensors come and go under PEFT's own names (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`); turning
a trainer's names into those is the business of `ttt_harness.training.families`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def write_adapter(
    folder: Path, weights: Mapping[str, Tensor], *, base_model: str, rank: int, alpha: float, dropout: float
) -> None:
    """Write a LoRA adapter into the existing `folder`.

    Args:
        folder: an empty directory.
        weights: PEFT name -> tensor; `lora_A` of shape [width, in], `lora_B` of shape [out, width], of one width.
        base_model: name or path of the model that the adapter belongs to.
        rank: the rank of the fit. The width is larger where the base model fuses projections that were fitted each
            with its own matrices; the file then states the width as its rank, and the same alpha / rank.
        alpha: the update is scaled by alpha / rank.
        dropout: the dropout that the fit used; it has no effect on inference.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    width = next(tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": width,
        "lora_alpha": alpha * width / rank,
        "lora_dropout": dropout,
        "target_modules": sorted({name.split(".")[-3] for name in weights}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    try:
        save_file({name: tensor.contiguous() for name, tensor in sorted(weights.items())}, folder / WEIGHTS_NAME)
    except SafetensorError as error:  # safetensors reports a full disk as an error of its own
        raise OSError(str(error)) from error


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a LoRA adapter: PEFT name -> tensor.

    Raises:
        OSError, SafetensorError: the file is missing or damaged.
    """
    with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
