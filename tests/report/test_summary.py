"""The summary: which method a run is, its mean over the seeds, and the figures beside."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest

from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.errors import ReportError
from ttt_harness.methods import SETTINGS
from ttt_harness.report import published, summary
from ttt_harness.report.results import read_run
from ttt_harness.report.summary import read
from ttt_harness.report.summary_tables import COLUMNS, tables

TASKS = ["bbh_ttt_snarks", "bbh_ttt_word_sorting"]


def write(
    folder,
    right,
    *,
    seed=42,
    shots=10,
    choices=(),
    metadata=None,
    group="bbh_ttt",
    tasks=TASKS,
    model="SmolLM2-135M-Instruct",
    limit=None,
    **settings,
):
    """A run in which `right` of ten questions are right in each task."""
    scores = {task: [1.0] * right + [0.0] * (10 - right) for task in tasks}
    path = write_run(
        folder,
        scores,
        source="ttt_vllm",
        group=group,
        ttt=ttt(tasks, seed=seed, **settings),
        metadata={"seed": seed, **(metadata or {})},
        shots=shots,
        model=model,
        limit=limit,
    )
    content = json.loads(path.read_text())
    for task, config in content["configs"].items():
        config["output_type"] = "generate_until"
        if task == TASKS[0] and choices:
            config["metadata"]["choices"] = list(choices)
    path.write_text(json.dumps(content))
    return path


def call(capsys, *arguments):
    status = cli.main(["summary", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def three_seeds(tmp_path):
    for seed, right in ((42, 5), (43, 6), (44, 10)):
        write(tmp_path / f"ttt/seed{seed}", right, seed=seed)
        write(tmp_path / f"random/seed{seed}", right // 2, seed=seed, method="random", choices=("(A)", "(B)"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("icl", {"method": "icl"}),
        ("zero_shot", {"method": "icl", "shots": 0}),
        ("icl_vote", {"method": "icl", "metadata": {"vote_permutations": 5}}),
        ("ttt", {}),
        ("ttt_vote", {"metadata": {"vote_permutations": 5}}),
        ("ttt_loss_all", {"loss_on": "all"}),
        ("ttt_loss_last", {"loss_on": "last"}),
        ("ttt_no_shuffle", {"shuffle": False}),
        ("ttt_no_shuffle_vote", {"shuffle": False, "metadata": {"vote_permutations": 5}}),
        ("ttt_leave_one_out", {"metadata": {"leave_one_out": True}}),
        ("shared_ttt", {"method": "shared_ttt"}),
        ("e2e", {"method": "e2e", "shots": 0, "shuffle": False}),
        ("shared_e2e", {"method": "shared_e2e", "shots": 0}),
        ("random", {"method": "random"}),
    ],
)
def test_every_method_is_known_by_its_results_file(tmp_path, name, run):
    assert name in SETTINGS
    assert read_run(write(tmp_path, 5, **run)).method == name


def test_another_model_is_named_by_its_shots(tmp_path):
    assert read_run(write_run(tmp_path, {"a": [1.0]}, source="hf")).method == "10-shot"


def test_mean_and_deviation_over_the_seeds(three_seeds):
    line = read([three_seeds]).line("ttt", "bbh_ttt_snarks")
    assert line.mean == pytest.approx(0.7)
    assert line.sd == pytest.approx(statistics.stdev([0.5, 0.6, 1.0]))
    assert line.seeds == (42, 43, 44)


def test_one_seed_has_no_deviation(tmp_path):
    write(tmp_path, 5)
    assert read([tmp_path]).line("ttt", "bbh_ttt").sd is None


def test_published_figures_stand_beside(three_seeds, tmp_path):
    write(tmp_path / "loo", 5, metadata={"leave_one_out": True})
    found = read([three_seeds])
    data = published.published_results()
    assert found.line("ttt", "bbh_ttt").beside.mean == data["average"]["ttt"] / 100
    assert found.line("ttt", "bbh_ttt_snarks").beside.mean == data["per_task"]["ttt"]["snarks"] / 100
    assert found.line("random", "bbh_ttt_snarks").beside.mean == 0.5
    assert found.line("ttt_leave_one_out", "bbh_ttt_snarks").beside is None


def test_every_published_method_has_figures():
    names = {setting.published for setting in SETTINGS.values() if setting.published}
    assert names == set(published.published_results()["average"])


def test_the_exact_expectation_of_guessing(three_seeds):
    found = read([three_seeds])
    assert found.line("random", "bbh_ttt_snarks").expected == 0.5
    assert found.line("random", "bbh_ttt_word_sorting").expected == 0.0
    assert found.line("random", "bbh_ttt").expected == 0.25
    assert found.line("ttt", "bbh_ttt_snarks").expected is None


def test_tasks_without_a_group_get_their_plain_mean(tmp_path):
    for seed, right in ((42, 4), (43, 6)):
        write(tmp_path / f"{seed}", right, seed=seed, group=None)
    found = read([tmp_path])
    assert found.names == ["mean of tasks", *TASKS]
    line = found.line("ttt", "mean of tasks")
    assert (line.mean, line.sd) == (0.5, pytest.approx(statistics.stdev([0.4, 0.6])))


def test_methods_stand_in_the_order_of_the_study(three_seeds, tmp_path):
    write(tmp_path / "a", 5, method="icl")
    assert read([three_seeds]).labels == ["random", "icl", "ttt"]


def test_of_two_runs_alike_the_newer_counts(tmp_path):
    write(tmp_path / "a", 5)
    write(tmp_path / "b", 6)
    found = read([tmp_path])
    assert found.line("ttt", "bbh_ttt").mean == 0.6
    assert any("older results of the same are left out" in remark for remark in found.remarks)


def test_what_differs_between_the_seeds_is_said(tmp_path):
    for seed in (42, 43):
        path = write(tmp_path / f"{seed}", 5, seed=seed)
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template_sha": f"sha{seed}"}))
    assert "ttt: the seeds differ in chat_template_sha (sha42, sha43)." in read([tmp_path]).remarks


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"limit": 40.0}, {"seed": 43}, "the runs differ in limit (40, not given)"),
        ({"limit": 40.0}, {"method": "icl"}, "the runs differ in limit (40, not given)"),
        ({}, {"model": "Llama", "method": "icl"}, "the runs differ in model (SmolLM2-135M-Instruct, Llama)"),
        ({}, {"tasks": TASKS[:1], "seed": 43}, "the runs of ttt differ in tasks (bbh_ttt_snarks and 1 more, bbh_ttt"),
    ],
)
def test_several_sweeps_are_refused(capsys, tmp_path, first, second, said):
    write(tmp_path / "a/seed42", 5, **first)
    write(tmp_path / "b/seed42", 6, **second)
    status, out, err = call(capsys, tmp_path)
    assert (status, out) == (1, "")
    assert said in err
    assert err.endswith("on its own.\n")
    assert err.count("\n") == 1
    assert call(capsys, tmp_path / "a")[0] == call(capsys, tmp_path / "b")[0] == 0


def test_long_lists_of_tasks_that_begin_alike_are_told_apart(capsys, tmp_path):
    write(tmp_path / "a", 5, tasks=["a", "b", "c"], group=None)
    write(tmp_path / "b", 5, tasks=["a", "b", "d"], group=None, seed=43)
    _, _, err = call(capsys, tmp_path)
    assert "the runs of ttt differ in tasks (only some have c, d)" in err


def test_methods_with_different_seeds_are_said(three_seeds):
    write(three_seeds / "icl", 5, method="icl")
    assert "The methods have different seeds: random 42, 43, 44; icl 42; ttt 42, 43, 44." in read([three_seeds]).remarks


def test_what_a_sweep_is_still_writing_is_left_out(three_seeds):
    path = write(three_seeds / "icl/seed42.partial", 5, method="icl")
    path.write_text(path.read_text()[:100])
    assert read([three_seeds]).labels == ["random", "ttt"]


def test_csv_and_json_hold_the_same(capsys, three_seeds):
    _, text, _ = call(capsys, three_seeds, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert tuple(rows[0]) == COLUMNS
    _, text, _ = call(capsys, three_seeds, "--format", "json")
    content = json.loads(text)
    assert content["schema"] == "ttt-harness.summary/1"
    assert [row["mean"] for row in content["rows"]] == [float(row["mean"]) for row in rows]
    assert [len(row["seeds"]) for row in content["rows"]] == [int(row["seeds"]) for row in rows] == [3] * 6
    first = content["rows"][0]
    assert (first["method"], first["name"], first["level"], first["expected"]) == ("random", "bbh_ttt", "group", 0.25)


def test_markdown(capsys, three_seeds):
    _, text, _ = call(capsys, three_seeds, "--format", "markdown")
    lines = text.splitlines()
    assert lines[0] == "| bbh\\_ttt | mean | sd | median | seeds | published | its median | redrawn | exact |"
    assert "| ttt | 70.0 | 26.5 | 70.0 | 3 | 57.8 ±0.5 | 67.0 | \\[56.8, 58.7] above | – |" in lines
    assert "| snarks | 33.3 ±15.3 (50.0) | 50.0 | 70.0 ±26.5 (77.6 ±4.1) |" in lines
    assert any(line.startswith("- Published: ") for line in lines)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_fits_the_terminal(capsys, monkeypatch, three_seeds, width):
    for name, settings in {"a": {"loss_on": "all"}, "b": {"loss_on": "last"}, "c": {"shuffle": False}}.items():
        write(three_seeds / name, 5, **settings)
    monkeypatch.setenv("COLUMNS", str(width))
    status, text, _ = call(capsys, three_seeds)
    assert status == 0
    assert max(map(len, text.splitlines())) <= width
    assert text.count("word_sorting") == {60: 3, 80: 2, 200: 1}[width]
    for cell in ("70.0 ±26.5 (77.6 ±4.1)", "random, exact", "ttt_no_shuffle"):
        assert cell in text


def test_every_table_has_a_cell_for_every_column(three_seeds):
    write(three_seeds / "icl", 5, method="icl", tasks=TASKS[:1])
    for header, *rows in tables(read([three_seeds])):
        assert {len(row) for row in rows} == {len(header)}


def test_a_folder_without_results(capsys, tmp_path):
    status, out, err = call(capsys, tmp_path)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    with pytest.raises(ReportError):
        read([tmp_path / "nowhere"])


def test_csv_columns_are_documented():
    text = (Path(summary.__file__).with_name("README.md")).read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"`{name}`" not in text] == []
