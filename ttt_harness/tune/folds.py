"""Splits demonstrations into folds, and draws the orders in which the others stand in the prompt."""

import random
from collections.abc import Hashable, Sequence

from ttt_harness.data.sequences import permutations


def folds(demonstrations: Sequence[Hashable], count: int, *, seed: int) -> list[tuple[int, ...]]:
    """Partition demonstrations at random into `count` folds of nearly equal size, each the places of its members.

    Equal demonstrations are in one fold: one that stayed behind would give the answer of the other away. So there are
    at most as many folds as there are different demonstrations.
    """
    places: dict[Hashable, list[int]] = {}
    for place, demonstration in enumerate(demonstrations):
        places.setdefault(demonstration, []).append(place)
    groups = list(places.values())
    random.Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)  # the sort is stable: the order within a size is the drawn one
    made: list[list[int]] = [[] for _ in range(min(count, len(groups)))]
    for group in groups:
        min(made, key=len).extend(group)
    return [tuple(sorted(fold)) for fold in made]


def orders(others: Sequence[int], count: int, *, seed: int, held_out: int) -> list[tuple[int, ...]]:
    """`count` random orders of the places `others` for the prompts that ask `held_out`, which has orders of its own."""
    drawn = permutations(len(others), count, seed=random.Random(f"{seed}/{held_out}").getrandbits(32))
    return [tuple(others[place] for place in order) for order in drawn]
