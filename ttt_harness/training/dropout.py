"""Dropout whose mask is kept, for layers that compute their own gradient, with masks that are cheap on a CPU too.

On a CPU torch draws one random number for each element, one after the other, which costs more than the matmul that
the dropped input goes into. There each element takes 16 bits of a faster generator instead.
"""

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 16


def dropout_with_mask(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Zero each element of `x` with probability `p` and scale the others by 1 / (1 - p).

    The masks follow from torch's random state, so `torch.manual_seed` repeats them. On a CPU `p` is rounded to a
    multiple of 2**-16.

    Returns:
        The result, and the mask of what is kept, a bool tensor of the same shape.
    """
    if x.device.type != "cpu":
        return torch.native_dropout(x, p, True)
    count = x.numel()
    seed = int(torch.randint(1 << 62, ()))
    bits = np.random.SFC64(seed).random_raw(count // 4 + 1).view(np.int16)[:count]
    keep = (torch.from_numpy(bits) >= _dropped_levels(p) - _LEVELS // 2).view(x.shape)
    return undo_dropout(x, keep, p), keep


def undo_dropout(gradient: Tensor, mask: Tensor, p: float) -> Tensor:
    """The gradient of dropout's input, from that of its result and the mask; the shape is kept."""
    if gradient.device.type != "cpu":
        return torch.ops.aten.native_dropout_backward(gradient, mask, 1 / (1 - p))
    return torch.where(mask, gradient, 0.0).mul_(_LEVELS / (_LEVELS - _dropped_levels(p)))


def _dropped_levels(p: float) -> int:
    return round(p * _LEVELS)
