"""The counted operations are those that a person counts by hand, and those that torch counts in a forward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchtune.models.llama3_2 import lora_llama3_2

from benchmarks import flops
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.training.families import LORA_ATTENTION_MODULES
from ttt_harness.training.shape import ModelShape

SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    num_layers=2,
    embed_dim=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=8,
    vocab_size=10,
    context_length=16,
    norm_eps=1e-5,
    rope_base=10000,
    rope_scale=1,
    tied_embeddings=False,
    windows=(None, None),
)


def test_weights():
    # q 4x4, k 4x2, v 4x2, output 4x4, and three of 4x8
    assert flops.layer_weights(SHAPE) == 2 * (16 + 8 + 8 + 16 + 3 * 32)
    # rank x (in + out) of q, v, output and the three of the MLP
    assert flops.lora_weights(SHAPE, rank=3) == 2 * 3 * (8 + 6 + 8 + 3 * 12)
    assert flops.output_weights(SHAPE) == 40


def test_a_fit():
    sequence = TrainingSequence(tokens=(1, 2, 3), loss_mask=(False, False, True))
    weights = 3 * (4 * 288 + 6 * 116)
    attention = 3 * 6 * (2 * 4 * 4)  # forward and twice backward, 6 pairs under the causal mask, 2 layers x 4 x width
    logits = 4 * 40 * 1
    assert flops.fit_flops(SHAPE, 1, [sequence]) == weights + attention + logits
    assert flops.fit_flops(SHAPE, 1, [sequence, sequence]) == 2 * flops.fit_flops(SHAPE, 1, [sequence])


def test_generation_reads_a_shared_beginning_once():
    prompts = [(1, 2, 3), (1, 2, 4)]
    # positions 0 to 2 of the first, 2 of the second, and 3, the first token of the longer answer
    computed, attended, logits = 3 + 1 + 1, (1 + 2 + 3) + 3 + 4, 2 + 1
    expected = computed * 2 * (288 + 116) + attended * 32 + logits * 2 * 40
    assert flops.generation_flops(SHAPE, 1, prompts, [2, 1]) == expected


def test_unshared_positions_are_the_nodes_of_the_prefix_tree():
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(0, 3, (int(n),), generator=generator).tolist())
               for n in torch.randint(1, 8, (50,), generator=generator)]  # fmt: skip
    nodes = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert sum(end - first for first, end in flops.unshared_spans(prompts)) == len(nodes)


@pytest.mark.parametrize(("first", "end"), [(0, 5), (3, 7), (4, 4)])
def test_causal_pairs(first, end):
    assert flops.pairs(first, end) == sum(position + 1 for position in range(first, end))


def test_torch_counts_the_same_in_a_forward_pass():
    tokens, rank = 8, 2
    # torchtune's own layers: torch does not count all that the fused ones do in place
    model = lora_llama3_2(
        lora_attn_modules=list(LORA_ATTENTION_MODULES),
        apply_lora_to_mlp=True,
        vocab_size=SHAPE.vocab_size,
        num_layers=SHAPE.num_layers,
        num_heads=SHAPE.num_heads,
        num_kv_heads=SHAPE.num_kv_heads,
        embed_dim=SHAPE.embed_dim,
        intermediate_dim=SHAPE.mlp_dim,
        max_seq_len=16,
        lora_rank=rank,
        lora_alpha=1,
        tie_word_embeddings=SHAPE.tied_embeddings,
    )
    # attention as two plain matmuls, since torch does not count inside its fused kernel for CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros((1, tokens), dtype=torch.long))
    weights = flops.layer_weights(SHAPE) + flops.lora_weights(SHAPE, rank) + flops.output_weights(SHAPE)
    # torch does not know that half of the attention is masked away
    assert counter.get_total_flops() == 2 * weights * tokens + flops.attention_pair(SHAPE) * tokens**2
