"""The choice from outcomes: on worked examples, and on simulated searches whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from tests.tuned.files import candidate, tuned
from ttt_harness.statistics import compare_few_within_tasks
from ttt_harness.tuned import Asked, Tuned
from ttt_harness.tuned.choice import choose

A, B = candidate(1e-4), candidate(3e-4)
HALF = [1, 0] * 5


def simulated(rng, *, tasks, demonstrations, between, gain, settings=3):
    """A search whose candidates gain `gain` on average, with a standard deviation of `between` over tasks.

    Returns the search, and (task, candidate's name) -> the true gain.
    """
    tried = [candidate(1e-4, epochs) for epochs in range(1, settings + 1)]
    truth, outcomes = {}, {}
    for task in (f"t{number:02}" for number in range(tasks)):
        base = rng.uniform(0.3, 0.6)
        gains = {one.name: gain + between * rng.standard_normal() for one in tried}
        truth |= {(task, name): np.clip(base + more, 0, 1) - base for name, more in gains.items()}
        hard = rng.random(demonstrations)  # a demonstration is as hard for all

        def answers(share, hard=hard):
            rights = (rng.random((demonstrations, 2)) + hard[:, None]) / 2 < _half_sum_quantile(share)
            return [int(right) for right in rights.ravel()]

        outcomes[task] = {"icl": answers(base), **{name: answers(base + more) for name, more in gains.items()}}
    return tuned(outcomes, tried, orders=2), truth


def _half_sum_quantile(share):
    """The quantile of the mean of two uniform numbers."""
    return stats.triang.ppf(np.clip(share, 0, 1), 0.5)


def searches(number, **options):
    rng = np.random.default_rng(options.pop("seed", 0))
    return [simulated(rng, **options) for _ in range(number)]


def test_one_setting_for_all_is_the_one_with_the_best_mean_over_tasks():
    # over all questions A is ahead, over tasks B is
    found = tuned({"large": {"icl": [0] * 20, A.name: [1] * 12 + [0] * 8, B.name: [1] * 9 + [0] * 11}}, [A, B])
    small = tuned({"small": {"icl": [0] * 4, A.name: [1, 0, 0, 0], B.name: [1, 1, 0, 0]}}, [A, B])
    both = Tuned(**{**vars(found), "tasks": {**found.tasks, **small.tasks}})
    choice = choose(both)
    assert choice.pooled is B
    assert choice.row(A).accuracy.value == pytest.approx((12 / 20 + 1 / 4) / 2)
    assert choice.row(B).difference.value == pytest.approx((9 / 20 + 2 / 4) / 2)
    assert [row.demonstrations for row in choice.rows] == [24, 24, 24]


def test_of_equal_settings_the_first_is_chosen_and_in_context_before_all():
    assert choose(tuned({"a": {"icl": HALF, A.name: HALF, B.name: HALF}}, [A, B])).pooled.name == "icl"
    better = [1, 1, *HALF[2:]]
    assert choose(tuned({"a": {"icl": HALF, A.name: better, B.name: better}}, [A, B])).pooled is A


def test_a_setting_that_was_dropped_is_compared_on_what_both_were_asked():
    # B has 4 of 4, but on these A has 4 of 4 as well; alone, its mean would be the higher one
    outcomes = {"icl": [0] * 10, A.name: [1] * 7 + [0] * 3, B.name: [1] * 4}
    choice = choose(tuned({"a": outcomes}, [A, B]))
    assert choice.pooled is A
    assert set(choice.predictions["a"]) == {A.name}
    ahead = {**outcomes, A.name: [0, *[1] * 6, 0, 0, 0]}
    assert choose(tuned({"a": ahead}, [A, B])).pooled is B
    assert choose(tuned({"a": {**outcomes, B.name: []}}, [A, B])).row(B).accuracy is None


def test_the_orders_of_a_demonstration_are_one_observation():
    once = choose(tuned({"a": {"icl": HALF, A.name: [1] * 9 + [0]}}, [A]))
    doubled = {"icl": [x for x in HALF for _ in "ab"], A.name: [1] * 18 + [0, 0]}
    twice = choose(tuned({"a": doubled}, [A], orders=2))
    assert once.row(A).difference == twice.row(A).difference
    assert once.predictions == twice.predictions


def test_the_same_place_under_another_seed_is_another_demonstration():
    one = tuned({"a": {"icl": HALF, A.name: [1] * 10}}, [A])
    more = {name: {**found, **{Asked(43, *asked[1:]): 1 for asked in found}} for name, found in one.tasks["a"].items()}
    assert choose(Tuned(**{**vars(one), "tasks": {"a": more}})).row(A).demonstrations == 20


def test_a_task_that_is_predicted_to_lose_is_answered_in_context():
    good = {"icl": [0] * 10, A.name: [1] * 10}
    bad = {"icl": [1] * 10, A.name: [0] * 10}
    choice = choose(tuned({**dict.fromkeys("abcde", good), "f": bad}, [A]))
    assert choice.pooled is A
    assert {task: one.name for task, one in choice.by_task.items()} == {**dict.fromkeys("abcde", A.name), "f": "icl"}
    assert choice.predictions["f"][A.name].high < 0 < choice.predictions["a"][A.name].low


def test_where_nothing_but_in_context_is_left_there_is_no_prediction():
    choice = choose(tuned({"a": {"icl": [1] * 10, A.name: [0] * 4}}, [A]))
    assert (choice.pooled.name, choice.by_task["a"].name, choice.predictions) == ("icl", "icl", {"a": {}})
    assert choice.verdict == "No setting has a better held-out accuracy than in-context learning."


def test_a_single_demonstration_gives_a_choice_and_no_interval():
    choice = choose(tuned({"a": {"icl": [0], A.name: [1]}}, [A]))
    assert choice.pooled is A
    assert (choice.row(A).difference.low, choice.row(A).p_holm, choice.row(A).better) == (None, None, False)
    assert "beyond noise; the best is" in choice.verdict
    assert choice.predictions["a"][A.name].low is None


def test_the_verdict_is_corrected_for_the_number_of_settings():
    outcomes = {"icl": [0] * 10, A.name: [1] * 4 + [0] * 6}
    alone = choose(tuned({"a": outcomes}, [A]))
    assert alone.row(A).better
    assert "is better than in-context learning on held-out demonstrations (+40.0 points, 95 %" in alone.verdict
    rivals = [candidate(1e-4, epochs) for epochs in range(2, 7)]
    many = choose(tuned({"a": {**outcomes, **{one.name: [0] * 10 for one in rivals}}}, [A, *rivals]))
    assert many.row(A).p_holm == pytest.approx(6 * alone.row(A).difference.p)
    assert not many.row(A).better
    assert "No setting is better than in-context learning beyond noise" in many.verdict
    assert "corrected for 6 settings" in many.verdict


@pytest.mark.parametrize(("between", "demonstrations"), [(0.1, 20), (0.15, 40), (0.05, 40)])
def test_the_weight_is_that_of_the_truth(between, demonstrations):
    weights, sampling, variances = [], [], []
    for search, truth in searches(40, tasks=27, demonstrations=demonstrations, between=between, gain=0.02):
        for task, predictions in choose(search).predictions.items():
            for name, one in predictions.items():
                weights.append(one.weight)
                sampling.append((one.own - truth[task, name]) ** 2)
        variances.append(np.var(list(truth.values())))
    assert np.mean(weights) == pytest.approx(np.mean(variances) / (np.mean(variances) + np.mean(sampling)), abs=0.06)


def test_without_differences_between_tasks_the_weight_goes_to_nothing():
    def weight(tasks):
        found = searches(20, tasks=tasks, demonstrations=10, between=0.0, gain=0.05)
        return np.mean([next(iter(choose(one).predictions["t00"].values())).weight for one, _ in found])

    few, many = weight(5), weight(80)
    assert many < 0.05
    assert many < few < 0.25


def test_predictions_are_nearer_to_the_truth_than_a_tasks_own_difference_and_than_the_pool():
    own, pool, predicted = [], [], []
    for search, truth in searches(40, tasks=20, demonstrations=20, between=0.08, gain=0.03):
        choice = choose(search)
        for task, predictions in choice.predictions.items():
            for name, one in predictions.items():
                row = next(row for row in choice.rows if row.candidate.name == name)
                own.append((one.own - truth[task, name]) ** 2)
                pool.append((row.difference.value - truth[task, name]) ** 2)
                predicted.append((one.value - truth[task, name]) ** 2)
    assert np.mean(predicted) < 0.9 * min(np.mean(own), np.mean(pool))


@pytest.mark.parametrize(
    ("tasks", "demonstrations", "between"), [(2, 10, 0.1), (6, 10, 0.1), (12, 10, 0.0), (20, 20, 0.1), (20, 40, 0.2)]
)
def test_intervals_cover(tasks, demonstrations, between):
    inside, pooled = [], []
    for search, truth in searches(60, tasks=tasks, demonstrations=demonstrations, between=between, gain=0.03):
        choice = choose(search)
        for task, predictions in choice.predictions.items():
            inside += [one.low <= truth[task, name] <= one.high for name, one in predictions.items()]
        for row in choice.rows[1:]:
            mean = np.mean([gain for (_, name), gain in truth.items() if name == row.candidate.name])
            pooled.append(row.difference.low <= mean <= row.difference.high)
    assert np.mean(inside) > 0.93
    assert np.mean(pooled) > 0.91  # 180 of them: three standard errors below 95 %


def test_chance_alone_seldom_looks_better():
    found = searches(200, tasks=6, demonstrations=10, between=0.0, gain=0.0, settings=5)
    assert np.mean([any(row.better for row in choose(search).rows) for search, _ in found]) < 0.05


def test_few_questions_in_a_task_are_compared_as_by_hand():
    tasks = [np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 1.0, -1.0])]
    difference = compare_few_within_tasks(tasks)
    # squares about the means 1/3 and 0: 2/3 and 2; 6 degrees of freedom
    stderr = np.sqrt((2 / 3 + 2 + 1) / (6 + 2) * (1 / 3 + 1 / 5)) / 2
    assert difference.value == pytest.approx(1 / 6)
    assert difference.high - difference.value == pytest.approx(stats.t(6).ppf(0.975) * stderr)
    assert difference.p == pytest.approx(2 * stats.t(6).sf(1 / 6 / stderr))
    mirrored = compare_few_within_tasks([-values for values in tasks])
    assert (mirrored.low, mirrored.p) == (pytest.approx(-difference.high), pytest.approx(difference.p))
