"""The quoted figures follow from the stages' seconds; a missing stage leaves its figures out."""

import json
from dataclasses import replace

import pytest

from benchmarks import growth
from benchmarks.compare import Settings
from benchmarks.figures import figures, original_rows, own_rows
from benchmarks.results import ResultsFile
from ttt_harness.errors import ConfigError

SETTINGS = Settings(
    model="m",
    tasks=("one", "two"),
    original_tasks=("one", "two"),
    limit=4,
    k=3,
    permutations=5,
    seed=42,
    generation_budget="full",
    max_model_len=2048,
    serve_sample=0,
    stages=None,
    stage_limit=60,
)


def task(fit_seconds, tokens, generate_seconds=1.0):
    return {
        "fit_seconds": fit_seconds,
        "train_tokens": tokens,
        "fit_flops": 100 * tokens,
        "generate_seconds": generate_seconds,
        "generate_flops": 50,
        "prompt_tokens": 20,
        "answer_tokens": [1, 2],
        "accuracy": 0.5,
        "answered": 2,
        "requests": 2,
    }


@pytest.fixture
def stages():
    peak = {"dtype": "bfloat16", "native_bf16": True, "peak_flops": {"bfloat16": 1000.0, "float32": 10.0}}
    tasks = {"one": task(1.0, 10), "two": task(3.0, 30)}
    fit = {"seconds": 20.0, "loop_seconds": 12.0, "train_tokens": 20, "fit_flops": 2000}
    served = {"seconds": 60.0, "generate_seconds": 40.0, "tasks": tasks}
    passes = [{"adapter": adapter, "tasks": {"one": 2.0 if adapter else 1.0, "two": 1.0}} for adapter in (False, True)]
    return {
        "peak_before": peak,
        "peak_after": {**peak, "peak_flops": {"bfloat16": 4000.0, "float32": 10.0}},
        "ours": {
            "seconds": 10.0,
            "gpu_peak_bytes": 8,
            "run_seconds": 7.0,
            "start_seconds": 3.0,
            "fit_seconds": 4.0,
            "generate_seconds": 2.0,
            "tasks": tasks,
        },
        "original_fits": {"one": fit, "two": fit},
        "original_serve": served,
        "original_serve_same_kernels": {**served, "seconds": 20.0},
        "adapter": {"passes": [*passes, {"adapter": True, "together": True, "tasks": {}}], "serve_peak_bytes": 7},
        "turns": {"gpu_peak_bytes": 6},
        "fits": {"tasks": {"one": {"fit_seconds": 0.5, "fit_flops": 1000}}},
        "prefix": {"passes": [{"adapter": True, "tasks": {"one": 8.0}}]},
        "memory_short": {"peak_bytes": 1, "limit_bytes": 10},
        "memory_full": {"peak_bytes": 5, "limit_bytes": 10},
    }


def test_each_figure(stages):
    assert figures(stages) == {
        "total_seconds": 7.0,
        "process_seconds": 10.0,
        "gpu_peak_bytes": 8,
        "turns_gpu_peak_bytes": 6,
        "fit_peak_fraction": 4000 / 4 / 4000,
        "fit_peak_fraction_alone": 1000 / 0.5 / 4000,
        "ratio_fit_per_token": (24 / 40) / (4 / 40),
        "ratio_fit_with_start": (40 / 40) / (4 / 40),
        "ratio_total": (40 + 60) / 10,
        "ratio_total_same_kernels": (40 + 20) / 10,
        "ratio_generate_adapter": 3 / 2,
        "serve_peak_bytes": 7,
        "ratio_generate_prefix_caching": 8 / 2,
        "fit_peak_bytes": 5,
        "fit_limit_bytes": 10,
    }


def test_the_whole_job_is_compared_on_the_same_tasks_only(stages):
    del stages["original_fits"]["two"]
    stages["original_serve"]["tasks"] = {"one": task(1.0, 10)}
    found = figures(stages)
    assert "ratio_total" not in found
    stages["ours_compared"] = {**stages["ours"], "seconds": 4.0, "tasks": {"one": task(1.0, 10)}}
    assert figures(stages)["ratio_total"] == (20 + 60) / 4


def test_the_whole_of_the_original_is_estimated_from_some_of_its_tasks(stages):
    assert "ratio_total_scaled" not in figures(stages)  # it ran all of them
    del stages["original_fits"]["two"]
    stages["original_serve"]["tasks"] = {"one": task(1.0, 10)}
    stages["ours"]["tasks"] = {"one": task(1.0, 20), "two": task(3.0, 30)}
    fits = 12.0 * 50 / 20 + 2 * (20.0 - 12.0)
    assert figures(stages)["ratio_total_scaled"] == pytest.approx((fits + (60.0 - 40.0) + 40.0 * 2) / 10.0)


@pytest.mark.parametrize("name", ["ours", "original_fits", "original_serve", "adapter", "memory_full", "peak_after"])
def test_a_missing_stage_leaves_its_figures_out(stages, name):
    whole = figures(stages)
    del stages[name]
    assert figures(stages).keys() <= whole.keys()


def test_rows_add_up_to_the_total(stages):
    for rows in [*original_rows(stages).values(), own_rows(stages["ours"])]:
        assert sum(row.seconds for row in rows[:-1]) == pytest.approx(rows[-1].seconds)


def test_a_scaled_generation_says_so(stages):
    stages["original_serve"] = {**stages["original_serve"], "tasks": {"one": {**task(1.0, 10), "requests": 4}}}
    assert "original (generation scaled by tokens from 2 of 4 questions)" in original_rows(stages)


def test_growth_names_what_grows_faster_than_its_tokens(stages):
    doubled = {**stages["ours"], "fit_seconds": 16.0, "tasks": {"one": task(8.0, 20), "two": task(8.0, 60)}}
    rows = growth.rows({"base": stages["ours"], "k": doubled})
    fit, generate, _ = rows
    assert (fit["doubled"], fit["stage"], fit["token_ratio"], fit["time_ratio"]) == ("k", "fit", 2.0, 4.0)
    assert fit["exponent"] == pytest.approx(2)
    assert fit["faster_than_tokens"] is True
    assert generate["exponent"] is None
    assert generate["faster_than_tokens"] is False
    assert growth.figures({"base": stages["ours"], "k": doubled})["exponent_fit_k"] == pytest.approx(2)


def test_each_variant_doubles_one_thing():
    made = growth.variants(SETTINGS, ("three", "four"))
    assert len(made["tasks"].tasks) == 4
    assert made["k"] == replace(SETTINGS, k=6)
    assert made["permutations"] == replace(SETTINGS, permutations=10)


def write(path, settings, seconds, **options):
    results = ResultsFile(path, settings, lambda stages: {"total_seconds": stages["s"]}, **options)
    for value in seconds:
        results.start_run()["stages"]["s"] = value
        results.save()
    return json.loads(path.read_text())


def test_the_file_holds_runs_and_medians(tmp_path):
    content = write(tmp_path / "a" / "cpu.json", {"k": 1}, [1.0, 5.0, 2.0])
    assert content["total_seconds"] == 2.0
    assert [run["figures"]["total_seconds"] for run in content["runs"]] == [1.0, 5.0, 2.0]
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["torchtune"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cpu.json"]


def test_runs_are_added_to_those_with_the_same_settings_only(tmp_path):
    path = tmp_path / "cpu.json"
    write(path, {"k": (1, 2)}, [1.0])
    assert len(write(path, {"k": (1, 2)}, [3.0], append=True)["runs"]) == 2
    with pytest.raises(ConfigError, match="other settings"):
        write(path, {"k": 2}, [3.0], append=True)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not a results file"):
        write(path, {"k": 2}, [3.0], append=True)
    assert len(write(path, {"k": 2}, [3.0])["runs"]) == 1
