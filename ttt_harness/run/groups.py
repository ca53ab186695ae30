"""Sorts requests into groups: what is asked together, what is fitted for it, and under which key.

A group holds the requests of one task. `group_by_task` makes the groups. `Preparation` adds the training sequences and
the adapter's key to the groups that are answered with an adapter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt_harness.adapters.names import adapter_key
from ttt_harness.data.sequences import Encode, TrainingSequence, in_context_sequences, single_pair_sequences
from ttt_harness.data.support import Render, SupportSet
from ttt_harness.errors import ConfigError, DataError
from ttt_harness.methods import Method, Sequences
from ttt_harness.run.fit_settings import FitSettings


@dataclass
class Group:
    """The requests of one task.

    indices: their positions among all requests.
    support: the demonstrations that they carry; None for a task without.
    sequences: what the adapter is fitted on; none where the base model answers.
    key: the adapter's name; None where the base model answers.
    determinants: what the key is the hash of.
    settings, said: of the fit, and as records state them; none where the base model answers.
    """

    task: str
    indices: list[int]
    support: SupportSet | None = None
    sequences: Sequence[TrainingSequence] = field(default=(), repr=False)
    key: str | None = None
    determinants: Mapping[str, Any] = field(default_factory=dict, repr=False)
    settings: FitSettings | None = None
    said: Mapping[str, Any] = field(default_factory=dict, repr=False)


def group_by_task(requests: Sequence[Any]) -> list[Group]:
    """The groups in the order of their first requests; `requests` are lm-eval's instances."""
    groups: dict[str, Group] = {}
    for index, request in enumerate(requests):
        name = str(request.task_name)
        if name not in groups:
            groups[name] = Group(name, [], getattr(request, "support_set", None))
        groups[name].indices.append(index)
    return list(groups.values())


@dataclass(frozen=True)
class Preparation:
    """Gives groups their training sequences and keys.

    method: decides what sequences are made of, and whether all tasks share one adapter.
    name: the method's, for messages.
    encode, render: the tokenizer and the chat template, exactly as prompts go through them.
    max_length: of a training sequence, in tokens.
    determinants: gives all that the adapter depends on that is fitted on sequences.
    """

    method: Method
    name: str
    encode: Encode
    render: Render
    max_length: int
    num_permutations: int
    shuffle: bool
    seed: int
    loss_on: str
    determinants: Callable[[Sequence[TrainingSequence]], Mapping[str, Any]]

    def prepare(self, groups: Sequence[Group]) -> None:
        """Set `sequences`, `determinants` and `key` of `groups`, which all have a support set.

        Raises:
            ConfigError: a support set is empty.
            DataError: a training sequence has no token to train on, or exceeds the context window.
        """
        for group in groups:
            group.sequences = self._sequences(group)
        if self.method.shared:
            together = [sequence for group in groups for sequence in group.sequences]
            determinants = self.determinants(together) if groups else {}  # once: these are the sequences of all tasks
            for group in groups:
                group.sequences, group.determinants = together, determinants
        else:
            for group in groups:
                group.determinants = self.determinants(group.sequences)
        for group in groups:
            group.key = adapter_key(group.determinants)

    def _sequences(self, group: Group) -> list[TrainingSequence]:
        support = group.support
        if support is None or not support.demonstrations:
            raise ConfigError(
                f"{group.task} has no demonstrations (k=0, or num_fewshot: 0 in its YAML), on which method={self.name} "
                "fits an adapter; set k to at least 1, or use method=icl."
            )
        try:
            if self.method.sequences is Sequences.SINGLE_PAIRS:
                sequences = single_pair_sequences(support, self.encode, loss_on=self.loss_on, render=self.render)
            else:
                sequences = in_context_sequences(
                    support,
                    self.encode,
                    num_permutations=self.num_permutations,
                    shuffle=self.shuffle,
                    seed=self.seed,
                    loss_on=self.loss_on,
                    render=self.render,
                )
        except DataError as error:
            raise DataError(f"{support.source or group.task}: {error}") from None
        longest = max(len(sequence.tokens) for sequence in sequences)
        if longest > self.max_length:
            raise DataError(
                f"{group.task}: a training sequence has {longest} tokens, but the context window holds "
                f"{self.max_length}; use a smaller k, or a model (or max_model_len) with a longer window."
            )
        return sequences
