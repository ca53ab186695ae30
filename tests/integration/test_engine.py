"""The engine that requests share; marked integration, for it reads a model with vLLM."""

import math

import pytest

pytestmark = pytest.mark.integration


def test_the_engine_is_one_for_equal_arguments(tiny_model):
    import ttt_harness.harness  # noqa: F401
    from ttt_harness.serving.engine import shared_engine

    first = shared_engine(model=str(tiny_model), max_model_len=128)
    assert shared_engine(model=str(tiny_model), max_model_len=128) is first
    other = shared_engine(model=str(tiny_model), max_model_len=64)
    assert other is not first
    assert other.llm_engine.model_config.max_model_len == 64
    assert math.isfinite(other.llm_engine.model_config.max_model_len)
