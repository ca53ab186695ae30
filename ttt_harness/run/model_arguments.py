"""`ModelArguments`: what `--model_args` say, checked once, before lm-eval, vLLM or torchtune get to see any of it.

The arguments are those of three: this package's settings (`TTTConfig`), lm-eval's `vllm` class and vLLM's engine.
`ModelArguments.parse` sorts them, finds the model directory, and adds what vLLM has to be told because adapters are
fitted and served.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from lm_eval.models import vllm_causallms
from vllm.engine.arg_utils import EngineArgs

from ttt_harness.config import VLLM_LORA_RANKS, TaskSettings, TTTConfig, nearest, quoted
from ttt_harness.embedded import embedded_model_path
from ttt_harness.errors import ConfigError, ModelError
from ttt_harness.run.memory import (
    GIB,
    UTILIZATION,
    MemoryPlan,
    Sizes,
    gpu_budget,
    gpu_memory,
    plan_memory,
    possible_contexts,
)
from ttt_harness.serving.engine import default_engine_args
from ttt_harness.training.checkpoint import ModelShape, read_config

# Metadata of the tasks that come with this package and draw their own data; they may stand in --model_args too.
DATA_KEYS = ("num_examples", "data_seed")


@dataclass(frozen=True)
class ModelArguments:
    """The model arguments of a run, checked and sorted.

    config: this package's settings.
    model_dir: the base model, in the hub's layout.
    hf_config: its config.json.
    shape: its numbers, where adapters are fitted or served; else None.
    workers: how many processes fit and answer.
    engine: what lm-eval's `vllm` class is made with, besides `pretrained`; it hands vLLM's arguments on.
    memory: how trainer and engine share a GPU; None without a GPU, without adapters, or with several workers.
    given: what a worker parses again.
    """

    config: TTTConfig
    model_dir: Path
    hf_config: Mapping[str, Any]
    shape: ModelShape | None
    workers: int
    engine: dict[str, Any]
    memory: MemoryPlan | None
    given: dict[str, Any]

    @classmethod
    def parse(cls, pretrained: str | None, dtype: str = "auto", **model_args: Any) -> Self:
        """Check the arguments of `TTTVLLM`; a model that is not on this machine is fetched.

        Raises:
            ConfigError: an argument is unknown or has a value that is not allowed.
            ModelError: the model is missing, damaged or not supported, or too large for the GPU.
        """
        if pretrained is None:
            raise ConfigError(
                "pretrained is missing: name a model with --model_args pretrained=..., e.g. pretrained=embedded."
            )
        _refuse_unknown(model_args)
        config = TTTConfig.from_mapping(model_args)
        workers = positive_int(model_args, "data_parallel_size", "workers") or 1
        model_dir = local_model(str(pretrained), model_args.get("revision"))
        hf_config = read_config(model_dir)
        shape = None
        if config.how.fits or model_args.get("enable_lora"):
            shape = ModelShape.from_config(hf_config, where=str(model_dir))
        engine = _engine_arguments(dtype, model_args)
        if config.how.fits:
            assert shape is not None
            engine["enable_lora"] = True
            engine["max_lora_rank"] = max_lora_rank(config, shape, model_args.get("max_lora_rank"))
        memory = None
        # Not for fits alone: a sweep asks for LoRA in all of its cells, so that they share one engine.
        if shape is not None and torch.cuda.is_available() and workers == 1:
            memory = _plan(model_dir, shape, config, engine)
            engine = _engine_share(memory, engine)
        given = {name: value for name, value in model_args.items() if name not in ("data_parallel_size", "device")}
        return cls(
            config=config,
            model_dir=model_dir,
            hf_config=hf_config,
            shape=shape,
            workers=workers,
            engine=engine,
            memory=memory,
            given={"pretrained": pretrained, "dtype": dtype, **given},
        )


def local_model(pretrained: str, revision: str | None) -> Path:
    """The local directory of a model: itself, the embedded one, or the hub's, downloaded if it is not in the cache.

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    if pretrained == "embedded":
        return embedded_model_path()
    path = Path(pretrained).expanduser()
    if path.exists() or path.is_absolute() or pretrained.startswith((".", "~")) or pretrained.count("/") != 1:
        return path
    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds, and those of its transport
        raise ModelError(
            f"pretrained={pretrained} is no local directory, and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local directory."
        ) from None


def positive_int(arguments: Mapping[str, Any], name: str, of: str) -> int | None:
    """A whole number, of `of`, among the arguments that the user gives; None where there is none.

    Raises:
        ConfigError: it is something else.
    """
    given = arguments.get(name)
    if given is None:
        return None
    try:
        count = int(str(given))  # int() alone takes 2.5 for 2
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"{name}={quoted(given)} is not allowed: it is a whole number of {of}, at least 1.")
    return count


def _refuse_unknown(model_args: Mapping[str, Any]) -> None:
    """Refuse an argument that is neither ours, nor lm-eval's, nor vLLM's."""
    lm_eval_args = set(inspect.signature(vllm_causallms.VLLM.__init__).parameters) - {"self", "kwargs"}
    known = {*TTTConfig.names(), *TaskSettings.names(), *DATA_KEYS, *lm_eval_args, "device"}
    known |= {field.name for field in fields(EngineArgs)}
    for name in model_args:
        if name not in known:
            raise ConfigError(
                f"{name} is not a model argument of ttt_vllm, of lm-eval's vllm or of vLLM.{nearest(name, known)}"
            )


def _engine_arguments(dtype: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults on this machine, and over them those of the user's arguments that are not this package's."""
    own = {*TTTConfig.names(), *TaskSettings.names(), *DATA_KEYS}
    engine = default_engine_args()
    if "compilation_config" in model_args:
        engine.pop("cudagraph_capture_sizes", None)  # vLLM takes them from one place only
    if dtype != "auto":
        engine["dtype"] = dtype
    engine |= {name: value for name, value in model_args.items() if name not in own}
    engine.pop("device", None)  # lm-eval's CLI passes one always; vLLM takes the machine's
    if engine.get("batch_size") in (None, 1):
        engine["batch_size"] = "auto"  # 1 is the CLI's default, and would make vLLM take turns
    engine.pop("revision", None)  # model_dir is that revision already
    engine.pop("data_parallel_size", None)  # each worker has an engine of its own
    return engine


def max_lora_rank(config: TTTConfig, shape: ModelShape, asked: Any) -> int:
    """The rank that vLLM reserves: the smallest that holds the adapters as they are written, or what the user asks."""
    written = shape.adapter_rank(config.lora_rank)
    allowed = [rank for rank in VLLM_LORA_RANKS if rank >= written]
    if not allowed:
        raise ConfigError(
            f"lora_rank={config.lora_rank} is not allowed for {shape.architecture}: its adapters are written with rank "
            f"{written}, and vLLM takes at most {VLLM_LORA_RANKS[-1]}; use a smaller one."
        )
    if asked is None:
        return allowed[0]
    if asked not in allowed:
        raise ConfigError(
            f"max_lora_rank={quoted(asked)} is not allowed: vLLM takes one of {', '.join(map(str, allowed))} "
            f"for lora_rank={config.lora_rank}."
        )
    return asked


def _plan(model_dir: Path, shape: ModelShape, config: TTTConfig, engine: Mapping[str, Any]) -> MemoryPlan:
    """Plan how trainer and engine share the GPU.

    Raises:
        ModelError: not even one of them fits.
    """
    budget = gpu_budget(gpu_share(engine.get("gpu_memory_utilization")))
    dtype = torch.float32 if engine.get("dtype") == "float32" else torch.bfloat16
    context = positive_int(engine, "max_model_len", "tokens") or positive_int(engine, "max_length", "tokens")
    plan = plan_memory(
        budget,
        Sizes.of(shape, config.lora_rank, dtype),
        possible_contexts(shape, context),
        positive_int(engine, "max_num_batched_tokens", "tokens"),
    )
    if plan is None:
        raise ModelError(
            f"{model_dir} needs more memory than this GPU may give ({budget / GIB:.1f} GiB), for fitting and "
            "serving in turns as well; use a smaller model, or a larger GPU or gpu_memory_utilization."
        )
    return plan


def gpu_share(given: Any) -> float:
    """`gpu_memory_utilization` as a number; vLLM's default where it is not given.

    Raises:
        ConfigError: it is no share.
    """
    try:
        share = UTILIZATION if given is None else float(given)
    except (TypeError, ValueError):
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(
            f"gpu_memory_utilization={quoted(given)} is not allowed: it is a share of the GPU's memory, above 0 and at "
            "most 1."
        )
    return share


def _engine_share(plan: MemoryPlan, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's arguments under a memory plan; what the user asks for is left as it is."""
    sequences = asked.get("max_num_seqs")
    steps = {"max_num_batched_tokens": max(plan.batch_tokens, sequences if isinstance(sequences, int) else 0)}
    if asked.get("enable_chunked_prefill") is False:
        steps = {}  # a step must then hold a whole context, which vLLM sees to
    return {
        "kv_cache_memory_bytes": plan.kv_cache,
        **steps,
        **{name: value for name, value in asked.items() if name != "max_length"},  # lm-eval's name for the next
        "max_model_len": plan.context,
        # vLLM only checks that this much is free when it starts; the cache's size is given.
        "gpu_memory_utilization": plan.engine / gpu_memory()[1],
        "enable_sleep_mode": plan.turns,
    }
