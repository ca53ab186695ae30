"""The engine that requests share; marked integration, for it reads a model with vLLM."""

import math
import os
import subprocess
import sys

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


def test_python_ends_whatever_was_imported_first(tiny_model):
    """Also where multiprocessing's exit function, which waits for all processes, comes before vLLM's finalizers."""
    script = f"""
import sys, weakref

class Anything: ...

if __name__ == "__main__":  # the engine's process imports this script too
    assert "multiprocessing.util" not in sys.modules
    thing = Anything()
    weakref.finalize(thing, int)
    import ttt_harness.harness
    from ttt_harness.serving.engine import Engine, default_engine_args
    engine = Engine(**default_engine_args(), model={str(tiny_model)!r}, max_model_len=128)
    engine.start()
    print("started", flush=True)
"""
    path = tiny_model.parent / "script.py"
    path.write_text(script)
    ended = subprocess.run(
        [sys.executable, str(path)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "started" in ended.stdout
