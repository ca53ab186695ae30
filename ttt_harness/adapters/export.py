"""An adapter on its own: a PEFT directory with a model card, for whoever serves or publishes it."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ttt_harness import __version__
from ttt_harness.adapters.inventory import Entry
from ttt_harness.adapters.names import is_hub_name, model_name
from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from ttt_harness.adapters.record import read_config
from ttt_harness.adapters.store import StoredAdapter
from ttt_harness.config import VLLM_LORA_RANKS
from ttt_harness.errors import StoreError
from ttt_harness.terminal import visible

CARD_NAME = "README.md"
_INTRODUCTION = """\
A LoRA adapter that test-time training has fitted on a task's demonstrations (ttt-harness {version}). Use it with the
prompts that it was fitted for.
"""
_LOADING = """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base_text})
model = PeftModel.from_pretrained(base, {folder_text})
```

```bash
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}
```
"""


def export(stored: StoredAdapter, entry: Entry, folder: Path, *, base_model: str | None = None) -> str:
    """Write an adapter and its model card to `folder`, which is made here, or is empty.

    Args:
        stored: the adapter, as the store has checked it.
        entry: the same in the inventory, with the results that the card is to name.
        base_model: the name of the base model, for the config and the card; by default its name on the hub where it
            came from there, else the path that it was fitted from.

    Returns:
        The name of the base model that was written.

    Raises:
        StoreError: the folder holds something, or cannot be written; nothing is left behind then.
    """
    on_hub = is_hub_name(model_name(entry.base_model))
    base = base_model or (model_name(entry.base_model) if on_hub else entry.base_model)
    try:
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is there already; give a folder that is empty, or one that is not there.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Written beside it and renamed, so that nobody meets half of it.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-", ignore_cleanup_errors=True) as work:
            made = Path(work) / "adapter"
            made.mkdir()
            config = {**read_config(stored.path), "base_model_name_or_path": base}
            (made / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(stored.path / WEIGHTS_NAME, made / WEIGHTS_NAME)
            text = model_card(stored, entry, base=base, rank=int(config["r"]), folder=folder)
            (made / CARD_NAME).write_text(text, encoding="utf-8")
            made.rename(folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.") from error
    return base


def model_card(stored: StoredAdapter, entry: Entry, *, base: str, rank: int, folder: Path) -> str:
    """The model card in Markdown: what the adapter was fitted on and how, its scores, and how to load it.

    For the fields at its head see https://huggingface.co/docs/hub/model-cards.
    """
    record = stored.record
    determinants = record.get("determinants", {})
    head: dict[str, Any] = {"base_model": base} if is_hub_name(base) else {}  # the hub takes no path
    head |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    head |= {"tags": ["lora", "test-time-training", "ttt-harness"]}
    losses = record.get("losses") or []
    name = "-".join(filter(None, [*entry.tasks[:1], entry.method])) or "adapter"
    facts = {
        "base model": base,
        "fitted for": ", ".join(entry.tasks),
        "demonstrations (hash of the training sequences)": determinants.get("sequences"),
        "base model (hash of its weights)": determinants.get("base_model"),
        "training sequences": record.get("train_sequences"),
        "tokens trained on": record.get("train_tokens"),
        "first and last loss": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else None,
        "key in its store": stored.key,
    }
    known = [(fact, value) for fact, value in facts.items() if value not in (None, "")]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {_text(name)}\n",
        _INTRODUCTION.format(version=__version__),
        _table(("", ""), known),
        "## Settings\n",
        _table(("argument", "value"), entry.settings.items()),
    ]
    if scores := [
        (use.task, metric, f"{value:.4f}", Path(use.results).name)
        for use in entry.uses
        for metric, value in use.scores.items()
    ]:
        parts += ["## Scores\n", _table(("task", "metric", "score", "results"), scores)]
    served = next(allowed for allowed in VLLM_LORA_RANKS if allowed >= rank)
    loading = _LOADING.format(
        base_text=json.dumps(base),
        folder_text=json.dumps(folder.name),
        base=shlex.quote(visible(base)),
        folder=shlex.quote(visible(folder.name)),
        rank=served,
        name=_word(name),
    )
    return "\n".join([*parts, "## Loading\n", loading])


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, *rows]
    cells = [" | ".join(map(_text, line)) for line in lines]
    cells.insert(1, " | ".join("---" for _ in header))
    return "".join(f"| {line} |\n" for line in cells)


def _text(value: Any) -> str:
    """Text of others within a line of Markdown."""
    return "".join(f"\\{c}" if c in "|\\`*_[]<>" else c for c in visible(value))


def _word(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
