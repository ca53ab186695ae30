"""The fast way: how each architecture is built from torchtune's modules, and how weights come in and adapters go out.

`FAMILIES` has one row for each architecture, by the name that a checkpoint's `config.json` gives; what it can express
stands in `ttt_harness.training.shape.FAST`. A row is right when the trained logits are those of transformers + peft and
of vLLM, which tests/training/test_families.py and tests/integration/test_served_families.py ask of each family.

One decoder serves all of them. Rotary embeddings rotate neighbours, where transformers rotates halves, so the rows of q
and k are permuted when they come in (`_interleaved`), and those of q's lora_B when they go out (`_halves`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ttt_harness.training.layers.fused import (
    FusedAttention,
    FusedFeedForward,
    FusedRMSNorm,
    FusedRoPE,
    FusedScaledRoPE,
)
from ttt_harness.training.shape import FAST, ModelShape
from ttt_harness.training.tune import (
    Gemma2Attention,
    GemmaNormEmbeddings,
    GemmaRMSNorm,
    LoRALinear,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

# The projections that the published hyperparameters adapt, by torchtune's names; and the three of the MLP.
LORA_ATTENTION_MODULES = ("q_proj", "v_proj", "output_proj")

Weights = dict[str, Tensor]

# The hub's names within a layer, and the decoder's; "projections" are linear layers, the others are norms.
_PROJECTIONS = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
_NORMS = {
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
}
# Gemma 2 has two norms more, and gives one of Llama's names to another.
_GEMMA2_NORMS = {
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "sa_scale",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_scale",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
}
# Phi-3's fused projections, and the hub's usual names of their parts, in the order of their rows.
_FUSED_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Family:
    """What one architecture has of its own; the defaults are Llama's.

    norm: of a layer, made with its width and `eps`. embeddings: made with vocabulary and width. rope: made with `dim`,
    `max_seq_len` and `base`, and `scale_factor` where `scaled`. activation: of the MLP. qkv_bias, qk_norm: whether q, k
    and v have biases, and q and k norms. norms: the names of a layer's. fused: whether the hub has q, k, v and gate, up
    as one matrix each. capped: Gemma 2's attention and logits.
    """

    norm: Callable[..., nn.Module] = FusedRMSNorm
    embeddings: Callable[[int, int], nn.Module] = nn.Embedding
    activation: Callable[[], nn.Module] = nn.SiLU
    scaled: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norms: Mapping[str, str] = field(default_factory=lambda: _NORMS)
    fused: bool = False
    capped: bool = False

    def build(
        self, shape: ModelShape, *, max_seq_len: int, rank: int, alpha: float, dropout: float
    ) -> TransformerDecoder:
        """A torchtune decoder of `shape` with LoRA layers; `max_seq_len` tokens are the most that it can read."""

        def adapted(inputs: int, outputs: int, *, bias: bool = False) -> LoRALinear:
            return LoRALinear(inputs, outputs, rank=rank, alpha=alpha, dropout=dropout, use_bias=bias)

        q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        rope = self._rope(shape, max_seq_len)
        layers = nn.ModuleList()
        for window in shape.windows:
            projections = {
                "q_proj": adapted(shape.embed_dim, q_width, bias=self.qkv_bias),
                "k_proj": nn.Linear(shape.embed_dim, kv_width, bias=self.qkv_bias),
                "v_proj": adapted(shape.embed_dim, kv_width, bias=self.qkv_bias),
                "output_proj": adapted(q_width, shape.embed_dim),
            }
            mlp = FusedFeedForward(
                gate_proj=adapted(shape.embed_dim, shape.mlp_dim),
                down_proj=adapted(shape.mlp_dim, shape.embed_dim),
                up_proj=adapted(shape.embed_dim, shape.mlp_dim),
                activation=self.activation(),
            )
            norms = {name: self._norm(shape) for name in self.norms.values() if "." not in name}
            attention = self._attention(shape, window, rope, projections)
            layers.append(TransformerSelfAttentionLayer(attention, mlp, **norms))
        embeddings = self.embeddings(shape.vocab_size, shape.embed_dim)
        return TransformerDecoder(
            tok_embeddings=embeddings,
            layers=layers,
            max_seq_len=max_seq_len,
            num_heads=shape.num_heads,
            head_dim=shape.head_dim,
            norm=self._norm(shape),
            output=self._output(shape, embeddings),
        )

    def from_hf(self, weights: Weights, shape: ModelShape) -> Weights:
        """The hub's tensors under the decoder's names; a tensor whose name is unknown keeps it."""
        converted: Weights = {}
        for name, tensor in weights.items():
            if name.endswith("rotary_emb.inv_freq") or (shape.tied_embeddings and name == "lm_head.weight"):
                continue  # computed; or the tied matrix, stored twice
            converted.update(self._renamed(name, tensor, shape))
        return converted

    def to_peft(self, weights: Weights, shape: ModelShape) -> Weights:
        """The LoRA weights of the decoder under PEFT's names."""
        halves = {
            name: _halves(tensor, shape.num_heads) if name.endswith("attn.q_proj.lora_b.weight") else tensor
            for name, tensor in weights.items()
        }
        converted = {}
        for layer in range(shape.num_layers):
            adapters = {
                theirs: (halves[f"layers.{layer}.{ours}.lora_a.weight"], halves[f"layers.{layer}.{ours}.lora_b.weight"])
                for theirs, ours in _PROJECTIONS.items()
                if f"layers.{layer}.{ours}.lora_a.weight" in halves
            }
            if self.fused:
                adapters = _as_fused(adapters, shape)
            for theirs, (a, b) in adapters.items():
                converted[f"base_model.model.model.layers.{layer}.{theirs}.lora_A.weight"] = a
                converted[f"base_model.model.model.layers.{layer}.{theirs}.lora_B.weight"] = b
        return converted

    def _rope(self, shape: ModelShape, max_seq_len: int) -> nn.Module:
        settings: dict[str, Any] = {"dim": shape.head_dim, "max_seq_len": max_seq_len, "base": shape.rope_base}
        return FusedScaledRoPE(**settings, scale_factor=shape.rope_scale) if self.scaled else FusedRoPE(**settings)

    def _norm(self, shape: ModelShape) -> nn.Module:
        return self.norm(shape.embed_dim, eps=shape.norm_eps)

    def _attention(
        self, shape: ModelShape, window: int | None, rope: nn.Module, projections: Mapping[str, nn.Module]
    ) -> nn.Module:
        settings: dict[str, Any] = {
            **projections,
            "embed_dim": shape.embed_dim,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "pos_embeddings": rope,
        }
        if self.capped:
            return CappedAttention(
                **settings,
                sliding_window_size=window,
                softcapping=shape.score_cap,
                query_pre_attn_scalar=shape.query_scale,
            )
        if self.qk_norm:
            settings |= {name: FusedRMSNorm(shape.head_dim, eps=shape.norm_eps) for name in ("q_norm", "k_norm")}
        return FusedAttention(**settings, window=window)

    def _output(self, shape: ModelShape, embeddings: nn.Module) -> Any:
        if not shape.tied_embeddings:
            return nn.Linear(shape.embed_dim, shape.vocab_size, bias=False)
        return TiedLinear(embeddings) if shape.logit_cap is None else _CappedTiedLinear(embeddings, shape.logit_cap)

    def _renamed(self, name: str, tensor: Tensor, shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
        """One tensor of the hub's under the decoder's name, or its parts under theirs."""
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if inner is None:
            yield _OUTSIDE.get(name, name), tensor
            return
        layer, theirs, kind = inner.groups()
        parts = {theirs: tensor}
        if self.fused and theirs in _FUSED_PARTS:
            kv_width = shape.num_kv_heads * shape.head_dim
            widths = [shape.num_heads * shape.head_dim, kv_width, kv_width]
            rows = widths if theirs == "self_attn.qkv_proj" else [shape.mlp_dim] * 2
            parts = dict(zip(_FUSED_PARTS[theirs], tensor.split(rows), strict=True))
        for part, value in parts.items():
            if part in ("self_attn.q_proj", "self_attn.q_norm", "self_attn.k_proj", "self_attn.k_norm"):
                value = _interleaved(value, value.shape[0] // shape.head_dim)
            if part in self.norms:
                yield f"layers.{layer}.{self.norms[part]}.scale", value
            elif part in _PROJECTIONS:
                yield f"layers.{layer}.{_PROJECTIONS[part]}.{kind}", value
            else:
                yield name, value


class CappedAttention(Gemma2Attention):
    """Gemma 2's attention, which bounds the scores.

    They are computed as whole matrices, some six of them, which autograd would keep for every layer: they are computed
    again for the gradient.
    """

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """As torchtune's."""
        return checkpoint(super().forward, *args, use_reentrant=False, **options)


class _CappedTiedLinear(TiedLinear):
    """Logits bounded to (-cap, cap): cap * tanh(logits / cap)."""

    def __init__(self, tied_module: nn.Module, cap: float) -> None:
        super().__init__(tied_module)
        self.cap = cap

    def __call__(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().__call__(x) / self.cap)


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head, of which the first and the second half belong together, as pairs of neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Undo `_interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _as_fused(adapters: Mapping[str, tuple[Tensor, Tensor]], shape: ModelShape) -> dict[str, tuple[Tensor, Tensor]]:
    """One adapter for each fused matrix, which is the sum of its parts' own.

    The A matrices of the parts stand one below the other and their B matrices on a diagonal, so a fused matrix takes
    the ranks of its adapted parts together (q and v; gate and up). One file has one rank: the others end in zeros.
    """
    whole = {part for parts in _FUSED_PARTS.values() for part in parts}
    groups = {**_FUSED_PARTS, **{name: (name,) for name in adapters if name not in whole}}
    rank = next(iter(adapters.values()))[0].shape[0]
    fused = {}
    for theirs, parts in groups.items():
        a = torch.cat([adapters[part][0] for part in parts if part in adapters])
        k_rows = torch.zeros(shape.num_kv_heads * shape.head_dim, 0, dtype=a.dtype)  # not adapted: rows, no columns
        b = torch.block_diag(*(adapters[part][1] if part in adapters else k_rows.to(a.device) for part in parts))
        missing = FAST[shape.architecture].rank_factor * rank - a.shape[0]
        fused[theirs] = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    return fused


def _gelu() -> nn.Module:
    return nn.GELU(approximate="tanh")


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(scaled=True),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
    "GemmaForCausalLM": Family(norm=GemmaRMSNorm, embeddings=GemmaNormEmbeddings, activation=_gelu),
    "Gemma2ForCausalLM": Family(
        norm=GemmaRMSNorm, embeddings=GemmaNormEmbeddings, activation=_gelu, norms=_GEMMA2_NORMS, capped=True
    ),
    "Phi3ForCausalLM": Family(fused=True),
}
