"""Checkpoints of a published geometry with random weights, for measuring speed where no real model can be had.

Generation is greedy and a random model would also choose ids that its tokenizer does not know. The rows of the output
matrix beyond the tokenizer's vocabulary are therefore zero: their logits are 0, below the largest of the others.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ttt_harness.errors import ModelError

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
}
# config.json of meta-llama/Llama-3.1-8B; and the smallest model that takes every path of the benchmark.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49408,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
}
LAYERS_PER_FILE = 8


def make_checkpoint(folder: Path, geometry: str, tokenizer_dir: Path, *, seed: int = 0) -> None:
    """Write a checkpoint in the hub's layout into the new `folder`: bfloat16, normal with standard deviation 0.02.

    Args:
        folder: must not exist; it appears when all of it is written.
        geometry: a name in `GEOMETRIES`.
        tokenizer_dir: model directory whose tokenizer files are taken over.
        seed: of the weights.

    Raises:
        ModelError: the folder exists, the geometry is unknown, or the tokenizer is missing or has too many tokens.
    """
    if geometry not in GEOMETRIES:
        raise ModelError(f"--geometry {geometry} is not known: use one of {', '.join(GEOMETRIES)}.")
    if folder.exists():
        raise ModelError(f"{folder} exists already: name a new folder.")
    config = {**_LLAMA, **GEOMETRIES[geometry]}
    known = _tokenizer_size(tokenizer_dir)
    if known > config["vocab_size"]:
        raise ModelError(
            f"the tokenizer of {tokenizer_dir} has {known} tokens and {geometry} only {config['vocab_size']}: "
            "use another tokenizer."
        )
    source = json.loads((tokenizer_dir / "config.json").read_text())
    config |= {name: source[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in source}
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json"):
        for path in tokenizer_dir.glob(pattern):
            shutil.copy(path, work)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_weights(work, config, known, seed)
    work.rename(folder)


def _tokenizer_size(tokenizer_dir: Path) -> int:
    try:
        content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
        ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{tokenizer_dir} has no readable tokenizer.json ({type(error).__name__}): name a model directory."
        ) from None
    return max(ids) + 1


def _write_weights(folder: Path, config: dict[str, Any], known: int, seed: int) -> None:
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = width // heads * config["num_key_value_heads"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        weights = torch.empty(size, dtype=torch.bfloat16, device=device)
        return weights.normal_(std=config["initializer_range"], generator=generator).cpu()

    def norm() -> Tensor:
        return torch.ones(width, dtype=torch.bfloat16)

    def layer(index: int) -> dict[str, Tensor]:
        tensors = {
            "self_attn.q_proj": normal(width, width),
            "self_attn.k_proj": normal(kv, width),
            "self_attn.v_proj": normal(kv, width),
            "self_attn.o_proj": normal(width, width),
            "mlp.gate_proj": normal(mlp, width),
            "mlp.up_proj": normal(mlp, width),
            "mlp.down_proj": normal(width, mlp),
            "input_layernorm": norm(),
            "post_attention_layernorm": norm(),
        }
        return {f"model.layers.{index}.{name}.weight": tensor for name, tensor in tensors.items()}

    layers = config["num_hidden_layers"]
    parts = [range(first, min(first + LAYERS_PER_FILE, layers)) for first in range(0, layers, LAYERS_PER_FILE)]
    index: dict[str, str] = {}
    size = 0

    def save(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        name = f"model-{number:05}-of-{len(parts) + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        size += sum(tensor.nbytes for tensor in tensors.values())

    for number, part in enumerate(parts, 1):
        save(number, {name: tensor for place in part for name, tensor in layer(place).items()})
    head = normal(config["vocab_size"], width)
    head[known:] = 0
    ends = {"model.embed_tokens.weight": normal(config["vocab_size"], width), "lm_head.weight": head}
    save(len(parts) + 1, {**ends, "model.norm.weight": norm()})
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
