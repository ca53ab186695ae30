"""Adapters that a user brings: PEFT directories, checked before an engine starts.

`check_user_adapter` says in one sentence what keeps vLLM from serving a directory on a base model, or would have it
serve something else than was trained. Shapes are compared with those of the model that transformers builds from the
base model's `config.json`, without weights.
"""

import functools
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ttt_harness.adapters.names import fingerprint, is_hub_name, model_name
from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME
from ttt_harness.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# What vLLM reads where there is no safetensors file, in its order.
PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt")
LARGEST_RANK: Final = 512  # that vLLM knows (vllm.config.lora.MaxLoRARanks)
SAVE_AGAIN = "save the adapter again with peft's save_pretrained"
# The module of a tensor, and which of its two matrices it is; an embedding's have no ".weight".
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
# A copy of a frozen matrix of the base model, which PEFT saves beside the adapter of an embedding.
_FROZEN = re.compile(r"(?:base_model\.model\.)?(.*\b(?:embed_tokens|lm_head))\.base_layer\.weight")
# Module names from the first numbered layer on, since what stands before differs between classes of one model.
_TAIL = re.compile(r"(?:.*?\.)?(layers\.\d+\..+|h\.\d+\..+)")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserAdapter:
    """An adapter that was checked.

    path: its PEFT directory.
    name: 32 hexadecimal digits of its content's hash, by which engines and caches can tell it from others.
    rank: the largest rank of its matrices, which vLLM's `max_lora_rank` has to hold.
    modules: the last names of the modules that it adapts, sorted.
    base_model: the model that it says it belongs to; empty where it says none.
    """

    path: Path
    name: str
    rank: int
    modules: tuple[str, ...]
    base_model: str


@dataclass(frozen=True)
class UserAdapters:
    """The adapters that a user brings: one for all tasks, or one for each of some."""

    common: UserAdapter | None = None
    by_task: Mapping[str, UserAdapter] = field(default_factory=dict)

    @property
    def all(self) -> list[UserAdapter]:
        """All of them."""
        return [*([self.common] if self.common else []), *self.by_task.values()]

    def of(self, task: str) -> UserAdapter:
        """The one that answers a task.

        Raises:
            ConfigError: there is none.
        """
        adapter = self.by_task.get(task, self.common)
        if adapter is None:
            named = ", ".join(sorted(self.by_task))
            raise ConfigError(f"adapter= names no adapter for {task}, but for {named}; add one to the mapping.")
        return adapter


def adapters_by_task(given: str | Mapping[str, str]) -> str | Mapping[str, str]:
    """What the argument `adapter` says: one adapter, or one for each task.

    Args:
        given: the name of an adapter; a mapping of tasks to names; or such a mapping as JSON or YAML, or a file of it
            whose name ends so.

    Raises:
        ConfigError: it cannot be read, or is no such mapping.
    """
    if not isinstance(given, str):
        return given
    text = given
    if given.endswith((".json", ".yaml", ".yml")):
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"adapter={given} cannot be read ({error}); name a file of tasks and adapters.") from None
    elif not given.lstrip().startswith("{"):
        return given
    import yaml

    try:
        named = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"adapter={given} is no mapping of tasks to adapters in YAML or JSON ({reason}).") from None
    if (
        not isinstance(named, dict)
        or not named
        or not all(isinstance(part, str) and part for item in named.items() for part in item)
    ):
        raise ConfigError(f"adapter={given} is no mapping of tasks to adapters; write {{task: directory}}.")
    return named


def check_user_adapter(
    path: str | Path, model_dir: Path, *, max_rank: int = LARGEST_RANK, argument: str = "adapter"
) -> UserAdapter:
    """Check that vLLM can serve a PEFT directory on a base model as it was trained.

    Args:
        path: the directory, with `adapter_config.json` and `adapter_model.safetensors` (or vLLM's older names).
        model_dir: the base model's directory, in the hub's layout.
        max_rank: the largest rank that the engine takes.
        argument: the user's name for `path`, for messages.

    Raises:
        ConfigError: it cannot be read, is of another kind than vLLM serves, does not fit the base model, or holds a
            value that is not finite.
    """
    where = f"{argument}={path}"
    if not isinstance(path, str | Path):
        raise ConfigError(f"{where} is no path; give a PEFT directory, with {CONFIG_NAME} and {WEIGHTS_NAME} in it.")
    folder = Path(path).expanduser()
    config = _read_config(folder, where)
    _check_kind(folder, config, where)
    base_model = _text(config.get("base_model_name_or_path"))
    _check_base_model(base_model, model_dir, where)
    with _opened(folder, where) as weights:
        pairs = _pairs(weights.shapes, where)
        ranks = _check_ranks(pairs, config, max_rank, where)
        _check_shapes(pairs, weights.shapes, model_dir, where)
        _check_finite(weights, where)
    return UserAdapter(
        folder.resolve(),
        _content_hash(folder),
        max(ranks),
        tuple(sorted({name.rpartition(".")[2] for name in pairs})),
        base_model,
    )


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    if not os.path.isdir(folder):  # unlike Path's, these take any name and any permissions
        kind = "a file" if os.path.exists(folder) else "not there"
        raise ConfigError(f"{where} is {kind}: give a PEFT directory, with {CONFIG_NAME} and {WEIGHTS_NAME} in it.")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{where} has no {CONFIG_NAME}, so it is no PEFT directory; {SAVE_AGAIN}.") from None
    except OSError as error:
        raise ConfigError(f"{where}: {CONFIG_NAME} cannot be read ({error.strerror}); correct that.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {CONFIG_NAME} is not JSON ({error}); {SAVE_AGAIN}.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: {CONFIG_NAME} holds no JSON object; {SAVE_AGAIN}.")
    return config


def _check_kind(folder: Path, config: Mapping[str, Any], where: str) -> None:
    """Refuse kinds of adapters that vLLM does not serve, and values that have another type than PEFT writes."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{where} has peft_type={kind!r}, and vLLM serves LORA alone; give a LoRA adapter.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            f"{where}: r={rank!r} in {CONFIG_NAME} is no rank, a whole number of at least 1; {SAVE_AGAIN}."
        )
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError(f"{where}: lora_alpha={alpha!r} in {CONFIG_NAME} is no number above 0; {SAVE_AGAIN}.")
    if config.get("fan_in_fan_out"):
        raise ConfigError(
            f"{where} has fan_in_fan_out=true, whose weights vLLM does not transpose; give another adapter."
        )
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    unknown = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if unknown and not hasattr(PEFTHelper, "get_rank_and_scaling"):
        raise ConfigError(f"{where} has {unknown[0]}, which this version of vLLM ignores; use one rank and one alpha.")
    try:
        # The largest rank that vLLM knows: which one this run takes is said by `_check_ranks`.
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(LoRAConfig(max_lora_rank=LARGEST_RANK))
    except Exception as error:  # whatever a value of the wrong type leads to
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ConfigError(f"{where} is an adapter that vLLM cannot serve ({reason}); give another one.") from None


def _check_base_model(said: str, model_dir: Path, where: str) -> None:
    """Refuse an adapter that was made for another model, as far as names and files tell.

    A model may have been copied or renamed: where nothing but a name differs, that is a warning.
    """
    if not said:
        return
    here, theirs = model_name(model_dir), model_name(said)
    if theirs.rpartition("/")[2].lower() == here.rpartition("/")[2].lower():
        return
    same = _same_files(Path(said).expanduser(), model_dir)
    if same:
        return
    if same is False or (is_hub_name(theirs) and is_hub_name(here)):
        raise ConfigError(
            f"{where} was made for the base model {theirs}, and this run's is {here}; evaluate it with "
            f"pretrained={said}, or correct base_model_name_or_path in its {CONFIG_NAME}."
        )
    _log.warning(
        "%s says that it was made for %s, and this run's base model is %s: its shapes fit, but whether it is the same "
        "model cannot be told.",
        where,
        said,
        here,
    )


def _same_files(one: Path, two: Path) -> bool | None:
    """Whether two directories hold the same model; None where that cannot be told."""
    if not os.path.isdir(one):
        return None
    if os.path.samefile(one, two):
        return True
    if is_hub_name(model_name(one)) != is_hub_name(model_name(two)):
        return None  # one in the hub's cache, whose files are not hashed (see `fingerprint`)
    try:
        return fingerprint(one) == fingerprint(two)
    except OSError:
        return None


@dataclass(frozen=True)
class _Weights:
    """The tensors of an open weights file: shapes by name, and how one is read."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], "Tensor"]


@contextmanager
def _opened(folder: Path, where: str) -> Iterator[_Weights]:
    """The weights of a PEFT directory; tensors of a safetensors file are read one by one.

    Raises:
        ConfigError: there is no such file, or it is damaged.
    """
    names = [name for name in (WEIGHTS_NAME, *PICKLED_NAMES) if (folder / name).is_file()]
    if not names:
        raise ConfigError(f"{where} has no {WEIGHTS_NAME}, which holds the weights; {SAVE_AGAIN}.")
    with ExitStack() as stack:
        try:
            weights = (
                _read_safetensors(folder / names[0], stack)
                if names[0] == WEIGHTS_NAME
                else _unpickle(folder / names[0])
            )
        except Exception as error:  # safetensors and torch raise many kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ConfigError(f"{where}: {names[0]} cannot be read ({reason}); {SAVE_AGAIN}.") from None
        yield weights


def _read_safetensors(path: Path, stack: ExitStack) -> _Weights:
    from safetensors import safe_open

    file = stack.enter_context(safe_open(path, framework="pt"))
    return _Weights({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor)  # noqa: SIM118


def _unpickle(path: Path) -> _Weights:
    import torch

    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return _Weights({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


# Module name -> its two tensors' shapes, by side ("A", "B").
_Pairs = Mapping[str, Mapping[str, tuple[int, ...]]]


def _pairs(shapes: Mapping[str, tuple[int, ...]], where: str) -> _Pairs:
    """The LoRA matrices by module; refuses a tensor of another kind, and a matrix without its other half."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if _FROZEN.fullmatch(name):
            continue
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise ConfigError(f"{where} holds the tensor {name}, which is none of a LoRA adapter's; {SAVE_AGAIN}.")
        if len(shape) != 2:
            raise ConfigError(f"{where}: the tensor {name} has the shape {list(shape)}, not two sides; {SAVE_AGAIN}.")
        pairs.setdefault(found[1], {})[found[2] or found[3]] = shape
    if not pairs:
        raise ConfigError(f"{where} holds no tensors, so it would change nothing; {SAVE_AGAIN}.")
    for module, sides in pairs.items():
        if len(sides) != 2:
            raise ConfigError(f"{where}: {module} has lora_{next(iter(sides))} without its other half; {SAVE_AGAIN}.")
    return pairs


def _check_ranks(pairs: _Pairs, config: Mapping[str, Any], max_rank: int, where: str) -> set[int]:
    """The ranks of the matrices, which are those that `config` states and at most `max_rank`."""
    ranks = set()
    for module, sides in pairs.items():
        stated = _stated_rank(module, config)
        rank = sides["A"][0]
        if rank != stated or sides["B"][1] != stated:
            raise ConfigError(
                f"{where}: {module} has matrices of rank {rank} and {sides['B'][1]}, and its {CONFIG_NAME} states "
                f"{stated}, by which its weights are scaled; {SAVE_AGAIN}."
            )
        ranks.add(rank)
    if max(ranks) > max_rank:
        raise ConfigError(
            f"{where} has rank {max(ranks)}, and vLLM takes at most {max_rank} here; give an adapter of a smaller rank"
            f"{'' if max_rank == LARGEST_RANK else ', or a larger max_lora_rank'}."
        )
    return ranks


def _stated_rank(module: str, config: Mapping[str, Any]) -> int:
    """The rank that PEFT gives a module: `r`, or that of the first of `rank_pattern` that ends its name."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"])


def _check_shapes(pairs: _Pairs, shapes: Mapping[str, tuple[int, ...]], model_dir: Path, where: str) -> None:
    """Refuse matrices of modules that the base model lacks, or has in other sizes."""
    known = _module_shapes(model_dir)
    if known is None:
        return
    here = model_name(model_dir)
    for module, sides in pairs.items():
        if ".experts" in module:  # transformers keeps the experts of a layer in one tensor
            continue
        own = known.get(_tail(module))
        if own is None:
            raise ConfigError(
                f"{where} adapts {module}, which the base model {here} lacks; give an adapter that was made for it."
            )
        given = (sides["A"][1], sides["B"][0])
        if given not in own:
            (width_in, width_out), *_ = own
            raise ConfigError(
                f"{where} adapts {module} as a matrix from {given[0]} to {given[1]}, and that of the base model {here} "
                f"is one from {width_in} to {width_out}; give an adapter that was made for it."
            )
    for name, shape in shapes.items():
        if (frozen := _FROZEN.fullmatch(name)) and shape not in {(b, a) for a, b in known.get("lm_head", ())}:
            raise ConfigError(
                f"{where} holds {frozen[1]} of the shape {list(shape)}, other than that of the base model {here}: vLLM "
                "would ignore the vocabulary that it was made for; give an adapter that was made for this model."
            )


def _tail(module: str) -> str:
    found = _TAIL.fullmatch(module)
    return found[1] if found else module.rpartition(".")[2]


@functools.lru_cache(maxsize=4)
def _module_shapes(model_dir: Path) -> Mapping[str, set[tuple[int, int]]] | None:
    """The widths (in, out) of the modules that LoRA can adapt, by the ends of their names.

    None where transformers cannot build the model by itself: then vLLM says what it cannot serve.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # remote code, an architecture that it does not know
        _log.info("%s: the shapes of an adapter cannot be compared with the model's (%s).", model_dir, error)
        return None
    shapes: dict[str, set[tuple[int, int]]] = {}
    for name, module in model.named_modules():
        match module:
            case nn.Linear():
                widths = (module.in_features, module.out_features)
            case nn.Embedding():
                widths = (module.num_embeddings, module.embedding_dim)
            case Conv1D():
                widths = (module.nx, module.nf)
            case _:
                continue
        shapes.setdefault(_tail(name), set()).add(widths)
    return shapes


def _check_finite(weights: _Weights, where: str) -> None:
    for name in weights.shapes:
        try:
            finite = bool(weights.read(name).isfinite().all())
        except Exception as error:  # a cut file
            raise ConfigError(f"{where}: the tensor {name} cannot be read ({error}); {SAVE_AGAIN}.") from None
        if not finite:
            raise ConfigError(
                f"{where}: {name} holds values that are not finite (NaN or infinity), as after a fit that diverged; "
                "fit it again with a smaller learning rate."
            )


def _content_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME, *PICKLED_NAMES):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
