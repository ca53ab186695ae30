"""Runs with several seeds are compared as one: a mean over the seeds for each question."""

import statistics

import pytest

from tests.report.runs import ttt, write_run
from ttt_harness.errors import ReportError
from ttt_harness.report.compare import compare_runs
from ttt_harness.report.page.figures import group_by_seed, lines_of_one
from ttt_harness.report.results import find_run, find_runs
from ttt_harness.report.seeds import find_compared

SCORES = {42: [0, 0, 1, 0, 1, 1], 43: [0, 1, 1, 0, 0, 1]}
BETTER = {42: [1, 0, 1, 0, 1, 1], 43: [1, 1, 1, 1, 0, 1]}


def write(folder, scores, question=lambda task, i: f"{task} question {i}", seeds=(42, 43), metadata=None, **more):
    for seed in seeds:
        of_run = {"seed": seed, **(metadata or {})}
        write_run(folder / f"seed{seed}", {"task": scores[seed]}, metadata=of_run, question=question, **more)
    return folder


def test_a_questions_score_is_its_mean_over_the_seeds(tmp_path):
    base, said = find_compared(write(tmp_path / "icl", SCORES))
    other, _ = find_compared(write(tmp_path / "ttt", BETTER, ttt=ttt(["task"])))
    assert "seeds 42, 43" in said[0]
    (row,) = compare_runs(base, [other]).others[0].rows
    assert row.paired
    assert (row.n, row.won, row.lost) == (6, 2, 0)
    assert row.base.value == pytest.approx(6 / 12)
    assert row.other.value == pytest.approx(9 / 12)
    assert row.difference.value == pytest.approx(3 / 12)
    assert row.difference.test == "bootstrap_paired"


def test_a_question_that_one_seed_shows_as_a_demonstration_counts_with_the_others(tmp_path):
    """Of seven questions seed 42 asks the first six, seed 43 the last six."""
    runs = []
    for name, scores in (("icl", SCORES), ("ttt", BETTER)):
        for seed, first in ((42, 0), (43, 1)):
            write(tmp_path / name, scores, lambda task, i, first=first: f"{task} question {i + first}", seeds=(seed,))
        runs.append(find_compared(tmp_path / name)[0])
    (row,) = compare_runs(runs[0], runs[1:]).others[0].rows
    assert row.n == 7
    means = [0, 0, 1, 0.5, 0.5, 0.5, 1]  # question 1: seed 42's second and seed 43's first, and so on
    assert row.base.value == pytest.approx(sum(means) / 7)


def test_other_seeds_are_refused(tmp_path):
    base, _ = find_compared(write(tmp_path / "icl", SCORES))
    other, _ = find_compared(write(tmp_path / "ttt", {**BETTER, 44: BETTER[43]}, seeds=(42, 44)))
    with pytest.raises(ReportError, match="same seed"):
        compare_runs(base, [other])


def test_runs_of_several_methods_are_not_one(tmp_path):
    write(tmp_path, SCORES, seeds=(42,))
    write(tmp_path, BETTER, seeds=(43,), ttt=ttt(["task"]))
    assert find_compared(tmp_path)[1] == find_run(tmp_path)[1]
    assert "took the newest" in find_compared(tmp_path)[1][0]


@pytest.mark.parametrize(
    "other",
    [
        {"shots": 0},
        {"limit": 3},
        {"limit": 0.5},
        {"metadata": {"vote_permutations": 5}},
        {"metadata": {"k": 5}},
        {"metadata": {"generation_budget": "published"}},
        {"model": "Llama"},
        {"ttt": ttt(["task"], method="icl", dtype="float32")},
        {"ttt": ttt(["task"], method="icl", model_dir="/cache/snapshots/revision")},
        {"change": {"chat_template_sha": "abc"}},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_not_one_anywhere(tmp_path, other):
    plain = {"ttt": ttt(["task"], method="icl")}
    write(tmp_path / "one", SCORES, **plain)
    write(tmp_path / "two", SCORES, seeds=(42,), **plain)
    write(tmp_path / "two", SCORES, seeds=(43,), **{**plain, **other})
    assert "took the newest" in find_compared(tmp_path / "two")[1][0]
    for folder, methods in (("one", 1), ("two", 2)):
        runs = find_runs(tmp_path / folder)
        assert len(group_by_seed(runs, runs[0], {})[0]) == methods


def test_seeds_of_machines_that_keep_the_model_elsewhere_are_one(tmp_path):
    for seed, cache in ((42, "/home/me"), (43, "/scratch")):
        write(tmp_path, SCORES, seeds=(seed,), ttt=ttt(["task"], model_dir=f"{cache}/snapshots/revision"))
    assert "seeds 42, 43" in find_compared(tmp_path)[1][0]


def test_a_folder_with_other_methods_of_the_same_seeds_is_not_one(tmp_path):
    write(tmp_path / "icl", SCORES)
    write(tmp_path / "ttt", BETTER, ttt=ttt(["task"]))
    assert "took the newest" in find_compared(tmp_path)[1][0]


def test_random_guesses_are_one_whatever_name_lm_eval_makes_up_for_their_model(tmp_path):
    for seed, name in ((42, "brave-otter"), (43, "calm-heron")):
        guesses = {"settings": {"method": "random", "seed": seed}, "tasks": {}}
        write(tmp_path, SCORES, seeds=(seed,), model=name, ttt=guesses)
    assert "seeds 42, 43" in find_compared(tmp_path)[1][0]


def test_without_samples_the_runs_scores_are_averaged(tmp_path):
    base, _ = find_compared(write(tmp_path / "icl", SCORES, samples=False))
    other, _ = find_compared(write(tmp_path / "ttt", BETTER, samples=False))
    (row,) = compare_runs(base, [other]).others[0].rows
    assert not row.paired
    assert row.difference.value == pytest.approx(3 / 12)
    assert row.n == 6  # the seeds ask the same questions, which are no more for being asked again
    single = find_run(tmp_path / "icl" / "seed42")[0]
    metric = single.metrics("task")[0]
    assert base.score("task", metric).stderr >= 0.9 * single.score("task", metric).stderr


def test_a_single_methods_scores_are_means_over_its_seeds(tmp_path):
    write(tmp_path, BETTER)
    runs = find_runs(tmp_path)
    (method,), _ = group_by_seed(runs, runs[0], {})
    (line,) = [line for line in lines_of_one(method, None) if line.name == "task"]
    means = [sum(scores) / len(scores) for scores in BETTER.values()]
    assert line.seeds == 2
    assert line.base[0] == pytest.approx(statistics.fmean(means))
    assert line.base[2] - line.base[0] == pytest.approx(statistics.stdev(means))
    assert line.n == 12
