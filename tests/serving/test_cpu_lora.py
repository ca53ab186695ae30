"""The grouped LoRA kernels do what vLLM's own do, for every mix of adapters in a batch."""

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from ttt_harness.serving import cpu_lora
from ttt_harness.serving.cpu_lora import GroupedPunicaWrapper

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
    cpu_lora.shrink(inputs, weights, output, indices, 0.5)
    reference_shrink(inputs, weights, expected, indices, 0.5)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expand_slice(indices, add, dtype):
    inputs, weights = torch.randn(TOKENS, RANK), torch.randn(ADAPTERS, 1, OUT, RANK).to(dtype)
    inputs = inputs.to(dtype).float()  # vLLM keeps what lies between the two matrices in float32
    output = torch.randn(TOKENS, 3 * OUT).to(dtype)
    expected = output.float()
    cpu_lora.expand_slice(inputs, weights, output, indices, 7, OUT, add)
    reference_expand(inputs, weights.float(), expected, indices, 7, OUT, add)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # of sums of a few units
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


# vLLM's own kernels take no token without an adapter.
@pytest.mark.parametrize("adapters", [[1] * TOKENS, [1, 2, 3] * 4])
def test_linear_layers_embeddings_and_logits_are_those_of_vllm(adapters):
    wrappers = [cls(TOKENS, max_batches=TOKENS, device="cpu") for cls in (GroupedPunicaWrapper, PunicaWrapperCPU)]
    for wrapper in wrappers:
        mapping = LoRAMapping(index_mapping=tuple(adapters), prompt_mapping=tuple(adapters))
        wrapper.update_metadata(mapping, [1, 2, 3], ADAPTERS + 1, 320)
    x, a = torch.randn(TOKENS, IN), [torch.randn(ADAPTERS, 1, RANK, IN) for _ in range(2)]
    b, start = [torch.randn(ADAPTERS, 1, OUT, RANK) for _ in range(2)], torch.randn(TOKENS, 2 * OUT)
    results = []
    for wrapper in wrappers:
        linear, embedding, logits = start.clone(), start[:, :OUT].clone(), start[:, : OUT + 2].clone()
        wrapper.add_lora_linear(linear, x, tuple(a), tuple(b), 0.5, (OUT, OUT))
        wrapper.add_lora_embedding(embedding, x[:, :RANK], b[0])
        wrapper.add_lora_logits(logits, x, a[0], b[0], 0.5)
        results.append((linear, embedding, logits))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not torch.equal(ours, start[:, : ours.shape[1]])
