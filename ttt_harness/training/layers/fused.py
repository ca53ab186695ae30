"""torchtune's decoder layers, computed in fewer passes over memory.

torchtune computes every adapted projection on its own: it copies the input with dropout, multiplies twice by small
matrices, scales, and adds, and autograd does the same again backwards. In the subclasses of this module projections of
one input (q, k and v; gate and up) share one dropout mask and one product with their stacked A matrices, and the matmul
that computes an update adds it. Norms and rotary embeddings have a shorter forward too. Parameters and their names are
torchtune's.

The update is y += (alpha / r) B A dropout(x), as in Hu et al., arXiv 2106.09685. The mask is shared by the projections
of one input, where torchtune draws one for each; without dropout the results are equal but for rounding.

This is what a CPU computes with. On a GPU layers are compiled instead (`ttt_harness.training.layers.compiled`), but
for the last one, which sees labelled positions only, and those of a family that has an attention of its own.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttt_harness.training.layers.attention import causal_attention, window_mask
from ttt_harness.training.layers.dropout import dropout_gradient, dropout_with_mask
from ttt_harness.training.tune import (
    FeedForward,
    Llama3ScaledRoPE,
    LoRALinear,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
)


class FusedRMSNorm(RMSNorm):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467), in float32, with frozen scales."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x`."""
        # torch 2.11 compiles a wrong gradient of the function for CPUs: it changes its own tensors.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x, self.scale, self.eps)
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.scale).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number for each token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, inverse)
        return (wide * inverse).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale, inverse = ctx.saved_tensors
        gradient, wide = gradients[0].to(torch.float32, copy=True).mul_(scale), x.float()
        along = (gradient * wide).mean(-1, keepdim=True).mul_(inverse**3)
        return gradient.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), None, None


class _Rotation(nn.Module):
    """Rotary position embeddings (Su et al., arXiv 2104.09864) from torchtune's table of cosines and sines."""

    cache: Tensor

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Turn each pair of neighbours of `x`, shape [batch, tokens, heads, head_dim], by its angle."""
        if input_pos is not None:
            return super().forward(x, input_pos=input_pos)  # torchtune's
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        turns = torch.view_as_complex(self.cache[: x.shape[1]].unsqueeze(1))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


class FusedRoPE(_Rotation, RotaryPositionalEmbeddings):
    """With the frequencies of Su et al."""


class FusedScaledRoPE(_Rotation, Llama3ScaledRoPE):
    """With the frequencies of Llama 3.1."""


class FusedAttention(MultiHeadAttention):
    """Causal self-attention of torchtune's, without a cache, in training and for whole sequences.

    `window` is the number of tokens that a token attends to, itself included (None: all before it). Norms of queries
    and keys come before the rotation, as in Qwen3; torchtune's own come after it.
    """

    def __init__(self, *, window: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.window = window

    def heads(self, q: Tensor, k: Tensor, *, input_pos: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalize and rotate queries and keys, each [batch, tokens, heads, head_dim]."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.pos_embeddings is not None:
            q, k = (self.pos_embeddings(part, input_pos=input_pos) for part in (q, k))
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the values of the tokens that each token attends to add up to, [batch, tokens, width].

        q, k, v: [batch, tokens, heads, head_dim].
        """
        mask = None if self.window is None else window_mask(q.shape[1], self.window, q.device)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return causal_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend from each position of `x`, shape [batch, tokens, width], to it and those before."""
        outs = project(x, [self.q_proj, self.k_proj, self.v_proj], self.training)
        q, k, v = (out.unflatten(-1, (-1, self.head_dim)) for out in outs)
        (out,) = project(self.attend(*self.heads(q, k), v), [self.output_proj], self.training)
        return out


class FusedFeedForward(FeedForward):
    """torchtune's MLP, gated or not."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x`, shape [..., width]."""
        if self.w3 is None:
            (hidden,) = project(x, [self.w1], self.training)
            hidden = self.activation(hidden)
        else:
            gate, up = project(x, [self.w1, self.w3], self.training)
            if isinstance(self.activation, nn.SiLU) and isinstance(self.w2, LoRALinear):
                return project_gated(gate, up, self.w2, self.training)
            hidden = self.activation(gate) * up
        (out,) = project(hidden, [self.w2], self.training)
        return out


def project(x: Tensor, layers: Sequence[nn.Module], training: bool) -> tuple[Tensor, ...]:
    """Apply linear layers, some of them with LoRA, to one input.

    Args:
        x: [..., in].
        layers: `torch.nn.Linear` with frozen weights, or torchtune's `LoRALinear`; those with LoRA have one rank,
            alpha and dropout.
        training: whether to drop out.

    Returns:
        For each layer its output, [..., out].
    """
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    if not adapted:
        return tuple(layer(x) for layer in layers)
    frozen = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
    trained = [tensor for layer in adapted for tensor in (layer.lora_a.weight, layer.lora_b.weight)]
    outs = _Project.apply(
        x.reshape(-1, x.shape[-1]),
        _dropout(adapted[0], training),
        adapted[0].alpha / adapted[0].rank,
        tuple(isinstance(layer, LoRALinear) for layer in layers),
        *frozen,
        *trained,
    )
    return tuple(out.view(*x.shape[:-1], -1) for out in outs)


def project_gated(gate: Tensor, up: Tensor, layer: LoRALinear, training: bool) -> Tensor:
    """Apply a layer with LoRA to silu(gate) * up; that product is not kept for the gradient, but computed again.

    Args:
        gate, up: [..., in].
        layer: torchtune's `LoRALinear`.
        training: whether to drop out.

    Returns:
        [..., out].
    """
    out = _ProjectGated.apply(
        gate.reshape(-1, gate.shape[-1]),
        up.reshape(-1, up.shape[-1]),
        _dropout(layer, training),
        layer.alpha / layer.rank,
        layer.weight,
        layer.bias,
        layer.lora_a.weight,
        layer.lora_b.weight,
    )
    return out.view(*gate.shape[:-1], -1)


def _dropout(layer: LoRALinear, training: bool) -> float:
    return getattr(layer.dropout, "p", 0.0) if training else 0.0


class _Project(torch.autograd.Function):
    """Linear layers with LoRA on one input [tokens, in]; gradients for the input and the LoRA weights only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, p: float, scale: float, adapted: tuple[bool, ...], *weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        frozen, trained = weights[: 2 * len(adapted)], weights[2 * len(adapted) :]
        a, b = torch.cat(trained[0::2]), trained[1::2]  # type: ignore[arg-type]
        dropped, mask, gain = dropout_with_mask(x, p)
        scale *= gain
        low = (dropped @ a.T).view(len(x), len(b), -1)  # [tokens, adapted layers, rank]
        outs, index = [], 0
        for has_lora, weight, bias in zip(adapted, frozen[0::2], frozen[1::2], strict=True):
            out = functional.linear(x, weight, bias)  # type: ignore[arg-type]
            if has_lora:
                out.addmm_(low[:, index], b[index].T, alpha=scale)  # type: ignore[union-attr]
                index += 1
            outs.append(out)
        ctx.save_for_backward(dropped, mask, low, a, *frozen[0::2], *b)
        ctx.p, ctx.scale, ctx.adapted = p, scale, adapted
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, low, a, *rest = ctx.saved_tensors
        weights, b = rest[: len(ctx.adapted)], rest[len(ctx.adapted) :]
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        d_low: list[Tensor] = []
        d_b: list[Tensor] = []
        for gradient in itertools.compress(gradients, ctx.adapted):
            index = len(d_b)
            d_low.append(torch.addmm(low[:1, index], gradient, b[index], beta=0, alpha=ctx.scale))
            d_b.append((gradient.T @ low[:, index]).mul_(ctx.scale))
        flat = torch.cat(d_low, 1) if len(d_low) > 1 else d_low[0]
        d_a = (flat.T @ dropped).chunk(len(b))
        dx = None
        if ctx.needs_input_grad[0]:  # not before the first layer
            dx = dropout_gradient(flat @ a, mask, ctx.p)
            for gradient, weight in zip(gradients, weights, strict=True):
                dx.addmm_(gradient, weight)
        trained = [gradient for pair in zip(d_a, d_b, strict=True) for gradient in pair]
        return dx, None, None, None, *([None] * 2 * len(ctx.adapted)), *trained


class _ProjectGated(torch.autograd.Function):
    """The same for one layer on silu(gate) * up, which is computed again for the gradient rather than kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        p: float,
        scale: float,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        hidden = _gated(gate, up)
        dropped, mask, gain = dropout_with_mask(hidden, p)
        low = dropped @ a.T
        ctx.save_for_backward(gate, up, mask, low, weight, a, b)
        ctx.p, ctx.scale = p, scale * gain
        return functional.linear(hidden, weight, bias).addmm_(low, b.T, alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, mask, low, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        d_low = torch.addmm(low[:1], gradient, b, beta=0, alpha=ctx.scale)
        d_b = (gradient.T @ low).mul_(ctx.scale)
        d_a = d_low.T @ dropout_gradient(_gated(gate, up), mask, ctx.p)  # which also drops with a mask that is there
        d_hidden = dropout_gradient(d_low @ a, mask, ctx.p)
        d_gate, d_up = _gated_gradients(d_hidden.addmm_(gradient, weight), gate, up)
        return d_gate, d_up, None, None, None, None, d_a, d_b


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _gated_gradients(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of silu(gate) * up."""
    d_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    return d_gate, gradient * functional.silu(gate)
