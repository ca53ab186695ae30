"""The fused layers compute what torchtune's own layers compute: outputs and gradients."""

import copy

import pytest
import torch
from torchtune.models.llama3_1 import lora_llama3_1
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from ttt_harness.training.layers.dropout import dropout_with_mask
from ttt_harness.training.layers.fused import (
    FusedAttention,
    FusedFeedForward,
    FusedRMSNorm,
    FusedScaledRoPE,
    project,
    project_gated,
)


def decoder(**overrides):
    settings = {
        "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True,
        "vocab_size": 50,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "embed_dim": 32,
        "intermediate_dim": 48,
        "max_seq_len": 64,
        "lora_rank": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lora_llama3_1(**{**settings, **overrides})
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter)  # zero at the start, and so would be the gradients of lora_a
    set_trainable_params(model, get_adapter_params(model))
    return model.train()


def fused(plain):
    """A decoder of the fused layers, with the weights of `plain`, one of torchtune's."""
    model = copy.deepcopy(plain)
    rope = FusedScaledRoPE(dim=8, max_seq_len=64, base=500_000, scale_factor=8)
    for index, layer in enumerate(model.layers):
        attn, mlp = layer.attn, layer.mlp
        projections = {name: getattr(attn, name) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
        sizes = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
        norms = {name: FusedRMSNorm(32, eps=1e-5) for name in ("sa_norm", "mlp_norm")}
        for name, norm in norms.items():
            norm.load_state_dict(getattr(layer, name).state_dict())
        quick = TransformerSelfAttentionLayer(
            FusedAttention(**sizes, **projections, pos_embeddings=rope),
            FusedFeedForward(gate_proj=mlp.w1, down_proj=mlp.w2, up_proj=mlp.w3),
            **norms,
        )
        model.layers[index] = quick.to(next(plain.parameters()).dtype).train(plain.training)
    set_trainable_params(model, get_adapter_params(model))
    return model


@pytest.mark.parametrize(
    "modules",
    [["q_proj", "v_proj", "output_proj"], ["q_proj", "k_proj", "v_proj", "output_proj"], ["k_proj"]],
    ids=["published", "all", "one"],
)
def test_outputs_and_gradients_are_those_of_torchtunes_layers(modules):
    plain = decoder(lora_attn_modules=modules).double()
    quick = fused(plain)
    assert {FusedAttention, FusedFeedForward} <= {type(module) for module in quick.modules()}
    tokens = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    expected, got = plain(tokens), quick(tokens)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # norms and rotations are in float32
    for out in (expected, got):
        out.logsumexp(-1).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert gradients
    for name, parameter in quick.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert parameter.grad is None, name


def test_with_dropout_the_update_sees_the_dropped_input_and_the_base_does_not():
    model = decoder(lora_dropout=0.5).double()
    layer = model.layers[0].mlp
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    outs = project(x, [layer.w1, layer.w3], training=True)
    torch.manual_seed(3)
    kept = dropout_with_mask(torch.ones_like(x), 0.5)[0]  # one mask for both projections
    for out, linear in zip(outs, (layer.w1, layer.w3), strict=True):
        update = (x * kept * 2) @ linear.lora_a.weight.T @ linear.lora_b.weight.T * (8 / 4)
        torch.testing.assert_close(out, x @ linear.weight.T + update)
        parameters = (x, linear.lora_a.weight, linear.lora_b.weight)
        gradients = torch.autograd.grad(out.square().sum(), parameters, retain_graph=True)
        plain = torch.autograd.grad((x @ linear.weight.T + update).square().sum(), parameters, retain_graph=True)
        for gradient, other in zip(gradients, plain, strict=True):
            torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_mlp_computes_its_product_again_with_the_same_mask(p):
    layer = decoder(lora_dropout=p).double().layers[0].mlp.w2
    gate, up = (torch.randn(7, 48, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.manual_seed(3)
    out = project_gated(gate, up, layer, training=True)
    torch.manual_seed(3)
    kept = dropout_with_mask(torch.ones_like(gate), p)[0] / (1 - p) if p else 1.0
    hidden = torch.nn.functional.silu(gate) * up
    update = (hidden * kept) @ layer.lora_a.weight.T @ layer.lora_b.weight.T * (8 / 4)
    plain = hidden @ layer.weight.T + update
    torch.testing.assert_close(out, plain)
    parameters = (gate, up, layer.lora_a.weight, layer.lora_b.weight)
    gradients = (torch.autograd.grad(result.square().sum(), parameters) for result in (out, plain))
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_nothing_is_dropped_in_evaluation():
    model = fused(decoder(lora_dropout=0.5).eval())
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens), model(tokens))
