"""Decoder layers on a GPU: torch.compile makes two functions of them, what comes before attention and what after.

A layer of torchtune's, or of `ttt_harness.training.layers.fused`, is some hundred calls from Python, which take longer
than the GPU needs for a thousand tokens, and each elementwise one is a pass over memory. Compiled, what lies between
two matmuls is one kernel, and all of it is two calls. Attention stays a call of its own, so that the number of
sequences, of which a fit has one at a time or five, occurs in no compiled function: those see tokens, of any number.

What is computed is what the fused layers compute: projections of one input share a dropout mask (another than there,
from the same random state), and the update is y += (alpha / r) B A dropout(x), as in Hu et al., arXiv 2106.09685.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn
from torch.nn import functional

from ttt_harness.training.tune import LoRALinear, TransformerDecoder, TransformerSelfAttentionLayer

# Settings of a model and an adapter that one process may fit with.
RECOMPILE_LIMIT = 64
# Padding would be decided by timing, with memory of its own: the same fit might come out otherwise.
_compile = functools.partial(torch.compile, options={"shape_padding": False})


class CompiledLayer(TransformerSelfAttentionLayer):
    """torchtune's layer with causal attention, without a cache, in training and for whole sequences."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """From the states of all tokens, [batch, tokens, width], the next ones."""
        batch, tokens, _width = x.shape
        # Nobody asks for the gradient of what enters the first layer; but without, that is another function to compile,
        # which costs more than that gradient does.
        x = x.flatten(0, 1) if x.requires_grad else x.flatten(0, 1).requires_grad_()
        positions = torch.arange(tokens, device=x.device).repeat(batch)
        q, k, v = (part.unflatten(0, (batch, tokens)) for part in _heads(self, *_any_number(x, positions)))
        attended = self.attn.attend(q, k, v).flatten(0, 1)
        return _after_attention(self, *_any_number(x, attended)).unflatten(0, (batch, tokens))


def compile_layers(model: TransformerDecoder) -> None:
    """Replace the layers of `model`, whose attention is `FusedAttention`, by compiled ones with the same parts."""
    for index, layer in enumerate(model.layers):
        parts = {name: getattr(layer, name) for name in ("attn", "mlp", "sa_norm", "mlp_norm", "sa_scale", "mlp_scale")}
        model.layers[index] = CompiledLayer(**parts).train(layer.training)


@contextmanager
def compiling() -> Iterator[None]:
    """What holds while something may be compiled.

    Elementwise results are computed again for the gradient, also those that matmuls take: a fifth less memory for each
    token. And as many models, ranks and dropouts as one process may fit with are compiled for; torch's limit is 8.
    """
    with (
        torch._functorch.config.patch(ban_recompute_materialized_backward=False),
        torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT),
    ):
        yield


def _any_number(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors`, of which the first dimension alone may change without compiling anew."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
        torch._dynamo.mark_static(tensor, list(range(1, tensor.dim())))
    return tensors


@_compile
def _heads(layer: TransformerSelfAttentionLayer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [tokens, heads, head_dim], of the states [tokens, width]."""
    attn = layer.attn
    outs = _linear([attn.q_proj, attn.k_proj, attn.v_proj], layer.sa_norm(x))
    q, k, v = (out.unflatten(-1, (-1, attn.head_dim)) for out in outs)
    q, k = (part[0] for part in attn.heads(q[None], k[None], input_pos=positions[None]))
    return q, k, v


@_compile
def _after_attention(layer: TransformerSelfAttentionLayer, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a layer, token by token: states and what attention made of them, [tokens, ...], to states."""
    mlp = layer.mlp
    (out,) = _linear([layer.attn.output_proj], attended)
    x = x + layer.sa_scale(out)
    normed = layer.mlp_norm(x)
    if mlp.w3 is None:
        hidden = mlp.activation(*_linear([mlp.w1], normed))
    else:
        gate, up = _linear([mlp.w1, mlp.w3], normed)
        hidden = mlp.activation(gate) * up
    (out,) = _linear([mlp.w2], hidden)
    return x + layer.mlp_scale(out)


def _linear(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """As `fused.project`, written out for the compiler, which finds the gradient and what to keep for it."""
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    if not adapted:
        return [layer(x) for layer in layers]
    first = adapted[0]
    dropped = first.dropout(x)
    low = dropped @ torch.cat([layer.lora_a.weight for layer in adapted]).T * (first.alpha / first.rank)
    lows = iter(low.split(first.rank, 1))
    outs = []
    for layer in layers:
        out = functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        outs.append(out + next(lows) @ layer.lora_b.weight.T if isinstance(layer, LoRALinear) else out)
    return outs
