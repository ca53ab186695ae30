"""vLLM serves the very model that was trained, for every family; marked integration, for real engine starts.

One process, `tests/integration/served_families.py`, starts the engines one after the other, so that vLLM is imported
once and no engine has to start a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from ttt_harness.errors import ConfigError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def served(save_tokenizer, tmp_path_factory):
    """What each family's trainer and engine computed: name -> what the script wrote."""
    folder = tmp_path_factory.mktemp("families")
    for name, config in CHECKPOINTS.items():
        (folder / name).mkdir()
        save_tokenizer(folder / name)
        write_checkpoint(folder / name, config)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.served_families", folder],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    made = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert made, done.stderr[-4000:]
    return made


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_trained_log_probabilities_are_those_of_vllm(name, served):
    record = served[name]
    assert "error" not in record, record["error"]
    for check in record["adapters"]:
        assert check["verdict"] == "served as trained"
        assert check["largest_difference"] < 2e-3
        assert check["base_difference"] < 1e-3
        assert check["effect"] > 0.1
        assert check["changes_output"]
    assert record["between_adapters"] > 1e-2  # each under its own name
    assert not record["without_effect_changes_output"]


def test_vllm_reserves_the_rank_under_which_adapters_are_written(save_tokenizer, tmp_path):
    from ttt_harness.harness.model import TTTVLLM

    for name in ("phi3", "mistral"):
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name)
        write_checkpoint(tmp_path / name, CHECKPOINTS[name])
    phi3 = {"pretrained": str(tmp_path / "phi3"), "dtype": "float32", "max_model_len": 256}
    assert TTTVLLM(**phi3, lora_rank=64).answering.model.engine_args["max_lora_rank"] == 128
    assert (
        TTTVLLM(**phi3 | {"pretrained": str(tmp_path / "mistral")}).answering.model.engine_args["max_lora_rank"] == 64
    )
    with pytest.raises(ConfigError, match="vLLM takes one of 128, 256, 320, 512 for lora_rank=64"):
        TTTVLLM(**phi3, lora_rank=64, max_lora_rank=64)
    with pytest.raises(ConfigError, match="lora_rank=300 is not allowed for Phi3ForCausalLM"):
        TTTVLLM(**phi3, lora_rank=300)
