"""The published figures: copies of the source, and what another draw of their seeds would give."""

import statistics

import numpy as np
import pytest

from tests.report.runs import ttt, write_run
from ttt_harness.methods import SETTINGS
from ttt_harness.report.compare import MEAN_ROW, compare_runs
from ttt_harness.report.published import (
    GROUP,
    TASK_PREFIX,
    place,
    published_results,
    published_seeds,
    published_setting,
)
from ttt_harness.report.results import read_run
from ttt_harness.report.seeds import find_compared
from ttt_harness.report.tables import notes, records
from ttt_harness.statistics import prediction_interval


def test_seeds_and_means_are_of_the_same_runs():
    """The two copied files agree: the mean over the seeds of each task and average is the published one."""
    results, seeds = published_results(), published_seeds()
    assert seeds["seeds"] == results["seeds"]
    for method, by_seed in seeds["per_seed"].items():
        assert len(by_seed) == 5
        for task, percent in results["per_task"][method].items():
            assert statistics.fmean(one[task] for one in by_seed) == pytest.approx(percent, abs=0.0051)
        averages = [statistics.fmean(one.values()) for one in by_seed]
        assert statistics.fmean(averages) == pytest.approx(results["average"][method], abs=0.0051)
        assert statistics.stdev(averages) == pytest.approx(seeds["sd"][method], abs=0.0006)


def test_every_setting_with_seeds_has_a_spread():
    for name, setting in SETTINGS.items():
        found = published_setting(name)
        if setting.published:
            known = setting.published in published_seeds()["per_seed"]
            assert (found.average.sd is not None) == known
            assert (found.figure(TASK_PREFIX + "snarks").redrawn(5) is not None) == known
            assert found.figure(GROUP) is found.average
            assert found.mean_of(found.figures).mean == pytest.approx(found.average.mean, abs=1e-4)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 1), (3, 10)])
def test_the_prediction_interval_holds_what_it_says(n, m):
    """Of 20,000 pairs of draws from one normal distribution, 95 % of the second means lie in the first's interval."""
    rng = np.random.default_rng(7)
    pairs = 20_000
    first, second = rng.normal(0.6, 0.02, (pairs, n)), rng.normal(0.6, 0.02, (pairs, m)).mean(axis=1)
    inside = 0
    for draw, mean in zip(first, second, strict=True):
        low, high = prediction_interval(float(draw.mean()), float(draw.std(ddof=1)), n, m)
        inside += low <= mean <= high
    assert inside / pairs == pytest.approx(0.95, abs=0.005)  # its own standard error is 0.0015


def test_five_seeds_of_the_published_kind():
    """The width of a hand-calculated case: t(4) = 2.776, sqrt(2/5) = 0.632."""
    low, high = prediction_interval(0.5, 0.01, 5, 5)
    assert (low, high) == (pytest.approx(0.5 - 0.01756, abs=1e-5), pytest.approx(0.5 + 0.01756, abs=1e-5))
    assert [place(value, (low, high)) for value in (0.48, 0.5, 0.52)] == ["below", "within", "above"]


def test_interval_of_a_share_ends_at_0_and_1():
    low, high = published_setting("ttt").figure(TASK_PREFIX + "temporal_sequences").redrawn(1)
    assert 0 <= low <= high <= 1


def test_compare_says_where_the_mean_over_the_seeds_lies(tmp_path):
    for seed in (42, 43, 44):
        scores = {"bbh_ttt_snarks": [1.0, 1.0, 1.0, 0.0] * 9, "bbh_ttt_navigate": [1.0, 0.0] * 18}
        facts = {"metadata": {"seed": seed}}
        write_run(tmp_path / "icl", scores, **facts)
        write_run(tmp_path / "ttt", scores, source="ttt_vllm", ttt=ttt(list(scores), seed=seed), **facts)
    base, other = (find_compared(tmp_path / name)[0] for name in ("icl", "ttt"))
    comparison = compare_runs(base, [other], reference=True)
    said = [note for note in notes(comparison, comparison.others[0]) if "prediction interval" in note]
    assert len(said) == 2
    assert said[1].startswith(f"ttt, {MEAN_ROW}: 62.5 is within the 95 % prediction interval for the mean of 3 other")
    row = records(comparison)[0]
    expected = published_setting("ttt").mean_of(["bbh_ttt_snarks", "bbh_ttt_navigate"])
    assert row["other_published_sd"] == expected.sd
    assert (row["other_redrawn_low"], row["other_redrawn_high"]) == expected.redrawn(3)


def test_one_run_is_one_seed(tmp_path):
    path = write_run(tmp_path, {"bbh_ttt_snarks": [1.0, 0.0]}, source="ttt_vllm", ttt=ttt(["bbh_ttt_snarks"]))
    other = write_run(tmp_path / "b", {"bbh_ttt_snarks": [1.0, 1.0]})
    comparison = compare_runs(read_run(other), [read_run(path)], reference=True)
    assert any("for another seed of" in note for note in notes(comparison, comparison.others[0]))
