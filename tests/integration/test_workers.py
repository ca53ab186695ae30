"""Runs on two Ray workers of this machine: the answers of one worker, whatever happens to the workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil")
pytest.importorskip("ray", reason="Ray is not installed (pip install 'ttt-harness[cluster]')")
pytestmark = pytest.mark.integration

TASKS = ["procedural_ttt_boolean_expressions", "procedural_ttt_word_sorting", "procedural_ttt_navigate"]
FIT = {"k": 3, "num_permutations": 150, "lora_rank": 8, "lr": 1e-2, "epochs": 1}
ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_model_len": 2048, "dtype": "float32"}
LIMIT = 20  # enough for two workers to share


def actors(method=""):
    """The processes of workers that are at `method` (fit, answer) now; Ray names a process by what it runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if line and line[0].startswith(f"ray::RayWorker.{method}"):
            found.append(process)
    return found


class Killer(threading.Thread):
    """Kills a worker that is at each of `methods`, one after the other, as soon as it sees one."""

    def __init__(self, methods):
        super().__init__(daemon=True)
        self.methods, self.killed, self.over = list(methods), [], threading.Event()

    def run(self):
        while self.methods and not self.over.is_set():
            for process in actors(self.methods[0])[:1]:
                time.sleep(0.05)  # into it
                process.kill()
                self.killed.append(self.methods.pop(0))
            time.sleep(0.02)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


@pytest.fixture(scope="module")
def evaluate(tiny_model):
    import ttt_harness.task_configs
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = Path(ttt_harness.task_configs.__file__).parent

    def run(store, workers, tasks=TASKS, **model_args):
        args = {"pretrained": str(tiny_model), "adapter_dir": str(store), **ENGINE, **FIT, **model_args}
        args["data_parallel_size"] = workers
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=args)
        options = {"task_manager": manager, "limit": LIMIT, "bootstrap_iters": 0}
        return simple_evaluate("ttt_vllm", args, tasks, batch_size=1, **options)

    yield run
    from ttt_harness.cluster import pool

    if pool._pool:
        pool._pool.close()
    assert not actors()


def told(results):
    """Answers and scores."""
    answers = {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}
    return answers, {task: results["results"][task]["acc,answer"] for task in answers}


def records(results):
    return results["config"]["ttt"]["tasks"]


@pytest.fixture(scope="module")
def one_worker(evaluate, tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two_workers(evaluate, store):
    return evaluate(store, 2)


def test_two_workers_give_the_answers_and_scores_of_one(one_worker, two_workers):
    assert told(two_workers) == told(one_worker)
    for task, record in records(two_workers).items():
        assert record["reused"] is False
        assert record["changes_output"] is True
        assert record["requests"] == LIMIT
        assert record["generate_seconds"] > 0
        assert len(record["losses"]) == len(records(one_worker)[task]["losses"])


def test_adapters_reach_the_drivers_store_and_are_found_there_again(evaluate, one_worker, two_workers, store):
    assert {Path(record["adapter"]).name for record in records(two_workers).values()} == {
        path.name for path in store.iterdir()
    }
    before = {path: path.stat().st_mtime_ns for path in store.rglob("adapter_*")}
    again = evaluate(store, 2)
    assert told(again) == told(one_worker)
    assert all(record["reused"] for record in records(again).values())
    assert {path: path.stat().st_mtime_ns for path in store.rglob("adapter_*")} == before


def test_a_worker_killed_in_a_fit_and_one_killed_while_it_answers_change_nothing(evaluate, one_worker, tmp_path):
    with Killer(["fit", "answer"]) as killer:
        results = evaluate(tmp_path, 2)
    assert killer.killed == ["fit", "answer"]
    assert told(results) == told(one_worker)
    assert all(record["requests"] == LIMIT for record in records(results).values())


def test_a_shared_adapter_is_fitted_once(evaluate, tmp_path):
    results = evaluate(tmp_path, 2, method="shared_ttt", num_permutations=4)
    assert len({record["adapter"] for record in records(results).values()}) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_kills_every_worker_ends_the_run(evaluate, tmp_path):
    from ttt_harness.errors import ClusterError

    with Killer(["fit"] * 9), pytest.raises(ClusterError, match=r"the fit of \S+ failed 3 times") as error:
        evaluate(tmp_path, 2, TASKS[:1], num_permutations=2000)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not actors()


def lm_eval(folder, tiny_model, *more):
    settings = {**FIT, **ENGINE, "pretrained": tiny_model, "adapter_dir": folder / "adapters", **dict(more)}
    arguments = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "ttt_vllm", "--model_args", arguments]
    command += ["--tasks", ",".join(TASKS), "--limit", "8"]
    return command


def test_ctrl_c_leaves_no_process_behind(tiny_model, tmp_path):
    command = lm_eval(tmp_path, tiny_model, ("data_parallel_size", 2), ("num_permutations", 2000))
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    started = []
    try:
        end = time.monotonic() + 200
        while not actors("fit"):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) > 4  # Ray's own, and the workers
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive
        assert {path.suffix for path in (tmp_path / "adapters").iterdir()} <= {".lock"}  # of the fits that it ended
    finally:
        for one in [*started, psutil.Process(process.pid)] if process.poll() is None else started:
            if one.is_running():
                one.kill()
        process.wait()


def test_two_drivers_of_one_store_fit_nothing_twice(tiny_model, tmp_path):
    runs = []
    for name in ("a", "b"):
        command = [*lm_eval(tmp_path, tiny_model), "--output_path", str(tmp_path / name)]
        runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for run in runs:
        _, err = run.communicate(timeout=400)
        assert run.returncode == 0, err
    results = [json.loads(next((tmp_path / name).rglob("results_*.json")).read_text()) for name in ("a", "b")]
    for task in TASKS:
        fitted = [not result["config"]["ttt"]["tasks"][task]["reused"] for result in results]
        assert sum(fitted) == 1
        assert len({result["results"][task]["acc,answer"] for result in results}) == 1
    assert len(list((tmp_path / "adapters").iterdir())) == len(TASKS)
