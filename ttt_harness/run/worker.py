"""A worker: fits and answers on one device, with one base model in a trainer and one in an engine.

The one in this process and those that Ray runs elsewhere are the same class. A worker does what it is ordered to; who
does what, and when, is the business of `executor`.
"""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ttt_harness.adapters.store import AdapterStore, StoredAdapter
from ttt_harness.errors import StoreError
from ttt_harness.records import TaskRecord
from ttt_harness.run.fitter import Fitter, record_of
from ttt_harness.run.orders import Answered, AnswerOrder, FitOrder, Fitted, Report
from ttt_harness.run.schedule import Stages
from ttt_harness.run.served_check import compare_served

if TYPE_CHECKING:
    from collections.abc import Sequence

# Enough of a text to tell a model with an adapter from one without.
SHORT_PROBE = 32


class AdapterGone(StoreError):
    """An adapter is no longer in the store: its worker died while it was written, or somebody removed it."""


class Answering(Protocol):
    """What a worker answers with (`ttt_harness.serving.answering.Answering`)."""

    model: Any

    def answer(self, kind: str, requests: "Sequence[Any]", adapter: Any) -> list[Any]:
        """Answer requests with lm-eval's method `kind`, with an adapter or with the base model."""


@dataclass(frozen=True)
class Served:
    """The engine's log-probabilities of some tokens, each shape [tokens]: with an adapter, and from the base model."""

    adapter: tuple[float, ...]
    base: tuple[float, ...]


class Worker:
    """Fits and answers on one device.

    Args:
        answering: answers requests with its engine, which starts when it is first needed.
        store: where adapters are.
        fitter: fits adapters; None where none are fitted.
        stages: how the two stages share the device.
        release_trainer: frees the device of the trainer, where the two take turns.
    """

    def __init__(
        self,
        answering: Answering,
        store: AdapterStore,
        fitter: Fitter | None,
        *,
        stages: Stages,
        release_trainer: Callable[[], None] = lambda: None,
    ) -> None:
        self.answering = answering
        self.store = store
        self.stages = stages
        self._fitter = fitter
        self._release_trainer = release_trainer
        self._engine_lock = threading.Lock()

    def fit(self, order: FitOrder, report: Report) -> Fitted:
        """Have an adapter in the store, or on its way there; `stored` waits for it.

        Raises:
            TTTError: the fit or the store fails.
        """
        assert self._fitter is not None
        report(0.0, f"{order.where}: fitting", True)
        if self.stages is Stages.ALTERNATING:
            self.answering.model.make_room()
        return Fitted(self._fitter.fit(order, report))

    def stored(self, key: str) -> StoredAdapter:
        """The adapter named `key`, once it is in the store.

        Raises:
            AdapterGone: it is no longer there.
            StoreError: it could not be written.
        """
        look_up = self._fitter.stored if self._fitter else self.store.load
        found = look_up(key)
        if found is None:
            with self.store.fitting(key):  # another process may be writing it
                found = look_up(key)
        if found is None:
            raise AdapterGone(f"the adapter {key} is no longer in {self.store.root}.")
        return found

    def answer(self, order: AnswerOrder, report: Report) -> Answered:
        """Answer requests.

        Returns:
            The answers, and a record of them and of the adapter.

        Raises:
            TTTError: the engine or the store fails.
        """
        record, adapter = TaskRecord(), None
        with ExitStack() as held:
            if order.key is not None:
                held.enter_context(self.store.holding(order.key))
                stored = self.stored(order.key)
                record, adapter = record_of(stored, reused=True), self.answering.model.adapter(order.key, stored.path)
            held.enter_context(self._engine_lock)
            if self.stages is Stages.ALTERNATING:
                self._release_trainer()
            if not self.answering.model.ready:
                report(0.0, f"{order.where}: starting vLLM", True)
            self.answering.model.start()  # here, so that its time is not counted as the first task's
            report(0.0, f"{order.where}: answering {len(order.requests)} requests", True)
            if adapter is not None:
                self._check_served(order, adapter, record)
            start = time.perf_counter()
            values = self.answering.answer(order.kind, order.requests, adapter)
            record.generate_seconds = round(time.perf_counter() - start, 3)
        record.requests = len(order.requests)
        return Answered(values, record)

    def _check_served(self, order: AnswerOrder, adapter: Any, record: TaskRecord) -> None:
        """Find out whether the engine serves what was trained: closely for the first adapter that was fitted here.

        Raises:
            ModelError: it serves something else.
        """
        engine = self.answering.model
        probed = self._fitter.probed(order.key) if self._fitter and order.key else None
        if probed is None:
            if order.probe is not None:
                record.changes_output = engine.changes_output(adapter, order.probe.tokens[:SHORT_PROBE])
            return
        sequence, trained, dtype = probed

        def served(request: Any) -> tuple[float, ...]:
            of_tokens = engine.log_probabilities(sequence.tokens, request)
            return tuple(value for value, wanted in zip(of_tokens, sequence.loss_mask[1:], strict=True) if wanted)

        check = compare_served(trained, Served(served(adapter), served(None)), dtype=dtype)
        record.served_check, record.changes_output = check.as_record(), check.served_effect > 0
        check.raise_if_failed(f"{order.task} with the adapter {self.store.root / str(order.key)}")
