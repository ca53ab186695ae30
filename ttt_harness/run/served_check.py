"""Checks that vLLM serves the adapter that was trained: compares log-probabilities of the trainer and the engine.

Both give the log-probabilities of the same tokens of one training sequence, with the adapter and from the base model
alone: the trainer by `Trainer.log_probabilities`, the engine as prompt log-probabilities. `compare_served` says whether
they agree.

The dtype limits what the check can find. Two programs that compute one model in bfloat16 differ by some hundredths. An
error in a small part of an adapter, such as permuted rows of one projection, is of that size, and shows in float32
only. An adapter that is not applied, belongs to another model, or is scaled wrongly shows in every dtype, once it moves
the log-probabilities by more than that.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from ttt_harness.errors import ModelError

# How far two programs that compute the same model may differ, in nats, on the mean over tokens; and beside that, as a
# share of what the adapter changes, since its update is rounded too.
TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 1e-1}
EFFECT_SHARE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}
# Where the base models of both programs differ, so do the adapters, by up to so many times as much; and the base models
# may differ by so many times the tolerance.
BASE_FACTOR = 2.0
# An adapter that changes the model by less than so many times the allowed difference cannot be told from others.
VISIBLE = 4.0
# An adapter that is not applied leaves vLLM's numbers as they are: this share of the trainer's effect counts as none.
# That holds for small adapters too, where their effect is more than rounding (this share of the tolerance).
STILL = 0.02

AS_TRAINED = "served as trained"
NO_EFFECT = "the adapter changes too little to be compared"
OTHER_BASE = "vLLM computes another base model than the one that was trained on"
NOT_APPLIED = "vLLM does not apply the adapter"
OTHER_ADAPTER = "vLLM serves another adapter than the one that was trained"


class LogProbabilities(Protocol):
    """Of some tokens, each shape [tokens]: with an adapter, and from the base model alone."""

    @property
    def adapter(self) -> Sequence[float]: ...

    @property
    def base(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class ServedCheck:
    """How near the served adapter is to the trained one; all differences in nats, over the compared tokens.

    verdict: one of this module's constants.
    tokens: how many were compared.
    mean_difference, largest_difference: between trained and served, both with the adapter.
    base_difference: mean, between the base models of trainer and engine.
    effect: mean, by which the adapter moves the trainer's base model.
    served_effect: mean, by which it moves the engine's.
    tolerance: what the mean difference may be, at most.
    """

    verdict: str
    tokens: int
    mean_difference: float
    largest_difference: float
    base_difference: float
    effect: float
    served_effect: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the run may go on."""
        return self.verdict in (AS_TRAINED, NO_EFFECT)

    def as_record(self) -> dict[str, str | int | float]:
        """What results state."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}

    def raise_if_failed(self, what: str) -> None:
        """End the run with one sentence unless the check passed.

        Raises:
            ModelError: it did not; `what` names the task and the adapter.
        """
        if not self.passed:
            raise ModelError(
                f"{what}: {self.verdict} (over {self.tokens} training tokens, log-probabilities differ from the "
                f"trainer's by {self.mean_difference:.3g} on average, where {self.tolerance:.3g} is allowed; the "
                f"adapter moves them by {self.effect:.3g} in the trainer, and by {self.served_effect:.3g} in vLLM); "
                "nothing was answered."
            )


def compare_served(trained: LogProbabilities, served: LogProbabilities, *, dtype: str) -> ServedCheck:
    """Compare the log-probabilities of the trainer and of vLLM for the same tokens.

    Args:
        trained, served: with the adapter and without, each of shape [tokens].
        dtype: of the weights, as `torch` names it: `float32`, `float16` or `bfloat16`.
    """
    tolerance = TOLERANCE[dtype]
    error = _mean_difference(served.adapter, trained.adapter)
    base_error = _mean_difference(served.base, trained.base)
    effect = _mean_difference(trained.adapter, trained.base)
    served_effect = _mean_difference(served.adapter, served.base)
    allowed = max(tolerance, BASE_FACTOR * base_error, EFFECT_SHARE[dtype] * effect)
    if not base_error <= BASE_FACTOR * tolerance:  # NaN is not
        verdict = OTHER_BASE
    elif effect > STILL * tolerance and served_effect < STILL * effect:
        verdict = NOT_APPLIED
    elif error <= allowed:
        verdict = AS_TRAINED if effect > VISIBLE * allowed else NO_EFFECT
    else:
        verdict = OTHER_ADAPTER
    return ServedCheck(
        verdict=verdict,
        tokens=len(trained.adapter),
        mean_difference=error,
        largest_difference=max(abs(a - b) for a, b in zip(served.adapter, trained.adapter, strict=True)),
        base_difference=base_error,
        effect=effect,
        served_effect=served_effect,
        tolerance=allowed,
    )


def _mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
