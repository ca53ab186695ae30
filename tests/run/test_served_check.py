"""A wrongly served adapter is found: served log-probabilities are computed by transformers + peft, faults and all."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ModelError
from ttt_harness.run import served_check
from ttt_harness.run.served_check import compare_served
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.trainer import LogProbabilities, Trainer

LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}
FIT = {"batch_size": 2, "epochs": 6, "lr": 5e-3, "warmup_ratio": 0.0}
HEADS, HEAD_DIM = 4, 32


@dataclass(frozen=True)
class Fitted:
    """A trainer, a sequence, and two adapters of it: state dicts of the trainer, and folders."""

    trainer: Trainer
    sequence: TrainingSequence
    states: list
    folders: list


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def fitted(request, tiny_model, tmp_path_factory):
    shape = ModelShape.from_config(read_config(tiny_model), where="tiny")
    trainer = Trainer(tiny_model, shape, **LORA, dtype=getattr(torch, request.param), device="cpu")
    rng = torch.Generator().manual_seed(0)
    sequences = [
        TrainingSequence(
            tuple(torch.randint(2, 320, (60,), generator=rng).tolist()), tuple(i % 3 == 2 for i in range(60))
        )
        for _ in range(4)
    ]
    states, folders = [], []
    for seed, seen in enumerate((sequences[:2], sequences[2:])):
        result = trainer.fit(seen, **FIT, seed=seed)
        states.append(result.tune_state_dict)
        folders.append(tmp_path_factory.mktemp("adapter"))
        write_adapter(folders[-1], result.peft_state_dict(), base_model=str(tiny_model), **LORA)
    return Fitted(trainer, sequences[0], states, folders)


def dtype_of(fitted):
    return str(fitted.trainer.dtype).removeprefix("torch.")


def served(fitted, model_dir, folder):
    """What a server that reads `folder` computes."""

    def log_probabilities(model):
        with torch.no_grad():
            logits = model(torch.tensor([fitted.sequence.tokens])).logits[0].float()
        every = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(fitted.sequence.tokens[1:])[:, None])[:, 0]
        return tuple(every[torch.tensor(fitted.sequence.loss_mask[1:])].tolist())

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=fitted.trainer.dtype)
    plain = log_probabilities(base)
    if folder is None:
        return LogProbabilities(adapter=plain, base=plain)
    return LogProbabilities(adapter=log_probabilities(PeftModel.from_pretrained(base, folder)), base=plain)


def changed(folder, to, *, weights=lambda _, tensor: tensor, **config):
    """A copy of an adapter, its weights and its config changed."""
    given = json.loads((folder / CONFIG_NAME).read_text())
    (to / CONFIG_NAME).write_text(json.dumps(given | config))
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({name: weights(name, tensor).contiguous() for name, tensor in tensors.items()}, to / WEIGHTS_NAME)
    return to


def permuted_q(name, tensor):
    """As a converter does that takes a model's rotated halves for pairs of neighbours."""
    if "q_proj.lora_B" not in name:
        return tensor
    return tensor.view(HEADS, 2, HEAD_DIM // 2, -1).transpose(1, 2).reshape(tensor.shape)


def test_an_adapter_that_is_served_as_trained_passes(fitted, tiny_model):
    trained = fitted.trainer.log_probabilities(fitted.sequence, fitted.states[0])
    check = compare_served(trained, served(fitted, tiny_model, fitted.folders[0]), dtype=dtype_of(fitted))
    assert check.verdict == served_check.AS_TRAINED
    assert check.passed
    check.raise_if_failed("task")
    assert check.tokens == sum(fitted.sequence.loss_mask) == 20
    assert check.mean_difference <= check.largest_difference
    assert check.effect > 4 * check.tolerance
    record = check.as_record()
    assert json.loads(json.dumps(record)) == record
    assert {"verdict", "mean_difference", "largest_difference"} <= record.keys()


@pytest.mark.parametrize("fault", ["alpha doubled", "alpha halved", "another adapter", "not applied", "another base"])
def test_a_fault_is_found_in_every_dtype(fitted, tiny_model, make_model, tmp_path, fault):
    folder, model_dir, verdict = fitted.folders[0], tiny_model, served_check.OTHER_ADAPTER
    if fault == "alpha doubled":
        folder = changed(folder, tmp_path, lora_alpha=32)
    elif fault == "alpha halved":
        folder = changed(folder, tmp_path, lora_alpha=8)
    elif fault == "another adapter":
        folder = fitted.folders[1]
    elif fault == "not applied":
        folder, verdict = None, served_check.NOT_APPLIED
    else:
        model_dir, verdict = make_model(rope_theta=100.0), served_check.OTHER_BASE
    trained = fitted.trainer.log_probabilities(fitted.sequence, fitted.states[0])
    check = compare_served(trained, served(fitted, model_dir, folder), dtype=dtype_of(fitted))
    assert check.verdict == verdict
    assert not check.passed
    with pytest.raises(ModelError, match=f"^mytask: {verdict} .*on average.* nothing was answered\\.$") as error:
        check.raise_if_failed("mytask")
    assert "\n" not in str(error.value)


# In 16 bits, rounding hides the fault of one projection of a small adapter.
@pytest.mark.parametrize("fitted", ["float32"], indirect=True)
def test_wrongly_permuted_rows_of_one_projection_are_found(fitted, tiny_model, tmp_path):
    trained = fitted.trainer.log_probabilities(fitted.sequence, fitted.states[0])
    folder = changed(fitted.folders[0], tmp_path, weights=permuted_q)
    check = compare_served(trained, served(fitted, tiny_model, folder), dtype="float32")
    assert check.verdict == served_check.OTHER_ADAPTER


def test_an_adapter_without_effect_is_said_to_have_none(fitted, tiny_model):
    trained = fitted.trainer.log_probabilities(fitted.sequence, fitted.states[0])
    base = LogProbabilities(adapter=trained.base, base=trained.base)
    check = compare_served(base, served(fitted, tiny_model, None), dtype=dtype_of(fitted))
    assert check.verdict == served_check.NO_EFFECT
    assert check.passed
    assert check.effect == 0


def test_log_probabilities_leave_the_trainer_as_it_was(fitted):
    before = fitted.trainer.fit([fitted.sequence], **FIT, seed=5)
    first = fitted.trainer.log_probabilities(fitted.sequence, fitted.states[0])
    assert fitted.trainer.log_probabilities(fitted.sequence, fitted.states[0]) == first
    assert first != fitted.trainer.log_probabilities(fitted.sequence, fitted.states[1])
    after = fitted.trainer.fit([fitted.sequence], **FIT, seed=5)
    assert before.losses == after.losses
    torch.testing.assert_close(before.tune_state_dict, after.tune_state_dict, rtol=0, atol=0)


def test_a_small_adapter_that_is_not_applied_is_found_although_it_is_too_small_to_be_compared():
    base = (-1.0, -2.0, -3.0)
    trained = LogProbabilities(adapter=(-1.05, -2.03, -3.05), base=base)
    check = compare_served(trained, LogProbabilities(adapter=base, base=base), dtype="bfloat16")
    assert check.mean_difference < check.tolerance
    assert check.verdict == served_check.NOT_APPLIED
    near = LogProbabilities(adapter=(-1.03, -2.05, -3.02), base=base)
    assert compare_served(trained, near, dtype="bfloat16").verdict == served_check.NO_EFFECT


def test_what_is_not_a_number_never_passes():
    good = LogProbabilities(adapter=(-1.0, -2.0), base=(-3.0, -4.0))
    for bad in (
        LogProbabilities(adapter=(-1.0, math.nan), base=(-3.0, -4.0)),
        LogProbabilities(adapter=(-1.0, -2.0), base=(math.nan, -4.0)),
    ):
        for pair in ((good, bad), (bad, good)):
            assert not compare_served(*pair, dtype="float32").passed
