"""The general way: any causal model that transformers knows, with torchtune's LoRA layers in place of its linear ones.

transformers builds and loads the model (never with code from the checkpoint), and computes all of it but the adapted
linear layers: attention through torch's scaled_dot_product_attention, norms, position embeddings, what it does to
logits. `ADAPTED` says which linear layers are adapted, by the last part of their names. They keep those names, so an
adapter's tensors have PEFT's names from the start.

It is slower than the fast way, since each projection draws a dropout mask and passes over memory on its own, and it
is not compiled on a GPU.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging as transformers_logging

from ttt_harness.errors import ModelError
from ttt_harness.training.layers.fused import project
from ttt_harness.training.model_config import as_transformers_config, one_line, read_config
from ttt_harness.training.tune import LoRALinear, get_adapter_params, set_default_dtype, set_trainable_params

# The linear layers that are adapted, by the last part of their names in transformers' models: the queries', the
# values', attention's output, and the MLP's. A fused layer is adapted as a whole.
ADAPTED = {
    # attention: one layer each ...
    "q_proj": "queries",
    "v_proj": "values",
    "o_proj": "output of attention",
    "dense": "output of attention (Phi-1, Persimmon, GPT-NeoX)",
    "out_proj": "output of attention (OPT, BLOOM's kin)",
    # ... or fused
    "qkv_proj": "queries, keys and values",
    "query_key_value": "queries, keys and values (GPT-NeoX, Falcon)",
    "Wqkv": "queries, keys and values (MPT, DBRX)",
    # MLP: one layer each ...
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "fc1": "up (Phi-1, OPT)",
    "fc2": "down (Phi-1, OPT)",
    "c_fc": "up (StarCoder2)",
    "c_proj": "down (StarCoder2)",
    "dense_h_to_4h": "up (GPT-NeoX, Falcon)",
    "dense_4h_to_h": "down (GPT-NeoX, Falcon)",
    # ... or fused
    "gate_up_proj": "gate and up",
}
# The keys are not adapted, as in the published fits, and a router only chooses.
_NOT_MISSED = re.compile(r"(^|\.)(k_proj|router|gate)$")
# Below modules with these words in their names nothing is adapted: vLLM serves adapters of attention and dense MLPs.
_NOT_SERVED = ("expert", "linear_attn", "mamba", "mixer", "conv", "mtp")
# These see no text.
_NOT_TEXT = ("vision", "visual", "audio", "multi_modal")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.\d+\.(.+)$")


class AdaptedLinear(LoRALinear):
    """torchtune's linear layer with LoRA, around the weights of one that is there already."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        with torch.device("meta"), set_default_dtype(linear.weight.dtype):
            super().__init__(
                linear.in_features,
                linear.out_features,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                use_bias=linear.bias is not None,
            )
        self.weight, self.bias = linear.weight, linear.bias
        if linear.weight.device.type != "meta":
            self.to_empty(device=linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x`, shape [..., in]."""
        (out,) = project(x, [self], self.training)
        return out


class GeneralDecoder(nn.Module):
    """A transformers model with LoRA layers, as the trainer sees a decoder."""

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, dropout: float) -> None:
        """Replace the adapted linear layers of `model`, and freeze the rest."""
        super().__init__()
        for name, linear in list(adapted_layers(model)):
            parent, _, leaf = name.rpartition(".")
            adapted = AdaptedLinear(linear, rank=rank, alpha=alpha, dropout=dropout)
            setattr(model.get_submodule(parent), leaf, adapted)
        set_trainable_params(model, get_adapter_params(model))
        self.adapter: dict[str, nn.Parameter] = get_adapter_params(model)
        # What comes after the last hidden state (the output matrix, scales and caps of logits) is the model's own
        # forward, which is handed that state in place of the backbone that computes it.
        self.backbone: Any = model.base_model
        setattr(model, model.base_model_prefix, _GivenStates())
        self.head = model
        self._recomputes = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of the token ids [batch, tokens]."""
        return self._logits(self.states(tokens))

    def states(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        """The last hidden states, normalized, [batch, tokens, width]."""
        if recompute != self._recomputes:
            if recompute:
                self.backbone.gradient_checkpointing_enable()
            else:
                self.backbone.gradient_checkpointing_disable()
            self._recomputes = recompute
        # Padding stands on the right, where causal attention does not see it: a mask would only cost time.
        # Not `__call__`, which an engine in this process replaces in the classes that it serves through transformers.
        return self.backbone.forward(input_ids=tokens, use_cache=False).last_hidden_state

    def output(self, states: Tensor) -> Tensor:
        """Logits [positions, vocabulary] of hidden states [positions, width]."""
        return self._logits(states[None])[0]

    def _logits(self, states: Tensor) -> Tensor:
        return self.head(inputs_embeds=states, use_cache=False).logits


class _GivenStates(nn.Module):
    """Stands where a model's backbone was, and returns the states that it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> "_States":
        """Return `inputs_embeds` as the last hidden state."""
        return _States(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


class _States(BaseModelOutputWithPast):
    """The output of a backbone; fields that only some models have (of routers, of images) are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are adapted, by their names in `model`."""
    for name, module in model.named_modules():
        named = name.rpartition(".")[2] in ADAPTED and _LAYER.search(name)
        if type(module) is nn.Linear and named and not any(word in name for word in _NOT_SERVED + _NOT_TEXT):
            yield name, module


def left_out(model: nn.Module) -> tuple[str, ...]:
    """The names, within a layer, of matrices that are not adapted, although an adapter could change them."""
    adapted = {f"{name}.weight" for name, _ in adapted_layers(model)}
    names = set()
    for name, parameter in model.named_parameters():
        inner = _LAYER.search(name)
        if any(word in name for word in _NOT_TEXT):
            continue
        if inner and parameter.dim() > 1 and name not in adapted and "norm" not in name:
            short = re.sub(r"\.\d+(?=\.|$)", "", inner[1].removesuffix(".weight"))
            if not _NOT_MISSED.search(short):
                names.add(short)
    return tuple(sorted(names))


def numbers(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The fields of `ModelShape` for a model that is fitted the general way, from its `config.json`.

    The model is built without storage, which takes a second or two.

    Raises:
        ModelError: it cannot be fitted.
    """
    full = _checked_config(config, where)
    text = full.get_text_config()
    try:
        model = model_without_storage(full)
    except Exception as error:  # of a model's own code: sizes that do not fit together, kinds that it does not know
        raise ModelError(
            f"{where} has a config.json of which transformers can make no model ({one_line(error)}); correct it."
        ) from None
    adapted = [linear for _, linear in adapted_layers(model)]
    if not adapted:
        raise ModelError(
            f"{where} has no linear layers of the names that are adapted ({', '.join(ADAPTED)}); "
            "such a model can be served, but not fitted (method=icl)."
        )
    layers = {name.split(".layers.")[-1].split(".")[0] for name, _ in adapted_layers(model)}
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    return {
        "num_layers": getattr(text, "num_hidden_layers", len(layers)),
        "embed_dim": text.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "mlp_dim": _one_number(getattr(text, "intermediate_size", None)) or 4 * text.hidden_size,
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "tied_embeddings": bool(getattr(text, "tie_word_embeddings", False)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "adapted_widths": sum(linear.in_features + linear.out_features for linear in adapted),
        "left_out": left_out(model),
        "short_context": rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else None,
    }


def load_general_model(
    model_dir: Path,
    *,
    context: int,
    rank: int,
    alpha: float,
    dropout: float,
    dtype: torch.dtype,
    device: str,
) -> GeneralDecoder:
    """Load the model in `model_dir` with frozen base weights and trainable, uninitialised LoRA layers.

    Args:
        context: tokens that the engine's sequences may have, on which the position embeddings of some models depend.

    Raises:
        ModelError: a file is damaged, or its tensors are not those of the architecture.
    """
    config = _checked_config(read_config(model_dir), str(model_dir))
    _serve_as_vllm(config, context)
    try:
        with _quietly():
            load: Any = AutoModelForCausalLM.from_pretrained
            model, info = load(
                model_dir,
                config=config,
                dtype=dtype,
                attn_implementation=_attention(config),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, with their names
            )
    except Exception as error:  # of safetensors, torch and the model's own code
        raise ModelError(
            f"the tensors in {model_dir} cannot be loaded ({one_line(error)}); copy the model again."
        ) from None
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected or info["mismatched_keys"]:
        raise ModelError(
            f"the tensors in {model_dir} do not fit {config.architectures[0]}: missing {missing}, left over "
            f"{unexpected}, of another shape {[name for name, *_ in info['mismatched_keys']]}."
        )
    return GeneralDecoder(model.to(device), rank=rank, alpha=alpha, dropout=dropout)


def to_peft(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trainer's names of LoRA weights as PEFT's."""
    return {
        f"base_model.model.{name.replace('.lora_a.', '.lora_A.').replace('.lora_b.', '.lora_B.')}": tensor
        for name, tensor in weights.items()
    }


def _checked_config(config: Mapping[str, Any], where: str) -> Any:
    """The config object, without the dropouts of pretraining.

    Raises:
        ModelError: transformers has no causal model for it, or it lacks a number that is needed.
    """
    made = as_transformers_config(config, where=where)
    if type(made) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{where} has the architecture {config['architectures'][0]}, which is no causal language model of "
            "transformers; fit one that is (method=icl runs any model that vLLM does)."
        )
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)]
    names = [kind.__name__ for kind in (known if isinstance(known, tuple) else (known,))]
    if config["architectures"][0] not in names:  # vLLM would serve another model than the one that is fitted
        raise ModelError(
            f"{where} has the architecture {config['architectures'][0]}, but the causal language model of its "
            f"model_type={made.model_type} is {' or '.join(names)}; use a checkpoint of that."
        )
    text = made.get_text_config()
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
    if missing := [name for name in needed if not isinstance(getattr(text, name, None), int)]:
        raise ModelError(
            f"{where} has a config.json without {', '.join(missing)} (whole numbers); such a model can be served, but "
            "not fitted (method=icl)."
        )
    given = config.get("text_config") or config
    aliases = getattr(type(text), "attribute_map", {})
    sizes = ("hidden_size", "num_hidden_layers")
    if missing := [name for name in sizes if name not in given and aliases.get(name) not in given]:
        raise ModelError(f"{where} has a config.json without {', '.join(missing)}; copy the model again.")
    for part in {id(made): made, id(text): text}.values():
        for name, value in vars(part).items():
            if re.search("drop|jitter", name) and isinstance(value, int | float):
                setattr(part, name, type(value)(0))
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False
    return made


def _serve_as_vllm(config: Any, context: int) -> None:
    """Choose between LongRoPE's factors for short and for long sequences as vLLM does: by the longest there may be.

    transformers chooses by the sequence at hand
    (https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/rotary_embedding/phi3_long_rope_scaled_rope.py).
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        chosen = "long_factor" if context > rope["original_max_position_embeddings"] else "short_factor"
        rope["short_factor"] = rope["long_factor"] = rope[chosen]


def _attention(config: Any) -> str:
    # torch's kernel cannot bound the scores.
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def model_without_storage(config: Any) -> PreTrainedModel:
    """The model of a config on torch's meta device: names and shapes, but no weights."""
    with torch.device("meta"), _quietly():
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(config), dtype=torch.bfloat16, trust_remote_code=False
        )


def _one_number(value: Any) -> int | None:
    """A width; the largest one where each layer has its own."""
    return max(value) if isinstance(value, list | tuple) else value


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and remarks; this process may have others that show them."""
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
