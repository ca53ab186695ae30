"""Which fits a search does, with a made-up model whose settings are right with known probabilities."""

import random
from types import SimpleNamespace

import pytest

from ttt_harness.tune.candidates import settings_of
from ttt_harness.tune.fitting import Fold, Tried
from ttt_harness.tune.log import NAME, SearchLog
from ttt_harness.tune.search import Search, kept, planned_epochs
from ttt_harness.tuned import Asked

SETTINGS = settings_of({}, None)
BEST = "lr=3e-4, epochs=3"


def questions(seed, number):
    return [SimpleNamespace(asked=Asked(seed, 2 * number + place, order)) for place in range(2) for order in range(2)]


def all_folds(tasks, count=5, seeds=(42,)):
    return [
        Fold(
            f"t{task}",
            seed,
            number,
            tuple(questions(seed, number)),
            lambda _: (),
        )
        for task in range(tasks)
        for seed in seeds
        for number in range(count)
    ]


class Simulated:
    """Answers rightly with the probability of a setting; a fit of more epochs is read off too well, by `flattery`."""

    def __init__(self, right, stop_after=None, flattery=0.0):
        self.right, self.stop_after, self.flattery, self.done = right, stop_after, flattery, []

    def key(self, fold, config, epochs):
        return f"{fold.task} {fold.seed} {fold.number} {config.method} {config.lr} {epochs}"

    def tried(self, fold, config, epochs, on_step):
        if len(self.done) == self.stop_after:
            raise KeyboardInterrupt
        self.done.append(self.key(fold, config, epochs))
        outcomes = {}
        for number in epochs:
            share = self.right(config, number) + self.flattery * (number < max(epochs))
            drawn = random.Random(f"{fold.task} {fold.number} {config.lr} {number}")
            outcomes[number] = {question.asked: int(drawn.random() < share) for question in fold.questions}
        on_step(1, 1, 0.5)
        return Tried(outcomes, seconds=2.0 * max(epochs), tokens=100 * max(epochs))


def right(config, epochs):
    if not config.fits:
        return 0.3
    return 0.7 if (config.lr, epochs) == (3e-4, 3) else 0.35


def search(tmp_path, worker, folds, **options):
    return Search(folds, SETTINGS, worker, SearchLog(tmp_path), **options).run()


def test_halving_keeps_the_best(tmp_path):
    worker = Simulated(right)
    folds = all_folds(12)
    found = search(tmp_path, worker, folds)
    ranked = sorted(SETTINGS, key=lambda one: -found.accuracy(one.name))
    assert ranked[0].name == BEST
    asked = {one.name: sum(len(tried[one.name]) for tried in found.outcomes.values()) for one in SETTINGS}
    assert asked[BEST] == asked["icl"] == 12 * 5 * 4
    assert min(asked.values()) == 0  # never fitted as a run does it
    # within ten fits of a run: each has two epochs on average, on ten demonstrations where a fold has eight
    assert found.tokens / 100 * 0.8 / 2 / 12 <= 10
    assert found.tokens / 100 <= planned_epochs(folds, SETTINGS[1:], full=False) * 1.5


def test_what_is_left_has_answered_all_that_in_context_learning_has(tmp_path):
    def one_epoch(_, epochs):
        return 0.1 + 0.8 * (epochs == 1)

    found = search(tmp_path, Simulated(one_epoch), all_folds(4, count=4))
    (left,) = [one.name for one in SETTINGS[1:] if len(found.outcomes["t0"][one.name]) == 16]
    assert left.endswith("epochs=1")


def test_what_is_read_off_a_longer_fit_decides_and_does_not_count(tmp_path):
    found = search(tmp_path, Simulated(right, flattery=0.3), all_folds(6, count=1))
    for tried in found.outcomes.values():
        as_runs = {name for name, answers in tried.items() if answers}
        assert {"icl", *(one.name for one in SETTINGS if one.epochs == 3)} <= as_runs
        assert len(as_runs) <= 1 + 3 + 3  # of the others only the third that goes on, which is fitted in the end
    assert all(
        found.screened[task][one.name] for task in found.outcomes for one in SETTINGS if one.epochs < 3 and one.fits
    )


def test_all_settings_are_tried_on_all_folds_where_that_is_asked(tmp_path):
    found = search(tmp_path, Simulated(right), all_folds(2, count=3), full=True)
    assert found.fits == 2 * 3 * 9
    assert all(len(found.outcomes[task][one.name]) == 12 for task in ("t0", "t1") for one in SETTINGS)
    assert found.fit_seconds(SETTINGS[-1]) == 6.0


@pytest.mark.parametrize("half_a_line", ["", '{"key": "t0 42 0 tt'])
def test_a_search_that_was_killed_goes_on_and_does_no_fit_twice(tmp_path, half_a_line):
    folds = all_folds(3, seeds=(42, 43))
    whole = Simulated(right)
    (tmp_path / "whole").mkdir()
    expected = search(tmp_path / "whole", whole, folds)
    first = Simulated(right, stop_after=17)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, first, folds)
    with (tmp_path / NAME).open("a") as file:
        file.write(half_a_line)
    second = Simulated(right)
    found = search(tmp_path, second, folds)
    assert len(first.done) == 17
    assert first.done + second.done == whole.done
    assert (found.outcomes, found.tokens) == (expected.outcomes, expected.tokens)
    third = Simulated(right)
    again = search(tmp_path, third, folds)
    assert third.done == []
    assert (again.outcomes, again.read, again.fits) == (expected.outcomes, expected.fits, expected.fits)


def test_seeds_reach_the_fits(tmp_path):
    seeds = []

    class Noting(Simulated):
        def tried(self, fold, config, epochs, on_step):
            seeds.append((fold.seed, config.seed))
            return super().tried(fold, config, epochs, on_step)

    search(tmp_path, Noting(right), all_folds(1, seeds=(7, 8)))
    assert set(seeds) == {(7, 7), (8, 8)}


def test_a_setting_that_diverges_is_wrong_and_is_told(tmp_path):
    class Diverging(Simulated):
        def tried(self, fold, config, epochs, on_step):
            tried = super().tried(fold, config, epochs, on_step)
            if config.lr != 1e-3:
                return tried
            wrong = {question.asked: 0 for question in fold.questions}
            return Tried(dict.fromkeys(epochs, wrong), diverged="the loss is nan")

    found = search(tmp_path, Diverging(right), all_folds(2))
    assert set(found.diverged) == {one.name for one in SETTINGS if one.config.lr == 1e-3}
    assert found.accuracy("lr=1e-3, epochs=3") == 0


def test_how_many_go_on():
    assert [kept(9, 0), kept(3, 1), kept(2, 2), kept(1, 3)] == [3, 2, 1, 1]
    assert [kept(2, 0), kept(1, 0), kept(3, 0)] == [2, 1, 2]


def test_a_file_lists_points_or_axes_and_the_command_line_goes_before_it():
    pairs = [{"lr": 1e-4, "epochs": 1}, {"lr": 1e-3, "epochs": 3}]
    assert [one.name for one in settings_of({}, None, pairs)] == ["icl", "lr=1e-4, epochs=1", "lr=1e-3, epochs=3"]
    assert [one.name for one in settings_of({}, None, {"lr": [1e-4, 1e-3]})] == ["icl", "lr=1e-4", "lr=1e-3"]
    assert [one.name for one in settings_of({}, ["lr=3e-4"], pairs)] == ["icl", "lr=3e-4"]
