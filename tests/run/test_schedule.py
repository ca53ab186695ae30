"""The schedule: everything is done once, the longest first, and no worker waits while there is something to share."""

import random
from itertools import pairwise

import pytest

from ttt_harness.run.schedule import LEAST_QUESTIONS, Answers, Fit, Schedule, Stages, Task, next_piece, simulate


def work_of(rng, count):
    """Fits, some of them shared by several tasks, and tasks, some of them without a fit."""
    fits = {f"k{index}": float(rng.randint(1, 1000)) for index in range(rng.randint(1, count))}
    tasks = [
        Task(f"t{index}", rng.choice([*fits, None, "stored"]), rng.randint(1, 500), rng.randint(1, 250))
        for index in range(count)
    ]
    return fits, tasks


def seconds_of(fits, tasks):
    def seconds(piece):
        if isinstance(piece, Fit):
            return fits[piece.key]
        return tasks[piece.task].answer * (piece.stop - piece.start) / tasks[piece.task].questions

    return seconds


def simulated(fits, tasks, workers, stages=Stages.SEQUENTIAL):
    return simulate(Schedule(fits, tasks, workers), workers, seconds_of(fits, tasks), stages)


@pytest.mark.parametrize("stages", Stages)
@pytest.mark.parametrize("seed", range(10))
def test_every_fit_and_every_question_is_done_once_and_in_order(seed, stages):
    rng = random.Random(seed)
    (fits, tasks), workers = work_of(rng, rng.randint(1, 30)), rng.randint(1, 12)
    done = simulated(fits, tasks, workers, stages)
    fitted = {one.piece.key: one.end for one in done if isinstance(one.piece, Fit)}
    assert sorted(fitted) == sorted(fits)
    assert sum(isinstance(one.piece, Fit) for one in done) == len(fits)
    for index, task in enumerate(tasks):
        own = [one for one in done if isinstance(one.piece, Answers) and one.piece.task == index]
        answered = sorted(q for one in own for q in range(one.piece.start, one.piece.stop))
        assert answered == list(range(task.questions))
        assert all(one.begin >= fitted.get(task.key, 0.0) for one in own)


@pytest.mark.parametrize("stages", Stages)
@pytest.mark.parametrize("seed", range(10))
def test_a_worker_does_at_most_what_its_stages_allow(seed, stages):
    rng = random.Random(seed)
    (fits, tasks), workers = work_of(rng, rng.randint(1, 30)), rng.randint(1, 12)
    for worker in range(workers):
        own = [one for one in simulated(fits, tasks, workers, stages) if one.worker == worker]
        lanes = (
            [own]
            if stages is not Stages.OVERLAPPED
            else [[one for one in own if isinstance(one.piece, kind)] for kind in (Fit, Answers)]
        )
        for lane in lanes:
            spans = sorted((one.begin, one.end) for one in lane)
            assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


@pytest.mark.parametrize("seed", range(20))
def test_takes_little_longer_than_it_must(seed):
    """Never more than the work divided evenly and one longest piece that nobody can share (Graham's bound)."""
    rng = random.Random(seed)
    (fits, tasks), workers = work_of(rng, rng.randint(1, 30)), rng.randint(1, 12)
    end = max(one.end for one in simulated(fits, tasks, workers))
    work = sum(fits.values()) + sum(task.answer for task in tasks)
    longest = max(fits.values()) + max(task.answer for task in tasks)
    assert end <= work / workers + longest


def test_the_longest_fit_with_its_answers_comes_first():
    fits = {"a": 10.0, "b": 5.0, "c": 20.0}
    tasks = [Task("a", "a", 1, 9), Task("b", "b", 90, 9), Task("c", "c", 1, 9)]
    assert [one.piece.key for one in simulated(fits, tasks, 1) if isinstance(one.piece, Fit)] == ["b", "c", "a"]


def test_a_fit_that_costs_more_comes_sooner():
    fits, tasks = {"a": 10.0, "b": 5.0}, [Task("a", "a", 0.5, 9), Task("b", "b", 9, 9)]
    assert Schedule(fits, tasks, 1).next_fit() == Fit("b")
    assert Schedule(fits, tasks, 1, fit_cost=2.5).next_fit() == Fit("a")


def test_the_questions_of_the_last_task_are_shared():
    done = simulated({"a": 10.0}, [Task("a", "a", 240, 240)], 4)
    assert {one.worker for one in done} == {0, 1, 2, 3}
    assert max(one.end for one in done) == 10 + 60


def test_a_few_questions_are_not_shared():
    assert len(simulated({"a": 10.0}, [Task("a", "a", 240, LEAST_QUESTIONS + 1)], 4)) == 2


def test_questions_stay_together_while_other_fits_wait():
    schedule = Schedule({"a": 10.0, "b": 1.0}, [Task("a", "a", 240, 240), Task("b", "b", 1, 240)], 2)
    assert schedule.next_fit() == Fit("a")
    schedule.fitted("a", 0)
    assert schedule.next_answers(0) == Answers(0, 0, 240)


def test_all_tasks_of_a_shared_adapter_are_answered_once_it_is_fitted():
    schedule = Schedule({"s": 10.0}, [Task("a", "s", 5, 4), Task("b", "s", 5, 4)], 1)
    assert schedule.next_answers(0) is None
    assert schedule.next_fit() == Fit("s")
    schedule.fitted("s", 0)
    assert [schedule.next_answers(0), schedule.next_answers(0)] == [Answers(0, 0, 4), Answers(1, 0, 4)]


def test_what_a_lost_worker_had_is_done_by_another():
    schedule = Schedule({"a": 10.0}, [Task("a", "a", 20, 8)], 2)
    fit = schedule.next_fit()
    schedule.failed(fit)
    assert schedule.next_fit() == fit
    schedule.fitted("a", 1)
    answers = schedule.next_answers(1)
    assert schedule.next_answers(0) is None
    schedule.failed(answers)
    assert schedule.next_answers(0) == answers


def test_an_adapter_that_is_gone_is_fitted_again_before_its_questions_are_answered():
    schedule = Schedule({"a": 10.0}, [Task("a", "a", 20, 8), Task("b", "a", 10, 4), Task("c", "s", 1, 4)], 2)
    schedule.next_fit()
    schedule.fitted("a", 1)
    answers = schedule.next_answers(1)
    schedule.gone(answers)
    assert schedule.next_answers(1) == Answers(2, 0, 4)
    assert schedule.next_answers(1) is None
    assert schedule.next_fit() == Fit("a")
    schedule.fitted("a", 0)
    assert {schedule.next_answers(0), schedule.next_answers(0)} == {Answers(0, 0, 8), Answers(1, 0, 4)}
    assert not schedule.left


def test_one_that_overlaps_is_as_fast_as_its_slower_stage():
    """But for the first fit, beside which nothing can be answered, and the last answers."""
    fits = {str(index): 10.0 for index in range(10)}
    tasks = [Task(key, key, 4.0, 4) for key in fits]
    end = {stages: max(one.end for one in simulated(fits, tasks, 1, stages)) for stages in Stages}
    assert end == {Stages.SEQUENTIAL: 140, Stages.OVERLAPPED: 104, Stages.ALTERNATING: 140}


def test_one_that_alternates_answers_when_nothing_is_left_to_fit():
    fits = {"a": 10.0, "b": 5.0}
    tasks = [Task("a", "a", 4, 9), Task("b", "b", 4, 9), Task("c", None, 4, 9)]
    done = simulated(fits, tasks, 1, Stages.ALTERNATING)
    assert [type(one.piece) for one in done] == [Fit, Fit, Answers, Answers, Answers]
    schedule = Schedule(fits, tasks, 2)
    assert next_piece(schedule, 0, [], Stages.ALTERNATING) == Fit("a")
    assert next_piece(schedule, 0, [Fit("a")], Stages.ALTERNATING) is None
