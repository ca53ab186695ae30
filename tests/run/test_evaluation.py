"""A run with a fake trainer and engine: every request is answered with its adapter, and the stages overlap."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest

from tests.run.fakes import SETTINGS, Log, fake_worker
from ttt_harness.adapters.inventory import entries
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import DataError, ModelError
from ttt_harness.records import TaskRecord
from ttt_harness.run.evaluation import Evaluation
from ttt_harness.run.groups import group_by_task
from ttt_harness.run.local import LocalCrew
from ttt_harness.run.progress import RunProgress
from ttt_harness.run.schedule import Stages


def evaluation(keys, questions=3, stored=()):
    """Requests of one task for each key, in turn; None: without an adapter."""
    requests = [
        SimpleNamespace(task_name=f"t{number}", args=(f"q{index}",), support_set=None)
        for index in range(questions)
        for number in range(len(keys))
    ]
    groups = group_by_task(requests)
    for number, (group, key) in enumerate(zip(groups, keys, strict=True)):
        group.key, group.settings = key, SETTINGS if key else None
        group.sequences = [TrainingSequence((1,) * (number + 2), (False,) + (True,) * (number + 1))] if key else ()
    return Evaluation(groups, requests, "gen", stored=dict(stored), store="the store"), requests


def run(worker, keys, **options):
    one, requests = evaluation(keys, **options)
    with RunProgress(one.work) as progress:
        one.run(LocalCrew(worker), 1, progress)
    assert one.answers == [f"gen {r.args[0]} {keys[int(r.task_name[1:])]}" for r in requests]
    return one


@pytest.mark.parametrize("stages", Stages)
@pytest.mark.parametrize("keys", [["a", "b", "c"], ["s", "s", None], [None, None], ["a", None, "b", "a"]])
def test_every_request_is_answered_with_the_adapter_of_its_task(tmp_path, stages, keys):
    log = Log()
    one = run(fake_worker(tmp_path, log, stages), keys)
    assert sum(what == "fit" for what, *_ in log.spans) == len({key for key in keys if key})
    assert {record.requests for record in one.records.values()} == {3}
    for number, key in enumerate(keys):
        record = one.records[f"t{number}"]
        assert record.adapter == (str(tmp_path / key) if key else None)
        assert record.reused == (key is not None and key in keys[:number])


def test_the_record_of_a_fit_tells_what_determines_it_and_all_its_tasks(tmp_path):
    one, _ = evaluation(["s", "s", "a"])
    for group in one._groups:
        group.determinants = {"sequences": f"of {group.key}"}
    worker = fake_worker(tmp_path, Log())
    with RunProgress(one.work) as progress:
        one.run(LocalCrew(worker), 1, progress)
    shared, alone = (worker.store.read(key).record for key in "sa")
    assert (shared["task"], shared["tasks"], shared["determinants"]) == ("t0", ["t0", "t1"], {"sequences": "of s"})
    assert "tasks" not in alone
    assert {entry.key: entry.task for entry in entries(tmp_path)} == {"s": "2 tasks", "a": "t2"}


def test_an_adapter_that_is_removed_while_the_run_goes_on_is_fitted_again(tmp_path):
    log = Log()
    worker = fake_worker(tmp_path, log)
    run(worker, ["a", "b"])
    assert worker.store.remove("a")
    one = run(worker, ["a", "b"], stored={"a": TaskRecord(), "b": TaskRecord()})  # this worker has loaded it before
    assert sum(what == "fit" for what, *_ in log.spans) == 3
    assert {record.requests for record in one.records.values()} == {3}


def test_fits_and_answers_overlap_where_the_device_has_room_for_both(tmp_path):
    log = Log()
    run(fake_worker(tmp_path, log, Stages.OVERLAPPED, fit_seconds=0.2, answer_seconds=0.15), list("abcdef"))
    assert log.overlap() > 0.5 * 5 * 0.15


@pytest.mark.parametrize("stages", [Stages.SEQUENTIAL, Stages.ALTERNATING])
def test_they_do_not_where_it_has_none(tmp_path, stages):
    log = Log()
    run(fake_worker(tmp_path, log, stages), list("abc"))
    assert log.overlap() == 0


def test_one_that_alternates_lets_go_of_the_trainer_before_it_answers(tmp_path):
    log = Log()
    released = []
    worker = fake_worker(tmp_path, log, Stages.ALTERNATING, release_trainer=lambda: released.append(len(log.spans)))
    run(worker, list("ab"))
    whats = [what for what, *_ in log.spans]
    assert whats == ["sleep", "fit", "sleep", "fit", "answer b", "answer a"] or whats == [
        "sleep", "fit", "sleep", "fit", "answer a", "answer b",
    ]  # fmt: skip
    assert released[0] == 4


@pytest.mark.parametrize("stages", Stages)
def test_an_error_of_a_stage_ends_the_run(tmp_path, stages):
    worker = fake_worker(tmp_path, Log(), stages)
    fit = worker.fit

    def fails(order, report):
        if order.key == "b":
            raise DataError("this one cannot be fitted.")
        return fit(order, report)

    worker.fit = fails
    with pytest.raises(DataError, match="this one cannot be fitted"):
        run(worker, list("abc"))


def test_what_is_stored_is_not_fitted_again(tmp_path):
    log = Log()
    worker = fake_worker(tmp_path, log)
    first = run(worker, ["a"])
    again = run(fake_worker(tmp_path, log), ["a", "b"], stored={"a": first.records["t0"]})
    assert sum(what == "fit" for what, *_ in log.spans) == 2
    assert again.records["t1"].reused is False


@pytest.mark.parametrize("stages", Stages)
def test_an_adapter_that_somebody_removes_is_fitted_again(tmp_path, stages):
    log = Log()
    first = run(fake_worker(tmp_path, log), ["a", "b"])
    shutil.rmtree(tmp_path / "a")
    stored = {key: dataclasses.replace(first.records[task], requests=0) for key, task in (("a", "t0"), ("b", "t1"))}
    again = run(fake_worker(tmp_path, log, stages), ["a", "b", "a"], stored=stored)
    assert sum(what == "fit" for what, *_ in log.spans) == 3
    assert {record.requests for record in again.records.values()} == {3}


def test_the_first_adapter_is_compared_with_the_trainer_and_the_others_have_the_cheap_check(tmp_path):
    records = run(fake_worker(tmp_path, Log()), ["a", "b"]).records
    assert sorted(record.served_check is not None for record in records.values()) == [False, True]
    assert all(record.changes_output for record in records.values())


@pytest.mark.parametrize("stages", Stages)
def test_an_engine_that_does_not_apply_the_adapter_ends_the_run_before_it_answers(tmp_path, stages):
    log = Log()
    worker = fake_worker(tmp_path, log, stages)
    worker.answering.model.applies_adapters = False
    with pytest.raises(ModelError, match=r"vLLM does not apply the adapter.*nothing was answered"):
        run(worker, ["a", "b"])
    assert not any(what.startswith("answer") for what, *_ in log.spans)
