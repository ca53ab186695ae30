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

import copy
import functools
from collections.abc import Callable, Mapping
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
from transformers import (
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from ttt_harness.errors import ModelError

# The projections that the published hyperparameters adapt; the three of the MLP come with `apply_lora_to_mlp`.
LORA_ATTENTION_MODULES = ("q_proj", "v_proj", "output_proj")

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that building it takes. Widths are in elements, `context_length` in tokens.

    `windows` holds, for each layer, how many tokens a token attends to, itself included (None: all before it).
    `score_cap`, `logit_cap` and `query_scale` are Gemma 2's: the bounds of attention scores and logits (None: none),
    and the number whose inverse square root multiplies the queries (None: the width of a head).
    """

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
    rope_base: float
    rope_scale: float
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    score_cap: float | None = None
    logit_cap: float | None = None
    query_scale: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str) -> "ModelShape":
        """Read a `config.json` of transformers, of version 4 or 5.

        Raises:
            ModelError: the architecture, or a feature of it, is not supported.
        """
        named = config.get("architectures")
        architecture = str(named[0]) if isinstance(named, list) and named else "(none)"
        if architecture not in FAMILIES:
            raise ModelError(
                f"{where} has the architecture {architecture}, which is not supported for fitting; "
                f"supported: {', '.join(FAMILIES)} (method=icl runs any model that vLLM does)."
            )
        family = FAMILIES[architecture]
        try:
            # With what the file leaves out, and in version 5's form; transformers changes what it is given.
            given = family.config.from_dict(copy.deepcopy(dict(config))).to_dict()
        except Exception as error:  # of transformers' validators, whose messages end in the reason
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip().strip('".')
            raise ModelError(f"{where} has a config.json that transformers refuses ({reason}); correct it.") from None
        rope = given["rope_parameters"]
        rope_type = rope["rope_type"]
        activation = given.get("hidden_activation") or given.get("hidden_act")
        embed_dim, num_heads = given["hidden_size"], given["num_attention_heads"]
        head_dim = given.get("head_dim") or embed_dim // num_heads
        layer_types = given.get("layer_types") or ["sliding_attention"] * given["num_hidden_layers"]
        unsupported = {
            "attention_bias": given.get("attention_bias"),
            "mlp_bias": given.get("mlp_bias"),
            "use_bidirectional_attention": given.get("use_bidirectional_attention"),
            "quantized weights (quantization_config)": given.get("quantization_config"),
            f"hidden_act={activation}": activation != family.activation,
            f"rope_type={rope_type}": rope_type not in family.rope_types,
            f"partial_rotary_factor={rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1) != 1,
            f"head_dim={head_dim}": head_dim * num_heads != embed_dim and not family.any_head_dim,
            f"tie_word_embeddings={given['tie_word_embeddings']}": given["tie_word_embeddings"] not in family.tied,
            f"layer_types={sorted(set(layer_types))}": set(layer_types) - {"sliding_attention", "full_attention"},
            "RoPE frequency factors other than 1 and 4 over 8192 positions": rope_type == "llama3"
            and (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
            != (1, 4, 8192),
        }
        for feature, present in unsupported.items():
            if present:
                raise ModelError(f"{where} has {feature}, which torchtune's {architecture} layers do not support.")
        window = given.get("sliding_window")
        return cls(
            architecture=architecture,
            num_layers=given["num_hidden_layers"],
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=given["num_key_value_heads"],
            head_dim=head_dim,
            mlp_dim=given["intermediate_size"],
            vocab_size=given["vocab_size"],
            context_length=given["max_position_embeddings"],
            norm_eps=given["rms_norm_eps"],
            rope_base=rope["rope_theta"],
            rope_scale=rope["factor"] if rope_type == "llama3" else 1,
            tied_embeddings=given["tie_word_embeddings"],
            windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
            score_cap=given.get("attn_logit_softcapping"),
            logit_cap=given.get("final_logit_softcapping"),
            query_scale=given.get("query_pre_attn_scalar"),
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

    def activation_bytes_per_token(self, dtype: torch.dtype, *, on_gpu: bool) -> int:
        """About what autograd keeps of one token in a fit, of the compiled layers or of the fused ones.

        Of each layer some 10 tensors of the model's width (norms, q, k, v, dropped copies and masks), 7.5 where the
        copies are computed again for the gradient; and of the MLP's 3.5, or 2.5 where its product is. Measured with
        Llama-3.1-8B's geometry on a GPU: 4.2 to 4.5 MB where this says 4.26, and 4.6 to 5.0 for 4.92.
        """
        family = FAMILIES[self.architecture]
        compiled = on_gpu and family.compiled
        width = 7.5 if compiled else 10
        mlp = 2.5 if compiled or family.activation == "silu" else 3.5
        return int(self.num_layers * (width * self.embed_dim + mlp * self.mlp_dim) * dtype.itemsize)

    def adapter_rank(self, rank: int) -> int:
        """The rank under which an adapter that was fitted with `rank` is written."""
        return FAMILIES[self.architecture].rank_factor * rank


@dataclass(frozen=True)
class Family:
    """How one architecture is built and how its names are converted.

    `config` is transformers' class for its `config.json`. `build` makes a torchtune decoder with LoRA layers;
    `from_hf` turns the hub's weights into its; `to_peft` turns its LoRA weights into PEFT's, of `rank_factor` times the
    rank. The rest is what `build` can express: the activation, kinds of RoPE, whether embeddings may be `tied`, and
    heads whose widths do not add up to the model's. `compiled` says whether its layers are compiled for a GPU, which
    takes torchtune's own attention.
    """

    config: type[PreTrainedConfig]
    build: Callable[..., TransformerDecoder]
    from_hf: Callable[[Weights, ModelShape], Weights]
    to_peft: Callable[[Weights, ModelShape], Weights]
    activation: str = "silu"
    rope_types: tuple[str, ...] = ("default",)
    tied: tuple[bool, ...] = (False,)
    any_head_dim: bool = False
    rank_factor: int = 1
    compiled: bool = True


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
            missing = FAMILIES[shape.architecture].rank_factor * rank - a.shape[0]
            name = f"base_model.model.model.layers.{layer}.{theirs}"
            converted[f"{name}.lora_A.weight"] = functional.pad(a, (0, 0, 0, missing))
            converted[f"{name}.lora_B.weight"] = functional.pad(b, (0, missing))
    return converted


_GELU = "gelu_pytorch_tanh"
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        LlamaConfig, _build_llama, _llama_from_hf, _llama_to_peft, rope_types=("default", "llama3"), tied=(False, True)
    ),
    "MistralForCausalLM": Family(MistralConfig, _build_mistral, _llama_from_hf, _llama_to_peft),
    "Qwen2ForCausalLM": Family(Qwen2Config, _build_qwen2, _qwen2_from_hf, _qwen2_to_peft, tied=(False, True)),
    "GemmaForCausalLM": Family(
        GemmaConfig, _build_gemma, _llama_from_hf, _llama_to_peft, activation=_GELU, tied=(True,), any_head_dim=True
    ),
    "Gemma2ForCausalLM": Family(
        Gemma2Config,
        _build_gemma2,
        _gemma2_from_hf,
        _llama_to_peft,
        activation=_GELU,
        tied=(True,),
        any_head_dim=True,
        compiled=False,
    ),
    "Phi3ForCausalLM": Family(Phi3Config, _build_phi3, _phi3_from_hf, _phi3_to_peft, rank_factor=2),
}
