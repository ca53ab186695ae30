"""Base models: from a checkpoint in the hub's layout to a torchtune model with LoRA layers, and back to PEFT names.

`FAMILIES` decides what is supported: one row for each architecture. `ModelShape.from_config` reads `config.json` and
refuses what torchtune's modules cannot express, before any weight is read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params
from torchtune.training import set_default_dtype

from ttt_harness.errors import ModelError

# The projections that the published hyperparameters adapt; the three of the MLP come with `apply_lora_to_mlp`.
LORA_ATTENTION_MODULES = ("q_proj", "v_proj", "output_proj")


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that building it takes. Widths are in elements, `context_length` in tokens."""

    architecture: str
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_base: int
    rope_scale: int
    tied_embeddings: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str) -> "ModelShape":
        """Read a `config.json` of transformers, of version 4 or 5.

        Raises:
            ModelError: the architecture, or a feature of it, is not supported.
        """
        architecture = (config.get("architectures") or ["(none)"])[0]
        if architecture not in FAMILIES:
            raise ModelError(
                f"{where} has the architecture {architecture}, which is not supported for fitting; "
                f"supported: {', '.join(FAMILIES)} (method=icl runs any model that vLLM does)."
            )
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        embed_dim, num_heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or embed_dim // num_heads
        unsupported = {
            "attention_bias": bool(config.get("attention_bias")),
            "mlp_bias": bool(config.get("mlp_bias")),
            f"hidden_act={config.get('hidden_act')}": config.get("hidden_act") != "silu",
            f"rope_type={rope_type}": rope_type not in ("default", "llama3"),
            f"head_dim={head_dim}": head_dim * num_heads != embed_dim,
            "RoPE frequency factors other than 1 and 4 over 8192 positions": rope_type == "llama3"
            and (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
            != (1, 4, 8192),
        }
        for feature, present in unsupported.items():
            if present:
                raise ModelError(f"{where} has {feature}, which torchtune's {architecture} layers do not support.")
        return cls(
            architecture=architecture,
            num_layers=config["num_hidden_layers"],
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            mlp_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            context_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_base=int(rope.get("rope_theta") or config.get("rope_theta") or 10000),
            rope_scale=int(rope["factor"]) if rope_type == "llama3" else 1,
            tied_embeddings=bool(config.get("tie_word_embeddings")),
        )

    @property
    def base_parameters(self) -> int:
        """Weights of the base model, without the norms'."""
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + 3 * self.embed_dim * self.mlp_dim) + embeddings

    def adapter_parameters(self, rank: int) -> int:
        """Weights of an adapter: of q, v and the output projection, and of the three of the MLP."""
        q, kv = self.head_dim * self.num_heads, self.head_dim * self.num_kv_heads
        widths = 2 * (self.embed_dim + q) + (self.embed_dim + kv) + 3 * (self.embed_dim + self.mlp_dim)
        return self.num_layers * rank * widths

    def activation_bytes_per_token(self, dtype: torch.dtype) -> int:
        """About what autograd keeps of one token in a fit, of the fused layers.

        Of each layer some 11 tensors of the model's width (norms, q, k, v, dropped copies and masks) and 4 of the
        MLP's.
        """
        return self.num_layers * (11 * self.embed_dim + 4 * self.mlp_dim) * dtype.itemsize


@dataclass(frozen=True)
class Family:
    """How one architecture is built and how its names are converted.

    `build` makes a torchtune decoder with LoRA layers; `from_hf` turns the hub's weights into its; `to_peft` turns
    its LoRA weights into PEFT's.
    """

    build: Callable[..., TransformerDecoder]
    from_hf: Callable[[dict[str, Tensor], ModelShape], dict[str, Tensor]]
    to_peft: Callable[[dict[str, Tensor], ModelShape], dict[str, Tensor]]


def _build_llama(shape: ModelShape, *, max_seq_len: int, rank: int, alpha: float, dropout: float) -> TransformerDecoder:
    # The builder of Llama 3.2 is the general one: any RoPE base, scaled or not, tied embeddings or not.
    return lora_llama3_2(
        lora_attn_modules=list(LORA_ATTENTION_MODULES),
        apply_lora_to_mlp=True,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        embed_dim=shape.embed_dim,
        intermediate_dim=shape.mlp_dim,
        max_seq_len=max_seq_len,
        norm_eps=shape.norm_eps,
        rope_base=shape.rope_base,
        scale_factor=shape.rope_scale,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        tie_word_embeddings=shape.tied_embeddings,
    )


def _llama_from_hf(weights: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    converted = hf_to_tune(
        weights,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        dim=shape.embed_dim,
        head_dim=shape.head_dim,
    )
    if shape.tied_embeddings:
        converted.pop("output.weight", None)  # some checkpoints store the tied matrix twice
    return converted


def _llama_to_peft(weights: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    # Undoes, on the rows of q's lora_B, the permutation that hf_to_tune applied to q.
    return tune_to_peft_adapter_weights(
        weights,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        dim=shape.embed_dim,
        head_dim=shape.head_dim,
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_build_llama, _llama_from_hf, _llama_to_peft),
}


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
    try:
        config = json.loads((model_dir / "config.json").read_text())
    except OSError:
        raise ModelError(
            f"pretrained={model_dir} has no config.json; a model directory in the hub's layout is needed."
        ) from None
    except ValueError as error:
        raise ModelError(f"{model_dir / 'config.json'} is not JSON ({error}); copy the model again.") from None
    if not any(model_dir.glob("*.safetensors")):
        raise ModelError(
            f"pretrained={model_dir} has no *.safetensors file, and only those are read; "
            "save the model with transformers' save_pretrained."
        )
    return config


def load_base_model(
    model_dir: Path, shape: ModelShape, *, rank: int, alpha: float, dropout: float, dtype: torch.dtype, device: str
) -> TransformerDecoder:
    """Build the torchtune decoder of `model_dir` with frozen base weights and trainable, uninitialised LoRA layers.

    Raises:
        ModelError: a file is damaged, or its tensors are not those of the architecture.
    """
    family = FAMILIES[shape.architecture]
    weights: dict[str, Tensor] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
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
        raise ModelError(f"the tensors in {model_dir} are not those of {shape.architecture} ({error}).") from None
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
