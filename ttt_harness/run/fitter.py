"""Adapters for a run: taken from the store, or fitted and stored."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from ttt_harness.adapters.store import AdapterStore, StoredAdapter
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.records import TaskRecord
from ttt_harness.run.orders import FitOrder, Report
from ttt_harness.run.served_check import LogProbabilities

# Of a training sequence, enough to compare trainer and engine by.
PROBE_TOKENS = 512


class FitResult(Protocol):
    """What a trainer gives back (`ttt_harness.training.trainer.FitResult`)."""

    @property
    def losses(self) -> list[float]:
        """Of each optimiser step."""

    @property
    def tokens(self) -> int:
        """Trained on, counted once for each epoch."""

    @property
    def seconds(self) -> float:
        """Wall-clock."""

    @property
    def tune_state_dict(self) -> dict[str, Any]:
        """torchtune name -> tensor, where the trainer is."""

    def peft_state_dict(self) -> dict[str, Any]:
        """PEFT name -> tensor on the CPU."""


class Trainer(Protocol):
    """What fits (`ttt_harness.training.trainer.Trainer`)."""

    def fit(
        self,
        sequences: Sequence[TrainingSequence],
        *,
        batch_size: int,
        epochs: int,
        lr: float,
        warmup_ratio: float,
        seed: int,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> FitResult:
        """Fit an adapter."""

    def log_probabilities(self, sequence: TrainingSequence, tune_state_dict: dict[str, Any]) -> LogProbabilities:
        """Of the tokens in the loss mask of `sequence`, with an adapter and without."""


class Fitter:
    """Has adapters in a store, fitted where they are not there.

    Args:
        store: where adapters are kept.
        trainer: gives the trainer when the first adapter is fitted.
        base_model: the base model's directory, which the adapter's file names.
    """

    def __init__(
        self,
        store: AdapterStore,
        trainer: Callable[[], Trainer],
        *,
        base_model: Path,
    ) -> None:
        self.store = store
        self._trainer = trainer
        self._base_model = base_model
        self._loaded: dict[str, StoredAdapter] = {}
        self._writing: dict[str, Future[StoredAdapter]] = {}
        self._probed: dict[str, tuple[TrainingSequence, LogProbabilities, str]] = {}
        self._probe_due = True
        # Writes an adapter while the next one is fitted.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")

    def stored(self, key: str) -> StoredAdapter | None:
        """The adapter named `key`, if it is in the store or on its way there; it is read once in a run.

        Raises:
            StoreError: it could not be written.
        """
        if (writing := self._writing.get(key)) is not None:
            self._loaded[key] = writing.result()
            self._writing.pop(key, None)
        if key in self._loaded and not self._loaded[key].path.is_dir():  # somebody has removed it
            del self._loaded[key]
        if key not in self._loaded and (found := self.store.load(key)):
            self._loaded[key] = found
        return self._loaded.get(key)

    def fit(self, order: FitOrder, report: Report) -> TaskRecord:
        """Have the adapter of `order` in the store, or on its way there; `stored` waits for it.

        A process that is fitting the same adapter is waited for.

        Returns:
            The record of the fit.

        Raises:
            TTTError: the fit or the store fails.
        """
        with ExitStack() as held:
            held.enter_context(self.store.fitting(order.key))
            if found := self.stored(order.key):
                return record_of(found, reused=True)
            trainer = self._trainer()
            result = trainer.fit(
                order.sequences,
                **order.settings.loop(),
                on_step=lambda done, steps, loss: report(
                    done / steps, f"{order.where}: fitting, step {done}/{steps}, loss {loss:.3f}", False
                ),
            )
            if self._probe_due:
                self._probe_due = False
                probe = probe_of(order.sequences)
                trained = trainer.log_probabilities(probe, result.tune_state_dict)
                self._probed[order.key] = probe, trained, order.settings.dtype
            wait(list(self._writing.values()))  # else a slow store would have adapters pile up on the GPU
            record = self._record(order, result)
            self._writing[order.key] = self._writer.submit(self._save, order, result, record, held.pop_all())
        return TaskRecord(
            adapter=str(self.store.root / order.key),
            train_sequences=record["train_sequences"],
            train_tokens=record["train_tokens"],
            losses=record["losses"],
            fit_seconds=record["fit_seconds"],
        )

    def probed(self, key: str) -> tuple[TrainingSequence, LogProbabilities, str] | None:
        """A sequence, its log-probabilities in the trainer, and the dtype, of the first adapter fitted here; once."""
        return self._probed.pop(key, None)

    def _record(self, order: FitOrder, result: FitResult) -> dict[str, Any]:
        return {
            "task": order.task,
            **({"tasks": list(order.tasks)} if len(order.tasks) > 1 else {}),
            "settings": dict(order.said),
            "determinants": dict(order.determinants),
            "dtype": order.settings.dtype,
            "train_sequences": len(order.sequences),
            "train_tokens": result.tokens,
            "losses": [round(loss, 6) for loss in result.losses],
            "fit_seconds": round(result.seconds, 3),
        }

    def _save(self, order: FitOrder, result: FitResult, record: dict[str, Any], held: ExitStack) -> StoredAdapter:
        """Store an adapter, then let go of the lock that is `held` on it."""
        with held:
            return self.store.save(
                order.key,
                result.peft_state_dict(),
                base_model=str(self._base_model),
                rank=order.settings.rank,
                alpha=order.settings.alpha,
                dropout=order.settings.dropout,
                record=record,
            )


def probe_of(sequences: Sequence[TrainingSequence]) -> TrainingSequence:
    """The beginning of a training sequence, with some tokens in its loss mask.

    For all of a long one the engine would hold logits that no memory is planned for.
    """
    first = sequences[0]
    end = len(first.tokens)
    if any(first.loss_mask[:PROBE_TOKENS]):
        end = PROBE_TOKENS
    return TrainingSequence(first.tokens[:end], first.loss_mask[:end])


def record_of(adapter: StoredAdapter, *, reused: bool) -> TaskRecord:
    """What a stored adapter's own record says of its fit."""
    said = TaskRecord.from_dict(adapter.record)
    said.adapter, said.reused = str(adapter.path), reused
    return said


def work_of_fit(sequences: Sequence[TrainingSequence], epochs: int) -> float:
    """The tokens that a fit trains on."""
    return float(epochs * sum(len(sequence.tokens) for sequence in sequences))
