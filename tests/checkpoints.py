"""One tiny checkpoint of random weights for each model family, with the keys of its `config.json` on the hub.

The sizes are small, and each number that a family has of its own is far from neutral (windows shorter than the tests'
sequences, caps below the scores, norms and biases that are not 1 and 0), so that ignoring one shows in the logits.
"""

import json
from pathlib import Path
from typing import Any

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
_LLAMA = {
    **_SIZES,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_LLAMA_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_QWEN2 = {
    **_SIZES,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_window_layers": 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 16,
    "use_sliding_window": False,
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama2": {
        **{key: value for key, value in _LLAMA.items() if key != "rope_theta"},
        "num_key_value_heads": 4,
    },
    "llama3": _LLAMA,
    "llama3.1": {**_LLAMA, "rope_scaling": {"factor": 8.0, **_LLAMA_ROPE}, "mlp_bias": False},
    "llama3.2": {
        **_LLAMA,
        "head_dim": 32,
        "rope_scaling": {"factor": 32.0, **_LLAMA_ROPE},
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
    "smollm2": {**_LLAMA, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True},
    "mistral": {
        **_SIZES,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 16,
        "tie_word_embeddings": False,
    },
    "qwen2": {**_QWEN2, "tie_word_embeddings": False},
    "qwen2.5": {**_QWEN2, "tie_word_embeddings": True},
    "gemma": {
        **_SIZES,
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "num_key_value_heads": 1,
        "head_dim": 64,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "gemma2": {
        **_SIZES,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
        "cache_implementation": "hybrid",
        "head_dim": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 16,
    },
    "phi3": {
        **_SIZES,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "original_max_position_embeddings": 2048,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 16,
        "tie_word_embeddings": False,
        "attention_bias": False,
    },
}


# Named as on the hub: Mistral-Nemo-Instruct-2407, Qwen3-0.6B, SmolLM3-3B, gemma-3-1b-it, phi-4, Phi-4-mini-instruct,
# OLMo-2-0425-1B and granite-3.3-2b-instruct.
CHECKPOINTS |= {
    "mistral-nemo": CHECKPOINTS["mistral"]
    | {
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "qwen3": {
        **_SIZES,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_window_layers": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "smollm3": {
        **_SIZES,
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": ["full_attention", "full_attention"],
        "max_window_layers": 2,
        "mlp_bias": False,
        "no_rope_layer_interval": 2,
        "no_rope_layers": [1, 0],
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gemma3": {
        **_SIZES,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "phi4": CHECKPOINTS["phi3"]
    | {"partial_rotary_factor": 1.0, "rms_norm_eps": 1e-05, "rope_theta": 250000, "sliding_window": None},
    "phi4-mini": {
        **CHECKPOINTS["phi3"],
        "lm_head_bias": False,
        "mlp_bias": False,
        "original_max_position_embeddings": 1024,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": [1 + i / 4 for i in range(12)],
            "short_factor": [1 + i / 16 for i in range(12)],
            "type": "longrope",
        },
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "olmo2": {
        **_SIZES,
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "granite": {
        **_SIZES,
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_bias": False,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "logits_scaling": 3.0,
        "mlp_bias": False,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
    },
}


# The table of ttt_harness/training/README.md: family -> architecture, way of fitting, checkpoints that prove it.
FAMILY_TABLE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "Llama 2, 3, 3.1, 3.2, 3.3": ("LlamaForCausalLM", "fast", ("llama2", "llama3", "llama3.1", "llama3.2")),
    "SmolLM2": ("LlamaForCausalLM", "fast", ("smollm2",)),
    "SmolLM3": ("SmolLM3ForCausalLM", "general", ("smollm3",)),
    "Mistral": ("MistralForCausalLM", "fast", ("mistral",)),
    "Mistral NeMo, Small": ("MistralForCausalLM", "fast", ("mistral-nemo",)),
    "Qwen2, Qwen2.5": ("Qwen2ForCausalLM", "fast", ("qwen2", "qwen2.5")),
    "Qwen3": ("Qwen3ForCausalLM", "fast", ("qwen3",)),
    "Gemma": ("GemmaForCausalLM", "fast", ("gemma",)),
    "Gemma 2": ("Gemma2ForCausalLM", "fast", ("gemma2",)),
    "Gemma 3 (270M, 1B)": ("Gemma3ForCausalLM", "general", ("gemma3",)),
    "Phi-3": ("Phi3ForCausalLM", "fast", ("phi3",)),
    "Phi-4": ("Phi3ForCausalLM", "fast", ("phi4",)),
    "Phi-4-mini": ("Phi3ForCausalLM", "general", ("phi4-mini",)),
    "OLMo 2": ("Olmo2ForCausalLM", "general", ("olmo2",)),
    "Granite 3": ("GraniteForCausalLM", "general", ("granite",)),
    "DeepSeek-R1 distills of Qwen2.5": ("Qwen2ForCausalLM", "fast", ("qwen2",)),
    "DeepSeek-R1 distills of Llama 3": ("LlamaForCausalLM", "fast", ("llama3.1",)),
}


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write `config` and random weights of the model that it describes to the existing `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # as on the hub, not as this version saves it
