"""Model families: what can be fitted, how torchtune builds it, and how weights come in and adapters go out.

`FAMILIES` decides: one row for each architecture, by the name that a checkpoint's `config.json` gives. A row is right
when the trained logits are those of transformers + peft and of vLLM, which tests/training/test_families.py and
tests/integration/test_served_families.py ask of each family on the CPU:

| family                               | architecture       | of its own                                               |
|--------------------------------------|--------------------|----------------------------------------------------------|
| Llama 2, 3, 3.1, 3.2 and SmolLM2     | LlamaForCausalLM   | scaled RoPE (from 3.1), tied embeddings (3.2, SmolLM2)   |
| Mistral                              | MistralForCausalLM | sliding window                                           |
| Qwen2, Qwen2.5                       | Qwen2ForCausalLM   | biases in q, k, v; halves rotated, not pairs             |
| Gemma                                | GemmaForCausalLM   | scaled embeddings, GELU, heads of any width              |
| Gemma 2                              | Gemma2ForCausalLM  | four norms a layer, capped scores and logits, window     |
| Phi-3                                | Phi3ForCausalLM    | fused qkv and gate_up, sliding window                    |

Another family takes a row here and a row in the tests' table of checkpoints.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
from torchtune.models.gemma import lora_gemma
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2 import lora_gemma2
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.models.mistral import lora_mistral
from torchtune.models.phi3 import lora_phi3, phi3_hf_to_tune
from torchtune.models.qwen2 import lora_qwen2, qwen2_hf_to_tune
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from ttt_harness.training.shape import FAST, ModelShape

# The projections that the published hyperparameters adapt; the three of the MLP come with `apply_lora_to_mlp`.
LORA_ATTENTION_MODULES = ("q_proj", "v_proj", "output_proj")

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How one architecture is built and how its names are converted.

    `build` makes a torchtune decoder with LoRA layers, `from_hf` turns the hub's weights into its, and `to_peft` turns
    its LoRA weights into PEFT's. What `build` can express is in the row of `ttt_harness.training.shape.FAST`.
    """

    build: Callable[..., TransformerDecoder]
    from_hf: Callable[[Weights, ModelShape], Weights]
    to_peft: Callable[[Weights, ModelShape], Weights]


def _decoder(
    builder: Callable[..., TransformerDecoder],
    shape: ModelShape,
    *,
    max_seq_len: int,
    rank: int,
    alpha: float,
    dropout: float,
    **own: Any,
) -> TransformerDecoder:
    """What `builder`, one of torchtune's, makes of `shape` and of the arguments that only it takes."""
    model = builder(
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
        lora_rank=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        **own,
    )
    for layer, window in zip(model.layers, shape.windows, strict=True):
        # Most builders give each layer its own table of RoPE, as large as the context is long.
        layer.attn.pos_embeddings = model.layers[0].attn.pos_embeddings
        if window is not None and isinstance(layer.attn, MultiHeadAttention):
            layer.attn.__class__ = SlidingAttention  # torchtune's builders choose the class themselves
            layer.attn.window = window
    return model


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor | None:
    """True where a row's token attends to a column's, [tokens, tokens]: to the last `window` up to it.

    None where all tokens are within the window: causal attention is the same, and faster.
    """
    if tokens <= window:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


class SlidingAttention(MultiHeadAttention):
    """Self-attention of torchtune's that sees no further back than `window` tokens, the token itself included."""

    window: int

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Attend from each position of `x`, shape [batch, tokens, width], to the last `window` up to it."""
        if mask is None and (within := window_mask(x.shape[1], self.window, x.device)) is not None:
            mask = within[None]
        return super().forward(x, y, mask=mask, input_pos=input_pos)


def _build_llama(shape: ModelShape, **lora: Any) -> TransformerDecoder:
    # The builder of Llama 3.2 is the general one: any RoPE base, scaled or not, tied embeddings or not.
    return _decoder(
        lora_llama3_2, shape, **lora, scale_factor=shape.rope_scale, tie_word_embeddings=shape.tied_embeddings
    )


def _build_mistral(shape: ModelShape, **lora: Any) -> TransformerDecoder:
    return _decoder(lora_mistral, shape, **lora)


def _build_qwen2(shape: ModelShape, **lora: Any) -> TransformerDecoder:
    return _decoder(lora_qwen2, shape, **lora, tie_word_embeddings=shape.tied_embeddings)


def _build_gemma(shape: ModelShape, **lora: Any) -> TransformerDecoder:
    return _decoder(lora_gemma, shape, **lora, head_dim=shape.head_dim)


class _CappedTiedLinear(TiedLinear):
    """Logits bounded to (-cap, cap): cap * tanh(logits / cap)."""

    def __init__(self, tied_module: nn.Module, cap: float) -> None:
        super().__init__(tied_module)
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().__call__(x) / self.cap)


def _build_gemma2(shape: ModelShape, **lora: Any) -> TransformerDecoder:
    own: dict[str, Any] = {
        "head_dim": shape.head_dim,
        "hidden_capping_value": shape.score_cap,
        "query_pre_attn_scalar": shape.query_scale,
    }
    model = _decoder(lora_gemma2, shape, **lora, **own)
    for layer, window in zip(model.layers, shape.windows, strict=True):
        layer.attn.sliding_window_size = window
        # Capped scores are computed as whole matrices, some six of them, which autograd would keep for every layer.
        layer.attn.forward = functools.partial(checkpoint, layer.attn.forward, use_reentrant=False)
    # torchtune caps the last hidden state, where Gemma 2 caps the logits.
    model.norm = GemmaRMSNorm(shape.embed_dim, eps=shape.norm_eps)
    if shape.logit_cap is None:
        model.output = TiedLinear(model.tok_embeddings)
    else:
        model.output = _CappedTiedLinear(model.tok_embeddings, shape.logit_cap)
    return model


def _build_phi3(shape: ModelShape, **lora: Any) -> TransformerDecoder:
    return _decoder(lora_phi3, shape, **lora)


def _head_sizes(shape: ModelShape) -> dict[str, int]:
    """What torchtune's converters ask for to tell the heads in a matrix apart."""
    return {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "dim": shape.embed_dim,
        "head_dim": shape.head_dim,
    }


def _llama_from_hf(weights: Weights, shape: ModelShape) -> Weights:
    """Also permutes the rows of q and k: torchtune's RoPE rotates neighbours, transformers' rotates halves."""
    converted = hf_to_tune(
        weights,
        **_head_sizes(shape),
    )
    if shape.tied_embeddings:
        converted.pop("output.weight", None)  # some checkpoints store the tied matrix twice
    return converted


def _llama_to_peft(weights: Weights, shape: ModelShape) -> Weights:
    # Undoes, on the rows of q's lora_B, the permutation of `_llama_from_hf`.
    return tune_to_peft_adapter_weights(
        weights,
        **_head_sizes(shape),
    )


# torchtune's table takes the norm after the MLP for the one before it, and the other way round; the last norm has
# another name in the decoder that `_build_gemma2` makes.
_GEMMA2_RENAMES = {"mlp_norm": "mlp_scale", "mlp_scale": "mlp_norm", "rms_norm": ""}


def _gemma2_from_hf(weights: Weights, shape: ModelShape) -> Weights:
    converted = gemma2_hf_to_tune(
        weights,
        **_head_sizes(shape),
    )
    converted.pop("output.weight", None)
    renamed = {}
    for name, tensor in converted.items():
        parts = [_GEMMA2_RENAMES.get(part, part) for part in name.split(".")]
        renamed[".".join(filter(None, parts))] = tensor
    return renamed


def _qwen2_from_hf(weights: Weights, shape: ModelShape) -> Weights:
    return qwen2_hf_to_tune(weights, tie_word_embeddings=shape.tied_embeddings)


# torchtune's names of the adapted projections, and PEFT's.
_PEFT_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}


def _qwen2_to_peft(weights: Weights, shape: ModelShape) -> Weights:
    # torchtune's own conversion would permute q's rows, which those of Qwen2 are not.
    return {
        f"base_model.model.model.layers.{layer}.{theirs}.lora_{side.upper()}.weight": weights[
            f"layers.{layer}.{ours}.lora_{side}.weight"
        ]
        for layer in range(shape.num_layers)
        for ours, theirs in _PEFT_NAMES.items()
        for side in "ab"
    }


def _phi3_from_hf(weights: Weights, shape: ModelShape) -> Weights:
    return phi3_hf_to_tune(weights, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, dim=shape.embed_dim)


# PEFT's names of the projections, and torchtune's names of the parts of each, in the order of their rows.
_PHI3_PARTS = {
    "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "self_attn.o_proj": ("attn.output_proj",),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
    "mlp.down_proj": ("mlp.w2",),
}


def _phi3_to_peft(weights: Weights, shape: ModelShape) -> Weights:
    """One adapter for each fused matrix, which is the sum of its parts' own.

    The A matrices of the parts stand one below the other and their B matrices on a diagonal, so a fused matrix takes
    the ranks of its adapted parts together (q and v; gate and up). One file has one rank: the others end in zeros.
    """
    converted = {}
    k_rows = torch.zeros(shape.num_kv_heads * shape.head_dim, 0)  # not adapted: rows without columns
    for layer in range(shape.num_layers):
        for theirs, parts in _PHI3_PARTS.items():
            ours = [f"layers.{layer}.{part}" for part in parts]
            a = torch.cat([weights[f"{part}.lora_a.weight"] for part in ours if f"{part}.lora_a.weight" in weights])
            rank = weights[f"{ours[0]}.lora_a.weight"].shape[0]
            b = torch.block_diag(*(weights.get(f"{part}.lora_b.weight", k_rows.to(a.dtype)) for part in ours))
            missing = FAST[shape.architecture].rank_factor * rank - a.shape[0]
            name = f"base_model.model.model.layers.{layer}.{theirs}"
            converted[f"{name}.lora_A.weight"] = functional.pad(a, (0, 0, 0, missing))
            converted[f"{name}.lora_B.weight"] = functional.pad(b, (0, missing))
    return converted


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_build_llama, _llama_from_hf, _llama_to_peft),
    "MistralForCausalLM": Family(_build_mistral, _llama_from_hf, _llama_to_peft),
    "Qwen2ForCausalLM": Family(_build_qwen2, _qwen2_from_hf, _qwen2_to_peft),
    "GemmaForCausalLM": Family(_build_gemma, _llama_from_hf, _llama_to_peft),
    "Gemma2ForCausalLM": Family(_build_gemma2, _gemma2_from_hf, _llama_to_peft),
    "Phi3ForCausalLM": Family(_build_phi3, _phi3_from_hf, _phi3_to_peft),
}
