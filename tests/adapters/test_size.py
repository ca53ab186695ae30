"""What an adapter takes on disk is known before it is fitted; sizes are read and shown as people write them."""

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import CHECKPOINTS, FAMILY_TABLE
from ttt_harness.adapters.peft import WEIGHTS_NAME
from ttt_harness.adapters.size import SMALL_FILES, TABLE_BYTES_OF_LAYER, adapter_bytes, parse_size, size_text
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.errors import ConfigError
from ttt_harness.training import general
from ttt_harness.training.families import FAMILIES
from ttt_harness.training.model_config import as_transformers_config
from ttt_harness.training.shape import ModelShape


def fitted_weights(shape, rank, dtype):
    """The weights that a fit would write, of zeros."""
    from ttt_harness.training.tune import get_adapter_params, set_default_dtype

    family = FAMILIES[shape.architecture]
    with set_default_dtype(dtype):
        model = family.build(shape, max_seq_len=64, rank=rank, alpha=rank, dropout=0.0)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in get_adapter_params(model).items()}
    return family.to_peft(zeros, shape)


@pytest.mark.parametrize(
    ("name", "rank", "dtype"),
    [(name, 8, torch.bfloat16) for _, way, names in FAMILY_TABLE.values() if way == "fast" for name in names]
    + [("llama3", 1, torch.float32), ("phi3", 64, torch.float32), ("qwen2", 32, torch.bfloat16)],
)
def test_the_size_is_that_of_the_file(name, rank, dtype, tmp_path):
    shape = ModelShape.from_config(CHECKPOINTS[name], where=name)
    weights = fitted_weights(shape, rank, dtype)
    stored = AdapterStore(tmp_path).save(
        "k", weights, base_model="b" * 100, rank=rank, alpha=rank, dropout=0.05, record={"losses": [0.123456] * 400}
    )
    sizes = {path.name: path.stat().st_size for path in stored.path.iterdir()}
    assert adapter_bytes(shape, rank, dtype) - SMALL_FILES == sizes.pop(WEIGHTS_NAME)
    assert sum(sizes.values()) < SMALL_FILES


@pytest.mark.parametrize("name", ["granite", "phi4-mini"])
def test_the_size_is_about_that_of_the_file_for_models_that_are_fitted_the_general_way(name, tmp_path):
    config = CHECKPOINTS[name] | {"num_hidden_layers": 12}
    shape = ModelShape.from_config(config, where=name)
    model = general.model_without_storage(as_transformers_config(config, where=name))
    adapter = general.GeneralDecoder(model, rank=8, alpha=8, dropout=0.0).adapter
    zeros = {key: torch.zeros(tensor.shape, dtype=torch.bfloat16) for key, tensor in adapter.items()}
    save_file(general.to_peft(zeros), tmp_path / "file")
    counted = adapter_bytes(shape, 8, torch.bfloat16) - SMALL_FILES
    assert 0 <= counted - (tmp_path / "file").stat().st_size <= 12 * TABLE_BYTES_OF_LAYER


def test_the_size_at_8b():
    config = CHECKPOINTS["llama3.1"] | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    }  # fmt: skip
    shape = ModelShape.from_config(config, where="8B")
    assert size_text(adapter_bytes(shape, 64, torch.bfloat16)) == "315 MB"  # as measured on such a store


@pytest.mark.parametrize(
    ("text", "size"),
    [("50GB", 50e9), ("1.5 TB", 1.5e12), ("800MiB", 800 * 2**20), ("7", 7), ("3k", 3000), ("2g", 2e9), ("0B", 0)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text, of="--keep") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "ten", "1e9", "5 PB", "1.2.3GB", "9" * 400, "nan", "1 GB x"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"--keep=.* is no size; write for example 50GB"):
        parse_size(text, of="--keep")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (315_000_000, "315 MB"), (999_600, "1 MB"), (2.1e11, "210 GB"),
     (4.2e12, "4.2 TB"), (1.3e16, "13000 TB")],
)  # fmt: skip
def test_sizes_are_shown(size, text):
    assert size_text(size) == text
