"""The fit: repeatable, and equal to plain computation. That its model is the one served, test_families.py shows."""

import pytest
import torch
from torch.nn import functional
from torchtune.modules.peft import get_adapter_params

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ModelError
from ttt_harness.training.checkpoint import ModelShape, read_config
from ttt_harness.training.trainer import Trainer, _late, labelled_states

FIT = {"batch_size": 3, "epochs": 2, "lr": 1e-2, "warmup_ratio": 0.1, "seed": 7}
LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}


def make_trainer(model_dir, **overrides):
    shape = ModelShape.from_config(read_config(model_dir), where=str(model_dir))
    return Trainer(model_dir, shape, **{**LORA, "dtype": torch.float32, "device": "cpu", **overrides})


@pytest.fixture(scope="module")
def sequences():
    rng = torch.Generator().manual_seed(0)
    made = []
    for length in (20, 33, 27, 18, 40):
        tokens = torch.randint(2, 320, (length,), generator=rng).tolist()
        made.append(TrainingSequence(tuple(tokens), tuple(i > 0 and i % 3 == 0 for i in range(length))))
    return made


@pytest.fixture(scope="module")
def trainer(tiny_model):
    return make_trainer(tiny_model)


def test_the_same_seed_gives_the_same_adapter_whatever_was_fitted_before(trainer, sequences):
    first = trainer.fit(sequences, **FIT)
    other = trainer.fit(sequences[:2], **{**FIT, "seed": 8})
    again = trainer.fit(sequences, **FIT)
    assert first.losses == again.losses
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert any(not torch.equal(first.weights[name], other.weights[name]) for name in first.weights)


def test_a_fit_lowers_the_loss_and_counts_what_it_saw(trainer, sequences):
    steps = []
    result = trainer.fit(sequences, **{**FIT, "epochs": 10}, on_step=lambda *step: steps.append(step))
    assert len(result.losses) == 20
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.tokens == 10 * sum(len(s.tokens) for s in sequences)
    assert steps[-1] == (20, 20, result.losses[-1])


@pytest.mark.parametrize("behind", [0, 1, 2, 9])
def test_a_loss_is_read_once_later_steps_are_there_and_none_is_lost(behind):
    made = []

    def steps():
        for number in range(5):
            made.append(number)
            yield number

    for number in _late(steps(), behind=behind):
        assert len(made) == min(5, number + behind + 1)
    assert list(_late(range(5), behind=behind)) == [0, 1, 2, 3, 4]


def test_no_epochs_leave_an_adapter_without_effect(trainer, sequences):
    weights = trainer.fit(sequences, **{**FIT, "epochs": 0}).weights
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_global_random_numbers_are_left_alone(trainer, sequences):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trainer.fit(sequences[:1], **FIT)
    assert torch.equal(torch.rand(1), expected)


def test_states_of_labelled_tokens_give_rows_of_all_logits(trainer, sequences):
    trainer.fit(sequences, **FIT)
    trainer.model.eval()
    tokens = torch.tensor([sequences[0].tokens])
    labelled = torch.tensor([sequences[0].labelled])
    with torch.no_grad():
        every = trainer.model(tokens)
        some = trainer.model.output(labelled_states(trainer.model, tokens, labelled))
    torch.testing.assert_close(some, every[:, :-1][labelled[:, 1:]])


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("logits", [1, 700, 2**23])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(trainer, sequences, monkeypatch, max_tokens, logits):
    monkeypatch.setattr(trainer, "max_tokens", max_tokens)  # 1: every sequence alone, its layers recomputed
    monkeypatch.setattr("ttt_harness.training.trainer.LOGITS", logits)  # 1: every position alone
    torch.manual_seed(0)
    trainer._reset()
    trainer.model.eval()  # no dropout, whose random numbers fall elsewhere in other micro-batches
    loss = trainer._backward(sequences).item()
    # Plain computation: every sequence alone, all logits, mean over the labelled tokens of the batch.
    losses = []
    for sequence in sequences:
        tokens, labelled = torch.tensor([sequence.tokens]), torch.tensor([sequence.labelled])
        logits = trainer.model(tokens)[:, :-1].flatten(0, 1)
        targets = torch.where(labelled, tokens, -100)[:, 1:].flatten()
        losses.append(functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
    labels = sum(sum(sequence.labelled) for sequence in sequences)
    expected = torch.stack(losses).sum() / labels
    adapter = list(get_adapter_params(trainer.model).values())
    gradients = torch.autograd.grad(expected, adapter)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(adapter, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
        parameter.grad = None


def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_gradient(trainer, sequences, monkeypatch):
    torch.manual_seed(0)
    trainer._reset()
    trainer.model.eval()
    loss = trainer._backward(sequences).item()
    expected = [parameter.grad.clone() for parameter in trainer.adapter.values()]
    for parameter in trainer.adapter.values():
        parameter.grad = None
    room = 50

    def limited(model, tokens, labelled, *, recompute=False):
        states = labelled_states(model, tokens, labelled, recompute=recompute)
        if tokens.numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states

    monkeypatch.setattr("ttt_harness.training.trainer.labelled_states", limited)
    monkeypatch.setattr(trainer, "max_tokens", 200)
    assert trainer._backward_within_memory(sequences).item() == pytest.approx(loss, rel=1e-5)
    assert trainer.max_tokens == 50
    for parameter, gradient in zip(trainer.adapter.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
        parameter.grad = None
    room = 30  # less than the longest sequence
    with pytest.raises(ModelError, match="40 tokens does not fit"):
        trainer._backward_within_memory(sequences)


def test_recomputed_layers_draw_the_same_dropout(trainer, sequences):
    tokens, labelled = torch.tensor([sequences[0].tokens]), torch.tensor([sequences[0].labelled])
    adapter = list(trainer.adapter.values())
    trainer.fit(sequences, **FIT)  # lora_B is zero before, and so would be most gradients
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        states = labelled_states(trainer.model, tokens, labelled, recompute=recompute)
        gradients.append(torch.autograd.grad(trainer.model.output(states).logsumexp(-1).sum(), adapter))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_a_sequence_of_any_length_fits_the_memory_that_activations_may_take(tiny_model):
    trainer = make_trainer(tiny_model)
    per_token = 2 * (10 * 128 + 2.5 * 256) * 4
    assert trainer.max_tokens * per_token == pytest.approx(528 * 2**20, rel=0.01)  # its weights are next to nothing


def test_bfloat16_trains_too(tiny_model, sequences):
    result = make_trainer(tiny_model, dtype=torch.bfloat16).fit(sequences, **FIT)
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.weights.values())
    assert result.losses[-1] < result.losses[0]


def test_a_model_directory_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no such directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        read_config(tmp_path)


def test_a_damaged_weights_file_is_refused(tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        make_trainer(tmp_path)
