"""What a user stated, told apart from what lm-eval fills in.

lm-eval hands tasks a seed of 1234 and merged metadata, whether a user asked for them or not. The bridge
(`ttt_harness.plugin`) marks both on their way: a seed that nobody stated is an `Unstated`, and metadata know which of
their keys come from the command line and not from a task's YAML. Without the bridge nothing counts as stated.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# lm-eval's seed of the few-shot examples where none is given, as the last of four: Python, NumPy, torch, few-shot.
DEFAULT_SEED = 1234


class Unstated(int):
    """lm-eval's default for a seed: the same number, and known to be the default."""


class StatedMetadata(dict[str, Any]):
    """A task's metadata; `stated` are the keys that come from `--metadata` or `--model_args`."""

    stated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, metadata: Mapping[str, Any], stated: Sequence[str]) -> "StatedMetadata":
        """Metadata of which `stated` come from the command line."""
        marked = cls(metadata)
        marked.stated = frozenset(stated)
        return marked


def stated_keys(metadata: Any) -> frozenset[str]:
    """The keys of metadata that are known to come from the command line."""
    return metadata.stated if isinstance(metadata, StatedMetadata) else frozenset()


def is_stated_seed(seed: Any) -> bool:
    """Whether lm-eval's seed of the few-shot examples is one that a user gave.

    Where nothing marks the default, its number counts as the default.
    """
    return isinstance(seed, int) and not isinstance(seed, Unstated | bool)


def states_few_shot_seed(given: Any) -> bool:
    """Whether a value of `--seed`, or of `seed:` in a file for `--config`, states the seed of the few-shot examples.

    One number does, for all four seeds. Of three, to which lm-eval adds its default as the fourth, none is that seed.
    """
    if not isinstance(given, list | tuple):
        return given is not None
    if len(given) == 4 and given[3] == DEFAULT_SEED:
        return all(seed == DEFAULT_SEED for seed in given)
    return len(given) in (1, 4)
