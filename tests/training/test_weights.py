"""A config.json that is not of its weights is refused by the files' headers, before anything is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from ttt_harness.errors import ModelError
from ttt_harness.training.model_config import read_config
from ttt_harness.training.weights import check_weights

# Each key, the value of which transformers would take from one model of the family.
UNSTATED = [
    ("llama3", "num_key_value_heads"),
    ("qwen3", "num_key_value_heads"),
    ("qwen3", "head_dim"),
    ("olmo2", "vocab_size"),
    ("olmo2", "intermediate_size"),
    ("olmo2", "num_attention_heads"),
    ("gemma3", "num_key_value_heads"),
    ("gemma3", "head_dim"),
    ("phi4-mini", "num_key_value_heads"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Gives the folder of a checkpoint by its name."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            write_checkpoint(folders[name], CHECKPOINTS[name])
        return folders[name]

    return folder


def refusal_of(folder, config):
    with pytest.raises(ModelError) as refusal:
        check_weights(folder, config)
    assert str(refusal.value).startswith(str(folder))
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_fits_its_weights(name, checkpoint):
    check_weights(checkpoint(name), read_config(checkpoint(name)))


@pytest.mark.parametrize(("name", "key"), UNSTATED)
def test_a_size_that_is_not_stated(name, key, checkpoint):
    config = {given: value for given, value in CHECKPOINTS[name].items() if given != key}
    said = refusal_of(checkpoint(name), config)
    assert key in said.partition("it does not state")[2]


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_size_that_is_another(name, key, checkpoint):
    said = refusal_of(checkpoint(name), CHECKPOINTS[name] | {key: 2 * CHECKPOINTS[name][key]})
    assert "and by the config it would have" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn])
def test_matrices_that_are_quantized_whatever_the_config_says(dtype, checkpoint, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(checkpoint("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
    assert f"quantized weights ({name} is stored as" in refusal_of(folder, read_config(folder))


def test_a_cut_file_and_one_that_is_missing(checkpoint, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint("qwen3"), folder)
    config = read_config(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a readable safetensors file" in refusal_of(folder, config)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    assert "lacks b.safetensors" in refusal_of(folder, config)
