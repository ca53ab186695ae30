"""The statistics agree with worked examples, scipy and statsmodels, and mirror exactly when the runs change places."""

import math

import numpy as np
import pytest
from scipy import stats

from ttt_harness import statistics
from ttt_harness.statistics import (
    compare_mean_of_tasks,
    compare_paired,
    compare_right_wrong,
    compare_unpaired,
    holm,
    mcnemar_interval,
    mcnemar_p,
)


def right_wrong(both, gained, lost, neither):
    base = np.array([1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither)
    other = np.array([1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither)
    return base, other


def test_mcnemar_worked_example():
    # Bentur et al. 2009, 21 children before and after transplantation, as worked in Fagerland, Lydersen and Laake,
    # BMC Medical Research Methodology 13 (2013) 91, table 1: exact conditional p = 0.070
    assert mcnemar_p(1, 7) == pytest.approx(0.0703, abs=5e-5)
    base, other = right_wrong(1, 7, 1, 12)
    difference = compare_right_wrong(base, other)
    assert difference.value == pytest.approx(6 / 21)
    assert difference.test == "mcnemar_exact"


def test_mcnemar_agrees_with_statsmodels_on_random_tables():
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    rng = np.random.default_rng(1)
    for _ in range(50):
        a, b, c, d = (int(x) for x in rng.integers(0, 40, 4))
        expected = contingency.mcnemar([[a, b], [c, d]], exact=True).pvalue
        assert mcnemar_p(b, c) == pytest.approx(min(1.0, float(expected)), abs=1e-12)


def test_nothing_changed():
    base, _ = right_wrong(30, 0, 0, 20)
    difference = compare_right_wrong(base, base)
    assert (difference.value, difference.p) == (0, 1)
    # 0 changed of 50 does not prove that none ever would: the limits are those of Clopper and Pearson for 0 of 50
    limit = stats.binomtest(0, 50).proportion_ci(0.95, "exact").high
    assert (difference.low, difference.high) == pytest.approx((-limit, limit))


def test_interval_follows_its_definition():
    # the quantile of the product of the two Clopper-Pearson confidence distributions, drawn instead of integrated
    rng = np.random.default_rng(2)
    for gained, lost, n in [(7, 1, 21), (1, 7, 21), (60, 20, 240), (10, 10, 240), (3, 0, 9), (40, 0, 40), (4, 5, 9)]:
        changed, draws = gained + lost, 400_000
        beta = rng.beta(gained, lost + 1, draws)
        theta = np.where(
            beta > 0.5, rng.beta(changed, n - changed + 1, draws), rng.beta(changed + 1, max(n - changed, 1e-9), draws)
        )
        assert mcnemar_interval(gained, lost, n)[0] == pytest.approx(
            np.quantile(theta * (2 * beta - 1), 0.025), abs=3e-3
        )


def test_interval_excludes_zero_exactly_when_the_test_rejects():
    for n in (5, 23, 100, 250):
        for gained in range(0, min(n, 40) + 1):
            for lost in range(0, min(n - gained, 40) + 1):
                low, high = mcnemar_interval(gained, lost, n)
                value = (gained - lost) / n
                assert -1 <= low <= value <= high <= 1
                assert (low > 0 or high < 0) == (mcnemar_p(gained, lost) < 0.05), (gained, lost, n)


def test_interval_covers_the_truth_at_least_as_often_as_it_says():
    rng = np.random.default_rng(3)
    for gain, loss in [(0.1, 0.1), (0.3, 0.05), (0.02, 0.0)]:
        draws = rng.multinomial(60, [gain, loss, 1 - gain - loss], size=1500)
        hits = sum(low <= gain - loss <= high for g, c, _ in draws for low, high in [mcnemar_interval(g, c, 60)])
        assert hits / len(draws) >= 0.94


def test_mirror():
    rng = np.random.default_rng(4)
    for _ in range(20):
        base, other = rng.integers(0, 2, (2, 37)).astype(float)
        for compare in (compare_right_wrong, lambda a, b: compare_paired(a, b, "task")):
            one, two = compare(base, other), compare(other, base)
            assert (one.value, one.low, one.high, one.p) == (-two.value, -two.high, -two.low, two.p)


def test_bootstrap_agrees_with_scipy_on_random_tables():
    rng = np.random.default_rng(5)
    for n in (12, 60, 240):
        base, other = rng.normal(0, 1, n), rng.normal(0.3, 1, n)
        ours = compare_paired(base, other, "task")
        theirs = stats.bootstrap((other - base,), np.mean, n_resamples=9999, method="percentile", rng=rng)
        spread = float(theirs.standard_error)
        assert ours.value == pytest.approx(np.mean(other - base))
        assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=spread / 10)
        assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=spread / 10)
        if n == 240:  # where the bootstrap and the t test must agree
            assert ours.p == pytest.approx(stats.ttest_rel(other, base).pvalue, abs=0.01)


def test_bootstrap_of_equal_scores_is_exactly_zero():
    scores = np.random.default_rng(6).random(30)
    difference = compare_paired(scores, scores, "task")
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)
    group = compare_mean_of_tasks([("a", scores - scores), ("b", scores - scores)])
    assert (group.value, group.low, group.high, group.p) == (0, 0, 0, 1)


def test_bootstrap_is_the_same_each_time_and_independent_between_tasks():
    differences = np.random.default_rng(7).random(30)
    one, again, two = (statistics.resampled_means(differences, key) for key in ("a", "a", "b"))
    assert (one == again).all()
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05


def test_batches_do_not_change_the_shape(monkeypatch):
    monkeypatch.setattr(statistics, "_BATCH", 100)
    means = statistics.resampled_means(np.arange(30.0), "a", resamples=50)
    assert means.shape == (50,)
    assert np.isfinite(means).all()


def test_mean_of_tasks_has_the_spread_of_independent_tasks():
    rng = np.random.default_rng(8)
    tasks = [(f"task{i}", rng.normal(0.2, 1, size)) for i, size in enumerate((50, 100, 200))]
    group = compare_mean_of_tasks(tasks)
    stderr = math.hypot(*(d.std() / math.sqrt(len(d)) for _, d in tasks)) / 3
    assert group.value == pytest.approx(np.mean([d.mean() for _, d in tasks]))
    assert (group.high - group.low) / 2 == pytest.approx(1.96 * stderr, rel=0.05)
    weighted = compare_mean_of_tasks(tasks, [50, 100, 200])
    assert weighted.value == pytest.approx(np.concatenate([d for _, d in tasks]).mean())


def test_unpaired_is_a_z_test():
    difference = compare_unpaired(0.50, 0.60, 0.03, 0.04)
    assert difference.value == pytest.approx(0.10)
    assert difference.p == pytest.approx(2 * stats.norm.sf(0.1 / 0.05))
    assert (difference.low, difference.high) == pytest.approx((0.10 - 1.959964 * 0.05, 0.10 + 1.959964 * 0.05))


def test_without_standard_errors_there_is_no_interval():
    for difference in (compare_unpaired(0.5, 0.6, None, 0.04), compare_unpaired(0.0, 1.0, 0.0, 0.0)):
        assert (difference.low, difference.high, difference.p, difference.test) == (None, None, None, "none")
    assert compare_unpaired(1.0, 1.0, 0.0, 0.0).p == 1
    one = compare_paired(np.array([0.2]), np.array([0.7]), "task")
    assert (one.value, one.p) == (pytest.approx(0.5), None)


def test_holm_agrees_with_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(9).random(27) ** 3
    assert holm(list(p)) == pytest.approx(list(multitest.multipletests(p, method="holm")[1]))
    assert holm([]) == []
