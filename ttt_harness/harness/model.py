"""`TTTVLLM`: lm-eval's `vllm` model with test-time training, known to lm-eval as `ttt_vllm`.

Requests are grouped by task and by the support set that they carry. For each support set an adapter is fitted, or
taken from the store; vLLM then answers its requests with that adapter. All support sets are prepared and checked
before any model is loaded. With `method=icl` nothing is fitted, and the class does what lm-eval's `vllm` does.
"""

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import snapshot_download
from lm_eval.api.instance import Instance
from lm_eval.models import vllm_causallms
from lm_eval.models.utils import has_bos_prefix
from vllm import envs
from vllm.engine.arg_utils import EngineArgs

from ttt_harness.adapters.store import AdapterStore, StoredAdapter, adapter_key, fingerprint
from ttt_harness.cluster.pool import Pool, shared_pool
from ttt_harness.config import VLLM_LORA_RANKS, TaskSettings, TTTConfig, nearest, quoted
from ttt_harness.data.sequences import TrainingSequence, in_context_sequences, single_pair_sequences
from ttt_harness.data.support import SupportSet
from ttt_harness.embedded import embedded_model_path
from ttt_harness.errors import ConfigError, DataError, ModelError
from ttt_harness.harness.task import has_support_set, support_set_of
from ttt_harness.run.progress import RunProgress
from ttt_harness.serving.engine import default_engine_args, shared_engine
from ttt_harness.serving.memory import (
    GIB,
    UTILIZATION,
    MemoryPlan,
    Sizes,
    gpu_budget,
    gpu_memory,
    plan_memory,
    possible_contexts,
)
from ttt_harness.training.checkpoint import ModelShape, read_config
from ttt_harness.training.trainer import FitResult, release_trainer, shared_trainer

# Part of every adapter's name; raise it when a change of the code changes what the same settings lead to.
FIT_VERSION = 4
# A token that is trained on costs about as much as this many that are only read (forward, and half of backward).
FIT_COST = 2.5

# For the time left only: the prefix cache spares most of a prompt, so 40 characters of it cost about one token.
CHARACTERS_PER_TOKEN = 40
# Enough of a text to tell a model with an adapter from one without.
PROBE_TOKENS = 32
# Metadata of the tasks that come with this package and draw their own data; they may stand in --model_args too.
DATA_KEYS = ("num_examples", "data_seed")

_log = logging.getLogger(__name__)


@dataclass
class Group:
    """The requests of one task, by their positions, and the adapter that they are answered with (None: none)."""

    task: str
    support: SupportSet | None
    indices: list[int]
    sequences: Sequence[TrainingSequence] = ()
    key: str | None = None


class TTTVLLM(vllm_causallms.VLLM):
    """lm-eval's `vllm` model that fits a LoRA adapter on each task's demonstrations before it answers.

    Args:
        pretrained: a model directory in the hub's layout, a name on the hub, or `embedded`.
        dtype: of the weights, fitted and served alike; `auto` is bfloat16, or float32 on a CPU that lacks it.
        **model_args: the fields of `TTTConfig`, the arguments of lm-eval's `vllm` model, and those of vLLM's engine.
            With `data_parallel_size` above 1, that many Ray workers fit and answer (`ttt_harness.cluster`).
            Task metadata keys may stand here too; lm-eval hands them to the tasks.

    Raises:
        ConfigError: an argument is unknown or has a value that is not allowed.
        ModelError: the model is missing, damaged or not supported.
    """

    def __init__(self, pretrained: str | None = None, dtype: str = "auto", **model_args: Any) -> None:
        if pretrained is None:
            raise ConfigError(
                "pretrained is missing: name a model with --model_args pretrained=..., e.g. pretrained=embedded."
            )
        _refuse_unknown(model_args)
        self.ttt_config = config = TTTConfig.from_mapping(model_args)
        workers = _count(model_args, "data_parallel_size", "workers") or 1
        self.model_dir = _model_dir(str(pretrained), model_args.get("revision"))
        hf_config = read_config(self.model_dir)
        self._fits = config.method != "icl"
        if self._fits or model_args.get("enable_lora"):
            self._shape = ModelShape.from_config(hf_config, where=str(self.model_dir))
        own = {*TTTConfig.names(), *TaskSettings.names(), *DATA_KEYS}
        engine_args = default_engine_args()
        if "compilation_config" in model_args:
            engine_args.pop("cudagraph_capture_sizes", None)  # vLLM takes them from one place only
        if dtype != "auto":
            engine_args["dtype"] = dtype
        engine_args |= {name: value for name, value in model_args.items() if name not in own}
        engine_args.pop("device", None)  # lm-eval's CLI passes one always; vLLM takes the machine's
        if engine_args.get("batch_size") in (None, 1):
            engine_args["batch_size"] = "auto"  # 1 is the CLI's default, and would make vLLM take turns
        engine_args.pop("revision", None)  # model_dir is that revision already
        engine_args.pop("data_parallel_size", None)  # each worker has an engine of its own
        if self._fits:
            engine_args["enable_lora"] = True
            engine_args["max_lora_rank"] = _max_lora_rank(config, self._shape, model_args.get("max_lora_rank"))
        self._memory: MemoryPlan | None = None
        # Not for fits alone: a sweep asks for LoRA in all of its cells, so that they share one engine.
        if engine_args.get("enable_lora") and self.fit_device == "cuda" and workers == 1:
            self._memory, engine_args = self._share_gpu(engine_args)
        # lm-eval's constructor starts an engine and waits for it; ours comes in its place, and nobody waits.
        llm, vllm_causallms.LLM = vllm_causallms.LLM, shared_engine
        try:
            super().__init__(pretrained=str(self.model_dir), **engine_args)
        finally:
            vllm_causallms.LLM = llm
        self.store = AdapterStore(config.adapter_store)
        self._fingerprint: str | None = None
        self._adapters: dict[str, StoredAdapter] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self._writing: Future[None] | None = None
        self._pool: Pool | None = None
        if workers > 1:
            self._pool = shared_pool(workers, gpus_per_worker=self.tensor_parallel_size)
            given = {name: value for name, value in model_args.items() if name not in ("data_parallel_size", "device")}
            self.worker_args = {"pretrained": pretrained, "dtype": dtype, **given}
        elif self.fit_device == "cuda" and not (self._memory and self._memory.turns):
            self.model.start_soon()  # in processes of its own, beside lm-eval's preparation of the tasks

    def _share_gpu(self, engine_args: dict[str, Any]) -> tuple[MemoryPlan, dict[str, Any]]:
        """Plan how trainer and engine share the GPU; returns the plan and the engine's arguments under it.

        Raises:
            ModelError: not even one of them fits.
        """
        budget = gpu_budget(_share_of_gpu(engine_args.get("gpu_memory_utilization")))
        dtype = torch.float32 if engine_args.get("dtype") == "float32" else torch.bfloat16
        plan = plan_memory(
            budget,
            Sizes.of(self._shape, self.ttt_config.lora_rank, dtype),
            possible_contexts(
                self._shape,
                _count(engine_args, "max_model_len", "tokens") or _count(engine_args, "max_length", "tokens"),
            ),
            _count(engine_args, "max_num_batched_tokens", "tokens"),
        )
        if plan is not None:
            return plan, _engine_share(plan, engine_args)
        raise ModelError(
            f"{self.model_dir} needs more memory than this GPU may give ({budget / GIB:.1f} GiB), for fitting and "
            "serving in turns as well; use a smaller model, or a larger GPU or gpu_memory_utilization."
        )

    # What lm-eval calls

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Generate greedily, each request with the adapter of its support set."""
        return self._answer(requests, "generate_until")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Score continuations, each request with the adapter of its support set."""
        return self._answer(requests, "loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, with the base model: such tasks have no demonstrations to fit on."""
        if self._fits and self.ttt_config.on_plain_task != "base":
            raise DataError(
                f"{requests[0].task_name} scores whole texts (loglikelihood_rolling) and has no demonstrations "
                "to fit on; evaluate it with on_plain_task=base or with method=icl."
            )
        self.lora_request = None
        for request in requests:
            self.records[str(request.task_name)] = {"adapter": None, "plain": True}
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in lm-eval's class, but a system turn that the template cannot take is refused and not left out.

        Raises:
            ConfigError: there is no template, or it takes no system turn.
        """
        return self._render_chat(chat_history, add_generation_prompt, continue_final_message=not add_generation_prompt)

    def _render_chat(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, continue_final_message: bool = False
    ) -> str:
        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=self.hf_chat_template,
                enable_thinking=self.enable_thinking,
                **self.chat_template_args,
            )

        if not (self.hf_chat_template or self.tokenizer.chat_template):
            raise ConfigError(
                f"the tokenizer of {self.model_dir} has no chat template; leave out --apply_chat_template."
            )
        system = [message["content"] for message in messages if message["role"] == "system"]
        try:
            text = render(messages)
        except jinja2.TemplateError as error:
            if not system:
                raise ModelError(f"the chat template of {self.model_dir} fails: {error.message}.") from None
            text = ""
        # Some templates refuse a system turn, others say nothing and leave it out.
        if not all(content.strip() in text for content in system):
            raise ConfigError(
                f"the chat template of {self.model_dir} cannot take a system turn, which the task's description or "
                "--system_instruction makes; leave out --system_instruction and set the YAML's description to an "
                "empty text, or leave out --apply_chat_template."
            )
        return text

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval calls this for `--use_cache`, which is refused.

        Its cache knows a request by its prompt alone, so a second setting would get the first one's answers.
        """
        if cache_hook.dbdict is not None:
            raise ConfigError(
                "--use_cache is not allowed with ttt_vllm: lm-eval's cache knows an answer by its prompt, not by the "
                "adapter that gave it; leave it out (fitted adapters are kept and reused without it)."
            )
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to `config` in its results: the settings, and for each task the cost of its stages."""
        packages = ("ttt-harness", "torch", "torchtune", "vllm", "transformers")
        return {
            "ttt": {
                "settings": {**self._settings, "model_dir": str(self.model_dir), "dtype": self.dtype_name},
                "tasks": self.records,
                "versions": {name: version(name) for name in packages},
            }
        }

    # The run

    def _answer(self, requests: list[Instance], kind: str) -> list[Any]:
        """Answer `requests` group by group with lm-eval's method `kind`; the answers come in the requests' order."""
        groups = self._plan(requests)
        if self._memory is not None and not self._memory.turns:
            # The last answers are those that no fit runs beside: the shortest.
            groups.sort(key=lambda group: -_most_answer_tokens(requests, group))
        to_fit = {group.key: group.sequences for group in groups if group.key and self._stored(group.key) is None}
        fit_work = {key: self.fit_work(sequences) for key, sequences in to_fit.items()}
        read_work = {group.task: _characters(requests, group) / CHARACTERS_PER_TOKEN for group in groups}
        answers: list[Any] = [None] * len(requests)

        def finish(group: Group, where: str, stored: Future[None] | None) -> None:
            if stored is not None:
                stored.result()
            own = [requests[index] for index in group.indices]
            fitted = stored is not None
            values = self.answer_group(group, own, kind, progress, where, read_work[group.task], fitted=fitted)
            for index, value in zip(group.indices, values, strict=True):
                answers[index] = value

        with (
            RunProgress(sum(fit_work.values()) + sum(read_work.values())) as progress,
            # Writes an adapter while the next one is fitted; the last of them, too, when the run ends with an error.
            ThreadPoolExecutor(1, thread_name_prefix="store") as writer,
        ):
            if self._pool is not None:
                return self._pool.answer(self, groups, requests, kind, progress, fit_work, read_work)
            fits = self._fit_in_turn(groups, progress, writer)
            if self._memory is None or not to_fit:
                for item in fits:
                    finish(*item)
                return answers
            progress.say(self._memory.reason)
            self.begin_fits()
            if self._memory.turns:
                fitted = list(fits)
                wait([stored for *_, stored in fitted if stored is not None])  # off the GPU, that is
                for item in fitted:
                    finish(*item)
            else:
                _in_background(fits, finish)
        return answers

    def begin_fits(self) -> None:
        """Have the engine make room for the fits, where the memory plan has the two take turns."""
        if self._memory is not None and self._memory.turns:
            self.model.make_room()

    def _fit_in_turn(
        self, groups: Sequence[Group], progress: RunProgress, writer: Executor
    ) -> Iterator[tuple[Group, str, Future[None] | None]]:
        """Yield each group, where it stands in the run, and what `fit_group` returns for it."""
        for position, group in enumerate(groups, 1):
            where = f"{group.task} ({position}/{len(groups)})"
            yield group, where, self.fit_group(group, progress, where, writer) if group.key else None

    def fit_group(self, group: Group, progress: RunProgress, where: str, writer: Executor) -> Future[None] | None:
        """Fit the group's adapter, and have `writer` put it into the store.

        A process that is fitting the same adapter is waited for.

        Returns:
            The writing of the adapter, or None where nothing had to be fitted.
        """
        assert group.key is not None
        if self._stored(group.key) is not None:
            return None
        with ExitStack() as held:
            held.enter_context(self.store.fitting(group.key))
            if self._stored(group.key) is not None:
                return None
            result = self._fit(group, progress, where)
            if self._writing is not None:
                wait([self._writing])  # else a slow store would have adapters pile up on the GPU
            self._writing = writer.submit(self._keep, group, result, held.pop_all())
            return self._writing

    def answer_group(
        self,
        group: Group,
        requests: list[Instance],
        kind: str,
        progress: RunProgress,
        where: str,
        work: float,
        *,
        fitted: bool = False,
    ) -> list[Any]:
        """Answer requests of one group, and put into `records` what it took.

        Args:
            group: whose adapter, if it has one, is in the store.
            requests: all of the group's, or some of them.
            kind: lm-eval's method that answers them.
            progress: counts `work` for the answers.
            where: what the progress calls the group.
            work: see progress.
            fitted: whether the adapter was fitted for this group in this run.
        """
        if self._memory is not None and self._memory.turns:
            release_trainer()
        adapter = self.adapter_of(group, fitted=fitted) if group.key else None
        if not self.model.ready:
            progress.say(f"{where}: starting vLLM")
        self.model.start()  # here, so that its time is not counted as the first task's
        progress.say(f"{where}: answering {len(requests)} requests")
        self._serve_with(adapter, group)
        start = time.perf_counter()
        values = getattr(super(), kind)(requests, disable_tqdm=True)
        seconds = time.perf_counter() - start
        progress.advance(work, where)
        self.records.setdefault(group.task, {"adapter": None}).update(
            requests=len(requests), generate_seconds=round(seconds, 3)
        )
        return values

    def _plan(self, requests: list[Instance]) -> list[Group]:
        """Group the requests by task, and prepare and check what each group will be fitted on.

        Raises:
            ConfigError, DataError: a task has no support set, an empty one, or one that does not fit the context.
        """
        by_task: dict[str, Group] = {}
        for index, request in enumerate(requests):
            if request.task_name not in by_task:
                plain = self.ttt_config.on_plain_task == "base" and not has_support_set(request)
                support = support_set_of(request) if self._fits and not plain else None
                by_task[request.task_name] = Group(request.task_name, support, [])
                if self._fits and plain:
                    self.records[request.task_name] = {"adapter": None, "plain": True}
            by_task[request.task_name].indices.append(index)
        groups = list(by_task.values())
        for group in groups:
            texts = ([arg for arg in requests[index].args if isinstance(arg, str)] for index in group.indices)
            longest = max(("".join(text) for text in texts), key=len)
            tokens = self.tok_encode(longest)
            self._check_length(len(tokens) + 1, f"{group.task}: a prompt and its answer")
            if group.support is not None:
                self._check_tokenizer(longest, tokens)
                group.sequences = self._sequences(group.task, group.support)
        fitted = [group for group in groups if group.support is not None]
        if fitted:
            shared = self.ttt_config.method.startswith("shared_")
            if shared:
                together = [sequence for group in fitted for sequence in group.sequences]
                for group in fitted:
                    group.sequences = together
                key = self._key(together)  # once: these are the sequences of all tasks
            for group in fitted:
                group.key = key if shared else self._key(group.sequences)
        return groups

    def _sequences(self, task: str, support: SupportSet) -> list[TrainingSequence]:
        """The training sequences of one support set, each within the context window."""
        config = self.ttt_config
        if not support.demonstrations:
            raise ConfigError(
                f"k=0 is not allowed for {task} with method={config.method}: an adapter is fitted on demonstrations; "
                "set k to at least 1, or use method=icl."
            )
        try:
            if config.method.endswith("e2e"):
                sequences = single_pair_sequences(
                    support, self._encode, loss_on=config.loss_on, render=self._render_chat
                )
            else:
                sequences = in_context_sequences(
                    support,
                    self._encode,
                    num_permutations=config.num_permutations,
                    shuffle=config.shuffle,
                    seed=config.seed,
                    loss_on=config.loss_on,
                    render=self._render_chat,
                )
        except DataError as error:
            raise DataError(f"{support.source or task}: {error}") from None
        self._check_length(max(len(sequence.tokens) for sequence in sequences), f"{task}: a training sequence")
        return sequences

    def _check_length(self, tokens: int, what: str) -> None:
        if tokens > self.max_length:
            raise DataError(
                f"{what} has {tokens} tokens, but the context window holds {self.max_length}; "
                "use a smaller k, or a model (or max_model_len) with a longer window."
            )

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize as lm-eval's class tokenizes prompts, with the characters that each token stands for."""
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        bos = None if self.prefix_token_id is None else self.tokenizer.decode(self.prefix_token_id)
        if has_bos_prefix(text, bos):  # from a chat template
            special = {"add_special_tokens": False}
        encoding = self.tokenizer(text, return_offsets_mapping=True, **special)
        return encoding.input_ids, encoding.offset_mapping

    def _check_tokenizer(self, text: str, tokens: list[int]) -> None:
        """Check that training texts get offsets and the tokens that prompts get, with a prompt's text and tokens.

        Raises:
            ModelError: they do not.
        """
        if not self.tokenizer.is_fast:
            raise ModelError(
                f"the tokenizer of {self.model_dir} tells no offsets, which fitting needs; "
                "convert it to a fast one (tokenizer.json), or use method=icl."
            )
        if self._encode(text)[0] != tokens:
            raise ModelError(f"the tokenizer of {self.model_dir} gives training texts other tokens than prompts.")

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.llm_engine.model_config.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype of weights, fitted and served alike."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def _settings(self) -> dict[str, Any]:
        """The settings that results and records state: all but where adapters are kept."""
        return {name: value for name, value in asdict(self.ttt_config).items() if name != "adapter_dir"}

    @property
    def fit_device(self) -> str:
        """Where adapters are fitted."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def base_model_hash(self) -> str:
        """A hash of the base model's weights."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model_dir)
        return self._fingerprint

    def _key(self, sequences: Sequence[TrainingSequence]) -> str:
        """The name of the adapter that is fitted on `sequences` with this run's settings."""
        ids = hashlib.sha256(json.dumps([(s.tokens, s.labelled) for s in sequences]).encode()).hexdigest()
        config = self.ttt_config
        return adapter_key(
            {
                "fit_version": FIT_VERSION,
                "base_model": self.base_model_hash,
                "sequences": ids,
                "dtype": str(self._dtype),
                "device": self.fit_device,
                "rank": config.lora_rank,
                "alpha": config.lora_alpha,
                "dropout": config.lora_dropout,
                "fit": self._fit_arguments(),
            }
        )

    def _fit_arguments(self) -> dict[str, Any]:
        config = self.ttt_config
        return {
            "batch_size": config.fit_batch_size,
            "epochs": config.epochs,
            "lr": config.lr,
            "warmup_ratio": config.warmup_ratio,
            "seed": config.seed,
        }

    def fit_work(self, sequences: Sequence[TrainingSequence]) -> float:
        """The work of a fit on `sequences`, in tokens that are read."""
        return FIT_COST * (self.ttt_config.epochs or 0) * sum(len(sequence.tokens) for sequence in sequences)

    def _stored(self, key: str) -> StoredAdapter | None:
        """The adapter named `key`, if it is there; it is read from the store once in a run."""
        if key not in self._adapters and (stored := self.store.load(key)):
            self._adapters[key] = stored
        return self._adapters.get(key)

    def adapter_of(self, group: Group, *, fitted: bool) -> StoredAdapter:
        """The group's adapter, which is in the store; puts into `records` what its fit took, here or before."""
        assert group.key is not None
        adapter = self._stored(group.key)
        assert adapter is not None
        record = adapter.record
        self.records[group.task] = {
            "adapter": str(adapter.path),
            "reused": not fitted,
            "train_sequences": record["train_sequences"],
            "train_tokens": record["train_tokens"],
            "losses": record["losses"],
            "first_loss": record["losses"][0] if record["losses"] else None,
            "last_loss": record["losses"][-1] if record["losses"] else None,
            "fit_seconds": record["fit_seconds"],
        }
        return adapter

    def _fit(self, group: Group, progress: RunProgress, where: str) -> FitResult:
        config = self.ttt_config
        progress.say(f"{where}: fitting")
        trainer = shared_trainer(
            self.model_dir,
            self._shape,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            dtype=self._dtype,
            device=self.fit_device,
            activation_bytes=self._memory.activations if self._memory else None,
            # Not where the user has the engine in this process, too.
            memory_bytes=self._memory.trainer if self._memory and envs.VLLM_ENABLE_V1_MULTIPROCESSING else None,
        )
        work = self.fit_work(group.sequences)
        return trainer.fit(
            group.sequences,
            **self._fit_arguments(),
            on_step=lambda done, steps, loss: progress.advance(
                work / steps, f"{where}: fitting, step {done}/{steps}, loss {loss:.3f}"
            ),
        )

    def _keep(self, group: Group, result: FitResult, held: ExitStack) -> None:
        """Store the adapter that was fitted for `group`, then let go of the lock that is `held` on it."""
        assert group.key is not None
        config = self.ttt_config
        with held:
            self._adapters[group.key] = self.store.save(
                group.key,
                result.weights,
                base_model=str(self.model_dir),
                rank=config.lora_rank,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                record={
                    "task": group.task,
                    "settings": self._settings,
                    "dtype": self.dtype_name,
                    "train_sequences": len(group.sequences),
                    "train_tokens": result.tokens,
                    "losses": [round(loss, 6) for loss in result.losses],
                    "fit_seconds": round(result.seconds, 3),
                },
            )

    def _serve_with(self, adapter: StoredAdapter | None, group: Group) -> None:
        """Have the next requests answered with `adapter`, after a check that vLLM applies it."""
        if adapter is None:
            self.lora_request = None
            return
        self.lora_request = self.model.adapter(adapter.key, adapter.path)
        changes = self.model.changes_output(self.lora_request, group.sequences[0].tokens[:PROBE_TOKENS])
        self.records[group.task]["changes_output"] = changes
        if not changes:
            _log.warning(
                "%s: the adapter %s does not change the model's output; lr=%s and epochs=%s may be too small.",
                group.task,
                adapter.path,
                self.ttt_config.lr,
                self.ttt_config.epochs,
            )


def _in_background(items: Iterable[tuple[Any, ...]], work: Callable[..., None]) -> None:
    """Call `work` with each of `items`, one after the other, while the next ones are being made."""
    with ThreadPoolExecutor(1, thread_name_prefix="answers") as worker:
        pending: list[Future[None]] = []
        try:
            for item in items:
                for done in [future for future in pending if future.done()]:
                    done.result()  # its error ends the run now, not after the last fit
                    pending.remove(done)
                pending.append(worker.submit(work, *item))
            for future in pending:
                future.result()
        except BaseException:
            worker.shutdown(wait=False, cancel_futures=True)
            raise


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


def _share_of_gpu(given: Any) -> float:
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


def _count(arguments: Mapping[str, Any], name: str, of: str) -> int | None:
    """A whole number, of `of`, among the arguments that the user gives; None where there is none."""
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


def _characters(requests: Sequence[Instance], group: Group) -> int:
    return sum(len(requests[index].args[0]) for index in group.indices)


def _most_answer_tokens(requests: Sequence[Instance], group: Group) -> float:
    """What a group's answers take at most, in tokens read or generated."""
    options = (requests[index].args[1] for index in group.indices)
    generated = sum(given.get("max_gen_toks", 0) for given in options if isinstance(given, dict))
    return _characters(requests, group) / CHARACTERS_PER_TOKEN + generated


def _refuse_unknown(model_args: dict[str, Any]) -> None:
    """Refuse an argument that is neither ours, nor lm-eval's, nor vLLM's."""
    lm_eval_args = set(inspect.signature(vllm_causallms.VLLM.__init__).parameters) - {"self", "kwargs"}
    known = {*TTTConfig.names(), *TaskSettings.names(), *DATA_KEYS, *lm_eval_args, "device"}
    known |= {field.name for field in fields(EngineArgs)}
    for name in model_args:
        if name not in known:
            raise ConfigError(
                f"{name} is not a model argument of ttt_vllm, of lm-eval's vllm or of vLLM.{nearest(name, known)}"
            )


def _max_lora_rank(config: TTTConfig, shape: ModelShape, asked: Any) -> int:
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


def _model_dir(pretrained: str, revision: str | None) -> Path:
    """The local directory of a model: itself, the embedded one, or the hub's, downloaded if it is not in the cache."""
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
