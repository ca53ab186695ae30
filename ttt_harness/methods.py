"""The methods: one row for each value of the model argument `method`, one for each setting of the published study.

No other file asks what a method's name means. The figures are those of Akyürek et al., arXiv 2411.07279, and of its
code, Fewshot-TTT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class Sequences(Enum):
    """What the training sequences of a method are made of."""

    IN_CONTEXT = "all demonstrations of a task, in a permutation"
    SINGLE_PAIRS = "one demonstration"


@dataclass(frozen=True)
class Hyperparameters:
    """The published hyperparameters in which methods differ."""

    lr: float
    epochs: int
    num_permutations: int = 40
    fit_batch_size: int = 5


@dataclass(frozen=True)
class Method:
    """A value of the model argument `method`.

    sequences: what an adapter is fitted on; None where nothing is fitted.
    shared: one adapter is fitted on the sequences of all tasks.
    prompts_hold_demonstrations: unless the user leaves them out with `--num_fewshot 0`.
    published: its hyperparameters in the study.
    """

    sequences: Sequences | None
    shared: bool
    prompts_hold_demonstrations: bool
    published: Hyperparameters

    @property
    def fits(self) -> bool:
        """Whether an adapter is fitted."""
        return self.sequences is not None

    def defaults(self, *, shuffle: bool) -> Hyperparameters:
        """The published hyperparameters, which differ where the demonstrations are not shuffled.

        All sequences of a task would be the same one then. The study takes four steps on it.
        """
        if shuffle or self.sequences is not Sequences.IN_CONTEXT:
            return self.published
        return replace(self.published, num_permutations=1, fit_batch_size=1, epochs=4)


def _in_context(lr: float, epochs: int, *, shared: bool) -> Method:
    return Method(
        Sequences.IN_CONTEXT, shared=shared, prompts_hold_demonstrations=True, published=Hyperparameters(lr, epochs)
    )


def _single_pairs(lr: float, epochs: int, *, shared: bool) -> Method:
    return Method(
        Sequences.SINGLE_PAIRS, shared=shared, prompts_hold_demonstrations=False, published=Hyperparameters(lr, epochs)
    )


METHODS: dict[str, Method] = {
    "ttt": _in_context(lr=1e-4, epochs=1, shared=False),
    "shared_ttt": _in_context(lr=5e-5, epochs=1, shared=True),
    "e2e": _single_pairs(lr=1e-4, epochs=4, shared=False),
    "shared_e2e": _single_pairs(lr=5e-5, epochs=6, shared=True),
    "icl": Method(None, shared=False, prompts_hold_demonstrations=True, published=Hyperparameters(lr=0.0, epochs=0)),
}

# Prompts per question in the published votes.
VOTES = 5


@dataclass(frozen=True)
class Setting:
    """A setting of the published study: a method and what is changed in it.

    model_args: of `ttt_vllm`, task metadata keys among them, since lm-eval hands them on.
    options: of `lm_eval run`.
    model: the lm-eval model class that runs it.
    published: its name among the published figures; None where there are none.
    """

    model_args: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "ttt_vllm"
    published: str | None = None

    @property
    def method(self) -> Method | None:
        """The method that `ttt_vllm` runs; None for another model."""
        return METHODS[self.model_args["method"]] if self.model == "ttt_vllm" else None

    @property
    def fits(self) -> bool:
        """Whether an adapter is fitted, and the engine therefore has to take adapters."""
        return self.method is not None and self.method.fits


SETTINGS: dict[str, Setting] = {
    "random": Setting(model="ttt_random", published="random"),
    "zero_shot": Setting({"method": "icl"}, {"num_fewshot": 0}, published="zero_shot"),
    "icl": Setting({"method": "icl"}, published="few_shot"),
    "icl_vote": Setting({"method": "icl", "vote_permutations": VOTES}, published="few_shot_vote"),
    "ttt": Setting({"method": "ttt"}, published="ttt"),
    "ttt_vote": Setting({"method": "ttt", "vote_permutations": VOTES}, published="ttt_vote"),
    "ttt_loss_all": Setting({"method": "ttt", "loss_on": "all"}, published="ttt_loss_all"),
    "ttt_loss_last": Setting({"method": "ttt", "loss_on": "last"}, published="ttt_loss_last"),
    "ttt_no_shuffle": Setting({"method": "ttt", "shuffle": False}, published="ttt_no_shuffle"),
    "ttt_no_shuffle_vote": Setting(
        {"method": "ttt", "shuffle": False, "vote_permutations": VOTES}, published="ttt_no_shuffle_vote"
    ),
    "ttt_leave_one_out": Setting({"method": "ttt", "leave_one_out": True}),
    "shared_ttt": Setting({"method": "shared_ttt"}, published="shared_ttt"),
    "e2e": Setting({"method": "e2e"}, published="e2e"),
    "shared_e2e": Setting({"method": "shared_e2e"}, published="shared_e2e"),
}


def method_of(settings: Mapping[str, Any]) -> Method | None:
    """The method of the settings that results state; None where they state none, or one that is not known."""
    name = settings.get("method")
    return METHODS.get(name) if isinstance(name, str) else None


def is_guessing(settings: Mapping[str, Any]) -> bool:
    """Whether results were drawn at random, by the settings that they state."""
    return settings.get("method") == "random"


def setting_name(settings: Mapping[str, Any], *, zero_shot: bool, leave_one_out: bool, vote: bool) -> str:
    """The name of what was run, in the manner of `SETTINGS`, in which combinations may be missing.

    Args:
        settings: the model arguments that the results of a `ttt_vllm` run state. Those of other models, which fit
            nothing, state no `method`.
        zero_shot: the prompts held no demonstrations.
        leave_one_out, vote: the metadata of the tasks.
    """
    name = str(settings.get("method", "icl"))
    method = METHODS.get(name)
    if method is not None and not method.fits and zero_shot:
        return "zero_shot"
    if method is not None and method.fits and settings.get("loss_on", "outputs") != "outputs":
        name += f"_loss_{settings['loss_on']}"
    in_context = method is not None and method.sequences is Sequences.IN_CONTEXT
    if in_context and not settings.get("shuffle", True):
        name += "_no_shuffle"
    return name + ("_leave_one_out" if leave_one_out else "") + ("_vote" if vote else "")
