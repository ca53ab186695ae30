"""The memory plan: both where both fit, turns where one at a time fits, and never more than there is."""

import itertools

import pytest

from ttt_harness.serving.memory import ADAPTER_COPIES, ENGINE_OVERHEAD, GIB, TRAINER_OVERHEAD, Sizes, plan_memory

# Llama-3.1-8B in bfloat16, rank 64.
EIGHT_B = Sizes(base=16 * 10**9, adapter=318 * 10**6, kv_token=131072, fit_token=6_550_000)
SMALL = Sizes(base=270 * 10**6, adapter=19 * 10**6, kv_token=23_040, fit_token=1_500_000)


def test_on_a_large_card_both_stay():
    plan = plan_memory(72 * GIB, EIGHT_B, context=8192)
    assert not plan.turns
    assert "both stay" in plan.reason


def test_on_a_card_that_holds_one_they_take_turns():
    plan = plan_memory(int(0.9 * 24 * GIB), EIGHT_B, context=8192)
    assert plan.turns
    assert "turns" in plan.reason


def test_where_not_even_one_fits_there_is_no_plan():
    assert plan_memory(12 * GIB, EIGHT_B, context=8192) is None
    assert plan_memory(24 * GIB, EIGHT_B, context=131072) is None  # 16 GiB of keys and values


@pytest.mark.parametrize("sizes", [EIGHT_B, SMALL], ids=["8B", "135M"])
@pytest.mark.parametrize("context", [2048, 8192])
@pytest.mark.parametrize("gib", [8, 16, 22, 24, 40, 48, 64, 72, 80, 141])
def test_no_plan_spends_more_than_there_is_and_all_can_work(sizes, context, gib):
    plan = plan_memory(gib * GIB, sizes, context)
    if plan is None:
        return
    trainer = sizes.base + ADAPTER_COPIES * sizes.adapter + TRAINER_OVERHEAD + plan.activations
    engine = sizes.base + 2 * sizes.adapter + ENGINE_OVERHEAD + plan.kv_cache
    assert (plan.trainer, plan.engine) == (trainer, engine)
    assert (max(trainer, engine) if plan.turns else trainer + engine) <= gib * GIB
    assert plan.kv_cache >= context * sizes.kv_token
    assert plan.activations > 0


def test_more_memory_never_takes_anything_away():
    plans = [plan_memory(gib * GIB, EIGHT_B, 8192) for gib in range(46, 142, 2)]
    together = [plan for plan in plans if plan and not plan.turns]
    assert together
    for smaller, larger in itertools.pairwise(together):
        assert larger.kv_cache >= smaller.kv_cache
        assert larger.activations >= smaller.activations
