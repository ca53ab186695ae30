"""Dropout whose mask is kept, for layers that compute their own gradient, with masks that are cheap on a CPU too.

On a CPU torch draws one random number for each element, one after the other, which costs more than the matmul that
the dropped input goes into. There the places of the dropped elements are drawn instead, one number for each: the gaps
between them are geometric. The factor 1 / (1 - p) is left to the caller, who has a smaller tensor to multiply, so that
dropping and its gradient only write zeros to those places.
"""

import math

import torch
from torch import Tensor


def dropout_with_mask(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, float]:
    """Zero each element of `x` with probability `p`, 0 <= p < 1.

    The masks follow from torch's random state, so `torch.manual_seed` repeats them.

    Returns:
        The result; what `dropout_gradient` needs of the mask, None where `p` is 0; and the factor that the result is
        still to be multiplied by for its mean to be that of `x`: on a GPU 1, as torch's kernel has done so.
    """
    if not p:
        return x, None, 1.0
    if x.device.type != "cpu":
        return *torch.native_dropout(x, p, True), 1.0
    places = _dropped_places(x.numel(), p)
    return _zeroed(x.clone(memory_format=torch.contiguous_format), places), places, 1 / (1 - p)


def dropout_gradient(gradient: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """The gradient of dropout's input, from that of its (unmultiplied) result, which may be changed in place."""
    if mask is None:
        return gradient
    if gradient.device.type != "cpu":
        return torch.ops.aten.native_dropout_backward(gradient, mask, 1 / (1 - p))
    return _zeroed(gradient.contiguous(), mask)


def _dropped_places(count: int, p: float) -> Tensor:
    """Which of `count` elements are dropped, in rising order, int64: each with probability `p`, independently."""
    expected = count * p
    last, parts = -1, []
    while last < count:
        # Nearly always enough at once: six standard deviations above the expected number.
        numbers = torch.rand(int(expected + 6 * math.sqrt(expected)) + 10, dtype=torch.float32)
        gaps = numbers.neg_().log1p_().mul_(1 / math.log1p(-p)).long().add_(1)
        parts.append(gaps.cumsum(0).add_(last))
        last = int(parts[-1][-1])
    places = torch.cat(parts) if len(parts) > 1 else parts[0]
    return places[: int(torch.searchsorted(places, count))]


def _zeroed(x: Tensor, places: Tensor) -> Tensor:
    x.view(-1).index_fill_(0, places, 0)
    return x
