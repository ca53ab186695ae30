"""Fits an adapter on a fold and answers the questions that the fold holds out; the adapter is not stored."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ttt_harness.adapters.names import adapter_key
from ttt_harness.config import TTTConfig
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import DivergedError
from ttt_harness.tune.held_out import Question
from ttt_harness.tuned import Asked

if TYPE_CHECKING:
    from ttt_harness.harness.model import TTTVLLM
    from ttt_harness.training.trainer import Trainer

OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Fold:
    """Demonstrations of a task that are held out together.

    task, seed: of the demonstrations.
    number: from 0.
    questions: the held-out ones, in each order.
    sequences: gives the training sequences that a setting makes of the others.
    """

    task: str
    seed: int
    number: int
    questions: tuple[Question, ...]
    sequences: Callable[[TTTConfig], Sequence[TrainingSequence]]


@dataclass(frozen=True)
class Tried:
    """What came of a fold.

    outcomes: number of epochs -> what was asked -> 1 where the answer after so many epochs was right, else 0.
    seconds, tokens: of the fit; tokens are counted once for each epoch.
    diverged: what the trainer said of a fit that diverged; every answer of it counts as wrong.
    """

    outcomes: Mapping[int, Mapping[Asked, int]]
    seconds: float = 0.0
    tokens: int = 0
    diverged: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        outcomes = {
            str(epochs): {str(asked): right for asked, right in found.items()}
            for epochs, found in self.outcomes.items()
        }
        return {**vars(self), "outcomes": outcomes}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> "Tried":
        """Read what `to_dict` writes.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is something else.
        """
        outcomes = {
            int(epochs): {Asked.parse(asked): int(right) for asked, right in found.items()}
            for epochs, found in said["outcomes"].items()
        }
        return cls(outcomes, float(said["seconds"]), int(said["tokens"]), str(said["diverged"]))


class Worker(Protocol):
    """What tries a setting on a fold; `Fitting` is the one of this process."""

    def key(self, fold: Fold, config: TTTConfig, epochs: Sequence[int]) -> str:
        """The name of all that determines what comes of it."""

    def tried(self, fold: Fold, config: TTTConfig, epochs: Sequence[int], on_step: OnStep) -> Tried:
        """Ask what the fold holds out: after each of these numbers of epochs, of one fit with the largest."""


class Fitting:
    """Fits in this process, with lm-eval's model class as the options made it.

    Args:
        lm: knows the base model, and the tokenizer.
    """

    def __init__(self, lm: "TTTVLLM") -> None:
        self._lm = lm

    def key(self, fold: Fold, config: TTTConfig, epochs: Sequence[int]) -> str:
        """The name of all that determines what comes of a fold."""
        lm = self._lm
        assert lm.arguments.shape is not None
        determined: dict[str, Any] = {"base_model": lm.fingerprint}
        if config.fits:
            settings = _of_run(lm, config, max(epochs))
            determined = settings.determinants(lm.fingerprint, fold.sequences(config))
        determined |= lm.arguments.shape.determinants(lm.max_length)
        asked = [question.identity for question in fold.questions]
        return adapter_key({**determined, "dtype": lm.answering.dtype_name, "epochs": sorted(epochs), "asked": asked})

    def tried(self, fold: Fold, config: TTTConfig, epochs: Sequence[int], on_step: OnStep) -> Tried:
        """Ask what the fold holds out; see `Worker`.

        Raises:
            ModelError: a sequence does not fit in memory.
        """
        from ttt_harness.run.local import trainer_of

        trainer = trainer_of(replace(self._lm.arguments, config=config), self._lm.answering.dtype)
        if not config.fits:
            return Tried({0: _answers(trainer, fold, None)})
        states: dict[int, dict[str, Any]] = {}

        def keep(done: int, state: Mapping[str, Any]) -> None:
            if done in epochs:
                states[done] = {name: tensor.detach().clone() for name, tensor in state.items()}

        loop = _of_run(self._lm, config, max(epochs)).loop()
        try:
            result = trainer.fit(fold.sequences(config), **loop, on_step=on_step, on_epoch=keep)
        except DivergedError as error:
            wrong = {question.asked: 0 for question in fold.questions}
            return Tried(dict.fromkeys(epochs, wrong), diverged=str(error))
        states.setdefault(max(epochs), result.tune_state_dict)  # of a fit without epochs
        outcomes = {number: _answers(trainer, fold, state) for number, state in sorted(states.items())}
        return Tried(outcomes, round(result.seconds, 3), result.tokens)


def _of_run(lm: "TTTVLLM", config: TTTConfig, epochs: int) -> Any:
    from ttt_harness.run.local import fit_settings

    return fit_settings(replace(config, epochs=epochs), lm.answering.dtype_name)


def _answers(trainer: "Trainer", fold: Fold, state: Mapping[str, Any] | None) -> dict[Asked, int]:
    found = {}
    for question in fold.questions:
        found[question.asked] = int(question.is_right(trainer.predict(question.sequences, state)))
    return found


def line_of(key: str, fold: Fold, name: str, tried: Tried) -> str:
    """A line of the log: what was tried, for people too, and what came of it."""
    where = {"key": key, "task": fold.task, "seed": fold.seed, "fold": fold.number, "setting": name}
    return json.dumps({**where, **tried.to_dict()})
