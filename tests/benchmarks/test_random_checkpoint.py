"""Checkpoints of a published geometry load everywhere, and never choose a token that their tokenizer lacks."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.checkpoint import GEOMETRIES, make_checkpoint
from ttt_harness.errors import ModelError
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tiny"
    make_checkpoint(folder, "tiny", tiny_model)
    return folder


def test_transformers_loads_every_weight(tiny):
    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    weights = model.model.layers[1].mlp.up_proj.weight
    assert weights.detach().float().std().item() == pytest.approx(0.02, rel=0.05)


def test_ids_beyond_the_tokenizer_are_never_the_likeliest(tiny):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    known = len(tokenizer)
    assert known < model.config.vocab_size
    with torch.no_grad():
        logits = model(torch.arange(known)[None]).logits
    assert (logits[..., known:] == 0).all()
    assert (logits.argmax(-1) < known).all()


def test_the_same_seed_gives_the_same_weights(tiny, tiny_model, tmp_path):
    make_checkpoint(tmp_path / "again", "tiny", tiny_model)
    for path in tiny.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_that_exists_and_an_unknown_geometry_are_refused(tiny, tiny_model, tmp_path):
    with pytest.raises(ModelError, match="exists already"):
        make_checkpoint(tiny, "tiny", tiny_model)
    with pytest.raises(ModelError, match=r"use one of llama-3\.1-8b, tiny"):
        make_checkpoint(tmp_path / "new", "huge", tiny_model)
    with pytest.raises(ModelError, match=r"no readable tokenizer\.json"):
        make_checkpoint(tmp_path / "new", "tiny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_geometry_is_that_of_llama_3_1_8b():
    config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
    shape = ModelShape.from_config({**config, **GEOMETRIES["llama-3.1-8b"]}, where="")
    assert (shape.num_layers, shape.embed_dim, shape.num_heads, shape.num_kv_heads) == (32, 4096, 32, 8)
    assert (shape.mlp_dim, shape.vocab_size, shape.rope_base, shape.rope_scale) == (14336, 128256, 500000, 8)
    assert shape.tied_embeddings is False


def test_its_config_is_read_by_the_project(tiny):
    shape = ModelShape.from_config(read_config(tiny), where="")
    assert shape.vocab_size == json.loads((tiny / "config.json").read_text())["vocab_size"]
