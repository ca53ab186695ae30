"""Every family trains the very model that transformers + peft run, or says why not; for vLLM see the integration."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from ttt_harness.adapters.peft import write_adapter
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ModelError
from ttt_harness.training.families import FAMILIES
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import FAST, ModelShape
from ttt_harness.training.trainer import FitResult, Trainer, target_states

FIT = {"batch_size": 2, "epochs": 3, "lr": 2e-2, "warmup_ratio": 0.0, "seed": 7}
LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}
# The families that transformers' own model computes; the others are built from torchtune's modules.
GENERAL = {"smollm3", "gemma3", "phi4-mini", "olmo2", "granite"}
# The same families with switches that the table of checkpoints leaves as most models have them.
VARIANTS = {
    **CHECKPOINTS,
    "llama3 with wide heads": CHECKPOINTS["llama3"] | {"head_dim": 64},
    "qwen3 with a window in its last layer": CHECKPOINTS["qwen3"]
    | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "mistral without a window": CHECKPOINTS["mistral"] | {"sliding_window": None},
    "qwen2 with a window in its last layer": CHECKPOINTS["qwen2"] | {"use_sliding_window": True},
    "gemma with keys for each head": CHECKPOINTS["gemma"] | {"num_key_value_heads": 4},
    "gemma2 without caps": CHECKPOINTS["gemma2"] | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "phi3 with keys for each head": CHECKPOINTS["phi3"] | {"num_key_value_heads": 4, "sliding_window": None},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Gives the folder of a checkpoint by its name."""
    folders: dict[str, Path] = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("checkpoint")
            write_checkpoint(folders[name], VARIANTS[name])
        return folders[name]

    return folder


@pytest.fixture(scope="module")
def sequences():
    rng = torch.Generator().manual_seed(0)
    made = []
    for length in (24, 50):  # the windows are of 16 tokens
        tokens = torch.randint(2, 320, (length,), generator=rng).tolist()
        made.append(TrainingSequence(tuple(tokens), tuple(i > 0 and i % 3 == 0 for i in range(length))))
    return made


def make_trainer(model_dir, dtype=torch.float32):
    shape = ModelShape.from_config(read_config(model_dir), where=str(model_dir))
    return Trainer(model_dir, shape, **LORA, dtype=dtype, device="cpu", context=256)


def transformers_model(model_dir):
    # "eager", since transformers' other kinds of attention leave out Gemma 2's cap on the scores
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")


def test_every_row_of_the_table_has_a_checkpoint():
    assert FAST.keys() == FAMILIES.keys()
    assert FAST.keys() <= {config["architectures"][0] for config in CHECKPOINTS.values()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_each_family_is_fitted_the_way_that_is_stated(name):
    way = ModelShape.from_config(CHECKPOINTS[name], where="here").way
    assert way == ("general" if name in GENERAL else "fast")


@pytest.mark.parametrize("name", VARIANTS)
def test_trained_logits_are_those_of_transformers_and_peft(name, checkpoint, sequences, tmp_path):
    trainer = make_trainer(checkpoint(name))
    base = transformers_model(checkpoint(name))
    tokens, loss_mask = torch.tensor([sequences[1].tokens]), torch.tensor([sequences[1].loss_mask])
    trainer.fit(sequences, **{**FIT, "epochs": 0})
    trainer.model.eval()
    with torch.no_grad():
        plain = base(tokens).logits
        torch.testing.assert_close(trainer.model(tokens), plain, rtol=1e-3, atol=1e-3)
    result = trainer.fit(sequences, **FIT)
    write_adapter(tmp_path, result.peft_state_dict(), base_model=str(checkpoint(name)), **LORA)
    trainer.model.eval()
    with torch.no_grad():
        trained = trainer.model(tokens)
        of_labels = trainer.model.output(target_states(trainer.model, tokens, loss_mask))
        served = PeftModel.from_pretrained(base, tmp_path)(tokens).logits
    torch.testing.assert_close(trained, served, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(of_labels, served[:, :-1][loss_mask[:, 1:]], rtol=1e-3, atol=1e-3)
    assert (trained - plain).abs().max() > 0.1  # so the adapter has an effect to compare


@pytest.mark.parametrize("name", ["mistral", "gemma", "gemma2", "qwen3", "granite", "phi4-mini"])
def test_gradients_are_those_of_transformers_and_peft(name, checkpoint, sequences, tmp_path):
    trainer = make_trainer(checkpoint(name))
    write_adapter(tmp_path, trainer.fit(sequences, **FIT).peft_state_dict(), base_model=str(checkpoint(name)), **LORA)
    trainer.model.eval()  # without dropout, whose random numbers differ
    tokens, loss_mask = torch.tensor([sequences[1].tokens]), torch.tensor([sequences[1].loss_mask])
    ours = trainer.model.output(target_states(trainer.model, tokens, loss_mask))
    functional.cross_entropy(ours, tokens[loss_mask]).backward()
    served = PeftModel.from_pretrained(transformers_model(checkpoint(name)), tmp_path, is_trainable=True).eval()
    theirs = served(tokens).logits[:, :-1][loss_mask[:, 1:]]
    functional.cross_entropy(theirs, tokens[loss_mask]).backward()
    gradients = {key: parameter.grad for key, parameter in served.named_parameters() if parameter.requires_grad}
    of_ours = {key: parameter.grad for key, parameter in trainer.adapter.items()}
    ours = FitResult(of_ours, trainer.shape, [], 0, 0.0).peft_state_dict()
    assert len(ours) == len(gradients) > 0
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, gradients[key.replace(".weight", ".default.weight")], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma", "gemma2", "phi3", "qwen3", "gemma3"])
def test_bfloat16_trains_too(name, checkpoint, sequences):
    result = make_trainer(checkpoint(name), torch.bfloat16).fit(sequences, **{**FIT, "epochs": 6})
    assert all(tensor.dtype == torch.bfloat16 for tensor in result.peft_state_dict().values())
    assert result.losses[-1] < result.losses[0]


def test_capped_scores_are_not_kept_for_the_gradient(checkpoint):
    model = make_trainer(checkpoint("gemma2")).model
    kept = []
    for length in (64, 128):
        tokens = torch.zeros((1, length), dtype=torch.long)
        loss_mask = torch.ones_like(tokens, dtype=torch.bool)
        sizes = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            target_states(model, tokens, loss_mask)
        kept.append(sum(sizes))
    assert kept[1] < 2.2 * kept[0]


def test_an_adapter_of_fused_projections_is_the_sum_of_its_parts(checkpoint, sequences, tmp_path):
    trainer = make_trainer(checkpoint("phi3"))
    weights = trainer.fit(sequences, **FIT).peft_state_dict()
    write_adapter(tmp_path, weights, base_model="phi3", **LORA)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (trainer.shape.adapter_rank(8), 32) == (16, 32)
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    for layer, block in enumerate(trainer.model.layers):
        name = f"base_model.model.model.layers.{layer}"
        for target, parts in {
            "self_attn.qkv_proj": (block.attn.q_proj, 64, block.attn.v_proj),
            "self_attn.o_proj": (block.attn.output_proj,),
            "mlp.gate_up_proj": (block.mlp.w1, block.mlp.w3),
            "mlp.down_proj": (block.mlp.w2,),
        }.items():
            fused = weights[f"{name}.{target}.lora_B.weight"] @ weights[f"{name}.{target}.lora_A.weight"]
            rows = [
                torch.zeros(part, 128) if isinstance(part, int) else part.lora_b.weight @ part.lora_a.weight
                for part in parts
            ]
            if target == "self_attn.qkv_proj":  # its 4 heads rotate pairs in torchtune, halves on the hub
                rows[0] = rows[0].view(4, 16, 2, 128).transpose(1, 2).reshape(128, 128)
            torch.testing.assert_close(fused, torch.cat(rows))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"attention_bias": True}),
        ("llama3", {"mlp_bias": True}),
        ("llama3", {"hidden_act": "gelu"}),
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("llama3.1", {"rope_scaling": {**CHECKPOINTS["llama3.1"]["rope_scaling"], "low_freq_factor": 2.0}}),
        ("mistral", {"tie_word_embeddings": True}),
        ("gemma", {"tie_word_embeddings": False}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("phi3", {"partial_rotary_factor": 0.75}),
    ],
    ids=str,
)
def test_what_the_fast_way_cannot_express_is_fitted_the_general_way(name, change, sequences, tmp_path):
    write_checkpoint(tmp_path, {**CHECKPOINTS[name], **change})
    trainer = make_trainer(tmp_path)
    assert trainer.shape.way == "general"
    result = trainer.fit(sequences, **FIT)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", result.peft_state_dict(), base_model=str(tmp_path), **LORA)
    tokens = torch.tensor([sequences[1].tokens])
    base = transformers_model(tmp_path)
    trainer.model.eval()
    with torch.no_grad():
        served = PeftModel.from_pretrained(base, tmp_path / "adapter")(tokens).logits
        torch.testing.assert_close(trainer.model(tokens), served, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "change", "telling"),
    [
        ("llama3", {"architectures": None}, 'without "architectures"'),
        ("llama3", {"architectures": "LlamaForCausalLM"}, 'without "architectures"'),
        ("llama3", {"hidden_size": "wide"}, "transformers refuses .*'hidden_size' expected int"),
        ("llama3", {"num_attention_heads": 3}, "transformers refuses .*not a multiple"),
        ("llama3", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights .*not fitted"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights .*not fitted"),
        ("llama3", {"num_hidden_layers": None}, "without num_hidden_layers"),
        ("qwen2", {"hidden_size": None, "vocab_size": None}, "without hidden_size, vocab_size"),
        ("qwen3", {"num_hidden_layers": None}, "num_hidden_layers"),
        ("olmo2", {"model_type": None}, "model_type=None, which this version of transformers does not know"),
        (
            "qwen3",
            {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": {"AutoModelForCausalLM": "m.M"}},
            r"asks for code of its own \(auto_map\), which is never run",
        ),
        ("qwen3", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "no causal language model"),
        ("olmo2", {"architectures": ["Olmo2ForSequenceClassification"]}, "model_type=olmo2 is Olmo2ForCausalLM"),
        ("olmo2", {"architectures": ["Qwen9ForCausalLM"]}, "model_type=olmo2 is Olmo2ForCausalLM"),
        ("qwen3", {"layer_types": ["other", "full_attention"]}, "layer_types"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused_by_its_config(name, change, telling):
    config = {key: value for key, value in {**CHECKPOINTS[name], **change}.items() if value is not None}
    with pytest.raises(ModelError, match=telling) as refusal:
        ModelShape.from_config(config, where="here")
    assert str(refusal.value).startswith("here has ")
    assert str(refusal.value).endswith((".", ")."))
    assert "\n" not in str(refusal.value)


def test_reading_a_config_leaves_it_as_it_is():
    config = {**CHECKPOINTS["llama3.1"], "rope_scaling": dict(CHECKPOINTS["llama3.1"]["rope_scaling"])}
    before = json.dumps(config)
    ModelShape.from_config(config, where="here")
    assert json.dumps(config) == before


def rewrite(model_dir, folder, change):
    """Copy a checkpoint into `folder`, its weights as `change` makes them: file name -> tensors."""
    (folder / "config.json").write_text((model_dir / "config.json").read_text())
    for name, tensors in change(load_file(model_dir / "model.safetensors")).items():
        save_file(tensors, folder / name)


def test_a_tied_matrix_that_is_stored_twice_is_read_once(checkpoint, tmp_path):
    def twice(weights):
        return {"model.safetensors": {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}}

    for name in ("smollm2", "qwen2.5", "gemma", "gemma2"):
        folder = tmp_path / name
        folder.mkdir()
        rewrite(checkpoint(name), folder, twice)
        tokens = torch.tensor([[5, 6, 7]])
        models = [make_trainer(path) for path in (checkpoint(name), folder)]
        for model in models:
            model.fit([], **{**FIT, "epochs": 0})
        with torch.no_grad():
            torch.testing.assert_close(*(model.model(tokens) for model in models))


def test_the_index_says_which_files_hold_the_weights(checkpoint, tmp_path):
    def shards(weights):
        names = sorted(weights)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        files = {file: {name: weights[name] for name in part} for file, part in parts.items()}
        # as Mistral's repositories have it: the same weights, under other names
        return {**files, "consolidated.safetensors": {"norm.weight": weights["model.norm.weight"]}}

    rewrite(checkpoint("mistral"), tmp_path, shards)
    make_trainer(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors, which model\.safetensors\.index\.json lists"):
        make_trainer(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="is not an index"):
        make_trainer(tmp_path)


def test_tensors_of_another_architecture_are_refused(checkpoint, tmp_path):
    rewrite(checkpoint("phi3"), tmp_path, lambda weights: {"model.safetensors": weights})
    (tmp_path / "config.json").write_text((checkpoint("mistral") / "config.json").read_text())
    with pytest.raises(ModelError, match=r"do not fit MistralForCausalLM: missing .*qkv_proj"):
        make_trainer(tmp_path)
