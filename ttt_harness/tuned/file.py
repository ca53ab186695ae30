"""`Tuned`: what a search on demonstrations has found, as `tuned.json` keeps it.

The file holds the outcomes themselves, right or wrong for each candidate and each held-out demonstration, and no
choice: whoever reads it chooses anew (`ttt_harness.tuned.choice`).

    {"kind": "ttt_harness tuned settings", "version": 1,
     "base_model": {"name": "...", "fingerprint": "..."}, "method": "ttt", "k": 10, "seeds": [42], "folds": 5,
     "orders": 2, "dtype": "bfloat16", "versions": {"torch": "..."},
     "candidates": [{"name": "icl", "model_args": {"method": "icl"}, "fit_seconds": 0.0},
                    {"name": "lr=1e-4, epochs=1", "model_args": {"method": "ttt", "lr": 1e-4, "epochs": 1},
                     "fit_seconds": 21.5}],
     "tasks": {"bbh_ttt_navigate": {"icl": {"42/0/0": 1, "42/0/1": 0}, "lr=1e-4, epochs=1": {"42/0/0": 1}}}}
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from ttt_harness.config import TTTConfig, cache_dir, nearest, quoted
from ttt_harness.errors import ConfigError
from ttt_harness.files import write_whole
from ttt_harness.methods import METHODS

KIND = "ttt_harness tuned settings"
VERSION = 1

# The model arguments that a candidate may state: those that determine an adapter, besides the demonstrations.
TUNABLE = (
    *("method", "lr", "epochs", "lora_rank", "lora_alpha", "lora_dropout", "num_permutations", "shuffle"),
    *("fit_batch_size", "warmup_ratio", "loss_on"),
)

_log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """A held-out demonstration, asked once. In the file: "42/3/0".

    seed: that drew the demonstrations.
    demonstration: its place among the k.
    order: the number of the order in which the others stood in the prompt.
    """

    seed: int
    demonstration: int
    order: int

    def __str__(self) -> str:
        return f"{self.seed}/{self.demonstration}/{self.order}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes.

        Raises:
            ValueError: it is something else.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) <= 10 for part in parts):
            raise ValueError(text)
        return cls(*map(int, parts))


@dataclass(frozen=True)
class BaseModel:
    """The model that was tuned.

    name: what people call it.
    fingerprint: the hash of its config and weights (`ttt_harness.adapters.names.fingerprint`).
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried.

    name: for people; unique in a file.
    model_args: of `ttt_vllm`, of those in `TUNABLE`; `method` is always among them.
    fit_seconds: the mean of a fit; 0 where nothing is fitted.
    """

    name: str
    model_args: Mapping[str, Any]
    fit_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether an adapter is fitted; the candidate that fits none is in-context learning."""
        return METHODS[self.model_args["method"]].fits


Outcomes = Mapping[Asked, int]


@dataclass(frozen=True)
class Tuned:
    """The outcomes of a search, and what it was made with.

    method, k, seeds: of the demonstrations and the fits.
    folds, orders: how the demonstrations were held out, and in how many orders the others were shown.
    dtype: of the weights.
    versions: package -> version.
    candidates: all that were tried; exactly one of them is in-context learning.
    tasks: task -> candidate's name -> what was asked -> 1 where the answer was right, else 0. A candidate that was
        dropped early has fewer outcomes, or none.

    Raises:
        ConfigError: the parts do not fit together.
    """

    base_model: BaseModel
    method: str
    k: int
    seeds: tuple[int, ...]
    folds: int
    orders: int
    dtype: str
    versions: Mapping[str, str]
    candidates: tuple[Candidate, ...]
    tasks: Mapping[str, Mapping[str, Outcomes]]

    def __post_init__(self) -> None:
        if self.method not in METHODS or not METHODS[self.method].fits:
            raise ConfigError(f"method={quoted(self.method)} fits nothing, or is not known.")
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) < len(names):
            raise ConfigError("two candidates have the same name.")
        for candidate in self.candidates:
            self._check(candidate)
        fitting_none = [candidate.name for candidate in self.candidates if not candidate.fits]
        if len(fitting_none) != 1:
            raise ConfigError(f"exactly one candidate has to be in-context learning, and {len(fitting_none)} are.")
        if not self.tasks:
            raise ConfigError("it holds no task.")
        for task, tried in self.tasks.items():
            if unknown := [name for name in tried if name not in names]:
                raise ConfigError(f"{quoted(task)} has outcomes of {quoted(unknown[0])}, which is no candidate.")
            if not tried.get(fitting_none[0]):
                raise ConfigError(f"{quoted(task)} has no outcome of in-context learning.")

    def _check(self, candidate: Candidate) -> None:
        for name in candidate.model_args:
            if name not in TUNABLE:
                raise ConfigError(
                    f"the candidate {quoted(candidate.name)} states {quoted(name)}, which is no argument of a fit."
                    f"{nearest(name, TUNABLE)}"
                )
        try:
            config = TTTConfig.from_mapping({**candidate.model_args, "k": self.k})
        except ConfigError as error:
            raise ConfigError(f"the candidate {quoted(candidate.name)} is not allowed: {error}") from None
        if "method" not in candidate.model_args or (config.fits and config.method != self.method):
            raise ConfigError(f"the candidate {quoted(candidate.name)} is not of method={self.method}.")

    @property
    def in_context(self) -> Candidate:
        """The candidate that fits nothing."""
        return next(candidate for candidate in self.candidates if not candidate.fits)

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        tasks = {
            task: {name: {str(asked): right for asked, right in sorted(found.items())} for name, found in tried.items()}
            for task, tried in self.tasks.items()
        }
        candidates = [{**vars(one), "model_args": dict(one.model_args)} for one in self.candidates]
        return {
            "kind": KIND,
            "version": VERSION,
            "base_model": asdict(self.base_model),
            **{name: getattr(self, name) for name in ("method", "k", "folds", "orders", "dtype")},
            "seeds": list(self.seeds),
            "versions": dict(self.versions),
            "candidates": candidates,
            "tasks": tasks,
        }

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Self:
        """Read the content of a file; what is stated beside the fields is left alone.

        Raises:
            ConfigError: something is missing, or of a wrong type; the sentence does not name the file.
        """
        base = _part(said, "base_model", dict)
        return cls(
            base_model=BaseModel(_part(base, "name", str), _part(base, "fingerprint", str)),
            method=_part(said, "method", str),
            k=_count(said, "k"),
            seeds=tuple(_integers(_part(said, "seeds", list), "seeds")),
            folds=_count(said, "folds"),
            orders=_count(said, "orders"),
            dtype=_part(said, "dtype", str),
            versions={str(name): str(version) for name, version in _part(said, "versions", dict).items()},
            candidates=tuple(_candidate(one) for one in _part(said, "candidates", list)),
            tasks={
                task: {name: dict(_outcomes(task, found)) for name, found in _mapping(tried, quoted(task)).items()}
                for task, tried in _part(said, "tasks", dict).items()
            },
        )


def read_tuned(path: Path) -> Tuned:
    """The content of a file.

    Raises:
        ConfigError: it cannot be read, or is no such file.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{_name(path)} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or a path with a null character
        raise ConfigError(f"{_name(path)} is no tuned.json: it is not complete JSON; run ttt-harness tune.") from None
    if not isinstance(said, dict) or said.get("kind") != KIND:
        raise ConfigError(f"{_name(path)} is no tuned.json, which ttt-harness tune writes.")
    if said.get("version") != VERSION:
        raise ConfigError(
            f"{_name(path)} is of version {quoted(said.get('version'))}, and this ttt_harness reads {VERSION}; run "
            "ttt-harness tune again."
        )
    try:
        return Tuned.from_dict(said)
    except ConfigError as error:
        raise ConfigError(f"{_name(path)} is damaged: {error}") from None


def is_tuned(path: Path) -> bool:
    """Whether a file is, or was meant to be, one of tuned settings."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("kind") == KIND


def write_tuned(tuned: Tuned, path: Path) -> None:
    """Write a file in one step; its folder is made.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(tuned.to_dict(), indent=1, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{_name(path)} cannot be written: {reason}; choose another place.") from None


def tuned_folder() -> Path:
    """The folder in which `settings=auto` looks for files."""
    return cache_dir() / "tuned"


def newest(*, fingerprint: str, method: str, k: int) -> Path | None:
    """The file in `tuned_folder` that was written last for this base model, method and k; None without one.

    What is no such file is passed over; a damaged one with a warning.
    """
    dated: list[tuple[float, Path]] = []
    for path in tuned_folder().rglob("*.json"):
        try:
            dated.append((path.stat().st_mtime, path))
        except OSError:
            continue
    for _, path in sorted(dated, reverse=True):
        try:
            tuned = read_tuned(path)
        except ConfigError as error:
            if "damaged" in str(error):
                _log.warning("settings=auto passes over a file: %s", error)
            continue
        if (tuned.base_model.fingerprint, tuned.method, tuned.k) == (fingerprint, method, k):
            return path
    return None


def _name(path: Path) -> str:
    return quoted(str(path)).strip("'\"")


def _part(said: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(said.get(name), kind):
        what = {"str": "a text", "list": "a list", "dict": "a mapping"}[kind.__name__]
        raise ConfigError(f"{name} has to be {what}, and is {quoted(said.get(name))}.")
    return said[name]


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} has to be a mapping, and is {quoted(value)}.")
    return value


def _integers(values: list[Any], name: str) -> Iterator[int]:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            raise ConfigError(f"{name} has to hold whole numbers, and holds {quoted(value)}.")
        yield value


def _count(said: Mapping[str, Any], name: str) -> int:
    return next(_integers([said.get(name)], name))


def _candidate(said: Any) -> Candidate:
    said = _mapping(said, "a candidate")
    seconds = said.get("fit_seconds", 0.0)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ConfigError(f"fit_seconds has to be a number of at least 0, and is {quoted(seconds)}.")
    return Candidate(_part(said, "name", str), _part(said, "model_args", dict), float(seconds))


def _outcomes(task: str, found: Any) -> Iterator[tuple[Asked, int]]:
    for text, right in _mapping(found, f"the outcomes of {quoted(task)}").items():
        try:
            asked = Asked.parse(text)
        except ValueError:
            raise ConfigError(
                f'{quoted(task)} has an outcome of {quoted(text)}, which is no "seed/demonstration/order".'
            ) from None
        if isinstance(right, bool) or right not in (0, 1):
            raise ConfigError(f"{quoted(task)} has the outcome {quoted(right)}, which is neither 0 nor 1.")
        yield asked, int(right)
