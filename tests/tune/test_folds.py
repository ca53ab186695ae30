"""Folds partition the demonstrations; a held-out one is never among those before it."""

import pytest

from ttt_harness.tune.folds import folds, orders


@pytest.mark.parametrize("k", [2, 3, 7, 10, 11])
@pytest.mark.parametrize("count", [2, 5, 20])
def test_folds_partition_the_demonstrations(k, count):
    made = folds(range(k), count, seed=42)
    assert sorted(place for fold in made for place in fold) == list(range(k))
    assert len(made) == min(k, count)
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert made == folds(range(k), count, seed=42)


def test_other_seeds_make_other_folds():
    assert len({tuple(folds(range(10), 5, seed=seed)) for seed in range(10)}) == 10


def test_equal_demonstrations_are_held_out_together():
    for seed in range(20):
        made = folds(["a", "b", "a", "c", "d", "b", "a", "e"], 4, seed=seed)
        for alike in ({0, 2, 6}, {1, 5}):
            assert sum(bool(alike & set(fold)) for fold in made) == 1
    assert folds(["a", "a", "a"], 3, seed=0) == [(0, 1, 2)]


def test_orders_are_of_the_others_and_differ():
    others = [0, 1, 3, 4, 5]
    drawn = orders(others, 3, seed=42, held_out=2)
    assert len(set(drawn)) == 3
    assert all(sorted(order) == others for order in drawn)
    assert drawn == orders(others, 3, seed=42, held_out=2) != orders(others, 3, seed=42, held_out=6)
