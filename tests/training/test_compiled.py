"""The compiled layers compute what torchtune's own compute, whatever the number of sequences and tokens.

They run on a GPU; torch compiles the same functions for a CPU, where these tests can ask it.
"""

import copy
import shutil

import pytest
import torch
from checkpoints import CHECKPOINTS, write_checkpoint
from training.test_fused import decoder

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.training.checkpoint import ModelShape, read_config
from ttt_harness.training.compiled import CompiledLayer, compile_layers, little_kept
from ttt_harness.training.fused import fuse
from ttt_harness.training.trainer import Trainer, labelled_states

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
    labelled = torch.zeros(tokens.shape, dtype=torch.bool)
    labelled[:, 1:] = True
    with little_kept():
        loss = model.output(labelled_states(model, tokens, labelled, recompute=recompute)).logsumexp(-1).sum()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.detach(), dict(zip(trained, gradients, strict=True))


def test_outputs_and_gradients_are_those_of_torchtunes_layers_and_two_functions_serve_all_shapes():
    plain = decoder(num_layers=4)
    quick = copy.deepcopy(plain)
    fuse(quick)
    assert compile_layers(quick)
    for batch, length in ((3, 20), (1, 33), (2, 7), (1, 2), (5, 64)):
        tokens = torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))
        expected = losses_and_gradients(plain, tokens)
        for recompute in (False, True):
            got = losses_and_gradients(quick, tokens, recompute=recompute)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert dict(torch._dynamo.utils.counters["frames"]) == {"total": 2, "ok": 2}
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", CHECKPOINTS)
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
    compiled = compile_layers(quick.model)
    assert compiled == ("Gemma2" not in shape.architecture)
    expected, got = (trainer.fit(sequences, **FIT) for trainer in (plain, quick))
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-3, atol=1e-4)
    assert (torch._dynamo.utils.counters["frames"]["ok"] > 0) == compiled


def test_a_seed_gives_the_same_adapter_again_and_dropout_another_than_none(tiny_model):
    shape = ModelShape.from_config(read_config(tiny_model), where="tiny")
    sequences = [TrainingSequence(tuple(range(2, 40)), (False,) * 20 + (True,) * 18)] * 3

    def fit(dropout):
        trainer = Trainer(tiny_model, shape, **LORA, dropout=dropout)
        assert compile_layers(trainer.model)
        first, again = trainer.fit(sequences, **FIT), trainer.fit(sequences, **FIT)
        assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
        return first

    dropped, whole = fit(0.3), fit(0.0)
    assert dropped.losses[-1] != whole.losses[-1]
    assert dropped.losses[-1] == pytest.approx(whole.losses[-1], rel=0.2)


def test_dropped_copies_are_not_kept_for_the_gradient():
    model = decoder(lora_dropout=0.5, num_layers=2)
    fuse(model)
    compile_layers(model)
    assert type(model.layers[0]) is CompiledLayer
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tuple(tensor.shape))
        return tensor

    with little_kept(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.layers[0](torch.randn(3, 20, 32))
    assert kept.count((60, 48)) == 3  # of the MLP's width: gate, up and the dropout's mask
