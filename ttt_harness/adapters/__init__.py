"""LoRA adapters on disk: the store that keeps them, what it holds, and those that users bring.

Adapters are PEFT directories. A run keeps its own in a store, each under a hash of everything that determines it; this
is how a program finds and reads them:

    >>> import tempfile, torch
    >>> from ttt_harness.adapters import find, open_store, read_adapter
    >>> store = open_store(tempfile.mkdtemp())  # without a path: the store of runs that name none

A run would write this one:

    >>> name = "base_model.model.model.layers.0.self_attn.q_proj"
    >>> weights = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.zeros(8, 4)}
    >>> record = {"task": "bbh_ttt_snarks", "settings": {"method": "ttt", "seed": 42}, "losses": [2.5, 1.25]}
    >>> how = {"base_model": "org/base", "rank": 4, "alpha": 8, "dropout": 0.05, "record": record}
    >>> _ = store.save("0a1b2c", weights, **how)

What the store holds, without reading any weights:

    >>> (entry,) = find(store, task="bbh_ttt_*", model="base")
    >>> entry.key, entry.model, entry.method, entry.seed
    ('0a1b2c', 'org/base', 'ttt', 42)

An adapter, checked against its record: its directory for whoever serves it, its losses, its weights as tensors:

    >>> stored = store.read(entry.key)
    >>> stored.path == entry.path
    True
    >>> stored.record["losses"]
    [2.5, 1.25]
    >>> {tuple(tensor.shape) for tensor in read_adapter(stored.path).values()} == {(4, 8), (8, 4)}
    True

While a program serves an adapter it keeps it from being pruned:

    >>> with store.using(entry.key) as stored:
    ...     store.remove(entry.key)
    False
    >>> store.remove(entry.key)
    True

`ttt-harness adapters` is the same on the command line; README.md beside this file is the guide.
"""

from pathlib import Path

from ttt_harness.adapters.inventory import Entry, entries, matching
from ttt_harness.adapters.peft import read_adapter
from ttt_harness.adapters.store import AdapterStore, StoredAdapter
from ttt_harness.adapters.user import UserAdapter, check_user_adapter
from ttt_harness.config import TTTConfig

__all__ = [
    "AdapterStore",
    "Entry",
    "StoredAdapter",
    "UserAdapter",
    "check_user_adapter",
    "find",
    "open_store",
    "read_adapter",
]


def open_store(path: str | Path | None = None) -> AdapterStore:
    """The store of adapters at `path`, by default the one of runs that name none with `adapter_dir=`."""
    return AdapterStore(TTTConfig(adapter_dir=None if path is None else str(path)).adapter_store)


def find(
    store: AdapterStore, *, model: str | None = None, task: str | None = None, method: str | None = None
) -> list[Entry]:
    """The adapters of a store, of one model, task or method where these are given; `*` and `?` stand for anything.

    Raises:
        StoreError: the folder is not there, or cannot be read.
    """
    return matching(entries(store.root), model=model, task=task, method=method)
