"""What a task's adapter is fitted on, and what its key depends on."""

from types import SimpleNamespace

import pytest

from ttt_harness.config import TTTConfig
from ttt_harness.data.support import Demonstration, SupportSet
from ttt_harness.run.groups import Preparation, group_by_task
from ttt_harness.run.local import fit_settings

SUPPORT = SupportSet("Add.\n\n", tuple(Demonstration(f"Q: {n}+1\nA:", f" {n + 1}", "\n\n") for n in range(4)))


def encode(text):
    return list(text.encode()), [(index, index + 1) for index in range(len(text))]


def prepared(**given):
    config = TTTConfig(**given)
    settings = fit_settings(config, "float32")
    (group,) = group_by_task([SimpleNamespace(task_name="t", support_set=SUPPORT)])
    Preparation(
        method=config.how,
        name=config.method,
        encode=encode,
        render=lambda *_: "",
        max_length=1000,
        num_permutations=config.num_permutations,
        shuffle=config.shuffle,
        seed=config.seed,
        loss_on=config.loss_on,
        determinants=lambda sequences: settings.determinants("base", sequences),
    ).prepare([group])
    return group


def test_without_shuffling_an_adapter_is_fitted_on_one_sequence_in_four_steps_of_one():
    group = prepared(shuffle=False)
    assert len(group.sequences) == 1
    fit = group.determinants["fit"]
    assert (fit["batch_size"], fit["epochs"]) == (1, 4)
    assert len(prepared().sequences) == 40


def test_settings_that_are_given_have_the_same_key_as_the_same_settings_by_default():
    assert prepared(shuffle=False).key == prepared(shuffle=False, num_permutations=1, fit_batch_size=1, epochs=4).key
    assert prepared().key == prepared(num_permutations=40, fit_batch_size=5, epochs=1, lr=1e-4).key
    # what was fitted without shuffling before its defaults changed is found by these
    before = prepared(shuffle=False, num_permutations=40, fit_batch_size=5, epochs=1)
    assert len(before.sequences) == 40
    assert len(set(before.sequences)) == 1
    assert before.key != prepared(shuffle=False).key


@pytest.mark.parametrize("method", ["e2e", "shared_e2e"])
def test_shuffling_makes_no_difference_to_single_pairs(method):
    assert prepared(method=method, shuffle=False).key == prepared(method=method).key
