"""Adapters that users bring: what peft writes is taken, and whatever would be served wrongly is one sentence."""

import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from ttt_harness.adapters.user import UserAdapters, adapters_by_task, check_user_adapter
from ttt_harness.errors import ConfigError

Q = "base_model.model.model.layers.1.self_attn.q_proj"


def save_with_peft(model_dir, folder, **config):
    """An adapter as peft saves it, of random weights."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**{**settings, "init_lora_weights": False, **config}))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    return save_with_peft(tiny_model, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS_NAME)
    change(weights)
    save_file(weights, folder / WEIGHTS_NAME)


def test_what_peft_writes_is_taken(adapter, tiny_model, caplog):
    found = check_user_adapter(adapter, tiny_model)
    assert (found.path, found.rank, found.modules) == (adapter, 4, ("down_proj", "q_proj"))
    assert found.base_model == str(tiny_model)
    assert check_user_adapter(str(adapter), tiny_model).name == found.name
    assert "cannot be told" not in caplog.text


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"target_modules": "all-linear"}, 4),
        pytest.param(
            {"target_modules": ["embed_tokens", "lm_head"]},
            4,
            marks=pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
        ),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 16}}, 16),
        ({"use_rslora": True, "layers_to_transform": [1]}, 4),
    ],
)
def test_other_kinds_that_vllm_serves_are_taken(tiny_model, tmp_path, config, rank):
    folder = save_with_peft(tiny_model, tmp_path, **config)
    assert check_user_adapter(folder, tiny_model).rank == rank


def test_older_files_of_weights_are_taken(adapter, tiny_model):
    torch.save(load_file(adapter / WEIGHTS_NAME), adapter / "adapter_model.bin")
    (adapter / WEIGHTS_NAME).unlink()
    assert check_user_adapter(adapter, tiny_model).rank == 4


def test_the_name_depends_on_weights_and_config(adapter, tiny_model):
    names = {check_user_adapter(adapter, tiny_model).name}
    change_config(adapter, lora_alpha=16)
    names.add(check_user_adapter(adapter, tiny_model).name)
    change_weights(adapter, lambda weights: weights[f"{Q}.lora_B.weight"].mul_(2))
    names.add(check_user_adapter(adapter, tiny_model).name)
    assert len(names) == 3


BAD_CONFIGS = {
    "prefix tuning": ({"peft_type": "PREFIX_TUNING"}, "peft_type='PREFIX_TUNING'"),
    "no rank": ({"r": None}, "r=None"),
    "a rank of another type": ({"r": True}, "r=True"),
    "no scale": ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    "a scale as a word": ({"lora_alpha": "8"}, "lora_alpha='8'"),
    "another rank than the weights'": ({"r": 8}, "rank 4 and 4, and its adapter_config.json states 8"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "trained biases": ({"bias": "all"}, "bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a pattern of words": ({"rank_pattern": {"q_proj": "many"}}, "rank_pattern"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "no modules": ({"target_modules": None, "r": 0}, "r=0"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_vllm_would_not_serve_as_it_was_trained(name, adapter, tiny_model):
    changes, words = BAD_CONFIGS[name]
    change_config(adapter, **changes)
    refused(adapter, tiny_model, words)


def refused(folder, model_dir, words, **options):
    with pytest.raises(ConfigError) as refusal:
        check_user_adapter(folder, model_dir, **options)
    sentence = str(refusal.value)
    assert words in sentence
    assert "\n" not in sentence
    assert sentence.startswith(f"adapter={folder}")


@pytest.mark.parametrize("content", ["[]", "null", "{", "", "\0", '{"r": ' + "9" * 5000 + "}"])
def test_a_config_that_is_none(content, adapter, tiny_model):
    (adapter / CONFIG_NAME).write_text(content)
    refused(adapter, tiny_model, CONFIG_NAME)


BAD_WEIGHTS = {
    "half of a pair": (lambda w: w.pop(f"{Q}.lora_A.weight"), "without its other half"),
    "a layer that is not there": (
        lambda w: [w.update({f"{Q.replace('1', '7')}.lora_{s}.weight": w.pop(f"{Q}.lora_{s}.weight")}) for s in "AB"],
        "layers.7.self_attn.q_proj, which the base model",
    ),
    "other widths": (
        lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 64)}),
        "from 64 to 128, and that of the base model",
    ),
    "another tensor": (lambda w: w.update({"model.lm_head.weight": torch.ones(2, 2)}), "model.lm_head.weight"),
    "a vector": (lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4)}), "not two sides"),
    "NaN": (lambda w: w[f"{Q}.lora_B.weight"].fill_(float("nan")), "not finite"),
    "infinity": (lambda w: w[f"{Q}.lora_A.weight"].view(-1)[3:4].fill_(float("-inf")), "not finite"),
    "nothing": (lambda w: w.clear(), "no tensors"),
    "the vocabulary of another model": (
        lambda w: w.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(321, 128)}),
        "vocabulary",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_do_not_fit(name, adapter, tiny_model):
    change, words = BAD_WEIGHTS[name]
    change_weights(adapter, change)
    refused(adapter, tiny_model, words)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x08\0\0\0\0\0\0\0{}      "])
def test_weights_that_cannot_be_read(name, content, adapter, tiny_model):
    (adapter / WEIGHTS_NAME).unlink()
    (adapter / name).write_bytes(content)
    refused(adapter, tiny_model, "adapter=")


def test_a_cut_file_of_weights(adapter, tiny_model):
    data = (adapter / WEIGHTS_NAME).read_bytes()
    (adapter / WEIGHTS_NAME).write_bytes(data[: len(data) // 2])
    refused(adapter, tiny_model, "cannot be read")


def test_what_is_no_peft_directory(tmp_path, adapter, tiny_model):
    refused(tmp_path / "nothing", tiny_model, "not there")
    refused(adapter / CONFIG_NAME, tiny_model, "a file")
    refused(tmp_path, tiny_model, f"no {CONFIG_NAME}")
    refused("x" * 300, tiny_model, "not there")
    refused("\0", tiny_model, "not there")
    refused(True, tiny_model, "no path")
    (adapter / WEIGHTS_NAME).unlink()
    refused(adapter, tiny_model, f"no {WEIGHTS_NAME}")


def test_the_rank_that_the_engine_takes(adapter, tiny_model):
    refused(adapter, tiny_model, "has rank 4, and vLLM takes at most 1 here", max_rank=1)


def test_another_base_model(adapter, tiny_model, make_model, tmp_path, caplog):
    refused(adapter, make_model(hidden_size=64), "was made for the base model")
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert check_user_adapter(adapter, copy).base_model == str(tiny_model)
    assert "cannot be told" not in caplog.text
    change_config(adapter, base_model_name_or_path="org/another")
    with caplog.at_level(logging.WARNING):
        check_user_adapter(adapter, copy)
    assert "cannot be told" in caplog.text


def test_names_on_the_hub_that_differ(adapter, tiny_model, tmp_path, caplog):
    here = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "d04e592"
    shutil.copytree(tiny_model, here)
    change_config(adapter, base_model_name_or_path="meta-llama/Llama-3.1-8B-Instruct")
    refused(
        adapter, here, "was made for the base model meta-llama/Llama-3.1-8B-Instruct, and this run's is meta-llama/"
    )
    change_config(adapter, base_model_name_or_path="somebody/llama-3.1-8b")
    check_user_adapter(adapter, here)
    assert "cannot be told" not in caplog.text


def test_a_model_that_transformers_cannot_build_is_left_to_vllm(adapter, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    (model / "config.json").write_text('{"model_type": "of_tomorrow", "auto_map": {"AutoConfig": "x.Y"}}')
    assert check_user_adapter(adapter, model).rank == 4


@pytest.mark.parametrize("form", ["mapping", "json", "yaml", "json file", "yaml file"])
def test_an_adapter_for_each_task(form, tmp_path):
    wanted = {"one": "/adapters/a", "two": "org/b"}
    given = {"mapping": wanted, "json": json.dumps(wanted), "yaml": "{one: /adapters/a, two: org/b}"}.get(form)
    if given is None:
        path = tmp_path / f"adapters.{form.split()[0]}"
        path.write_text(json.dumps(wanted) if "json" in form else "one: /adapters/a\ntwo: org/b\n")
        given = str(path)
    assert adapters_by_task(given) == wanted
    assert adapters_by_task("/adapters/a") == "/adapters/a"


@pytest.mark.parametrize(
    "given",
    ["{", "{}", "{a: 3}", "{a: }", "{a: [b]}", "{a: &b [*b]}", "{3: a}", "nothing.json", "{a: !!python/name:os.x }"],
)
def test_what_is_no_mapping_of_tasks_to_adapters(given):
    with pytest.raises(ConfigError, match="adapter=") as refusal:
        adapters_by_task(given)
    assert "\n" not in str(refusal.value)


def test_a_task_that_no_adapter_is_for(adapter, tiny_model):
    checked = check_user_adapter(adapter, tiny_model)
    adapters = UserAdapters(by_task={"one": checked})
    assert adapters.of("one") is checked
    with pytest.raises(ConfigError, match="names no adapter for two, but for one"):
        adapters.of("two")
    assert UserAdapters(checked).of("two") is checked
