"""Dropout for a CPU: the masks of `torch.nn.Dropout` in distribution, at a fraction of its cost.

On a CPU `nn.Dropout` draws one random number for each element, one after the other, and LoRA drops out the input of
every adapted projection: that is a fifth of a training step. Here each element takes 16 bits of a faster generator.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 1 << 16


class CPUDropout(nn.Module):
    """Zeroes each element with probability `p` and scales the others by 1 / (1 - p), in training mode only.

    `p` is rounded to a multiple of 2**-16. The masks follow from torch's random state, so `torch.manual_seed` repeats
    them.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self._dropped_levels = round(p * _LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        """Drop out elements of `x`, of any shape."""
        if not self.training or not self._dropped_levels:
            return x
        return _Drop.apply(x, self._draw(x.shape), _LEVELS / (_LEVELS - self._dropped_levels))

    def _draw(self, shape: torch.Size) -> Tensor:
        """The mask of what is kept, a bool tensor of `shape`."""
        count = shape.numel()
        seed = int(torch.randint(1 << 62, ()))
        bits = np.random.SFC64(seed).random_raw(count // 4 + 1).view(np.int16)[:count]
        return (torch.from_numpy(bits) >= self._dropped_levels - _LEVELS // 2).view(shape)


class _Drop(torch.autograd.Function):
    """x * keep * scale; keeps only the mask, of one byte an element, for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.where(keep, x, 0.0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, gradients[0], 0.0).mul_(ctx.scale), None, None
