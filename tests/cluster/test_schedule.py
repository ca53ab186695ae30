"""The schedule: everything is done once, the longest first, and no worker waits while there is something to share."""

import random
from itertools import pairwise

import pytest

from ttt_harness.cluster.schedule import LEAST_QUESTIONS, Piece, Schedule, Task, simulate


def tasks_of(rng, count):
    return [
        Task(f"t{index}", rng.choice([0, rng.randint(1, 1000)]), rng.randint(1, 500), rng.randint(1, 250))
        for index in range(count)
    ]


def seconds_of(tasks):
    def seconds(piece):
        task = tasks[piece.task]
        return task.fit if piece.fits else task.answer * (piece.stop - piece.start) / task.questions

    return seconds


@pytest.mark.parametrize("seed", range(20))
def test_every_fit_and_every_question_is_done_once_and_in_order(seed):
    rng = random.Random(seed)
    tasks, workers = tasks_of(rng, rng.randint(1, 30)), rng.randint(1, 12)
    done = simulate(Schedule(tasks, workers), workers, seconds_of(tasks))
    assert sorted(one.piece.task for one in done if one.piece.fits) == [i for i, t in enumerate(tasks) if t.fit]
    for index, task in enumerate(tasks):
        own = [one for one in done if one.piece.task == index]
        answered = sorted(q for one in own for q in range(one.piece.start, one.piece.stop))
        assert answered == list(range(task.questions))
        if task.fit:
            fitted = next(one.end for one in own if one.piece.fits)
            assert all(one.begin >= fitted for one in own if not one.piece.fits)
    for worker in range(workers):
        spans = sorted((one.begin, one.end) for one in done if one.worker == worker)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


@pytest.mark.parametrize("seed", range(20))
def test_takes_little_longer_than_it_must(seed):
    """Never more than the work divided evenly and one longest piece that nobody can share (Graham's bound)."""
    rng = random.Random(seed)
    tasks, workers = tasks_of(rng, rng.randint(1, 30)), rng.randint(1, 12)
    seconds = seconds_of(tasks)
    end = max(one.end for one in simulate(Schedule(tasks, workers), workers, seconds))
    work = sum(task.fit + task.answer for task in tasks)
    longest = max(task.fit + task.answer for task in tasks)
    assert end <= work / workers + longest


def test_the_longest_task_comes_first():
    tasks = [Task("a", 10, 1, 9), Task("b", 5, 90, 9), Task("c", 20, 1, 9)]
    schedule = Schedule(tasks, 1)
    assert [one.piece.task for one in simulate(schedule, 1, seconds_of(tasks)) if one.piece.fits] == [1, 2, 0]


def test_a_fit_that_costs_more_comes_sooner():
    tasks = [Task("a", 10, 0.5, 9), Task("b", 5, 9, 9)]
    assert Schedule(tasks, 1).next(0) == Piece(1)
    assert Schedule(tasks, 1, fit_cost=2.5).next(0) == Piece(0)


def test_the_questions_of_the_last_task_are_shared():
    tasks = [Task("a", 10, 240, 240)]
    done = simulate(Schedule(tasks, 4), 4, seconds_of(tasks))
    assert {one.worker for one in done} == {0, 1, 2, 3}
    assert max(one.end for one in done) == 10 + 60


def test_a_few_questions_are_not_shared():
    tasks = [Task("a", 10, 240, LEAST_QUESTIONS + 1)]
    assert len(simulate(Schedule(tasks, 4), 4, seconds_of(tasks))) == 2


def test_questions_stay_together_while_other_tasks_wait():
    tasks = [Task("a", 10, 240, 240), Task("b", 1, 1, 240)]
    schedule = Schedule(tasks, 2)
    assert schedule.next(0) == Piece(0)
    schedule.fitted(0, 0)
    assert schedule.next(0) == Piece(0, 0, 240)


def test_what_a_lost_worker_had_is_done_by_another():
    tasks = [Task("a", 10, 20, 8)]
    schedule = Schedule(tasks, 2)
    fit = schedule.next(0)
    schedule.failed(fit)
    assert schedule.next(1) == fit
    schedule.fitted(0, 1)
    answers = schedule.next(1)
    assert schedule.next(0) is None
    schedule.failed(answers)
    assert schedule.next(0) == answers
