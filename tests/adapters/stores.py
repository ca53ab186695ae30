"""Stores with adapters as runs leave them, but of a few weights, for tests that need no fit."""

import os
import time

import torch

from ttt_harness.adapters.names import adapter_key
from ttt_harness.adapters.record import RECORD_NAME
from ttt_harness.adapters.store import AdapterStore, StoredAdapter
from ttt_harness.config import TTTConfig

MODELS = (
    "/cache/hub/models--meta-llama--Llama-3.1-8B/snapshots/d04e592bb4f6",
    "/data/models/SmolLM2-135M-Instruct",
    "/cache/hub/models--Qwen--Qwen2.5-7B/snapshots/0123456789ab",
)
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def settings(**changes):
    """The settings that a record states."""
    config = TTTConfig(**changes)
    return {name: getattr(config, name) for name in config.names() if name != "adapter_dir"}


def add_adapter(
    store: AdapterStore,
    task: str = "bbh_ttt_snarks",
    *,
    model: str = MODELS[0],
    days_unused: float = 0,
    rows: int = 8,
    **changes,
) -> StoredAdapter:
    """Store an adapter of rank 4 that was fitted for `task`; keyword arguments change the settings of its fit."""
    weights = {f"{PREFIX}.lora_A.weight": torch.ones(4, rows), f"{PREFIX}.lora_B.weight": torch.ones(rows, 4)}
    said = settings(lora_rank=4, lora_alpha=8, **changes)
    determinants = {"fit_version": 4, "base_model": "0" * 64, "sequences": adapter_key({"task": task}), **said}
    key = adapter_key({**determinants, "model": model})
    record = {
        "task": task,
        "settings": said,
        "determinants": determinants,
        "dtype": "bfloat16",
        "train_sequences": 40,
        "train_tokens": 18000,
        "losses": [2.5, 1.25],
        "fit_seconds": 41.5,
    }
    stored = store.save(key, weights, base_model=model, rank=4, alpha=8, dropout=0.05, record=record)
    used = time.time() - 86400 * days_unused
    os.utime(stored.path / RECORD_NAME, (used, used))
    return stored
