"""The settings of a run: three frozen dataclasses, checked at construction, in which every default stands once.

`TTTConfig` holds this package's model arguments of `ttt_vllm` (how an adapter is fitted), `TaskSettings` the metadata
keys of a task (which demonstrations, which prompts), and `LMEvalSettings` the arguments of lm-eval's `vllm` class.
`from_mapping` builds them from the output of lm-eval's parser. Components take flat values from here, never these
objects.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from ttt_harness.errors import ConfigError
from ttt_harness.methods import METHODS, Method

# vLLM's own list (vllm.config.lora.MaxLoRARanks), repeated here so that a wrong rank is refused before vLLM loads.
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# Characters of a refused value that a message repeats.
LONGEST_QUOTE = 120

# A number of bytes as people write it: "50GB", "1.5 TiB".
SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)

LOSS_ON = ("outputs", "all", "last")
GENERATION_BUDGETS = ("full", "published")
ON_PLAIN_TASK = ("error", "base")
OVERLAP = ("refuse", "allow")
CHOOSE = ("all", "task")


def cache_dir() -> Path:
    """The folder for everything that can be made again: `$TTT_CACHE_DIR`, else `ttt_harness` in the user's cache."""
    if chosen := os.environ.get("TTT_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ttt_harness"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as " Did you mean 'lr'?" for a mistyped name, or nothing where no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def quoted(value: Any) -> str:
    """A refused value as a person wrote it (lm-eval makes -1 a -1.0, and --limit 0 a 0.0), cut where it is long."""
    try:
        text = repr(value).removesuffix(".0")
    except ValueError:  # an integer of more digits than Python writes
        return "[a number of thousands of digits]"
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 5]}[...]"


def _rule(kind: type, rule: str, allowed: Any) -> Any:
    """Dataclass field metadata: the type, the rule in words, and the function or tuple that decides."""
    return {"kind": kind, "rule": rule, "allowed": allowed}


def _published(rule: Any) -> Any:
    """A field whose default is the published value of the method; None is never seen once the settings are made."""
    return field(default=None, metadata=rule)


def _one_of(values: tuple[str, ...]) -> Any:
    return _rule(str, "one of " + ", ".join(values), values.__contains__)


_COUNT = _rule(int, "a whole number of at least 1", lambda v: v >= 1)
_SEED = _rule(int, "a whole number from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
_TEXT = _rule(str, "a text that is not empty", bool)
_YES_NO = _rule(bool, "true or false", lambda _: True)


def _convert(value: Any, kind: type) -> Any:
    """Read a command-line value as `kind`; ValueError where that would change it (1.5 is no int, 'yes' no bool)."""
    if kind is bool:
        if isinstance(value, str) and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
    elif kind is int:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
        if isinstance(value, float) and value.is_integer():
            return int(value)
    elif kind is float:
        if not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind):
        return value
    raise ValueError


def _is_size(value: Any) -> bool:
    """Whether a value is a size in bytes, with a unit or without; `ttt_harness.adapters.size` reads it."""
    return isinstance(value, int | str) and not isinstance(value, bool) and bool(SIZE.fullmatch(str(value)))


def _is_adapter(value: Any) -> bool:
    """Whether a value names adapters: one of all tasks, or one each."""
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(part, str) and part for item in value.items() for part in item)
    return isinstance(value, str) and bool(value)


class _Settings:
    """What the dataclasses share: conversion and check of each field by the rule in its metadata."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, rule = getattr(self, f.name), f.metadata
            if not rule or (value is None and f.default is None):
                continue
            try:
                converted = _convert(value, rule["kind"])
                ok = rule["allowed"](converted)
            except (TypeError, ValueError, OverflowError):
                ok = False
            if not ok:
                raise ConfigError(f"{f.name}={quoted(value)} is not allowed: it must be {rule['rule']}.")
            object.__setattr__(self, f.name, converted)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the settings, in order."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build the settings from those of `values` that belong to them; the others are left alone."""
        return cls(**{name: values[name] for name in cls.names() if name in values})


@dataclass(frozen=True)
class TTTConfig(_Settings):
    """How adapters are fitted: the model arguments of `ttt_vllm` besides those of lm-eval's `vllm` model.

    `num_permutations`, `fit_batch_size`, `epochs` and `lr` default to the method's published values
    (`ttt_harness.methods`), with `shuffle=False` to those of the study's runs without shuffling. The rest of the
    defaults are the published hyperparameters of the `ttt` method. With `settings`, hyperparameters come from a
    `tuned.json` (`ttt_harness.tuned`); with `adapter`, nothing is fitted.

    Raises:
        ConfigError: a value that is not allowed; the message says which are.
    """

    method: str = field(default="ttt", metadata=_one_of(tuple(METHODS)))
    loss_on: str = field(default="outputs", metadata=_one_of(LOSS_ON))
    num_permutations: int = _published(_rule(int, "a whole number from 1 to 100000", lambda v: 1 <= v <= 100_000))
    shuffle: bool = field(default=True, metadata=_YES_NO)
    fit_batch_size: int = _published(_COUNT)
    epochs: int = _published(_rule(int, "a whole number of at least 0", lambda v: v >= 0))
    lr: float = _published(_rule(float, "a number from 0 to 1", lambda v: 0 <= v <= 1))
    warmup_ratio: float = field(default=0.1, metadata=_rule(float, "a number from 0 to 1", lambda v: 0 <= v <= 1))
    lora_rank: int = field(
        default=64,
        metadata=_rule(int, f"a whole number from 1 to {VLLM_LORA_RANKS[-1]}", lambda v: 1 <= v <= VLLM_LORA_RANKS[-1]),
    )
    lora_alpha: float = field(default=64, metadata=_rule(float, "a number above 0", lambda v: 0 < v < float("inf")))
    lora_dropout: float = field(
        default=0.05, metadata=_rule(float, "a number from 0 to less than 1", lambda v: 0 <= v < 1)
    )
    seed: int = field(default=42, metadata=_SEED)
    k: int = field(default=10, metadata=_rule(int, "a whole number of at least 0", lambda v: v >= 0))
    adapter_dir: str | None = field(default=None, metadata=_TEXT)
    adapter_limit: str | None = field(
        default=None, metadata=_rule(object, 'a size such as "50GB"', lambda v: _is_size(v))
    )
    adapter: str | dict[str, str] | None = field(
        default=None,
        metadata=_rule(object, "a PEFT directory, a name on the hub, or a mapping of tasks to these", _is_adapter),
    )
    on_plain_task: str = field(default="error", metadata=_one_of(ON_PLAIN_TASK))
    truncate: bool = field(default=False, metadata=_YES_NO)
    settings: str | None = field(
        default=None, metadata=_rule(str, "the path of a tuned.json, which ttt-harness tune writes, or auto", bool)
    )
    choose: str | None = field(default=None, metadata=_one_of(CHOOSE))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in asdict(self.how.defaults(shuffle=self.shuffle)).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.fits and self.k == 0:
            raise ConfigError(
                f"k=0 is not allowed with method={self.method}: an adapter is fitted on demonstrations; "
                "set k to at least 1, or method=icl for a zero-shot run."
            )
        if self.choose is not None and self.settings is None:
            raise ConfigError(
                f"choose={self.choose} needs settings=: the tuned.json to choose from, which ttt-harness tune writes."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """As of the base; lm-eval's `lora_local_path` is `adapter`, and with an adapter the method is `icl` by default.

        Raises:
            ConfigError: both names are used.
        """
        given = dict(values)
        if _is_adapter(given.get("lora_local_path")):  # else `LMEvalSettings` says what it must be
            if given.get("adapter") is not None:
                raise ConfigError("adapter and lora_local_path mean the same; give one of them.")
            given["adapter"] = given["lora_local_path"]
        if given.get("adapter") is not None:
            given.setdefault("method", "icl")
        return super().from_mapping(given)

    @property
    def how(self) -> Method:
        """What `method` stands for."""
        return METHODS[self.method]

    @property
    def fits(self) -> bool:
        """Whether adapters are fitted: not where the user brings one."""
        return self.how.fits and self.adapter is None

    @property
    def max_lora_rank(self) -> int:
        """The smallest rank that vLLM can reserve for an adapter of `lora_rank`."""
        return next(rank for rank in VLLM_LORA_RANKS if rank >= self.lora_rank)

    @property
    def adapter_store(self) -> Path:
        """The folder in which adapters are kept."""
        return Path(self.adapter_dir).expanduser() if self.adapter_dir else cache_dir() / "adapters"


@dataclass(frozen=True)
class TaskSettings(_Settings):
    """Which demonstrations a task draws and how it asks: the metadata keys of a YAML, `--metadata` or `--model_args`.

    `k` is the default for a task that neither lists demonstrations nor states a `num_fewshot`. `overlap` says what
    becomes of demonstrations that are evaluated as well.

    Raises:
        ConfigError: a value that is not allowed; the message says which are.
    """

    k: int = field(default=10, metadata=_rule(int, "a whole number of at least 0", lambda v: v >= 0))
    seed: int = field(default=42, metadata=_SEED)
    vote_permutations: int = field(
        default=1, metadata=_rule(int, "a whole number from 1 to 1000", lambda v: 1 <= v <= 1000)
    )
    leave_one_out: bool = field(default=False, metadata=_YES_NO)
    generation_budget: str = field(default="full", metadata=_one_of(GENERATION_BUDGETS))
    overlap: str = field(default="refuse", metadata=_one_of(OVERLAP))

    @classmethod
    def refuse_misspelt(cls, metadata: Mapping[str, Any]) -> None:
        """Refuse a key that is nearly the name of a setting. Metadata may hold whatever else a task likes.

        Raises:
            ConfigError: there is one.
        """
        for key in metadata:
            if isinstance(key, str) and key not in cls.names():
                near = difflib.get_close_matches(key.lower().replace("-", "_"), cls.names(), n=1, cutoff=0.85)
                if near:
                    raise ConfigError(
                        f"{key} is no metadata key, and would change nothing; write {near[0]}, or another name for "
                        "something of your own."
                    )


@dataclass(frozen=True)
class LMEvalSettings(_Settings):
    """The arguments of lm-eval's `vllm` class that it takes as they are, so that they are checked before it does.

    None stands for lm-eval's own default.

    Raises:
        ConfigError: a value that is not allowed; the message says which are.
    """

    revision: str | None = field(default=None, metadata=_TEXT)
    tokenizer: str | None = field(default=None, metadata=_TEXT)
    tokenizer_mode: str | None = field(default=None, metadata=_TEXT)
    tokenizer_revision: str | None = field(default=None, metadata=_TEXT)
    trust_remote_code: bool | None = field(default=None, metadata=_YES_NO)
    add_bos_token: bool | None = field(default=None, metadata=_YES_NO)
    prefix_token_id: int | None = field(
        default=None, metadata=_rule(int, "the number of a token, at least 0", lambda v: 0 <= v < 2**31)
    )
    tensor_parallel_size: int | None = field(default=None, metadata=_COUNT)
    data_parallel_size: int | None = field(default=None, metadata=_COUNT)
    quantization: str | None = field(default=None, metadata=_TEXT)
    max_gen_toks: int | None = field(default=None, metadata=_COUNT)
    max_batch_size: int | None = field(default=None, metadata=_COUNT)
    max_length: int | None = field(default=None, metadata=_COUNT)
    max_model_len: int | None = field(default=None, metadata=_COUNT)
    lora_local_path: str | None = field(default=None, metadata=_TEXT)
    max_lora_rank: int | None = field(default=None, metadata=_COUNT)
    enable_lora: bool | None = field(default=None, metadata=_YES_NO)
    enable_thinking: bool | None = field(default=None, metadata=_YES_NO)
    chat_template_args: dict[str, Any] | None = field(default=None, metadata=_rule(dict, "a mapping", lambda _: True))
    think_end_token: str | None = field(default=None, metadata=_TEXT)
    truncation_side: str | None = field(default=None, metadata=_one_of(("left", "right", "middle")))
    hf_token: str | bool | None = None
    download_dir: str | None = field(default=None, metadata=_TEXT)

    def stated(self) -> dict[str, Any]:
        """Those that are not left to lm-eval."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
