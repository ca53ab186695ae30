"""What no fit adapts of a model is said when the model object is made, and stated in results."""

import logging

from tests.checkpoints import CHECKPOINTS, write_checkpoint

QWEN3_MOE = CHECKPOINTS["qwen3"] | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "mlp_only_layers": [1],
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def test_experts_are_named_before_anything_is_loaded_and_in_results(save_tokenizer, tmp_path, caplog):
    from ttt_harness.harness.model import TTTVLLM

    write_checkpoint(tmp_path, QWEN3_MOE)
    save_tokenizer(tmp_path)
    with caplog.at_level(logging.WARNING):
        settings = TTTVLLM(str(tmp_path), lora_rank=8).get_model_info()["ttt"]["settings"]
    assert f"left out: {', '.join(EXPERTS)}." in caplog.text
    assert (settings["way"], settings["left_out"]) == ("general", EXPERTS)
    caplog.clear()
    settings = TTTVLLM(str(tmp_path), method="icl").get_model_info()["ttt"]["settings"]
    assert not caplog.records
    assert "left_out" not in settings


def test_a_model_that_is_adapted_whole_says_nothing(tiny_model, caplog):
    from ttt_harness.harness.model import TTTVLLM

    settings = TTTVLLM(str(tiny_model), lora_rank=8).get_model_info()["ttt"]["settings"]
    assert not caplog.records
    assert (settings["way"], settings["left_out"]) == ("fast", [])
