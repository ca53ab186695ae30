"""The numbers of a base model, read from its `config.json`: what memory plans, adapters and builders ask for.

`ModelShape.from_config` also decides which way a model is fitted. `FAST` has a row for each architecture that is built
from torchtune's modules (`ttt_harness.training.families`); a model whose config asks for nothing else is fitted the
fast way. Every other model that transformers knows is fitted the general way (`ttt_harness.training.general`), or
refused in one sentence. Nothing here imports torchtune.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ttt_harness.errors import ModelError
from ttt_harness.training.model_config import completed_config

if TYPE_CHECKING:
    import torch

Way = Literal["fast", "general"]

_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class FastFamily:
    """What the torchtune modules of an architecture can express.

    model_type: transformers' name of its config. activation: of the MLP. rope_types: kinds of rotary embeddings.
    tied: whether the output matrix may be that of the embeddings. rank_factor: adapters are written with so many times
    the rank of the fit. compiled: whether the layers are compiled on a GPU.
    """

    model_type: str
    activation: str = "silu"
    rope_types: tuple[str, ...] = ("default",)
    tied: tuple[bool, ...] = (False,)
    rank_factor: int = 1
    compiled: bool = True


FAST: dict[str, FastFamily] = {
    "LlamaForCausalLM": FastFamily("llama", rope_types=("default", "llama3"), tied=(False, True)),
    "MistralForCausalLM": FastFamily("mistral"),
    "Qwen2ForCausalLM": FastFamily("qwen2", tied=(False, True)),
    "Qwen3ForCausalLM": FastFamily("qwen3", tied=(False, True)),
    "GemmaForCausalLM": FastFamily("gemma", activation=_GELU, tied=(True,)),
    "Gemma2ForCausalLM": FastFamily("gemma2", activation=_GELU, tied=(True,), compiled=False),
    "Phi3ForCausalLM": FastFamily("phi3", rank_factor=2),
}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder. Widths are in elements, `context_length` in tokens.

    The fast way builds a model from them:
        windows: for each layer, how many tokens a token attends to, itself included (None: all before it).
        score_cap, logit_cap, query_scale: Gemma 2's bounds of attention scores and logits (None: none), and the number
            whose inverse square root multiplies the queries (None: the width of a head).
    The general way builds a model from its config, and states what it found:
        parameters: weights of the base model.
        adapted_widths: inputs and outputs of all adapted linear layers, added up.
        left_out: the names of layers that are not adapted, although they are matmuls.
        short_context: where position embeddings have one form for engines whose sequences have at most so many tokens,
            and another for others (LongRoPE); else None.
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
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_scale: float = 1.0
    tied_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    score_cap: float | None = None
    logit_cap: float | None = None
    query_scale: float | None = None
    way: Way = "fast"
    parameters: int | None = None
    adapted_widths: int | None = None
    left_out: tuple[str, ...] = ()
    short_context: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str) -> "ModelShape":
        """Read a `config.json` of transformers, of version 4 or 5.

        Args:
            config: its content.
            where: the model, for messages.

        Raises:
            ModelError: the model cannot be fitted; the message says why.
        """
        architecture = _architecture(config, where)
        family = FAST.get(architecture)
        given = completed_config(config, where=where, model_type=family.model_type if family else None)
        if family is not None and not _beyond(family, given):
            return _fast_shape(cls, architecture, given)
        from ttt_harness.training import general  # imports torch and the model's code

        return cls(architecture=architecture, way="general", **general.numbers(config, where=where))

    @property
    def base_parameters(self) -> int:
        """Weights of the base model, without the norms' where it is fitted the fast way."""
        if self.parameters is not None:
            return self.parameters
        attention = 2 * self.embed_dim * self.head_dim * (self.num_heads + self.num_kv_heads)
        embeddings = self.vocab_size * self.embed_dim * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + 3 * self.embed_dim * self.mlp_dim) + embeddings

    def adapter_parameters(self, rank: int) -> int:
        """Weights of an adapter: of q, v and the output projection, and of the three of the MLP."""
        if self.adapted_widths is not None:
            return rank * self.adapted_widths
        q, kv = self.head_dim * self.num_heads, self.head_dim * self.num_kv_heads
        widths = 2 * (self.embed_dim + q) + (self.embed_dim + kv) + 3 * (self.embed_dim + self.mlp_dim)
        return self.num_layers * rank * widths

    def activation_bytes_per_token(self, dtype: "torch.dtype", *, on_gpu: bool) -> int:
        """About what autograd keeps of one token in a fit.

        Of each layer that is fitted the fast way some 10 tensors of the model's width (norms, q, k, v, dropped copies
        and masks), 7.5 where it is compiled and the copies are computed again for the gradient; and of the MLP's 3.5,
        or 2.5 where its product is computed again. Measured with Llama-3.1-8B's geometry on a GPU: 4.2 to 4.5 MB where
        this says 4.26, and 4.6 to 5.0 for 4.92. transformers' layers keep more; see tests/training/test_general.py.
        """
        if self.way == "general":
            width, mlp = 20.0, 5.0
        else:
            family = FAST[self.architecture]
            compiled = on_gpu and family.compiled
            width = 7.5 if compiled else 10
            mlp = 2.5 if compiled or family.activation == "silu" else 3.5
        return int(self.num_layers * (width * self.embed_dim + mlp * self.mlp_dim) * dtype.itemsize)

    def adapter_rank(self, rank: int) -> int:
        """The rank under which an adapter that was fitted with `rank` is written."""
        return FAST[self.architecture].rank_factor * rank if self.way == "fast" else rank

    def determinants(self, context: int) -> dict[str, Any]:
        """What an adapter depends on besides its settings, where the engine's sequences have up to `context` tokens."""
        return {} if self.short_context is None else {"long_context": context > self.short_context}

    def check_tokens(self, tokens: Iterable[int], *, what: str) -> None:
        """Check that the model has an embedding for each of `tokens`.

        Raises:
            ModelError: it has not; `what` names what the tokens are of.
        """
        largest = max(tokens, default=0)
        if largest >= self.vocab_size:
            raise ModelError(
                f"{what} has the token {largest}, but the model's embeddings hold {self.vocab_size} (0 to "
                f"{self.vocab_size - 1}); use the tokenizer that belongs to the model, or resize its embeddings."
            )


# Without these transformers takes its defaults, those of one model of the family.
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def _architecture(config: Mapping[str, Any], where: str) -> str:
    """The architecture's name, after checks that need nothing else.

    Raises:
        ModelError: it cannot be fitted, whatever the rest of the config says.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise ModelError(
            f'{where} has a config.json without "architectures", so nobody can tell what the model is; copy the model '
            "again, or add the name of its class in transformers."
        )
    if key := next((key for key in ("quantization_config", "compression_config") if config.get(key)), None):
        raise ModelError(
            f"{where} has quantized weights ({key}), which can be served but not fitted; use the model "
            "that it was made from, or method=icl."
        )
    if named[0] in FAST:
        missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
        if missing := [name for name in missing if config.get(name) is None]:
            raise ModelError(f"{where} has a config.json without {', '.join(missing)}; copy the model again.")
    return named[0]


def _beyond(family: FastFamily, given: Mapping[str, Any]) -> list[str]:
    """What a completed config asks for that the fast way does not have."""
    rope = given.get("rope_parameters") or {}
    rope_type = rope.get("rope_type")
    activation = given.get("hidden_activation") or given.get("hidden_act")
    layer_types = given.get("layer_types") or []
    features = {
        "attention_bias": given.get("attention_bias"),
        "mlp_bias": given.get("mlp_bias"),
        "use_bidirectional_attention": given.get("use_bidirectional_attention"),
        f"hidden_act={activation}": activation != family.activation,
        f"rope_type={rope_type}": rope_type not in family.rope_types,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
        "hidden_size": given["hidden_size"] % given["num_attention_heads"],  # torchtune's attention asks for that
        "tie_word_embeddings": given["tie_word_embeddings"] not in family.tied,
        "layer_types": set(layer_types) - {"sliding_attention", "full_attention"},
        "RoPE frequency factors other than 1 and 4 over 8192 positions": rope_type == "llama3"
        and (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])
        != (1, 4, 8192),
    }
    return [name for name, present in features.items() if present]


def _head_dim(given: Mapping[str, Any]) -> int:
    return given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]


def _fast_shape(make: Callable[..., ModelShape], architecture: str, given: Mapping[str, Any]) -> ModelShape:
    rope, window = given["rope_parameters"], given.get("sliding_window")
    layer_types = given.get("layer_types") or ["sliding_attention"] * given["num_hidden_layers"]
    return make(
        architecture=architecture,
        num_layers=given["num_hidden_layers"],
        embed_dim=given["hidden_size"],
        num_heads=given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        head_dim=_head_dim(given),
        mlp_dim=given["intermediate_size"],
        vocab_size=given["vocab_size"],
        context_length=given["max_position_embeddings"],
        norm_eps=given["rms_norm_eps"],
        rope_base=rope["rope_theta"],
        rope_scale=rope["factor"] if rope["rope_type"] == "llama3" else 1,
        tied_embeddings=given["tie_word_embeddings"],
        windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        score_cap=given.get("attn_logit_softcapping"),
        logit_cap=given.get("final_logit_softcapping"),
        query_scale=given.get("query_pre_attn_scalar"),
    )
