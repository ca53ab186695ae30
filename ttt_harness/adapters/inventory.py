"""What a store holds: an entry for each adapter, read from its record and its config, without torch and in no time.

Ages come from the files' times: an adapter was fitted when its weights were written, and was last used when its record
was last touched, which the store does whenever it loads one.
"""

import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ttt_harness.adapters.names import model_name
from ttt_harness.adapters.peft import WEIGHTS_NAME
from ttt_harness.adapters.record import RECORD_NAME, Damage, read_config, read_record
from ttt_harness.adapters.store import SET_ASIDE
from ttt_harness.config import TTTConfig
from ttt_harness.errors import StoreError
from ttt_harness.methods import METHODS

# What an entry has a column of its own for, or what changes no adapter.
_NO_SETTING = ("method", "k", "seed", "adapter_dir", "adapter_limit", "adapter", "on_plain_task", "truncate")
SHORTEST_KEY = 4


@dataclass(frozen=True)
class Use:
    """A results file that names an adapter: its path, the task, and the task's scores by metric.

    served_check: how near the adapter that vLLM served was to the trained one, as the run states it
        (`ttt_harness.run.served_check`); None where the run did not compare this adapter.
    """

    results: str
    task: str
    scores: Mapping[str, float] = field(default_factory=dict)
    served_check: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """An adapter of a store, as far as its files tell without being checked.

    tasks: what it was fitted for; several where a method shares it.
    model: the base model's name; base_model: the name or path that the config holds.
    settings: the model arguments of its fit.
    size: of its files, in bytes; created, used: seconds since 1970.
    problem: what keeps its record or config from being read; empty where nothing does.
    uses: results that name it, where any were looked for.
    """

    key: str
    path: Path
    tasks: tuple[str, ...]
    model: str
    base_model: str
    settings: Mapping[str, Any]
    size: int
    created: float
    used: float
    problem: str = ""
    uses: tuple[Use, ...] = ()

    @property
    def task(self) -> str:
        """The task, or how many there are."""
        return self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks" if self.tasks else ""

    @property
    def method(self) -> str:
        """The model argument `method`; empty where the record states none."""
        return str(self.settings.get("method", ""))

    @property
    def k(self) -> int | None:
        """How many demonstrations were asked for."""
        return _whole(self.settings.get("k"))

    @property
    def seed(self) -> int | None:
        """The seed of the fit."""
        return _whole(self.settings.get("seed"))

    @property
    def changed_settings(self) -> str:
        """The settings that are not the method's defaults, as `--model_args` take them."""
        defaults = asdict(TTTConfig(method=self.method)) if self.method in METHODS else {}
        return ",".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.settings.items()
            if name not in _NO_SETTING and (name not in defaults or defaults[name] != value)
        )


def entries(root: Path) -> list[Entry]:
    """An entry for each adapter in the store at `root`; folders without a record are none of it.

    Raises:
        StoreError: there is no such folder, or it cannot be read.
    """
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise StoreError(
            f"there is no store of adapters at {root} ({error.strerror}); name one with --adapter_dir."
        ) from None
    found = (_entry(root / name) for name in names if not name.startswith(".") and SET_ASIDE not in name)
    return [entry for entry in found if entry is not None]


def _entry(path: Path) -> Entry | None:
    """What the files of one folder say; None where it is no adapter's, or has been removed meanwhile."""
    try:
        used = os.stat(path / RECORD_NAME).st_mtime
    except OSError:
        return None
    record: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    problem = ""
    try:
        record, config = read_record(path), read_config(path)
    except Damage as damage:
        problem = str(damage)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    settings = record.get("settings")
    base_model = config.get("base_model_name_or_path")
    base_model = base_model if isinstance(base_model, str) else ""
    tasks = record.get("tasks", [record.get("task")])
    return Entry(
        key=path.name,
        path=path,
        tasks=tuple(task for task in (tasks if isinstance(tasks, list) else []) if isinstance(task, str)),
        model=model_name(base_model),
        base_model=base_model,
        settings=settings if isinstance(settings, dict) else {},
        size=folder_bytes(path),
        created=_time(path / WEIGHTS_NAME, used),
        used=used,
        problem=problem,
    )


def folder_bytes(path: Path) -> int:
    """The size of the files in a folder, which may be vanishing."""
    total = 0
    try:
        for entry in os.scandir(path):
            total += entry.stat().st_size
    except OSError:
        pass
    return total


def _time(path: Path, otherwise: float) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return otherwise


def by_key(found: Sequence[Entry], key: str, root: Path) -> Entry:
    """The entry of a key, or of a key that begins so.

    Raises:
        StoreError: there is none, or there are several.
    """
    exact = [entry for entry in found if entry.key == key]
    starting = exact or [entry for entry in found if len(key) >= SHORTEST_KEY and entry.key.startswith(key)]
    if len(starting) == 1:
        return starting[0]
    if starting:
        raise StoreError(f"{len(starting)} adapters in {root} begin with {key}; give more of the key.")
    raise StoreError(f"there is no adapter {key} in {root}; see ttt-harness adapters list.")


def matching(
    found: Iterable[Entry], *, model: str | None = None, task: str | None = None, method: str | None = None
) -> list[Entry]:
    """The entries of a model, a task and a method; each may hold the signs * and ?, and case does not matter.

    A model may be given with or without its organisation, or as the path that it was fitted from.
    """
    by_path = model is not None and model.startswith(("/", "."))
    return [
        entry
        for entry in found
        if _matches(model, (entry.base_model,) if by_path else (entry.model, entry.model.rpartition("/")[2]))
        and _matches(task, entry.tasks)
        and _matches(method, (entry.method,))
    ]


def _matches(pattern: str | None, names: Iterable[str]) -> bool:
    return pattern is None or any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in names)


# What entries can be sorted by; None and empty values come last.
ORDERS: dict[str, Callable[[Entry], Any]] = {
    "used": lambda entry: -entry.used,
    "age": lambda entry: -entry.created,
    "size": lambda entry: -entry.size,
    "task": lambda entry: (not entry.tasks, entry.tasks, entry.model, -entry.used),
    "model": lambda entry: (entry.model, entry.tasks, -entry.used),
    "method": lambda entry: (entry.method, entry.tasks, -entry.used),
    "key": lambda entry: entry.key,
}


def with_uses(found: Iterable[Entry], uses: Mapping[str, Sequence[Use]]) -> list[Entry]:
    """The entries, with the results that name them; `uses` holds those by the adapters' keys."""
    return [replace(entry, uses=tuple(uses.get(entry.key, ()))) for entry in found]


def age_text(seconds: float) -> str:
    """A time that has passed, for people, in its largest unit: "3 d"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "now"


def since(moment: float) -> str:
    """How long ago a moment was, for people."""
    return age_text(time.time() - moment)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
