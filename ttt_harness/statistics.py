"""Is the difference between two runs real? Tests and intervals for scores on the same questions.

Everything here takes plain arrays and counts, knows nothing of files, and is deterministic: the bootstrap draws from a
fixed seed. All of it is exactly symmetric: exchanging the two runs negates the difference and its interval, exchanges
won and lost, and leaves the p-value alone. A difference is always `other - base`.

| data | test | interval |
|---|---|---|
| right or wrong, same questions | exact McNemar | the one that belongs to that test |
| any number, same questions | paired bootstrap | bootstrap percentiles |
| mean over several tasks | bootstrap over questions within tasks | bootstrap percentiles |
| mean over several tasks, few questions each | t test with the variance pooled within tasks | the one of that test |
| two scores and their standard errors | z test | normal |
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

CONFIDENCE = 0.95
NORMAL_REACH = float(stats.norm.ppf((1 + CONFIDENCE) / 2))  # half of a normal interval, in standard errors
RESAMPLES = 9999  # odd multiple of 10 less one, so that p-values are multiples of 1/10000
SEED = 42
_BATCH = 4_000_000  # drawn indices in memory at once

Floats = npt.NDArray[np.float64]
Test = Literal["mcnemar_exact", "bootstrap_paired", "bootstrap_within_tasks", "t_within_tasks", "z_unpaired", "none"]


@dataclass(frozen=True)
class Difference:
    """How far `other` is from `base`.

    value: other - base, in the metric's own unit.
    low, high: the 95 % confidence interval; None where the data do not allow one.
    p: two-sided p-value of "no difference"; None where the data do not allow one.
    test: which test gave `p`; "none" where there is none.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    test: Test


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test; 1 when nothing changed.

    gained, lost: the questions that only the other run, and only the base run, answered rightly. Under "no difference"
    each changed question is a fair coin (McNemar, Psychometrika 12, 1947): `scipy.stats.binomtest`.
    """
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(min(gained, lost), gained + lost, 0.5).pvalue)


def mcnemar_interval(gained: int, lost: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval for (gained - lost) / n that excludes 0 exactly when the exact McNemar test rejects.

    gained, lost: as in `mcnemar_p`; n: all paired questions. The usual intervals (Wald, Bonett-Price, Tango) can
    exclude 0 beside an exact p of 0.07, which no reader of a table should have to puzzle over. This one combines the
    Clopper-Pearson distributions of the share of changed questions and of the share gained among them:
    Fay and Lumbard, Statistics in Medicine 40 (2021) 1147, doi:10.1002/sim.8829.
    """
    tail = (1 - confidence) / 2
    # `0.0 -` instead of a minus sign: a limit of exactly 0 stays +0
    return _lower_limit(gained, lost, n, tail), 0.0 - _lower_limit(lost, gained, n, tail)


@lru_cache(maxsize=4096)
def _lower_limit(gained: int, lost: int, n: int, tail: float) -> float:
    """The `tail` quantile of theta * (2 * beta - 1): theta is the share changed, beta the share gained among these.

    Both follow their Clopper-Pearson lower confidence distribution; where beta is below 1/2, a larger theta is what
    makes the product smaller, so there theta follows the upper one.
    """
    changed = gained + lost
    if gained == 0:  # beta is 0: the limit is minus the upper Clopper-Pearson limit of theta
        return -float(special.betaincinv(changed + 1, n - changed, 1 - tail)) if changed < n else -1.0
    below_half = float(special.betainc(gained, lost + 1, 0.5))  # also the one-sided McNemar p-value
    if below_half == tail:
        return 0.0
    positive = below_half < tail
    # Gauss-Legendre nodes for beta, over the half that the limit lies in, where beta has any weight
    edge = (1e-12, 1 - 1e-12)
    low, high = (float(special.betaincinv(gained, lost + 1, q)) for q in edge)
    low, high = (max(low, 0.5), max(high, 0.5)) if positive else (min(low, 0.5), min(high, 0.5))
    nodes, weights = _quadrature()
    beta = low + (high - low) * (nodes + 1) / 2
    mass = weights * stats.beta.pdf(beta, gained, lost + 1) * (high - low) / 2
    slope = np.abs(2 * beta - 1)

    def excess(size: float) -> float:
        """Probability of at most the limit, less `tail`, where the limit is `size` away from 0."""
        share = np.minimum(size / slope, 1.0)
        if positive:
            return below_half + float(mass @ special.betainc(changed, n - changed + 1, share)) - tail
        above = 1 - special.betainc(changed + 1, n - changed, share) if changed < n else (share < 1).astype(float)
        return float(mass @ above) - tail

    size = float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-10))
    return size if positive else -size


@lru_cache
def _quadrature() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(128)
    return nodes, weights


def compare_right_wrong(base: Floats, other: Floats) -> Difference:
    """The difference of two accuracies on the same questions. base, other: (n,) arrays of 0 and 1, paired by place."""
    gained, lost = int(np.sum(other > base)), int(np.sum(other < base))
    low, high = mcnemar_interval(gained, lost, len(base))
    return Difference((gained - lost) / len(base), low, high, mcnemar_p(gained, lost), "mcnemar_exact")


def resampled_means(differences: Floats, key: str, resamples: int = RESAMPLES) -> Floats:
    """The mean of `differences` (n,) in each of `resamples` bootstrap samples of the n questions: (resamples,).

    key: what the draws are for (a task's name). The same key and n give the same draws, whatever the differences are,
    and different keys give independent ones.
    """
    n = len(differences)
    rng = np.random.default_rng([SEED, zlib.crc32(key.encode())])
    means = np.empty(resamples)
    step = max(1, _BATCH // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        means[start : start + rows] = differences[rng.integers(0, n, size=(rows, n), dtype=np.int32)].mean(axis=1)
    return means


def _from_bootstrap(value: float, means: Floats, test: Test) -> Difference:
    """Percentile interval and shifted-null p-value: Efron and Tibshirani, An Introduction to the Bootstrap, 13 and 16.

    A bootstrap mean that is as far from the observed one as the observed one is from 0 counts against it; a hair's
    breadth of rounding does not.
    """
    tail = (1 - CONFIDENCE) / 2
    far = np.abs(means - value) >= abs(value) - 1e-12
    return Difference(
        value,
        float(np.quantile(means, tail)),
        0.0 - float(np.quantile(-means, tail)),  # not quantile(1 - tail): this way the two mirror each other exactly
        float((1 + np.sum(far)) / (1 + len(means))),
        test,
    )


def compare_paired(base: Floats, other: Floats, key: str) -> Difference:
    """The difference of two means on the same questions, by paired bootstrap.

    base, other: (n,) arrays paired by place; key: see `resampled_means`. One question alone gives no interval.
    """
    differences = other - base
    value = float(differences.mean())
    if len(differences) < 2:
        return Difference(value, None, None, None, "none")
    return _from_bootstrap(value, resampled_means(differences, key), "bootstrap_paired")


def compare_mean_of_tasks(tasks: Sequence[tuple[str, Floats]], weights: Sequence[float] | None = None) -> Difference:
    """The difference of two group scores: the (weighted) mean over tasks of each task's mean difference.

    tasks: (name, differences (n_task,)) per task; weights: one number per task, by default all equal. The bootstrap
    draws questions within each task, for the tasks are fixed: it says what another set of questions of these very
    tasks would have given, not what other tasks would.
    """
    share = np.asarray(weights if weights is not None else [1.0] * len(tasks), dtype=float)
    share = share / share.sum()
    value = float(sum(w * d.mean() for w, (_, d) in zip(share, tasks, strict=True)))
    if all(len(d) < 2 for _, d in tasks):
        return Difference(value, None, None, None, "none")
    means = np.zeros(RESAMPLES)
    for weight, (name, differences) in zip(share, tasks, strict=True):
        means += weight * resampled_means(differences, name)
    return _from_bootstrap(value, means, "bootstrap_within_tasks")


def variance_within_tasks(tasks: Sequence[Floats]) -> float | None:
    """The variance of one question's value about the mean of its task, pooled over tasks; None without two in a task.

    tasks: the values, shares from -1 to 1, of each task. One half of a question that was gained and one half of one
    that was lost are added, as Agresti and Min do for paired shares (Statistics in Medicine 24 (2005) 729): a few
    questions that all come out alike do not show that the next one will.
    """
    freedom = sum(len(values) - 1 for values in tasks)
    if freedom < 1:
        return None
    return (sum(float(np.sum((values - values.mean()) ** 2)) for values in tasks) + 1) / (freedom + 2)


def compare_few_within_tasks(tasks: Sequence[Floats]) -> Difference:
    """The mean over tasks of each task's mean difference, where tasks have few questions, with a t test.

    tasks: the differences (n_task,), from -1 to 1, of each task. The tasks are fixed, as in `compare_mean_of_tasks`;
    the bootstrap's intervals are too short for a handful of questions.
    """
    value = float(np.mean([values.mean() for values in tasks]))
    variance = variance_within_tasks(tasks)
    if variance is None:
        return Difference(value, None, None, None, "none")
    stderr = math.sqrt(variance * sum(1 / len(values) for values in tasks)) / len(tasks)
    student = stats.t(sum(len(values) - 1 for values in tasks))
    reach = float(student.ppf((1 + CONFIDENCE) / 2)) * stderr
    return Difference(value, value - reach, value + reach, float(2 * student.sf(abs(value) / stderr)), "t_within_tasks")


def compare_unpaired(base: float, other: float, base_stderr: float | None, other_stderr: float | None) -> Difference:
    """The difference of two scores of which only the standard errors are known: a z test, as if on separate questions.

    On the same questions this is too careful: scores that rise and fall together differ less than it assumes.
    """
    value = other - base
    if base_stderr is None or other_stderr is None:
        return Difference(value, None, None, None, "none")
    stderr = math.hypot(base_stderr, other_stderr)
    if stderr == 0:  # both scores are all right or all wrong: their standard errors of 0 say nothing
        return Difference(value, None, None, 1.0 if value == 0 else None, "z_unpaired" if value == 0 else "none")
    reach = NORMAL_REACH * stderr
    p = float(2 * stats.norm.sf(abs(value) / stderr))
    return Difference(value, value - reach, value + reach, p, "z_unpaired")


def score_interval(score: float, n: int | None, stderr: float | None, *, accuracy: bool) -> tuple[float, float] | None:
    """The 95 % interval of one score alone, for error bars: (low, high), or None where nothing is known of its spread.

    accuracy: the score is a share of n questions (Wilson, JASA 22 (1927) 209); else stderr gives a normal one.
    """
    if accuracy and n and abs(round(score * n) - score * n) < 1e-6:
        limits = stats.binomtest(round(score * n), n).proportion_ci(CONFIDENCE, method="wilson")
        return float(limits.low), float(limits.high)
    if stderr is None:
        return None
    reach = NORMAL_REACH * stderr
    return score - reach, score + reach


def prediction_interval(mean: float, sd: float, n: int, m: int) -> tuple[float, float]:
    """Where the mean of m further draws lies in 95 % of all cases, given the mean and sd (n - 1) of n draws, n > 1.

    mean ± t(n - 1; 0.975) · sd · sqrt(1/n + 1/m), for independent draws from one normal distribution: the n draws tell
    its mean with an error of sd/sqrt(n), around which the m draws' own mean scatters by sd/sqrt(m). Meeker, Hahn and
    Escobar, Statistical Intervals, 2nd ed. (2017), chapter 4.
    """
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd * math.sqrt(1 / n + 1 / m)
    return mean - reach, mean + reach


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: among k tasks without any real change, one looks real in 5 % of all cases.

    Holm, Scandinavian Journal of Statistics 6 (1979) 65; in the order given.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [1.0] * len(p_values)
    floor = 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = floor
    return corrected
