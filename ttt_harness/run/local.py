"""The worker of this process, and the crew that consists of it alone.

`make_worker` turns model arguments into a worker, in this process and in the processes of a cluster.
"""

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from vllm import envs

from ttt_harness.adapters.store import AdapterStore
from ttt_harness.config import TTTConfig
from ttt_harness.run.executor import SECONDS_BETWEEN_LOOKS
from ttt_harness.run.fit_settings import FitSettings
from ttt_harness.run.fitter import Fitter
from ttt_harness.run.memory import MemoryPlan
from ttt_harness.run.model_arguments import ModelArguments
from ttt_harness.run.orders import FitOrder, Order, Outcome, Report
from ttt_harness.run.schedule import Stages
from ttt_harness.run.worker import Worker
from ttt_harness.serving.answering import Answering
from ttt_harness.training.trainer import Trainer, release_trainer, shared_trainer
from ttt_harness.tuned.arguments import TunedArguments

T = TypeVar("T")

_log = logging.getLogger(__name__)


def fit_device() -> str:
    """Where adapters are fitted: "cuda" or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit_settings(config: TTTConfig, dtype: str) -> FitSettings:
    """The settings of a run's fits, with weights of `dtype`."""
    return FitSettings(
        dtype=dtype,
        device=fit_device(),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        batch_size=config.fit_batch_size,
        epochs=config.epochs,
        lr=config.lr,
        warmup_ratio=config.warmup_ratio,
        seed=config.seed,
    )


def stated_settings(config: TTTConfig, tuned: TunedArguments | None = None) -> dict[str, Any]:
    """The settings that results and records state.

    Not where adapters are kept; the user's own adapter, and the file of tuned settings and the name of the one that was
    chosen for all tasks, where there is one.
    """
    unstated = {"adapter_dir", "adapter_limit"}
    unstated |= {name for name in ("adapter", "settings", "choose") if getattr(config, name) is None}
    said = {name: value for name, value in asdict(config).items() if name not in unstated}
    return said if tuned is None else {**said, "setting": tuned.pooled.name}


def what_ran(arguments: ModelArguments, dtype: str) -> dict[str, Any]:
    """The base model, and how and where it is fitted and served, as results state it beside the settings."""
    ran: dict[str, Any] = {"model_dir": str(arguments.model_dir), "dtype": dtype, "device": fit_device()}
    if arguments.config.fits:
        assert arguments.shape is not None
        ran |= {"way": arguments.shape.way, "left_out": list(arguments.shape.left_out)}
    return ran


def tell_what_is_left_out(arguments: ModelArguments) -> None:
    """Say which of the base model's matrices no fit adapts."""
    if arguments.shape is not None and arguments.shape.left_out:
        _log.warning(
            "%s gets an adapter on its attention and its dense MLPs only; left out: %s.",
            arguments.model_dir,
            ", ".join(arguments.shape.left_out),
        )


def stages_of(memory: MemoryPlan | None) -> Stages:
    """How a worker with this memory plan goes about fits and answers; without a GPU there is no plan."""
    if memory is None:
        return Stages.SEQUENTIAL
    return Stages.ALTERNATING if memory.turns else Stages.OVERLAPPED


def make_worker(arguments: ModelArguments, answering: Answering, store: AdapterStore) -> Worker:
    """The worker that fits and answers as `arguments` say; loads nothing yet."""
    fitter = None
    if arguments.config.fits:
        fitter = Fitter(store, lambda: trainer_of(arguments, answering.dtype), base_model=arguments.model_dir)
    return Worker(answering, store, fitter, stages=stages_of(arguments.memory), release_trainer=release_trainer)


def preload(arguments: ModelArguments, answering: Answering, *, engine: bool = True) -> None:
    """Begin to load the trainer and, beside it, the engine, where a GPU is there to load them to.

    Whoever needs one of them first waits for it, and gets its error.
    """
    if fit_device() != "cuda":
        return
    if engine and (arguments.memory is None or not arguments.memory.turns):
        answering.model.start_soon()  # in processes of its own
    if arguments.config.fits:
        in_background(lambda: trainer_of(arguments, answering.dtype), name="trainer-start")


def trainer_of(arguments: ModelArguments, dtype: torch.dtype) -> Trainer:
    """This process's trainer for these arguments; it loads the base model unless it has the last time."""
    config, memory = arguments.config, arguments.memory
    assert arguments.shape is not None
    return shared_trainer(
        arguments.model_dir,
        arguments.shape,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        dtype=dtype,
        device=fit_device(),
        context=_max_model_len(arguments),
        activation_bytes=memory.activations if memory else None,
        # Not where the user has the engine in this process, too.
        memory_bytes=memory.trainer if memory and envs.VLLM_ENABLE_V1_MULTIPROCESSING else None,
    )


def _max_model_len(arguments: ModelArguments) -> int | None:
    """Tokens that a sequence may have in the engine, where the user or the memory plan says so."""
    given = arguments.engine.get("max_model_len") or arguments.engine.get("max_length")
    return given if isinstance(given, int) and given > 0 else None


def in_background(call: Callable[[], T], *, name: str) -> Future[T]:
    """Call in a thread that a process which ends does not wait for."""
    future: Future[T] = Future()
    threading.Thread(target=_settle, args=(future, call), name=name, daemon=True).start()
    return future


def _settle(future: Future[T], call: Callable[[], T]) -> None:
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class LocalCrew:
    """The one worker of this process.

    One that is sequential or alternates works in the calling thread, so that Ctrl-C ends it where it is. One that
    overlaps has a thread for each of its stages.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def ready(self) -> Collection[int]:
        """Worker number 0."""
        return (0,)

    def stages_of(self, worker: int) -> Stages:  # noqa: ARG002
        """As the worker says."""
        return self._worker.stages

    def begin(self, worker: int, order: Order, report: Report) -> "Future[Outcome]":  # noqa: ARG002
        """Do the piece, or have its thread do it."""

        def work() -> Outcome:
            return (
                self._worker.fit(order, report) if isinstance(order, FitOrder) else self._worker.answer(order, report)
            )

        if self._worker.stages is Stages.OVERLAPPED:
            return in_background(work, name="fit" if isinstance(order, FitOrder) else "answers")
        future: Future[Outcome] = Future()
        _settle(future, work)
        return future

    def wait(self, running: "Collection[Future[Outcome]]") -> "Sequence[Future[Outcome]]":
        """Those that are done."""
        return list(wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done)

    def result(self, handle: "Future[Outcome]") -> Outcome:
        """What came of it."""
        return handle.result()
