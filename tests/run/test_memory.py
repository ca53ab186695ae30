"""The memory plan: both where both fit, turns where one at a time fits, and never more than there is."""

import itertools

import pytest

from ttt_harness.run.memory import (
    ADAPTER_COPIES,
    BATCH_TOKENS,
    ENGINE_ACTIVATION_COPIES,
    ENGINE_OVERHEAD,
    GIB,
    SLEEPING_ENGINE,
    TRAINER_OVERHEAD,
    TURNS_BATCH_TOKENS,
    Sizes,
    plan_memory,
)

# Llama-3.1-8B and SmolLM2-135M in bfloat16, rank 64.
EIGHT_B = Sizes(base=16_060_000_000, adapter=314_600_000, kv_token=131_072, fit_token=4_259_840, serve_token=135_168)
SMALL = Sizes(base=270_000_000, adapter=19_000_000, kv_token=23_040, fit_token=489_600, serve_token=16_128)


def test_on_a_large_card_both_stay():
    plan = plan_memory(72 * GIB, EIGHT_B, [8192])
    assert not plan.turns
    assert plan.batch_tokens == BATCH_TOKENS
    assert "both stay" in plan.reason


def test_on_a_card_that_holds_one_they_take_turns():
    plan = plan_memory(int(0.9 * 24 * GIB), EIGHT_B, [8192])
    assert plan.turns
    assert plan.batch_tokens == TURNS_BATCH_TOKENS
    assert "turns" in plan.reason


def test_where_not_even_one_fits_there_is_no_plan():
    assert plan_memory(12 * GIB, EIGHT_B, [8192]) is None
    assert plan_memory(24 * GIB, EIGHT_B, [131072]) is None  # 16 GiB of keys and values


def test_the_first_context_that_fits_is_planned_for():
    assert plan_memory(24 * GIB, EIGHT_B, [131072, 8192, 2048]).context == 8192


def test_the_engine_gets_what_it_took_on_a_card():
    """24.0 GiB were planned with 3.5 beside weights, adapters and cache; 26.9 of the card were in use."""
    plan = plan_memory(24 * GIB, EIGHT_B, [8192], 16384)
    assert plan.turns
    beside = plan.engine - EIGHT_B.base - 2 * EIGHT_B.adapter - plan.kv_cache
    assert beside >= (3.5 + 26.9 - 24.0) * GIB


@pytest.mark.parametrize("sizes", [EIGHT_B, SMALL], ids=["8B", "135M"])
@pytest.mark.parametrize("context", [2048, 8192])
@pytest.mark.parametrize("batch_tokens", [None, 4096])
@pytest.mark.parametrize("gib", [8, 16, 22, 24, 40, 48, 64, 72, 80, 141])
def test_no_plan_spends_more_than_there_is_and_all_can_work(sizes, context, batch_tokens, gib):
    plan = plan_memory(gib * GIB, sizes, [context], batch_tokens)
    if plan is None:
        return
    assert plan.batch_tokens == (batch_tokens or plan.batch_tokens)
    trainer = sizes.base + ADAPTER_COPIES * sizes.adapter + TRAINER_OVERHEAD + plan.activations
    engine = sizes.base + 2 * sizes.adapter + ENGINE_OVERHEAD + plan.kv_cache
    engine += ENGINE_ACTIVATION_COPIES * plan.batch_tokens * sizes.serve_token
    assert (plan.trainer, plan.engine) == (trainer, engine)
    assert (max(trainer + SLEEPING_ENGINE, engine) if plan.turns else trainer + engine) <= gib * GIB
    assert plan.kv_cache >= context * sizes.kv_token
    assert plan.activations > 0


def test_more_memory_never_takes_anything_away():
    plans = [plan_memory(gib * GIB, EIGHT_B, [8192]) for gib in range(46, 142, 2)]
    together = [plan for plan in plans if plan and not plan.turns]
    assert together
    for smaller, larger in itertools.pairwise(together):
        assert larger.kv_cache >= smaller.kv_cache
        assert larger.activations >= smaller.activations
