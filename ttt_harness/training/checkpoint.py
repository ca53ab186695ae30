"""Loading a base model the fast way: from a checkpoint in the hub's layout to a torchtune model with LoRA layers.

How each architecture is built, and its names converted, is the business of `ttt_harness.training.families`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ttt_harness.errors import ModelError
from ttt_harness.training.families import FAMILIES
from ttt_harness.training.model_config import one_line
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.tune import (
    LoRALinear,
    TransformerDecoder,
    get_adapter_params,
    set_default_dtype,
    set_trainable_params,
)
from ttt_harness.training.weights import weight_files


def load_base_model(
    model_dir: Path, shape: ModelShape, *, rank: int, alpha: float, dropout: float, dtype: torch.dtype, device: str
) -> TransformerDecoder:
    """Build the torchtune decoder of `model_dir` with frozen base weights and trainable, uninitialised LoRA layers.

    Raises:
        ModelError: a file is damaged, or its tensors are not those of the architecture.
    """
    family = FAMILIES[shape.architecture]
    weights: dict[str, Tensor] = {}
    for path in weight_files(model_dir):
        try:
            weights.update(load_file(path, device=device))
        except Exception as error:  # safetensors raises several kinds
            raise ModelError(f"{path} is not a readable safetensors file ({error}); copy the model again.") from None
    # Built without storage and given the checkpoint's tensors, so that a large model never exists twice.
    with set_default_dtype(dtype), torch.device("meta"):
        model = family.build(shape, max_seq_len=shape.context_length, rank=rank, alpha=alpha, dropout=dropout)
    try:
        base = {name: tensor.to(dtype) for name, tensor in family.from_hf(weights, shape).items()}
        missing, unexpected = model.load_state_dict(base, strict=False, assign=True)
    except Exception as error:
        raise ModelError(
            f"the tensors in {model_dir} are not those of {shape.architecture} ({one_line(error)})."
        ) from None
    adapter = get_adapter_params(model)
    lost = [name for name in missing if name not in adapter]
    if lost or unexpected:
        raise ModelError(
            f"the tensors in {model_dir} do not fit {shape.architecture}: missing {lost}, left over {unexpected}."
        )
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.to_empty(device=device)
        rope_init = getattr(module, "rope_init", None)  # of torchtune's kinds of RoPE, which share no class
        if callable(rope_init):
            with torch.device(device):
                rope_init()
    set_trainable_params(model, get_adapter_params(model))
    return model
