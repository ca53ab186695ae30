"""What is exported is what was stored, in a form that peft loads and a person can read."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.adapters.stores import MODELS, add_adapter
from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.adapters import find, open_store
from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ttt_harness.adapters.user import check_user_adapter


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "adapters")


def export(store, key, folder, *options):
    return cli.main(["adapters", "export", "--adapter_dir", str(store.root), key, str(folder), *map(str, options)])


def head_of(card: str):
    return yaml.safe_load(card.split("---\n")[1])


def test_peft_gives_the_answers_of_the_stored_adapter(store, tiny_model, tmp_path, capsys):
    shape = (8, 128)
    weights = {}
    for layer in range(2):
        for module in ("q_proj", "o_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights |= {f"{name}.lora_A.weight": torch.randn(shape), f"{name}.lora_B.weight": torch.randn(shape).T}
    how = {"base_model": str(tiny_model), "rank": 8, "alpha": 16, "dropout": 0.05}
    stored = store.save("k", weights, **how, record={"task": "t", "settings": {"method": "ttt"}, "losses": [1.0]})
    assert export(store, "k", tmp_path / "out" / "adapter") == 0
    assert "note: the base model is the path" in capsys.readouterr().err
    tokens = torch.tensor([[5, 6, 7, 8]])

    def logits(folder):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        model = base if folder is None else PeftModel.from_pretrained(base, folder)
        with torch.no_grad():
            return model(tokens).logits

    exported = logits(tmp_path / "out" / "adapter")
    assert torch.equal(exported, logits(stored.path))
    assert not torch.allclose(exported, logits(None), atol=0.1)
    assert check_user_adapter(tmp_path / "out" / "adapter", tiny_model).rank == 8


def test_the_card_tells_where_an_adapter_comes_from(store, tmp_path, capsys):
    stored = add_adapter(store, lr=5e-5)
    said = ttt(["bbh_ttt_snarks"])
    said["tasks"]["bbh_ttt_snarks"]["adapter"] = str(stored.path)
    results = write_run(tmp_path / "results", {"bbh_ttt_snarks": [1, 0, 1, 1]}, source="ttt_vllm", ttt=said)
    assert export(store, stored.key[:8], tmp_path / "out", "--results", results) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, "README.md"}
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"  # not the path of this machine's cache
    card = (tmp_path / "out" / "README.md").read_text()
    assert head_of(card)["base_model"] == "meta-llama/Llama-3.1-8B"
    for words in (
        "| fitted for | bbh\\_ttt\\_snarks |",
        "| lr | 5e-05 |",
        stored.record["determinants"]["sequences"],
        "| bbh\\_ttt\\_snarks | acc,answer | 0.7500 | results",
        'PeftModel.from_pretrained(base, "out")',
        "vllm serve meta-llama/Llama-3.1-8B --enable-lora --max-lora-rank 8 --lora-modules bbh_ttt_snarks-ttt=out",
    ):
        assert words in card
    weights = read_adapter(stored.path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_adapter(tmp_path / "out").items())


def test_the_base_model_can_be_named(store, tmp_path, capsys):
    stored = add_adapter(store, model=MODELS[1])
    assert export(store, stored.key, tmp_path / "out", "--base_model", "HuggingFaceTB/SmolLM2-135M-Instruct") == 0
    assert capsys.readouterr().err == ""
    assert head_of((tmp_path / "out" / "README.md").read_text())["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_names_of_others_do_not_change_the_card(store, tmp_path):
    stored = add_adapter(store, "a | b\n# heading\n---\nbase_model: other\x1b[31m`$(rm)`", model="/m/x\n---\nmalice: 1")
    assert export(store, stored.key, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert set(head_of(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "\n# heading" not in card
    assert "\x1b" not in card
    assert "$(rm)" not in card.split("## Loading")[1]


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_nothing_is_written_over(kind, store, tmp_path, capsys):
    stored = add_adapter(store)
    folder = tmp_path / "out"
    if kind == "full":
        folder.mkdir()
        (folder / "mine").write_text("mine")
    elif kind == "file":
        folder.write_text("mine")
    else:
        folder.symlink_to("nothing")
    assert export(store, stored.key, folder) == 1
    assert "is there already" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".export")]


def test_into_an_empty_folder_and_under_a_file(store, tmp_path, capsys):
    stored = add_adapter(store)
    (tmp_path / "empty").mkdir()
    assert export(store, stored.key, tmp_path / "empty") == 0
    (tmp_path / "file").write_text("")
    assert export(store, stored.key, tmp_path / "file" / "x" / "out") == 1
    assert "cannot be written" in capsys.readouterr().err
    (stored.path / WEIGHTS_NAME).write_bytes(b"")
    assert export(store, stored.key, tmp_path / "damaged") == 1
    assert not (tmp_path / "damaged").exists()


def test_find_and_the_store_that_runs_use(store, monkeypatch, tmp_path):
    add_adapter(store)
    add_adapter(store, "other", model=MODELS[1])
    assert [entry.task for entry in find(store, model="smollm2*")] == ["other"]
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))
    assert open_store().root == tmp_path / "cache" / "adapters"
    assert open_store("~/x").root == Path("~/x").expanduser()
