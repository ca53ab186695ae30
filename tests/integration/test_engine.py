"""The engine that requests share; marked integration, for it reads a model with vLLM."""

import math
import os
import subprocess
import sys
import time

import psutil
import pytest

from ttt_harness.errors import ModelError

pytestmark = pytest.mark.integration


def test_the_engine_is_one_for_equal_arguments(tiny_model):
    from ttt_harness.serving.environment import prepare_environment

    prepare_environment()
    from ttt_harness.serving.engine import shared_engine

    first = shared_engine(model=str(tiny_model), max_model_len=128)
    assert shared_engine(model=str(tiny_model), max_model_len=128) is first
    other = shared_engine(model=str(tiny_model), max_model_len=64)
    assert other is not first
    assert other.llm_engine.model_config.max_model_len == 64
    assert math.isfinite(other.llm_engine.model_config.max_model_len)


# A weakref finalizer that is older than multiprocessing, whose exit function waits for all processes, puts vLLM's own
# finalizers after it.
SCRIPT = """
import sys, weakref

class Anything: ...

if __name__ == "__main__":  # the engine's process imports this script too
    assert "multiprocessing.util" not in sys.modules
    thing = Anything()
    weakref.finalize(thing, int)
    from ttt_harness.serving.environment import prepare_environment

    prepare_environment()
    from ttt_harness.serving.engine import Engine, default_engine_args
    engine = Engine(**default_engine_args(), model=sys.argv[1], max_model_len=128)
    engine.start()
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def engine(tiny_model, tmp_path):
    """A Python with an engine in processes of its own, which ends when its input does; and these processes."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(path), str(tiny_model)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as python:
        for line in python.stdout:
            if "started" in line:
                break
        started = psutil.Process(python.pid).children(recursive=True)
        assert [child for child in started if "EngineCore" in " ".join(child.cmdline())]
        yield python, started
        for process in psutil.wait_procs(started, timeout=0)[1]:
            process.kill()
        python.kill()


def test_python_ends_whatever_was_imported_first(engine):
    python, started = engine
    python.stdin.close()
    assert python.wait(timeout=60) == 0
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_an_engine_does_not_outlive_a_killed_run(engine):
    python, started = engine
    python.kill()
    assert not psutil.wait_procs(started, timeout=30)[1]


@pytest.mark.parametrize("spawned", [True, False], ids=["its process is there", "at once"])
def test_a_process_that_ends_does_not_wait_for_an_engine_that_starts(tiny_model, tmp_path, spawned):
    script = """
import multiprocessing, sys, time

if __name__ == "__main__":
    from ttt_harness.serving.environment import prepare_environment

    prepare_environment()
    from ttt_harness.serving.engine import Engine, default_engine_args
    engine = Engine(**default_engine_args(), model=sys.argv[1], max_model_len=128)
    engine.start_soon()
    while len(sys.argv) > 2 and not multiprocessing.active_children():
        time.sleep(0.05)
    print("ready" if engine.ready else "starting", time.time())
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    told = subprocess.run(
        [sys.executable, str(path), str(tiny_model), *(["spawned"] if spawned else [])],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TTT_TEST_FOLDER": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=180,
        check=True,
    ).stdout.splitlines()[-1]
    state, ended = told.split()
    assert state == "starting"
    assert time.time() - float(ended) < 30
    left = [process for process in psutil.process_iter() if started_by(process, tmp_path)]
    assert not left


def started_by(process, folder):
    try:
        return process.environ().get("TTT_TEST_FOLDER") == str(folder)
    except psutil.Error:
        return False


def test_an_engine_that_raised_is_started_anew(tiny_model, tmp_path):
    """One process for all: in the background, after a start that failed, and after requests that failed."""
    from ttt_harness.serving.environment import prepare_environment

    prepare_environment()
    from ttt_harness.serving.engine import SamplingParams, default_engine_args, shared_engine

    args = {**default_engine_args(), "model": str(tiny_model), "max_model_len": 128, "enable_lora": True}
    engine = shared_engine(**args)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    def answer():
        (output,) = shared_engine(**args).generate([{"prompt_token_ids": [1, 2, 3]}], params)
        return list(output.outputs[0].token_ids)

    weights = tiny_model / "model.safetensors"
    weights.rename(tmp_path / "away")
    engine.start_soon()
    engine.start_soon()
    with pytest.raises(ModelError, match="could not start"):
        answer()
    (tmp_path / "away").rename(weights)
    engine.start_soon()
    first = answer()
    assert len(first) == 2
    assert engine.ready
    for config in ("[]", "{}", "not JSON"):
        adapter = tmp_path / f"adapter {config}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(config)
        (adapter / "adapter_model.safetensors").touch()
        with pytest.raises(ModelError, match=r"^vLLM could not answer: .+\.$"):
            engine.generate([{"prompt_token_ids": [1, 2, 3]}], params, lora_request=engine.adapter(config, adapter))
        assert not engine.running
    assert answer() == first
    engine.close()
