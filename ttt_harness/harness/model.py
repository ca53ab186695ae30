"""`TTTVLLM`: lm-eval's `vllm` model with test-time training, known to lm-eval as `ttt_vllm`.

Requests are grouped by task and by the support set that they carry. For each support set an adapter is fitted, or
taken from the store; vLLM then answers its requests with that adapter. All support sets are prepared and checked
before any model is loaded. With `method=icl` nothing is fitted, and the class does what lm-eval's `vllm` does.
"""

# ruff: noqa: E402 - vLLM and torch read the environment when they are imported
from ttt_harness.errors import ConfigError, DataError, report_errors_in_one_sentence
from ttt_harness.serving.environment import prepare_environment

report_errors_in_one_sentence()
prepare_environment()

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance
from vllm import envs
from vllm.lora.request import LoRARequest

from ttt_harness.adapters.store import AdapterStore, StoredAdapter, adapter_key, fingerprint
from ttt_harness.cluster.pool import Pool, shared_pool
from ttt_harness.data.sequences import TrainingSequence, in_context_sequences, single_pair_sequences
from ttt_harness.data.support import SupportSet
from ttt_harness.harness.model_arguments import ModelArguments
from ttt_harness.harness.task import has_support_set, support_set_of
from ttt_harness.run.progress import RunProgress
from ttt_harness.serving.answering import Answering, Checked
from ttt_harness.training.trainer import FitResult, release_trainer, shared_trainer

# Part of every adapter's name; raise it when a change of the code changes what the same settings lead to.
FIT_VERSION = 4
# A token that is trained on costs about as much as this many that are only read (forward, and half of backward).
FIT_COST = 2.5

# For the time left only: the prefix cache spares most of a prompt, so 40 characters of it cost about one token.
CHARACTERS_PER_TOKEN = 40
# Enough of a text to tell a model with an adapter from one without.
PROBE_TOKENS = 32

_log = logging.getLogger(__name__)


@dataclass
class Group:
    """The requests of one task, by their positions, and the adapter that they are answered with (None: none)."""

    task: str
    support: SupportSet | None
    indices: list[int]
    sequences: Sequence[TrainingSequence] = ()
    key: str | None = None


class TTTVLLM(Answering):
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
        arguments = ModelArguments.parse(pretrained, dtype, **model_args)
        super().__init__(arguments.model_dir, arguments.engine)
        self.ttt_config = config = arguments.config
        self.worker_args = arguments.given
        self._fits = config.how.fits
        self._shape = arguments.shape
        self._memory = arguments.memory
        self.store = AdapterStore(config.adapter_store)
        self._fingerprint: str | None = None
        self._adapters: dict[str, StoredAdapter] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self._checked: dict[str, Checked] = {}
        self._writing: Future[None] | None = None
        self._pool: Pool | None = None
        if arguments.workers > 1:
            self._pool = shared_pool(arguments.workers, gpus_per_worker=self.tensor_parallel_size)
        elif self.fit_device == "cuda" and not (self._memory and self._memory.turns):
            self.model.start_soon()  # in processes of its own, beside lm-eval's preparation of the tasks

    # What lm-eval calls

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Generate greedily, each request with the adapter of its support set."""
        return self._answer(requests, "generate_until")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Score continuations, each request with the adapter of its support set."""
        return self._answer(requests, "loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Score whole texts, with the base model: such tasks have no demonstrations to fit on."""
        if self._fits and self.ttt_config.on_plain_task != "base":
            raise DataError(
                f"{requests[0].task_name} scores whole texts (loglikelihood_rolling) and has no demonstrations "
                "to fit on; evaluate it with on_plain_task=base or with method=icl."
            )
        for request in requests:
            self.records[str(request.task_name)] = {"adapter": None, "plain": True}
        return self.answer("loglikelihood_rolling", requests, None)

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
        requests = self.seeded(kind, requests, seed=self.ttt_config.seed)
        groups = self._plan(requests, kind)
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
        lora_request = self._served(adapter, group)
        start = time.perf_counter()
        values = self.answer(kind, requests, lora_request)
        seconds = time.perf_counter() - start
        progress.advance(work, where)
        self.records.setdefault(group.task, {"adapter": None}).update(
            requests=len(requests), generate_seconds=round(seconds, 3)
        )
        if checked := self._checked.get(group.task):  # not on a worker
            self.records[group.task] |= {name: value for name, value in asdict(checked).items() if value}
        return values

    def _plan(self, requests: list[Instance], kind: str) -> list[Group]:
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
            own = [requests[index] for index in group.indices]
            self._checked[group.task] = self.check(
                kind, own, fitted=group.support is not None, truncate=self.ttt_config.truncate
            )
            if group.support is not None:
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
                sequences = single_pair_sequences(support, self.encode, loss_on=config.loss_on, render=self.render_chat)
            else:
                sequences = in_context_sequences(
                    support,
                    self.encode,
                    num_permutations=config.num_permutations,
                    shuffle=config.shuffle,
                    seed=config.seed,
                    loss_on=config.loss_on,
                    render=self.render_chat,
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
        ids = hashlib.sha256(json.dumps([(s.tokens, s.loss_mask) for s in sequences]).encode()).hexdigest()
        config = self.ttt_config
        return adapter_key(
            {
                "fit_version": FIT_VERSION,
                "base_model": self.base_model_hash,
                "sequences": ids,
                "dtype": str(self.dtype),
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
        assert self._shape is not None
        trainer = shared_trainer(
            self.model_dir,
            self._shape,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            dtype=self.dtype,
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
                result.peft_state_dict(),
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

    def _served(self, adapter: StoredAdapter | None, group: Group) -> LoRARequest | None:
        """How the engine is asked to answer with `adapter`, after a check that it applies it."""
        if adapter is None:
            return None
        lora_request = self.model.adapter(adapter.key, adapter.path)
        changes = self.model.changes_output(lora_request, group.sequences[0].tokens[:PROBE_TOKENS])
        self.records[group.task]["changes_output"] = changes
        if not changes:
            _log.warning(
                "%s: the adapter %s does not change the model's output; lr=%s and epochs=%s may be too small.",
                group.task,
                adapter.path,
                self.ttt_config.lr,
                self.ttt_config.epochs,
            )
        return lora_request


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


def _characters(requests: Sequence[Instance], group: Group) -> int:
    return sum(len(requests[index].args[0]) for index in group.indices)


def _most_answer_tokens(requests: Sequence[Instance], group: Group) -> float:
    """What a group's answers take at most, in tokens read or generated."""
    options = (requests[index].args[1] for index in group.indices)
    generated = sum(given.get("max_gen_toks", 0) for given in options if isinstance(given, dict))
    return _characters(requests, group) / CHARACTERS_PER_TOKEN + generated
