"""The driver's side with real Ray processes, but workers that only sleep: who gets what, and what a lost one costs."""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ttt_harness.adapters.store import AdapterStore
from ttt_harness.cluster import pool
from ttt_harness.cluster.worker import Circumstances, Worker
from ttt_harness.errors import ClusterError, DataError
from ttt_harness.run.progress import RunProgress

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.integration


@dataclass
class Group:
    """Stands for the groups of `ttt_vllm`, whose module would load vLLM."""

    task: str
    indices: list
    key: str | None
    sequences: tuple = ()
    support: object = None


class Sleeper(Worker):
    """A worker that fits and answers by sleeping; `worker_args` tell how long, and who dies."""

    def start(self, model_args, mark, _):
        self._store = mark.parent if mark.exists() and not model_args.get("elsewhere") else None
        return Circumstances("cpu", "float32", model_args["base_model"]), self._store is not None

    def _die(self, model_args, what, task):
        flag = Path(model_args["flags"]) / f"{what}-{task}"
        left = int(flag.read_text()) if flag.exists() else 0
        if left:
            flag.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def fit(self, model_args, group):
        with self._reporting(), RunProgress(2) as progress:
            progress.say(f"{group.task}: half")
            progress.advance(1, f"{group.task}: half", line=True)
            time.sleep(0.1)
            self._die(model_args, "fit", group.task)
        if group.task == model_args.get("bad"):
            raise DataError("this task is bad.")
        files = {"ttt.json": b'{"sha256": ""}', "adapter_config.json": b"{}"}
        return {"fit_seconds": 0.1, "reused": False, "adapter": "there"}, None if self._store else files

    def answer(self, model_args, group, requests, kind, files):
        time.sleep(0.2)
        self._die(model_args, "answer", group.task)
        assert (files is None) == (self._store is not None or group.key is None)
        record = {"adapter": None, "requests": len(requests), "generate_seconds": 0.2}
        return [f"{kind} {group.task} {request}" for request in requests], record


@dataclass
class Model:
    store: AdapterStore
    worker_args: dict
    records: dict = field(default_factory=dict)
    base_model_hash: str = "m"


@pytest.fixture(scope="module")
def made():
    """The pool that tests share until one of them loses it."""
    pools = []
    yield pools
    for one in pools:
        one.close()
    assert not ray.is_initialized()


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "Worker", Sleeper)
    ours = Circumstances("cpu", "float32", "m")
    monkeypatch.setattr(pool.Circumstances, "of", lambda _: ours)
    monkeypatch.setattr(pool, "versions", dict)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    (tmp_path / "flags").mkdir()

    def go(fits=("a", "b", "c"), questions=40, keys=None, workers=2, **args):
        groups, requests = [], []
        for number, task in enumerate(fits):
            indices = list(range(number, questions * len(fits), len(fits)))
            groups.append(Group(task, indices, keys[number] if keys else f"key-{task}"))
        requests = [f"q{index}" for index in range(questions * len(fits))]
        model = Model(AdapterStore(tmp_path / "store"), {"base_model": "m", "flags": str(tmp_path / "flags"), **args})
        if not made or made[0].closed:
            made[:] = [pool.Pool(workers)]
        work = {group.key: 100.0 for group in groups if group.key}
        with RunProgress(1000) as progress:
            answers = made[0].answer(model, groups, requests, "gen", progress, work, dict.fromkeys(fits, 50.0))
        return answers, model, tmp_path

    return go


def expected(fits, questions):
    return [f"gen {fits[index % len(fits)]} q{index}" for index in range(questions * len(fits))]


def flag(folder, what, count):
    (folder / "flags").mkdir(exist_ok=True)
    (folder / "flags" / what).write_text(str(count))


def test_answers_come_in_the_order_of_the_requests_and_a_second_run_uses_the_same_workers(run):
    answers, model, _ = run()
    assert answers == expected("abc", 40)
    assert {task: record["requests"] for task, record in model.records.items()} == {"a": 40, "b": 40, "c": 40}
    assert {record["adapter"] for record in model.records.values()} == {
        str(model.store.root / f"key-{t}") for t in "abc"
    }
    assert list(model.store.root.iterdir()) == []
    assert run(fits="d", questions=3)[0] == expected("d", 3)
    assert run(fits="xy", questions=5, keys=[None, None])[0] == expected("xy", 5)


def test_an_adapter_for_all_tasks_is_fitted_once_and_first(run):
    _, model, _ = run(keys=["one"] * 3)
    assert [task for task, record in model.records.items() if "fit_seconds" in record] == ["a"]


def test_adapters_are_carried_where_the_folder_is_not_shared(run):
    answers, model, _ = run(elsewhere=True)
    assert answers == expected("abc", 40)
    assert sorted(path.name for path in model.store.root.iterdir()) == ["key-a", "key-b", "key-c"]


def test_what_a_lost_worker_had_is_done_elsewhere(run, tmp_path):
    flag(tmp_path, "fit-a", 2)
    flag(tmp_path, "answer-b", 1)
    answers, model, _ = run()
    assert answers == expected("abc", 40)
    assert {task: record["requests"] for task, record in model.records.items()} == {"a": 40, "b": 40, "c": 40}


def test_three_lost_workers_end_the_run(run, tmp_path):
    flag(tmp_path, "fit-a", 9)
    with pytest.raises(ClusterError, match=r"the fit of a ended 3 workers: .*All adapters that are done are in"):
        run()
    assert not ray.is_initialized()


def test_what_a_worker_refuses_ends_the_run_with_its_sentence(run):
    with pytest.raises(DataError, match=r"^this task is bad\.$"):
        run(bad="b")


def test_another_model_on_a_node_is_refused(run):
    with pytest.raises(ClusterError, match=r"the base model of worker . is other, and m here"):
        run(base_model="other")
