"""The original pipeline is given torchtune's stock recipe, the published settings, and this project's sequences."""

import pytest
import yaml
from omegaconf import OmegaConf
from torchtune import config as torchtune_config
from torchtune.data import padded_collate_sft
from torchtune.modules.peft import get_adapter_params

from benchmarks import flops
from benchmarks.original import recipe_config
from benchmarks.tokenized_dataset import write_sequences
from ttt_harness.config import TTTConfig
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ConfigError
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape

SEQUENCES = [
    TrainingSequence((5, 6, 7), (False, True, False)),
    TrainingSequence((8, 9, 3, 4), (False, False, True, True)),
]


@pytest.fixture
def settings(tiny_model, tmp_path):
    shape = ModelShape.from_config(read_config(tiny_model), where="")
    write_sequences(tmp_path / "data.jsonl", SEQUENCES)
    made = recipe_config(
        model_dir=tiny_model,
        shape=shape,
        data=tmp_path / "data.jsonl",
        output=tmp_path / "out",
        sequences=40,
        config=TTTConfig(),
        dtype="bfloat16",
        device="cpu",
    )
    return yaml.safe_load(yaml.safe_dump(made))


def component(settings, name, *arguments, **keywords):
    return torchtune_config.instantiate(OmegaConf.create(settings[name]), *arguments, **keywords)


def test_published_hyperparameters(settings):
    model, optimizer = settings["model"], settings["optimizer"]
    assert model["lora_attn_modules"] == ["q_proj", "v_proj", "output_proj"]
    assert (model["lora_rank"], model["lora_alpha"], model["lora_dropout"]) == (64, 64, 0.05)
    assert (settings["batch_size"], settings["epochs"], settings["dtype"]) == (5, 1, "bf16")
    assert (optimizer["lr"], optimizer["weight_decay"]) == (1e-4, 0.01)
    assert settings["lr_scheduler"]["num_warmup_steps"] == 0  # a tenth of 8 steps
    assert settings["loss"] == {"_component_": "torch.nn.CrossEntropyLoss"}
    assert settings["enable_activation_checkpointing"] is True
    assert settings["compile"] is False


def test_the_model_is_that_of_the_checkpoint(settings, tiny_model):
    model = component(settings, "model")
    shape = ModelShape.from_config(read_config(tiny_model), where="")
    adapter = get_adapter_params(model)
    assert sum(p.numel() for p in adapter.values()) == flops.lora_weights(shape, 64)
    weights = component(settings, "checkpointer").load_checkpoint()["model"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == set(adapter)
    assert not unexpected


def test_the_dataset_holds_the_sequences_and_labels(settings):
    tokenizer = component(settings, "tokenizer")
    rows = [component(settings, "dataset", tokenizer)[index] for index in range(2)]
    batch = padded_collate_sft(rows, padding_idx=tokenizer.pad_id)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0], [8, 9, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 3, 4]]


def test_a_last_batch_that_the_recipe_would_drop_is_refused(tiny_model, tmp_path):
    shape = ModelShape.from_config(read_config(tiny_model), where="")
    with pytest.raises(ConfigError, match="use a multiple of 5"):
        recipe_config(
            model_dir=tiny_model,
            shape=shape,
            data=tmp_path,
            output=tmp_path,
            sequences=41,
            config=TTTConfig(),
            dtype="float32",
            device="cpu",
        )
