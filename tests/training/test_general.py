"""The general way: transformers' model with LoRA layers is fitted by the same trainer, to the same gradients."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests.checkpoints import CHECKPOINTS, write_checkpoint
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ModelError
from ttt_harness.training.general import ADAPTED, AdaptedLinear
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.trainer import Trainer, target_states

FIT = {"batch_size": 3, "epochs": 2, "lr": 1e-2, "warmup_ratio": 0.1, "seed": 7}
LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}
QWEN3 = CHECKPOINTS["qwen3"]
# As Qwen3, but for a switch that the fast way does not have.
GENERAL_QWEN3 = QWEN3 | {"attention_bias": True}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "tie_word_embeddings": False,
}


def make_trainer(folder, **overrides):
    shape = ModelShape.from_config(read_config(folder), where="here")
    assert shape.way == "general"
    return Trainer(folder, shape, **{**LORA, "dtype": torch.float32, "device": "cpu", **overrides})


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    write_checkpoint(folder, GENERAL_QWEN3)
    return folder


@pytest.fixture(scope="module")
def trainer(qwen3):
    return make_trainer(qwen3)


@pytest.fixture(scope="module")
def sequences():
    rng = torch.Generator().manual_seed(0)
    return [
        TrainingSequence(
            tuple(torch.randint(2, 320, (length,), generator=rng).tolist()),
            tuple(i > 0 and i % 3 == 0 for i in range(length)),
        )
        for length in (20, 33, 27, 18, 40)
    ]


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "gemma2", "phi3"])
def test_both_ways_start_from_the_same_loss(name, sequences, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, CHECKPOINTS[name])
    fast = ModelShape.from_config(read_config(tmp_path), where="here")
    assert fast.way == "fast"
    expected = Trainer(tmp_path, fast, **LORA, dtype=torch.float32, device="cpu").fit(sequences, **FIT).losses[0]
    monkeypatch.setattr("ttt_harness.training.shape.FAST", {})
    assert make_trainer(tmp_path).fit(sequences, **FIT).losses[0] == pytest.approx(expected, rel=1e-5)


def test_the_same_seed_gives_the_same_adapter_whatever_was_fitted_before(trainer, sequences):
    first = trainer.fit(sequences, **FIT)
    other = trainer.fit(sequences[:2], **{**FIT, "seed": 8})
    again = trainer.fit(sequences, **FIT)
    assert first.losses == again.losses != other.losses
    torch.testing.assert_close(first.peft_state_dict(), again.peft_state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])  # 1: every sequence alone, its layers recomputed
def test_micro_batches_add_up_to_the_gradient_of_the_batch(qwen3, sequences, monkeypatch, max_tokens):
    trainer = make_trainer(qwen3, dropout=0.0)
    trainer.max_tokens = max_tokens
    monkeypatch.setattr("ttt_harness.training.trainer.LOGITS", 700)
    torch.manual_seed(0)
    trainer._reset()
    loss = trainer._backward(sequences).item()
    losses = []
    for sequence in sequences:
        tokens, mask = torch.tensor([sequence.tokens]), torch.tensor([sequence.loss_mask])
        targets = torch.where(mask, tokens, -100)[:, 1:].flatten()
        logits = trainer.model(tokens)[:, :-1].flatten(0, 1)
        losses.append(functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
    expected = torch.stack(losses).sum() / sum(sum(sequence.loss_mask) for sequence in sequences)
    gradients = torch.autograd.grad(expected, list(trainer.adapter.values()))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(trainer.adapter.values(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_recomputed_layers_draw_the_same_dropout_and_keep_less(qwen3, sequences):
    trainer = make_trainer(qwen3, dropout=0.4)
    tokens, mask = torch.tensor([sequences[4].tokens]), torch.tensor([sequences[4].loss_mask])
    trainer.fit(sequences, **FIT)  # lora_B is zero before, and so would be most gradients
    gradients, kept = [], []
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    for recompute in (False, True, False):
        torch.manual_seed(0)
        sizes = []

        def pack(tensor, sizes=sizes):
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = target_states(trainer.model, tokens, mask, recompute=recompute)
        kept.append(sum(sizes))
        loss = trainer.model.output(states).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, list(trainer.adapter.values())))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=0)
    assert kept[1] < kept[0] / 4


def test_activations_take_about_what_the_memory_plan_counts(tmp_path):
    config = CHECKPOINTS["olmo2"] | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    write_checkpoint(tmp_path, config)
    trainer = make_trainer(tmp_path, dtype=torch.bfloat16)
    tokens = torch.randint(2, 320, (1, 400))
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = target_states(trainer.model, tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert states.requires_grad
    kept = sum(storages.values()) / 400
    counted = trainer.shape.activation_bytes_per_token(torch.bfloat16, on_gpu=False)
    assert 0.6 * counted < kept < 1.1 * counted


def test_longrope_is_that_of_the_longest_sequence_that_the_engine_takes(tmp_path):
    write_checkpoint(tmp_path, CHECKPOINTS["phi4-mini"])
    tokens = torch.arange(2, 60)[None]
    logits = {}
    for context in (256, 1024, 1025, None):  # the limit is 1024, and the model's own window is of 2048
        trainer = make_trainer(tmp_path, context=context)
        trainer.fit([], **{**FIT, "epochs": 0})
        trainer.model.eval()
        with torch.no_grad():
            logits[context] = trainer.model(tokens)
    torch.testing.assert_close(logits[256], logits[1024], rtol=0, atol=0)
    torch.testing.assert_close(logits[1025], logits[None], rtol=0, atol=0)
    assert (logits[1024] - logits[1025]).abs().max() > 0.01
    shape = ModelShape.from_config(read_config(tmp_path), where="here")
    assert shape.determinants(1024) != shape.determinants(1025)
    assert ModelShape.from_config(CHECKPOINTS["granite"], where="here").determinants(1024) == {}


def test_dropouts_of_pretraining_are_off(sequences, tmp_path):
    write_checkpoint(tmp_path, GENERAL_QWEN3 | {"attention_dropout": 0.5})
    trainer = make_trainer(tmp_path, dropout=0.0)
    assert trainer.fit(sequences, **FIT).losses == trainer.fit(sequences, **FIT).losses
    tokens = torch.tensor([sequences[0].tokens])
    trainer.model.train()
    torch.testing.assert_close(trainer.model(tokens), trainer.model(tokens), rtol=0, atol=0)


def test_experts_are_left_out_and_said_so(sequences, tmp_path):
    write_checkpoint(tmp_path, QWEN3_MOE)
    trainer = make_trainer(tmp_path)
    assert trainer.shape.left_out == ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    result = trainer.fit(sequences, **{**FIT, "epochs": 10})
    assert result.losses[-1] < result.losses[0]
    adapted = {name.split("layers.")[1].split(".lora")[0] for name in result.peft_state_dict()}
    attention = {f"{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qvo"}
    assert adapted == attention | {f"1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert trainer.shape.adapter_parameters(8) == sum(tensor.numel() for tensor in result.tune_state_dict.values())


def test_linear_attention_is_left_out_and_said_so(sequences, tmp_path):
    config = QWEN3 | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "decoder_sparse_step": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "mlp_only_layers": [0, 1],
        "num_experts": 0,
        "partial_rotary_factor": 0.25,
    }
    write_checkpoint(tmp_path, config)
    trainer = make_trainer(tmp_path)
    assert {name.split(".")[0] for name in trainer.shape.left_out} == {"linear_attn"}
    assert not any("linear_attn" in name for name in trainer.adapter)
    result = trainer.fit(sequences, **{**FIT, "epochs": 10})
    assert result.losses[-1] < result.losses[0]


def test_of_a_model_of_images_and_text_the_text_part_is_fitted(sequences, tmp_path):
    text = {key: value for key, value in CHECKPOINTS["gemma3"].items() if key != "architectures"}
    vision = {"hidden_size": 32, "image_size": 28, "intermediate_size": 64, "patch_size": 14, "num_hidden_layers": 1}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {**vision, "model_type": "siglip_vision_model", "num_attention_heads": 2},
        "mm_tokens_per_image": 4,
    }
    write_checkpoint(tmp_path, config)
    trainer = make_trainer(tmp_path)
    assert trainer.shape.left_out == ()
    result = trainer.fit(sequences, **{**FIT, "epochs": 5})
    assert result.losses[-1] < result.losses[0]
    names = list(result.peft_state_dict())
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)


def test_a_model_without_a_layer_that_can_be_adapted_is_refused():
    config = {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 320,
    }
    with pytest.raises(ModelError, match=r"here has .*can be served, but not fitted \(method=icl\)\.$"):
        ModelShape.from_config(config, where="here")


def copied(folder, to, **config):
    shutil.copytree(folder, to, dirs_exist_ok=True)
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return to


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_refused_in_one_sentence(qwen3, tmp_path):
    weights = load_file(qwen3 / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name}
    extra = {**weights, "model.layers.0.mlp.up_proj.bias": torch.zeros(192)}
    other = {**weights, "model.norm.weight": torch.ones(64)}
    for number, (tensors, telling) in enumerate(
        [
            (missing, r"missing \['model.layers.1.mlp.up_proj.weight'\]"),
            (extra, r"left over \['model.layers.0.mlp.up_proj.bias'\]"),
            (other, r"of another shape \['model.norm.weight'\]"),
        ]
    ):
        folder = copied(qwen3, tmp_path / str(number))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=telling) as error:
            make_trainer(folder)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(".")
    damaged = copied(qwen3, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((qwen3 / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        make_trainer(damaged)
    assert "\n" not in str(error.value)


def test_code_of_a_checkpoint_is_never_run(qwen3, tmp_path):
    ran = tmp_path / "ran"
    folder = copied(qwen3, tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (folder / "modeling_mine.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n")
    make_trainer(folder)  # transformers has a Qwen3 of its own
    assert not ran.exists()


def test_a_checkpoint_of_pickles_is_refused(qwen3, tmp_path):
    (tmp_path / "config.json").write_text((qwen3 / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\(pytorch_model\.bin is a pickle, which may run any code\)"):
        read_config(tmp_path)


@pytest.mark.parametrize("way", ["general", "fast"])
def test_a_token_without_an_embedding_is_refused_before_the_fit(trainer, tiny_model, way):
    shape = ModelShape.from_config(read_config(tiny_model), where="tiny")
    fast = Trainer(tiny_model, shape, **LORA, dtype=torch.float32, device="cpu")
    bad = [TrainingSequence((5, 320, 7), (False, True, True))]
    with pytest.raises(ModelError, match=r"token 320, but the model's embeddings hold 320 \(0 to 319\); use the token"):
        (trainer if way == "general" else fast).fit(bad, **FIT)


def test_names_of_adapted_layers_cover_the_table_of_families():
    fused = {"qkv_proj", "gate_up_proj"}
    assert {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} | fused <= ADAPTED.keys()
    assert "k_proj" not in ADAPTED
    assert "lm_head" not in ADAPTED


def test_an_adapted_layer_keeps_the_base_weights_that_it_is_given():
    linear = torch.nn.Linear(6, 4)
    adapted = AdaptedLinear(linear, rank=2, alpha=4, dropout=0.0)
    adapted.initialize_parameters()
    assert adapted.weight is linear.weight
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(adapted(x), linear(x))
    torch.nn.init.normal_(adapted.lora_b.weight)
    update = x @ adapted.lora_a.weight.T @ adapted.lora_b.weight.T * 2
    torch.testing.assert_close(adapted(x), linear(x) + update)
