"""The driver's side with real Ray processes, but workers that only sleep: who gets what, and what a lost one costs."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.run.fakes import SETTINGS, Log, fake_worker
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.cluster import pool
from ttt_harness.cluster.worker import RayWorker, WorkerEnvironment
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import ClusterError, DataError
from ttt_harness.run.evaluation import Evaluation
from ttt_harness.run.groups import group_by_task
from ttt_harness.run.progress import RunProgress
from ttt_harness.run.schedule import Stages

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.integration

VERSIONS = {"vllm": "1"}


class Sleeper(RayWorker):
    """A worker whose trainer and engine only sleep; what it is given to load tells how long, and who dies."""

    def _load(self, given):
        self.given = given

    def _environment(self):
        return WorkerEnvironment("cpu", "float32", self.given["base_model"], VERSIONS, Stages[self.given["stages"]])

    def use_store(self, mark):
        elsewhere = self.given.get("elsewhere")
        self._store = None if elsewhere else mark.parent
        store = Path(self.given["flags"]).parent / f"store-of-{self.number}" if elsewhere else mark.parent
        self.log = Log()
        self._worker = fake_worker(store, self.log, Stages[self.given["stages"]], fit_seconds=0.2, answer_seconds=0.2)
        return self._store is not None

    def _die(self, what, task):
        flag = Path(self.given["flags"]) / f"{what}-{task}"
        left = int(flag.read_text()) if flag.exists() else 0
        if left:
            flag.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)

    def fit(self, order):
        self._die("fit", order.task)
        if order.task == self.given.get("bad"):
            raise DataError("this task is bad.")
        return super().fit(order)

    def answer(self, order, files):
        self._die("answer", order.task)
        assert (files is None) == (self._store is not None or order.key is None)
        try:
            return super().answer(order, files)
        finally:
            with (Path(self.given["flags"]) / f"overlap-{self.number}").open("w") as file:
                file.write(str(self.log.overlap()))


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
    monkeypatch.setattr(pool, "RayWorker", Sleeper)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=":")
    (tmp_path / "flags").mkdir()

    def go(tasks=("a", "b", "c"), questions=40, keys=None, workers=2, stages=Stages.SEQUENTIAL, **given):
        requests = [
            SimpleNamespace(task_name=task, args=(f"q{index * len(tasks) + number}",), support_set=None)
            for index in range(questions)
            for number, task in enumerate(tasks)
        ]
        groups = group_by_task(requests)
        for number, group in enumerate(groups):
            group.key = keys[number] if keys else f"key-{group.task}"
            group.sequences = [TrainingSequence((1, 2), (False, True))] if group.key else ()
            group.settings = SETTINGS if group.key else None
        if not made or made[0].closed:
            made[:] = [pool.Pool(workers)]
            # as on a GPU, where a worker's fit and answers go on at once
            made[0]._options |= {"max_concurrency": 4, "num_cpus": 1}
        store = AdapterStore(tmp_path / "store")
        evaluation = Evaluation(groups, requests, "gen", stored={}, store=str(store.root))
        made[0].load({"base_model": "m", "flags": str(tmp_path / "flags"), "stages": stages.name, **given})
        ours = WorkerEnvironment("cpu", "float32", "m", VERSIONS)
        with RunProgress(evaluation.work) as progress, made[0].crew(store, ours, progress) as crew:
            evaluation.run(crew, workers, progress)
        assert not list(store.root.glob(".driver-*"))
        return evaluation, store

    return go


def expected(tasks, questions, keys=None):
    return [
        f"gen q{index} {(keys or [f'key-{t}' for t in tasks])[index % len(tasks)]}"
        for index in range(questions * len(tasks))
    ]


def flag(folder, what, count):
    (folder / "flags").mkdir(exist_ok=True)
    (folder / "flags" / what).write_text(str(count))


def test_answers_come_in_the_order_of_the_requests_and_a_second_run_uses_the_same_workers(run):
    one, store = run()
    assert one.answers == expected("abc", 40)
    assert {task: record.requests for task, record in one.records.items()} == {"a": 40, "b": 40, "c": 40}
    assert {record.adapter for record in one.records.values()} == {str(store.root / f"key-{t}") for t in "abc"}
    assert run(tasks="d", questions=3)[0].answers == expected("d", 3)
    assert run(tasks="xy", questions=5, keys=[None, None])[0].answers == expected("xy", 5, [None, None])


def test_an_adapter_for_all_tasks_is_fitted_once_and_first(run):
    one, _ = run(keys=["one"] * 3)
    assert [task for task, record in one.records.items() if record.fitted] == ["a"]


def test_a_worker_fits_the_next_task_while_it_answers_the_last(run, tmp_path):
    assert run(tasks="abcdefgh", stages=Stages.OVERLAPPED)[0].answers == expected("abcdefgh", 40)
    overlaps = [float(file.read_text()) for file in (tmp_path / "flags").glob("overlap-*")]
    assert len(overlaps) == 2
    assert min(overlaps) > 0.3


def test_adapters_are_carried_where_the_folder_is_not_shared(run):
    one, store = run(elsewhere=True)
    assert one.answers == expected("abc", 40)
    assert sorted(path.name for path in store.root.iterdir() if path.is_dir()) == ["key-a", "key-b", "key-c"]


@pytest.mark.parametrize("stages", [Stages.SEQUENTIAL, Stages.OVERLAPPED])
def test_what_a_lost_worker_had_is_done_elsewhere(run, tmp_path, stages):
    # the pieces that a worker is at are lost together
    flag(tmp_path, "fit-a", 2 if stages is Stages.SEQUENTIAL else 1)
    flag(tmp_path, "answer-b", 1)
    one, _ = run(stages=stages)
    assert one.answers == expected("abc", 40)
    assert {task: record.requests for task, record in one.records.items()} == {"a": 40, "b": 40, "c": 40}


def test_three_lost_workers_end_the_run(run, tmp_path):
    flag(tmp_path, "fit-a", 9)
    with pytest.raises(ClusterError, match=r"the fit of a failed 3 times: .*All adapters that are done are in"):
        run()
    assert not ray.is_initialized()


def test_what_a_worker_refuses_ends_the_run_with_its_sentence(run):
    with pytest.raises(DataError, match=r"^this task is bad\.$"):
        run(bad="b")


def test_another_model_on_a_node_is_refused(run):
    with pytest.raises(ClusterError, match=r"the base model of worker . is other, and m here"):
        run(base_model="other")


def test_a_call_to_load_that_comes_late_changes_nothing():
    worker = Sleeper(0, board=None)
    worker.load({"base_model": "new", "stages": "SEQUENTIAL"}, count=2)
    assert worker.load({"base_model": "old", "stages": "SEQUENTIAL"}, count=1).base_model == "new"
    assert worker.load({"base_model": "newer", "stages": "SEQUENTIAL"}, count=3).base_model == "newer"
