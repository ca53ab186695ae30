"""The fit: repeatable, and equal to plain computation. That its model is the one served, test_families.py shows."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torchtune.modules.peft import get_adapter_params

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ModelError
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.trainer import Trainer, all_finite, delayed, release_trainer, shared_trainer, target_states

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
    first, again, other = (result.peft_state_dict() for result in (first, again, other))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_fit_lowers_the_loss_and_counts_what_it_saw(trainer, sequences):
    steps = []
    result = trainer.fit(sequences, **{**FIT, "epochs": 10}, on_step=lambda *step: steps.append(step))
    assert len(result.losses) == 20
    assert result.losses[-1] < 0.8 * result.losses[0]
    assert result.tokens == 10 * sum(len(s.tokens) for s in sequences)
    assert steps[-1] == (20, 20, result.losses[-1])


@pytest.mark.parametrize("lag", [0, 1, 2, 9])
def test_a_loss_is_read_once_later_steps_are_there_and_none_is_lost(lag):
    made = []

    def steps():
        for number in range(5):
            made.append(number)
            yield number

    for number in delayed(steps(), lag=lag):
        assert len(made) == min(5, number + lag + 1)
    assert list(delayed(range(5), lag=lag)) == [0, 1, 2, 3, 4]


def test_no_epochs_leave_an_adapter_without_effect(trainer, sequences):
    weights = trainer.fit(sequences, **{**FIT, "epochs": 0}).peft_state_dict()
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def rewrite_weights(model_dir, folder, change):
    """Copy a checkpoint into `folder`, each tensor as `change(name, tensor)` makes it."""
    for path in model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def assert_one_sentence(error):
    assert str(error).endswith(".")
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("dtype", "lr", "telling"),
    [
        ("float16", 1e4, r"\(lr=10000, dtype=float16\); float16 overflows .* use dtype=bfloat16, or dtype=float32"),
        ("float32", 1e30, r"the loss of step 2 of 4 is (nan|inf) \(lr=1e\+30, dtype=float32\); use a smaller lr"),
        ("bfloat16", 1e38, r"step \d of 4 .*dtype=bfloat16\); use a smaller lr"),
    ],
)
def test_a_fit_that_diverges_ends_with_its_step_and_a_remedy(tiny_model, sequences, dtype, lr, telling):
    steps = []
    with pytest.raises(ModelError, match=telling) as error:
        make_trainer(tiny_model, dtype=getattr(torch, dtype)).fit(
            sequences,
            **{**FIT, "lr": lr, "warmup_ratio": 0.0},
            on_step=lambda done, _, loss: steps.append((done, loss)),
        )
    assert_one_sentence(error.value)
    assert all(math.isfinite(loss) for _, loss in steps)  # what is shown until then is true


def test_a_fit_that_diverges_in_its_last_step_gives_no_adapter_either(trainer, sequences):
    with pytest.raises(ModelError, match=r"a weight is not finite after step 1 of 1 \(lr=1e\+39") as error:
        trainer.fit(sequences[:1], **{**FIT, "epochs": 1, "lr": 1e39, "warmup_ratio": 0.0})
    assert_one_sentence(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_model_that_is_not_finite_is_named_as_the_cause(tiny_model, tmp_path, sequences, value):
    def damage(name, tensor):
        return tensor.fill_(value) if name == "model.norm.weight" else tensor

    with pytest.raises(ModelError, match=r"the loss of step 1 of 4 .* the base model itself .* check its weights"):
        make_trainer(rewrite_weights(tiny_model, tmp_path, damage)).fit(sequences, **FIT)


def test_a_fit_after_one_that_diverged_is_as_any_other(tiny_model, sequences):
    trainer = make_trainer(tiny_model)
    expected = trainer.fit(sequences, **FIT)
    with pytest.raises(ModelError, match="diverged"):
        trainer.fit(sequences, **{**FIT, "lr": 1e30})
    again = trainer.fit(sequences, **FIT)
    assert again.losses == expected.losses
    torch.testing.assert_close(again.peft_state_dict(), expected.peft_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_found(value):
    weights = [torch.ones(3, 4), torch.ones(2, dtype=torch.bfloat16)]
    assert all_finite(weights)
    weights[1][1] = value
    assert not all_finite(weights)
    assert all_finite([])


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
    loss_mask = torch.tensor([sequences[0].loss_mask])
    with torch.no_grad():
        every = trainer.model(tokens)
        some = trainer.model.output(target_states(trainer.model, tokens, loss_mask))
    torch.testing.assert_close(some, every[:, :-1][loss_mask[:, 1:]])


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
        tokens, loss_mask = torch.tensor([sequence.tokens]), torch.tensor([sequence.loss_mask])
        logits = trainer.model(tokens)[:, :-1].flatten(0, 1)
        targets = torch.where(loss_mask, tokens, -100)[:, 1:].flatten()
        losses.append(functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
    labels = sum(sum(sequence.loss_mask) for sequence in sequences)
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

    def limited(model, tokens, loss_mask, *, recompute=False):
        states = target_states(model, tokens, loss_mask, recompute=recompute)
        if tokens.numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states

    monkeypatch.setattr("ttt_harness.training.trainer.target_states", limited)
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
    tokens, loss_mask = torch.tensor([sequences[0].tokens]), torch.tensor([sequences[0].loss_mask])
    adapter = list(trainer.adapter.values())
    trainer.fit(sequences, **FIT)  # lora_B is zero before, and so would be most gradients
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        states = target_states(trainer.model, tokens, loss_mask, recompute=recompute)
        gradients.append(torch.autograd.grad(trainer.model.output(states).logsumexp(-1).sum(), adapter))
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_a_sequence_of_any_length_fits_the_memory_that_activations_may_take(tiny_model):
    trainer = make_trainer(tiny_model)
    per_token = 2 * (10 * 128 + 2.5 * 256) * 4
    assert trainer.max_tokens * per_token == pytest.approx(528 * 2**20, rel=0.01)  # its weights are next to nothing


def test_a_trainer_that_one_thread_loads_is_waited_for_by_another(tiny_model, monkeypatch):
    shape = ModelShape.from_config(read_config(tiny_model), where="tiny")
    asked = {**LORA, "dtype": torch.float32, "device": "cpu"}
    loading, may_end, loaded = threading.Event(), threading.Event(), []

    class Slow(Trainer):
        def __init__(self, *args, **settings):
            loading.set()
            assert may_end.wait(60)
            super().__init__(*args, **settings)
            loaded.append(self)

    monkeypatch.setattr("ttt_harness.training.trainer.Trainer", Slow)
    try:
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(shared_trainer, tiny_model, shape, **asked)
            assert loading.wait(60)
            second = threads.submit(shared_trainer, tiny_model, shape, **asked)
            may_end.set()
            assert first.result() is second.result()
        assert len(loaded) == 1
        assert shared_trainer(tiny_model, shape, **asked | {"rank": 4}) is not first.result()
        assert len(loaded) == 2
        assert shared_trainer(tiny_model, shape, **asked | {"rank": 4}) is loaded[1]
    finally:
        release_trainer()


def test_a_trainer_that_could_not_be_loaded_is_loaded_anew(tiny_model, tmp_path):
    shape = ModelShape.from_config(read_config(tiny_model), where="tiny")
    asked = {**LORA, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ModelError):
        shared_trainer(tmp_path, shape, **asked)
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    try:
        assert shared_trainer(tmp_path, shape, **asked).shape == shape
    finally:
        release_trainer()


def test_bfloat16_trains_too(tiny_model, sequences):
    result = make_trainer(tiny_model, dtype=torch.bfloat16).fit(sequences, **FIT)
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.peft_state_dict().values())
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
