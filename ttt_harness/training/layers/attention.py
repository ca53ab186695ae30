"""Causal attention for training: torch's kernels on a GPU; on a CPU, blocks of queries by batched matmuls.

torch's own kernel for CPUs computes the gradient in small blocks, at a fraction of what a matmul reaches there. Here a
block of queries meets all keys up to its end in one matmul, so that about half of the work is left out, and query heads
that share a head of keys are rows of one matrix. Nothing of the size tokens x tokens is kept: the gradient computes the
probabilities again, as in Dao et al., arXiv 2205.14135.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# A block's scores should stay in the processor's cache.
_SCORES = 2**21
_ROWS = (32, 128)
# oneDNN keeps half a MiB of code for each shape of a product, hundreds of MiB if each block of a long sequence met a
# number of keys of its own. They meet so many numbers of keys, or up to twice as many.
_KEY_COUNTS = 32


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend from each position to itself and those before, or to where `mask`, [tokens, tokens], is True.

    q: [batch, heads, tokens, head_dim]; k, v: [batch, kv_heads, tokens, head_dim]. Returns the shape of q.
    """
    if mask is None and q.device.type == "cpu":
        return CausalAttention.apply(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor | None:
    """True where a row's token attends to a column's, [tokens, tokens]: to the last `window` up to it.

    None where all tokens are within the window: causal attention is the same, and faster.
    """
    if tokens <= window:
        return None
    position = torch.arange(tokens, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(head_dim)) v, each position attending to itself and those before.

    The scores are in float32 for bfloat16 inputs, as in torch's kernel; all other products in the inputs' type.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        """From q, [batch, heads, tokens, head_dim], and k and v, [batch, kv_heads, tokens, head_dim]; as q."""
        batch, kv_heads, length, width = k.shape
        shape = (batch, length, kv_heads, q.shape[1] // kv_heads, width)
        q, k, v = _rows(q, kv_heads), _rows(k, kv_heads), _rows(v, kv_heads)
        wide = torch.promote_types(q.dtype, torch.float32)
        q_wide, k_wide = q.to(wide), k.to(wide)
        out = torch.empty(shape, dtype=q.dtype)
        for first, end, keys in _blocks(shape):
            seen = _probabilities(q_wide, k_wide[:, :keys], first, end, shape).to(v.dtype)
            _block(out, first, end).copy_(torch.bmm(seen, v[:, :keys]).view(batch, kv_heads, end - first, -1, width))
        ctx.save_for_backward(q, k, v)
        ctx.shape = shape
        return out.flatten(2, 3).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        batch, length, kv_heads, group, width = shape = ctx.shape
        gradient = _rows(gradients[0], kv_heads)
        wide = torch.promote_types(q.dtype, torch.float32)
        q_wide, k_wide = q.to(wide), k.to(wide)
        dq = torch.empty(shape, dtype=q.dtype)
        dk, dv = (torch.zeros(k.shape, dtype=wide) for _ in range(2))
        for first, end, keys in _blocks(shape):
            rows = slice(first * group, end * group)
            seen = _probabilities(q_wide, k_wide[:, :keys], first, end, shape).to(v.dtype)
            dv[:, :keys] += torch.bmm(seen.transpose(1, 2), gradient[:, rows])
            d_seen = torch.bmm(gradient[:, rows], v[:, :keys].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_seen, seen, -1, seen.dtype)
            _block(dq, first, end).copy_(torch.bmm(d_scores, k[:, :keys]).view(batch, kv_heads, -1, group, width))
            dk[:, :keys] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
        scale = 1 / math.sqrt(width)
        dk.mul_(scale)
        dk, dv = (part.view(batch, kv_heads, length, width).to(k.dtype) for part in (dk, dv))
        return dq.mul_(scale).flatten(2, 3).transpose(1, 2), dk, dv


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, tokens, head_dim] as [batch * kv_heads, tokens * heads / kv_heads, head_dim]."""
    return x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1).contiguous()


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """For each block of queries its first position, its end, and the end of the keys that it meets."""
    batch, length, kv_heads, group, _ = shape
    low, high = _ROWS
    rows = max(low, min(high, _SCORES // (batch * kv_heads * group * length)))
    # Where there are many blocks, some of them meet as many keys as their last.
    step = rows * max(1, length // (_KEY_COUNTS * rows))
    for first in range(0, length, rows):
        end = min(first + rows, length)
        yield first, end, min(-(-end // step) * step, length)


def _block(x: Tensor, first: int, end: int) -> Tensor:
    """Positions `first` to `end` of `x`, [batch, tokens, kv_heads, group, head_dim], with kv_heads before tokens."""
    return x[:, first:end].transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, first: int, end: int, shape: tuple[int, ...]) -> Tensor:
    """What the positions `first` to `end` attend to, in the inputs' type: [batch * kv_heads, rows, keys]."""
    group, width, keys = *shape[3:], k.shape[1]
    scores = torch.bmm(q[:, first * group : end * group], k.transpose(1, 2)).mul_(1 / math.sqrt(width))
    later = torch.full((end - first, keys - first), -math.inf, dtype=q.dtype).triu_(1).unsqueeze(1)
    scores.view(len(k), end - first, group, keys)[..., first:] += later
    return torch.softmax(scores, -1)
