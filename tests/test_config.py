"""Settings: defaults, conversion of command-line values, and the sentence that refuses a wrong one."""

import dataclasses
import pickle

import pytest
from lm_eval._cli.utils import key_val_to_dict

from ttt_harness.config import TaskSettings, TTTConfig, nearest
from ttt_harness.errors import ConfigError
from ttt_harness.methods import METHODS


def test_the_published_hyperparameters_are_the_defaults():
    config = TTTConfig()
    assert dataclasses.asdict(config) == {
        "method": "ttt",
        "loss_on": "outputs",
        "num_permutations": 40,
        "shuffle": True,
        "fit_batch_size": 5,
        "epochs": 1,
        "lr": 1e-4,
        "warmup_ratio": 0.1,
        "lora_rank": 64,
        "lora_alpha": 64,
        "lora_dropout": 0.05,
        "seed": 42,
        "k": 10,
        "adapter_dir": None,
        "adapter_limit": None,
        "adapter": None,
        "on_plain_task": "error",
        "truncate": False,
        "settings": None,
        "choose": None,
    }
    assert dataclasses.asdict(TaskSettings()) == {
        "k": 10,
        "seed": 42,
        "vote_permutations": 1,
        "leave_one_out": False,
        "generation_budget": "full",
        "overlap": "refuse",
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_method_brings_its_own_learning_rate_and_epochs_and_an_argument_wins(method):
    config = TTTConfig(method=method)
    assert (config.lr, config.epochs) == (METHODS[method].published.lr, METHODS[method].published.epochs)
    assert TTTConfig(method=method, lr="3e-4", epochs=2).lr == 3e-4


def _of_a_fit(**given):
    config = TTTConfig(**given)
    return config.num_permutations, config.fit_batch_size, config.epochs


def test_without_shuffling_a_fit_takes_the_four_steps_of_the_study_and_an_argument_wins():
    assert _of_a_fit(method="ttt", shuffle=False) == (1, 1, 4)
    assert _of_a_fit(method="shared_ttt", shuffle=False) == (1, 1, 4)
    assert _of_a_fit(method="ttt", shuffle=False, epochs=2) == (1, 1, 2)
    assert _of_a_fit(method="ttt", shuffle=False, num_permutations=40, fit_batch_size=5, epochs=1) == (40, 5, 1)
    # nothing is shuffled in single pairs
    assert _of_a_fit(method="e2e", shuffle=False) == _of_a_fit(method="e2e")


def test_values_of_the_command_line_are_read_without_loss():
    config = TTTConfig.from_mapping({"k": "5", "lr": "1e-3", "shuffle": "False", "lora_alpha": 16, "other": 1})
    assert (config.k, config.lr, config.shuffle, config.lora_alpha) == (5, 1e-3, False, 16.0)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (TTTConfig, "method", "tttt"),
        (TTTConfig, "method", 3),
        (TTTConfig, "loss_on", "inputs"),
        (TTTConfig, "num_permutations", 0),
        (TTTConfig, "num_permutations", 2.5),
        (TTTConfig, "shuffle", "yes"),
        (TTTConfig, "fit_batch_size", -1),
        (TTTConfig, "epochs", "many"),
        (TTTConfig, "lr", -1e-4),
        (TTTConfig, "lr", "nan"),
        (TTTConfig, "warmup_ratio", 1.5),
        (TTTConfig, "lora_rank", 0),
        (TTTConfig, "lora_rank", 513),
        (TTTConfig, "lora_alpha", 0),
        (TTTConfig, "lora_alpha", float("inf")),
        (TTTConfig, "lora_dropout", 1),
        (TTTConfig, "on_plain_task", "skip"),
        (TTTConfig, "seed", -1),
        (TTTConfig, "seed", True),
        (TTTConfig, "k", "ten"),
        (TTTConfig, "k", -1),
        (TTTConfig, "k", None),
        (TaskSettings, "k", "ten"),
        (TaskSettings, "k", float("inf")),
        (TaskSettings, "seed", 2**32),
        (TaskSettings, "vote_permutations", 0),
        (TaskSettings, "vote_permutations", 10**6),
        (TaskSettings, "leave_one_out", "maybe"),
        (TaskSettings, "generation_budget", "large"),
        (TaskSettings, "overlap", "ignore"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_the_rule(settings, name, value):
    with pytest.raises(ConfigError) as refusal:
        settings(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name}={value!r} is not allowed: it must be ")
    assert message.endswith(".")
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(refusal.value))) == message


def test_a_refused_value_is_quoted_as_it_was_given():
    parsed = key_val_to_dict("num_permutations=-1,lora_rank=-12345678,lr=-0.5,shuffle='x.0'")
    assert isinstance(parsed["num_permutations"], float)  # what lm-eval makes of it
    for name, given in {"num_permutations": "-1", "lora_rank": "-12345678", "lr": "-0.5", "shuffle": "'x.0'"}.items():
        with pytest.raises(ConfigError, match=rf"^{name}={given} is not allowed"):
            TTTConfig(**{name: parsed[name]})


def test_no_demonstrations_are_allowed_only_where_nothing_is_fitted():
    assert TTTConfig(method="icl", k=0).k == 0
    with pytest.raises(ConfigError, match="method=icl"):
        TTTConfig(k=0)


@pytest.mark.parametrize(("rank", "reserved"), [(1, 1), (2, 8), (64, 64), (65, 128), (512, 512)])
def test_vllm_reserves_a_rank_that_holds_the_adapter(rank, reserved):
    assert TTTConfig(lora_rank=rank).max_lora_rank == reserved


def test_the_nearest_known_name_is_offered():
    assert nearest("lora_rang", TTTConfig.names()) == " Did you mean 'lora_rank'?"
    assert nearest("xyzzy", TTTConfig.names()) == ""


def test_a_limit_of_the_store_is_a_size():
    for size in ("50GB", "1.5 TiB", "800m", 50, "7"):
        assert TTTConfig.from_mapping({"adapter_limit": size}).adapter_limit == size
    for wrong in ("much", "", "-1GB", True, 1.5, [], "5 PB", "9" * 500):
        with pytest.raises(ConfigError, match=r"adapter_limit=.* is not allowed: it must be a size"):
            TTTConfig.from_mapping({"adapter_limit": wrong})
