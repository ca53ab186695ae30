"""The compiled layers compute what torchtune's own compute, whatever the number of sequences and tokens.

They run on a GPU; torch compiles the same functions for a CPU, where these tests can ask it.
"""

import shutil

import pytest
import torch

from tests.checkpoints import CHECKPOINTS, FAMILY_TABLE, write_checkpoint
from tests.training.layers.test_fused import decoder, fused
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.training.layers.compiled import CompiledLayer, _linear, compile_layers, compiling
from ttt_harness.training.layers.fused import FusedAttention
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import FAST, ModelShape
from ttt_harness.training.trainer import Trainer, target_states

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
    pytest.mark.filterwarnings("default"),  # torch.compile's own
]
FIT = {"batch_size": 3, "epochs": 2, "lr": 1e-2, "warmup_ratio": 0.1, "seed": 7}
LORA = {"rank": 8, "alpha": 16, "dtype": torch.float32, "device": "cpu"}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def losses_and_gradients(model, tokens, *, recompute=False):
    """Of a loss at all positions but the first."""
    loss_mask = torch.zeros(tokens.shape, dtype=torch.bool)
    loss_mask[:, 1:] = True
    with compiling():
        loss = model.output(target_states(model, tokens, loss_mask, recompute=recompute)).logsumexp(-1).sum()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.detach(), dict(zip(trained, gradients, strict=True))


def test_outputs_and_gradients_are_those_of_torchtunes_layers_and_two_functions_serve_all_shapes():
    plain = decoder(num_layers=4)
    quick = fused(plain)
    compile_layers(quick)
    for batch, length in ((3, 20), (1, 33), (2, 7), (1, 2), (5, 64)):
        tokens = torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))
        expected = losses_and_gradients(plain, tokens)
        for recompute in (False, True):
            got = losses_and_gradients(quick, tokens, recompute=recompute)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert dict(torch._dynamo.utils.counters["frames"]) == {"total": 2, "ok": 2}
    assert not torch._dynamo.utils.counters["graph_break"]


def test_with_dropout_gradients_are_those_of_the_loss_and_the_same_when_recomputed():
    model = fused(decoder(lora_dropout=0.4, num_layers=3).double())
    compile_layers(model)
    tokens = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))

    def seeded(**options):
        torch.manual_seed(3)  # the same masks each time
        return losses_and_gradients(model, tokens, **options)

    _, gradients = seeded()
    torch.testing.assert_close(seeded(recompute=True)[1], gradients)
    for name in (
        "layers.0.attn.q_proj.lora_a.weight",
        "layers.1.attn.v_proj.lora_b.weight",
        "layers.1.mlp.w2.lora_a.weight",
    ):
        weight = model.get_parameter(name)
        losses = []
        for step in (2e-5, -2e-5):
            with torch.no_grad():
                weight += step * gradients[name]
            losses.append(seeded()[0])
            with torch.no_grad():
                weight -= step * gradients[name]
        difference = (losses[0] - losses[1]) / 4e-5
        torch.testing.assert_close(difference, gradients[name].square().sum(), rtol=1e-2, atol=0)


def test_dropout_keeps_the_mean_of_the_update():
    layer = decoder(lora_dropout=0.5).layers[0].mlp.w1
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(20_000, 32)
    with torch.no_grad():
        update = _linear([layer], x)[0] - x @ layer.weight.T
        expected = x[0] @ layer.lora_a.weight.T @ layer.lora_b.weight.T * (8 / 4)
    noise = update.std(0) / len(x) ** 0.5
    assert ((update.mean(0) - expected).abs() < 5 * noise).all()
    assert (noise < expected.abs().mean() / 20).all()


@pytest.mark.parametrize("name", [names[0] for _, way, names in FAMILY_TABLE.values() if way == "fast"])
def test_a_compiled_fit_of_each_family_is_that_of_the_layers_as_they_are(name, tmp_path):
    write_checkpoint(tmp_path, CHECKPOINTS[name])
    shape = ModelShape.from_config(read_config(tmp_path), where=name)
    rng = torch.Generator().manual_seed(0)
    sequences = [  # the windows are of 16 tokens
        TrainingSequence(
            tuple(torch.randint(2, 320, (length,), generator=rng).tolist()), tuple(i % 3 == 2 for i in range(length))
        )
        for length in (24, 50, 12)
    ]
    plain, quick = (Trainer(tmp_path, shape, **LORA, dropout=0.0) for _ in range(2))
    plain_attention = all(isinstance(layer.attn, FusedAttention) for layer in quick.model.layers)
    assert FAST[shape.architecture].compiled == plain_attention
    if plain_attention:
        compile_layers(quick.model)
        expected, got = (trainer.fit(sequences, **FIT) for trainer in (plain, quick))
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-3, atol=1e-4)
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_a_seed_gives_the_same_adapter_again_whatever_was_fitted_before(tiny_model):
    shape = ModelShape.from_config(read_config(tiny_model), where="tiny")
    sequences = [TrainingSequence(tuple(range(2, 40)), (False,) * 20 + (True,) * 18)] * 3

    def trainer(**settings):
        made = Trainer(tiny_model, shape, **{**LORA, **settings})
        compile_layers(made.model)
        return made

    first, other = trainer(dropout=0.3), trainer(dropout=0.1, rank=4)
    once, between, again = (one.fit(sequences, **FIT) for one in (first, other, first))
    torch.testing.assert_close(again.peft_state_dict(), once.peft_state_dict(), rtol=0, atol=0)
    assert once.losses[-1] != between.losses[-1]
    assert torch._dynamo.utils.counters["frames"]["ok"] == 4  # two functions, of two ranks


def test_dropped_copies_are_not_kept_for_the_gradient():
    model = fused(decoder(lora_dropout=0.5, num_layers=2))
    compile_layers(model)
    assert type(model.layers[0]) is CompiledLayer
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    with compiling(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.layers[0](torch.randn(3, 20, 32))
    assert kept.count((60, 48)) == 3  # of the MLP's width: gate, up and the dropout's mask
