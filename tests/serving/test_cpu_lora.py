"""The grouped LoRA kernels do what vLLM's own do, for every mix of adapters in a batch."""

import pytest
import torch

from ttt_harness.serving import cpu_lora

TOKENS, RANK, IN, OUT, ADAPTERS = 12, 4, 16, 10, 3


def reference_shrink(inputs, weights, output, indices, scaling):
    for token, adapter in enumerate(indices.tolist()):
        output[token] = scaling * inputs[token] @ weights[adapter, 0].T if adapter >= 0 else 0


def reference_expand(inputs, weights, output, indices, offset, size, add):
    for token, adapter in enumerate(indices.tolist()):
        if adapter >= 0:
            product = inputs[token] @ weights[adapter, 0, :size].T
            output[token, offset : offset + size] = product + (output[token, offset : offset + size] if add else 0)


@pytest.fixture(params=[[0] * 12, [-1] * 12, [0, 1, 2] * 4, [-1, 2, 2, 0] * 3, [1] * 5 + [-1] * 7])
def indices(request):
    return torch.tensor(request.param)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_shrink(indices):
    inputs, weights = torch.randn(TOKENS, IN), torch.randn(ADAPTERS, 1, RANK, IN)
    output, expected = torch.randn(TOKENS, RANK), torch.zeros(TOKENS, RANK)
    cpu_lora.bgmv_shrink(inputs, weights, output, indices, 0.5)
    reference_shrink(inputs, weights, expected, indices, 0.5)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expand_slice(indices, add, dtype):
    inputs, weights = torch.randn(TOKENS, RANK), torch.randn(ADAPTERS, 1, OUT, RANK).to(dtype)
    inputs = inputs.to(dtype).float()  # vLLM keeps what lies between the two matrices in float32
    output = torch.randn(TOKENS, 3 * OUT).to(dtype)
    expected = output.float()
    cpu_lora.bgmv_expand_slice(inputs, weights, output, indices, 7, OUT, add)
    reference_expand(inputs, weights.float(), expected, indices, 7, OUT, add)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # of sums of a few units
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


def test_expand_covers_the_narrower_of_adapter_and_output(indices):
    inputs, weights = torch.randn(TOKENS, RANK), torch.randn(ADAPTERS, 1, OUT, RANK)
    for width in (OUT - 3, OUT, OUT + 5):
        output = torch.randn(TOKENS, width)
        expected = output.clone()
        cpu_lora.bgmv_expand(inputs, weights, output, indices)
        reference_expand(inputs, weights, expected, indices, 0, min(width, OUT), True)
        torch.testing.assert_close(output, expected)
