"""The attention that fits use on a CPU is torch's: outputs and gradients, whatever the heads, lengths and blocks."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ttt_harness.training.layers import attention
from ttt_harness.training.layers.attention import CausalAttention


def inputs(batch, heads, kv_heads, length, width, dtype, scale=1.0):
    """q, k, v, of which q.k / sqrt(width) has the standard deviation `scale`, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, length, width) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, gradient = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [q * scale, k, v], gradient


def plain(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def result_and_gradients(attend, tensors, gradient):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", [1, 31, 32, 100])
@pytest.mark.parametrize("key_counts", [1, 3, 32])  # 1, 3: blocks meet keys of later positions too
def test_it_is_torchs_attention(monkeypatch, heads, kv_heads, length, key_counts):
    monkeypatch.setattr(attention, "_ROWS", (8, 32))
    monkeypatch.setattr(attention, "_KEY_COUNTS", key_counts)
    tensors, gradient = inputs(2, heads, kv_heads, length, 20, torch.float64)
    expected = result_and_gradients(plain, tensors, gradient)
    for one, other in zip(result_and_gradients(CausalAttention.apply, tensors, gradient), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_in_bfloat16_it_is_as_near_to_exact_as_torchs(scale):
    tensors, gradient = inputs(2, 9, 3, 300, 64, torch.bfloat16, scale)
    exact = result_and_gradients(plain, [tensor.double() for tensor in tensors], gradient.double())

    def errors(attend):
        found = result_and_gradients(attend, tensors, gradient)
        return [((one - true).norm() / true.norm()).item() for one, true in zip(found, exact, strict=True)]

    for error, torchs in zip(errors(CausalAttention.apply), errors(plain), strict=True):
        assert error < max(1.5 * torchs, 0.005)


@pytest.mark.parametrize("length", [1, 600, 3_000, 8_192, 8_193, 20_000])
def test_blocks_of_any_length_have_few_shapes(length):
    blocks = list(attention._blocks((1, length, 3, 3, 64)))
    firsts, ends, keys = zip(*blocks, strict=True)
    assert firsts == (0, *ends[:-1])
    assert ends[-1] == length
    assert all(end <= seen <= length for end, seen in zip(ends, keys, strict=True))
    assert len(set(keys)) <= 64
    if length <= 3_000:
        assert keys == ends
