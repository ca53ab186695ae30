"""`ModelArguments`: the arguments of `--model_args`, checked once, before lm-eval, vLLM or torchtune see any of them.

The arguments belong to this package (`TTTConfig`), to lm-eval's `vllm` class or to vLLM's engine.
`ModelArguments.parse` sorts them, finds the model directory, replaces `settings=` with what it stands for, and adds the
engine arguments that fitted adapters need.
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from lm_eval.models import vllm_causallms
from vllm.engine.arg_utils import EngineArgs

from ttt_harness.adapters.names import fingerprint
from ttt_harness.adapters.user import UserAdapters, adapters_by_task, check_user_adapter
from ttt_harness.config import VLLM_LORA_RANKS, LMEvalSettings, TaskSettings, TTTConfig, nearest, quoted
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
from ttt_harness.serving.engine import check_sees_images, default_engine_args
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape
from ttt_harness.training.weights import check_weights
from ttt_harness.tuned import newest, tuned_folder
from ttt_harness.tuned.arguments import TunedArguments, tuned_arguments, tuned_path

# Arguments of vLLM's engine that mean something else here, or nothing, and what to use.
NOT_HERE = {
    "model": "use pretrained",
    "swap_space": "vLLM has no such argument any more; leave it out",
    "device_ids": "set CUDA_VISIBLE_DEVICES, which fits go by as well",
    "skip_tokenizer_init": "answers are texts",
    "tokens_only": "answers are texts",
    "runner": "vLLM has to generate",
    "convert": "vLLM has to generate",
    "pooler_config": "vLLM has to generate",
    "override_generation_config": "lm-eval states how each answer is generated; use generation_kwargs or --gen_kwargs",
    "return_sampling_mask": "it allows no greedy answers",
    **dict.fromkeys(
        (
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_backend",
            "nnodes",
            "node_rank",
            "master_addr",
            "master_port",
        ),
        "each of the data_parallel_size workers has an engine of its own, and RAY_ADDRESS names their cluster",
    ),
}
# Those with which an adapter would be served on other weights than it is fitted on, or in part.
NOT_WITH_FITS = (
    "quantization",
    "quantization_config",
    "load_format",
    "model_weights",
    "model_class_overrides",
    "hf_overrides",
    "hf_config_path",
    "config_format",
    "lora_target_modules",
)
# Those that spread one engine over several GPUs or nodes, of which a worker has tensor_parallel_size.
NOT_WITH_WORKERS = (
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "distributed_executor_backend",
    "enable_expert_parallel",
)
# vLLM's modes that give log-probabilities; the others give logits, which lm-eval would add up as such.
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
# An adapter's effect is seen in so many log-probabilities of a token.
LEAST_LOGPROBS = 5

# What vLLM's arithmetic holds.
LARGEST_INT = 2**63

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
    adapters: the user's own, which answer in the place of fitted ones; None without any.
    memory: how trainer and engine share a GPU; None without a GPU, without adapters, or with several workers.
    given: what a worker parses again.
    tuned: the settings that `settings=` chooses; None where the user states them.
    """

    config: TTTConfig
    model_dir: Path
    hf_config: Mapping[str, Any]
    shape: ModelShape | None
    workers: int
    engine: dict[str, Any]
    adapters: UserAdapters | None
    memory: MemoryPlan | None
    given: dict[str, Any]
    tuned: TunedArguments | None = None

    def config_of(self, task: str) -> TTTConfig:
        """The settings of a task's fit, which with choose=task are its own."""
        return self.tuned.config(task) if self.tuned is not None else self.config

    def tuned_setting(self, task: str) -> dict[str, Any] | None:
        """What results state of the tuned setting of a task; None without `settings=`."""
        return self.tuned.said(task) if self.tuned is not None else None

    def base_model(self) -> str:
        """The hash of the base model's weights, which takes a while."""
        return fingerprint(self.model_dir) if self.tuned is None else self.tuned.tuned.base_model.fingerprint

    @classmethod
    def parse(cls, pretrained: str | None, dtype: str = "auto", **model_args: Any) -> Self:
        """Check the arguments of `TTTVLLM`; a model that is not on this machine is fetched.

        Raises:
            ConfigError: an argument is unknown or has a value that is not allowed.
            ModelError: the model is missing, damaged or not supported, or too large for the GPU.
        """
        pretrained = _named(pretrained)
        _refuse_unknown(model_args)
        config = TTTConfig.from_mapping(model_args)
        TaskSettings.from_mapping(model_args)
        lm_eval = LMEvalSettings.from_mapping(model_args)
        tuned = None
        if config.settings is not None:
            tuned = _tuned(pretrained, lm_eval, model_args)
            model_args = tuned.model_args(tuned.base)
            stated = {"settings": str(tuned.path), "choose": config.choose or "all"}
            config = TTTConfig.from_mapping({**model_args, **stated})
        workers = lm_eval.data_parallel_size or 1
        _refuse_log_probabilities(model_args)
        if config.fits:
            _refuse_with_fits(model_args, lm_eval, config.method)
        if workers > 1:
            _refuse_with_workers(model_args, workers)
        model_dir = model_directory(pretrained, lm_eval)
        hf_config = read_config(model_dir)
        if "vision_config" in hf_config:
            check_sees_images(hf_config.get("architectures"), where=str(model_dir))
        shape = adapters = memory = None
        if config.fits or lm_eval.enable_lora:
            shape = ModelShape.from_config(hf_config, where=str(model_dir))
        if config.fits:
            if lm_eval.trust_remote_code:
                _refuse_own_code(model_dir, hf_config)
            check_weights(model_dir, hf_config)
        engine = _engine_arguments(dtype, model_args) | _lm_eval_arguments(lm_eval, model_args)
        if config.fits:
            assert shape is not None
            rank = max_lora_rank(config, shape, lm_eval.max_lora_rank)
            engine |= {"enable_lora": True, "max_lora_rank": rank}
        elif config.adapter is not None:
            argument = "adapter" if lm_eval.lora_local_path is None else "lora_local_path"
            adapters = _user_adapters(config.adapter, model_dir, argument=argument, token=lm_eval.hf_token)
            largest = max(adapters.all, key=lambda adapter: adapter.rank)
            rank = _reserved_rank(largest.rank, lm_eval.max_lora_rank, f"the adapter in {largest.path}")
            engine |= {"enable_lora": True, "max_lora_rank": rank}
        # Not for fits alone: a sweep asks for LoRA in all of its cells, so that they share one engine.
        if shape is not None and torch.cuda.is_available() and workers == 1:
            memory = _plan(model_dir, shape, config, engine)
            engine = _engine_share(memory, engine)
        given = {name: value for name, value in model_args.items() if name not in ("data_parallel_size", "device")}
        return cls(
            config=replace(config, truncate=_truncates(config, model_args)),
            model_dir=model_dir,
            hf_config=hf_config,
            shape=shape,
            workers=workers,
            engine=engine,
            adapters=adapters,
            memory=memory,
            given={"pretrained": pretrained, "dtype": dtype, **given},
            tuned=tuned,
        )


def explicit_arguments(pretrained: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Model arguments in which `settings=` is replaced with what it stands for, for processes that lack the file.

    Raises:
        ConfigError, ModelError: as `ModelArguments.parse`.
    """
    tuned = _tuned(_named(pretrained), LMEvalSettings.from_mapping(model_args), model_args)
    return tuned.model_args(tuned.base)


def _tuned(pretrained: str, lm_eval: LMEvalSettings, model_args: Mapping[str, Any]) -> TunedArguments:
    """The settings that `settings=` chooses for this base model.

    Raises:
        ConfigError: there are none, or they are for another model, or not allowed beside the other arguments.
    """
    config = TTTConfig.from_mapping(model_args)
    model_dir = model_directory(pretrained, lm_eval)
    read_config(model_dir)  # says what is wrong with a folder that holds no model
    weights = fingerprint(model_dir)
    if config.settings == "auto":
        path = newest(fingerprint=weights, method=config.method, k=config.k)
        if path is None:
            raise ConfigError(
                f"settings=auto finds no settings for {pretrained} with method={config.method} and k={config.k} in "
                f"{tuned_folder()}; run ttt-harness tune, or name a file with settings=PATH."
            )
    else:
        path = tuned_path(str(config.settings))
    tuned = tuned_arguments(model_args, path)
    if tuned.tuned.base_model.fingerprint != weights:
        raise ConfigError(
            f"settings={path} was found for {tuned.tuned.base_model.name}, whose weights are others than those of "
            f"pretrained={pretrained}; run ttt-harness tune for this model."
        )
    return tuned


def model_directory(pretrained: str, settings: LMEvalSettings) -> Path:
    """The local directory of the model that is named with these arguments of lm-eval's class.

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    return local_model(
        pretrained,
        settings.revision,
        token=settings.hf_token,
        folder=settings.download_dir,
        code=bool(settings.trust_remote_code),
    )


def local_model(
    pretrained: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    folder: str | None = None,
    code: bool = False,
) -> Path:
    """The local directory of a model: itself, the embedded one, or the hub's, downloaded if it is not in the cache.

    Args:
        pretrained: a directory, a name on the hub, or `embedded`.
        revision: of the hub's.
        token: for the hub.
        folder: the cache to use in the place of the hub client's own.
        code: take the model's Python files as well.

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    if pretrained == "embedded":
        return embedded_model_path()
    if not _is_on_hub(pretrained):
        return _local_directory("pretrained", pretrained, "embedded, ")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py"] if code else [])]
    return _from_hub("pretrained", pretrained, revision=revision, token=token, cache_dir=folder, allow_patterns=wanted)


def _user_adapters(
    given: str | Mapping[str, str], model_dir: Path, *, argument: str, token: str | bool | None
) -> UserAdapters:
    """The adapters that a user brings, checked.

    Raises:
        ConfigError: one cannot be served on this model, or what names them cannot be read.
        ModelError: one is neither here nor on the hub.
    """
    named = adapters_by_task(given)
    checked = {
        name: check_user_adapter(local_adapter(name, argument=argument, token=token), model_dir, argument=argument)
        for name in ([named] if isinstance(named, str) else dict.fromkeys(named.values()))
    }
    if isinstance(named, str):
        return UserAdapters(checked[named])
    return UserAdapters(by_task={task: checked[name] for task, name in named.items()})


def local_adapter(name: str, *, argument: str = "adapter", token: str | bool | None = None) -> Path:
    """The local directory of an adapter: itself, or the hub's, downloaded if it is not in the cache.

    Raises:
        ModelError: it is neither here nor on the hub.
    """
    if not _is_on_hub(name):
        return _local_directory(argument, name)
    return _from_hub(argument, name, token=token, allow_patterns=["adapter_*"])


def _local_tokenizer(given: LMEvalSettings) -> Path:
    assert given.tokenizer is not None
    if _is_on_hub(given.tokenizer):
        wanted = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", *(["*.py"] if given.trust_remote_code else [])]
        return _from_hub(
            "tokenizer",
            given.tokenizer,
            revision=given.tokenizer_revision,
            token=given.hf_token,
            cache_dir=given.download_dir,
            allow_patterns=wanted,
        )
    return _local_directory("tokenizer", given.tokenizer)


def _local_directory(argument: str, name: str, or_else: str = "") -> Path:
    path = Path(name).expanduser()
    if not os.path.isdir(path):  # unlike Path's, it takes names of any length
        there = "it is a file" if os.path.exists(path) else "there is no such directory"
        raise ModelError(f"{argument}={_cut(name)}: {there}; give {or_else}a local directory, or a name on the hub.")
    return path


def _cut(name: str) -> str:
    return quoted(name).strip("'\"")


def _is_on_hub(name: str) -> bool:
    path = Path(name).expanduser()
    return not (os.path.exists(path) or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1)


def _from_hub(argument: str, name: str, **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # the hub's client raises many kinds, and those of its transport
        raise ModelError(
            f"{argument}={_cut(name)} is no local directory, and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, or give a local directory."
        ) from None


def _named(pretrained: Any) -> str:
    if pretrained is None:
        raise ConfigError(
            "pretrained is missing: name a model with --model_args pretrained=..., e.g. pretrained=embedded."
        )
    # lm-eval's parser makes a number of a folder's name
    if not isinstance(pretrained, str | int | Path) or isinstance(pretrained, bool) or not str(pretrained):
        raise ConfigError(
            f"pretrained={quoted(pretrained)} is not allowed: it is a model directory, a name on the hub, or embedded."
        )
    return str(pretrained)


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
    """Refuse an argument that is neither ours, nor lm-eval's, nor vLLM's, or that is not for here."""
    lm_eval_args = set(inspect.signature(vllm_causallms.VLLM.__init__).parameters) - {"self", "kwargs"}
    known = {*TTTConfig.names(), *TaskSettings.names(), *DATA_KEYS, *lm_eval_args, "device"}
    known |= {field.name for field in fields(EngineArgs) if not field.name.startswith("_")}
    for name, value in model_args.items():
        if name in NOT_HERE:
            raise ConfigError(f"the model argument {name} is not allowed for ttt_vllm: {NOT_HERE[name]}.")
        if name not in known:
            raise ConfigError(
                f"{name} is not a model argument of ttt_vllm, of lm-eval's vllm or of vLLM.{nearest(name, known)}"
            )
        if isinstance(value, int) and abs(value) >= LARGEST_INT:
            raise ConfigError(f"{name}={quoted(value)} is not allowed: it is no number of 64 bits.")


def _refuse_with_fits(model_args: Mapping[str, Any], lm_eval: LMEvalSettings, method: str) -> None:
    """Refuse what a fitted adapter cannot be served with."""
    if lm_eval.enable_lora is False:
        raise ConfigError(
            f"enable_lora=false is not allowed with method={method}: fitted adapters are LoRA; leave it out."
        )
    for name in NOT_WITH_FITS:
        if model_args.get(name) not in (None, "auto", "safetensors"):
            raise ConfigError(
                f"{name} is not allowed with method={method}: an adapter is served on the weights that it is fitted "
                "on, and on all of its modules; leave it out, or use method=icl."
            )


def _refuse_own_code(model_dir: Path, hf_config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint's own code where it is asked for: vLLM would run it, and no fit does."""
    if "auto_map" in hf_config:
        raise ModelError(
            f"trust_remote_code=True is not allowed with methods that fit, since {model_dir} has code of its own "
            "(auto_map), which no fit runs: another model would be served than is fitted; leave it out, or use "
            "method=icl."
        )


def _refuse_log_probabilities(model_args: Mapping[str, Any]) -> None:
    """Refuse engines that give lm-eval other numbers than log-probabilities, or too few of them."""
    mode = model_args.get("logprobs_mode")
    if mode is not None and mode not in LOGPROBS_MODES:
        raise ConfigError(
            f"logprobs_mode={quoted(mode)} is not allowed: lm-eval adds up log-probabilities; "
            f"use one of {', '.join(LOGPROBS_MODES)}."
        )
    most = model_args.get("max_logprobs")
    whole = isinstance(most, int) and not isinstance(most, bool)
    if most is not None and not (whole and (most == -1 or most >= LEAST_LOGPROBS)):
        raise ConfigError(
            f"max_logprobs={quoted(most)} is not allowed: it is a whole number of at least {LEAST_LOGPROBS}, by which "
            "an adapter's effect is seen, or -1 for all."
        )


def _refuse_with_workers(model_args: Mapping[str, Any], workers: int) -> None:
    for name in NOT_WITH_WORKERS:
        if model_args.get(name) not in (None, 1, False):
            raise ConfigError(
                f"{name} is not allowed with data_parallel_size={workers}: each worker has an engine on "
                "tensor_parallel_size GPUs of its machine; leave one of them out."
            )


def _engine_arguments(dtype: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults on this machine, and over them those of the user's arguments that are vLLM's alone."""
    others = {*TTTConfig.names(), *TaskSettings.names(), *DATA_KEYS, *LMEvalSettings.names(), "device", "batch_size"}
    engine = default_engine_args()
    if "compilation_config" in model_args:
        engine.pop("cudagraph_capture_sizes", None)  # vLLM takes them from one place only
    if model_args.get("max_batch_size") is not None:
        engine.pop("max_num_seqs", None)  # lm-eval gives it that of its own name
    if "gpu_memory_utilization" in model_args:
        engine.pop("kv_cache_memory_bytes", None)  # on a CPU, too, it is the other way to say how much
    if dtype != "auto":
        engine["dtype"] = dtype
    return engine | {name: value for name, value in model_args.items() if name not in others}


def _lm_eval_arguments(given: LMEvalSettings, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The user's arguments that lm-eval's class takes."""
    if given.max_length is not None and given.max_model_len is not None:
        raise ConfigError(
            f"max_length={given.max_length} is not allowed beside max_model_len={given.max_model_len}: they are two "
            "names of one argument; leave one of them out."
        )
    _check_device(model_args.get("device"))
    # Each worker has an engine of its own; model_dir is the revision, and lora_local_path an adapter that is found.
    not_passed_on = ("data_parallel_size", "revision", "lora_local_path", "download_dir")
    stated = {name: value for name, value in given.stated().items() if name not in not_passed_on}
    if given.tokenizer is not None:
        stated["tokenizer"] = str(_local_tokenizer(given))
    return {**stated, **_thinking(given), "batch_size": _batch_size(model_args.get("batch_size"))}


def _thinking(given: LMEvalSettings) -> dict[str, Any]:
    """Whether prompts ask the model to think, from both places where it may be said; lm-eval drops one of them."""
    template_args = dict(given.chat_template_args or {})
    said = template_args.pop("enable_thinking", None)
    if said is not None and not isinstance(said, bool):
        raise ConfigError(
            f"enable_thinking={quoted(said)} is not allowed among chat_template_args: it is true or false."
        )
    if said is not None and given.enable_thinking is not None and said != given.enable_thinking:
        raise ConfigError(
            f"enable_thinking={given.enable_thinking} is not allowed beside enable_thinking={said} among "
            "chat_template_args; leave one of them out."
        )
    thinking = given.enable_thinking if said is None else said
    if thinking and given.think_end_token is None:
        raise ConfigError(
            "enable_thinking=true needs think_end_token, the text after which the answer begins, such as </think>."
        )
    return {"enable_thinking": thinking, "chat_template_args": template_args}


def _batch_size(given: Any) -> int | str:
    """lm-eval's: "auto" hands vLLM all requests at once. 1 is the command line's default, and would have it wait."""
    if given is None or (isinstance(given, str) and given.partition(":")[0] == "auto"):
        return "auto"
    count = positive_int({"batch_size": given}, "batch_size", "requests, or auto")
    return "auto" if count in (None, 1) else count


def _check_device(given: Any) -> None:
    """Refuse a device that is not the one which fits and answers go to."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    # lm-eval's command line passes its default, cuda:0, on every machine.
    if given not in (None, "cuda:0", here, f"{here}:0"):
        raise ConfigError(
            f"device={quoted(given)} is not allowed: fits and answers go to {here} here; leave it out (GPUs are chosen "
            "with CUDA_VISIBLE_DEVICES)."
        )


def _truncates(config: TTTConfig, model_args: Mapping[str, Any]) -> bool:
    """Whether prompts may be cut: as `truncate` says, and without it, where the side to cut them on is stated."""
    return config.truncate if "truncate" in model_args else model_args.get("truncation_side") is not None


def max_lora_rank(config: TTTConfig, shape: ModelShape, asked: Any) -> int:
    """The rank that vLLM reserves: the smallest that holds the adapters as they are written, or what the user asks.

    Raises:
        ConfigError: vLLM reserves none that holds them, or the one that is asked for does not.
    """
    written = shape.adapter_rank(config.lora_rank)
    if written > VLLM_LORA_RANKS[-1]:
        raise ConfigError(
            f"lora_rank={config.lora_rank} is not allowed for {shape.architecture}: its adapters are written with rank "
            f"{written}, and vLLM takes at most {VLLM_LORA_RANKS[-1]}; use a smaller one."
        )
    return _reserved_rank(written, asked, f"lora_rank={config.lora_rank}")


def _reserved_rank(rank: int, asked: Any, of: str) -> int:
    """The smallest rank that vLLM can reserve for adapters of `rank`, or what the user asks."""
    allowed = [reserved for reserved in VLLM_LORA_RANKS if reserved >= rank]
    if asked is None:
        return allowed[0]
    if asked not in allowed:
        raise ConfigError(
            f"max_lora_rank={quoted(asked)} is not allowed: vLLM takes one of {', '.join(map(str, allowed))} for {of}."
        )
    return int(asked)


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
        "enable_sleep_mode": plan.turns or bool(asked.get("enable_sleep_mode")),
    }
