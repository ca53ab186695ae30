"""The command `ttt-harness`: formats, and one sentence for each bad input."""

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.report.tables import COLUMNS

PACKAGE = Path(cli.__file__).parents[1]


@pytest.fixture
def two(tmp_path):
    scores = [{"bbh_ttt_snarks": [0.0, 1.0, 0.0, 1.0] * 9, "bbh_ttt_navigate": [0.0, 1.0] * 9}]
    scores.append({"bbh_ttt_snarks": [1.0, 1.0, 0.0, 1.0] * 9, "bbh_ttt_navigate": [0.0, 1.0] * 9})
    base = write_run(tmp_path / "icl", scores[0], group="bbh_ttt")
    other = write_run(tmp_path / "ttt", scores[1], group="bbh_ttt", source="ttt_vllm", ttt=ttt(list(scores[1])))
    return base, other


def call(capsys, *arguments):
    status = cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys, *arguments):
    """The one sentence that the arguments are refused with."""
    status, out, err = call(capsys, *arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert err.endswith((".\n", "?\n")), err
    return err


def test_table(capsys, two, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = call(capsys, "compare", *two)
    assert status == 0
    assert "10-shot → ttt" in out
    snarks = next(line for line in out.splitlines() if line.startswith("snarks"))
    assert snarks.split()[:4] == ["snarks", "50.0", "75.0", "+25.0"]
    assert "9–0" in snarks
    assert "exact McNemar per task" in out


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_table_keeps_its_width(capsys, two, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = call(capsys, "compare", *two, "--reference", "published")
    # below about 60 the table keeps names and scores readable rather than the width
    assert max(map(len, out.splitlines())) <= max(width, 60)


def test_folders_and_names(capsys, two):
    status, out, _ = call(capsys, "compare", f"before={two[0].parents[1]}", f"after={two[1].parents[1]}")
    assert status == 0
    assert "before → after" in out


def test_csv_columns_are_stable(capsys, two):
    _, out, _ = call(capsys, "compare", *two, "--format", "csv", "--reference", "published")
    table = list(csv.DictReader(io.StringIO(out)))
    assert tuple(table[0]) == COLUMNS
    assert [row["name"] for row in table] == ["bbh_ttt", "bbh_ttt_snarks", "bbh_ttt_navigate"]
    row = table[1]
    assert (row["level"], row["metric"], row["filter"], row["n"]) == ("task", "acc", "answer", "36")
    assert (row["base"], row["other"], row["won"], row["lost"]) == ("10-shot", "ttt", "9", "0")
    assert float(row["difference"]) == 0.25
    assert float(row["ci_low"]) < 0.25 < float(row["ci_high"])
    assert float(row["other_published"]) == pytest.approx(0.7762)
    assert row["higher_is_better"] == "true"


def test_csv_columns_are_documented():
    text = (Path(__file__).parents[1] / "ttt_harness/report/README.md").read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"`{name}`" not in text] == []


def test_json_is_plain_and_complete(capsys, two):
    _, out, _ = call(capsys, "compare", *two, "--format", "json")
    data = json.loads(out)
    assert data["schema"] == "ttt-harness.compare/1"
    assert list(data["rows"][0]) == list(COLUMNS)
    assert data["rows"][0]["p_holm"] is None
    assert data["others"][0]["method"] == "ttt"


def test_markdown_and_latex(capsys, two):
    _, markdown, _ = call(capsys, "compare", *two, "--format", "markdown")
    assert "| snarks | 50.0 | 75.0 | +25.0 |" in markdown
    assert "**bbh\\_ttt**" in markdown
    _, latex, _ = call(capsys, "compare", *two, "--format", "latex")
    assert r"snarks & 50.0 & 75.0 & +25.0" in latex
    assert r"\toprule" in latex
    assert r"bbh\_ttt &" in latex


def test_markup_in_names_is_text(capsys, tmp_path):
    paths = [write_run(tmp_path / n, {"[red]t|*_$": [0.0, 1.0]}) for n in "ab"]
    for form in ("table", "markdown", "latex", "csv"):
        status, out, _ = call(capsys, "compare", *paths, "--format", form)
        assert status == 0
        assert "[red]" in out


def test_several_others_begin_with_a_summary(capsys, two, tmp_path):
    third = write_run(
        tmp_path / "all",
        {"bbh_ttt_snarks": [0.0] * 36, "bbh_ttt_navigate": [1.0] * 18},
        group="bbh_ttt",
        ttt=ttt(["bbh_ttt_snarks"], loss_on="all"),
    )
    _, out, _ = call(capsys, "compare", *two, third)
    assert "all runs compared with 10-shot (50.0)" in out
    assert "10-shot → ttt_loss_all" in out


def test_not_a_results_file(capsys, two, tmp_path):
    other = tmp_path / "other.json"
    for content in ('{"a": 1}', "[1, 2]", '{"results": {"t": 3}}', '"text"', '{"results": {}}'):
        other.write_text(content)
        assert "other.json" in refused(capsys, "compare", two[0], other)
    other.write_bytes(b"\x89PNG\xff\xfe")
    assert "not JSON text" in refused(capsys, "compare", two[0], other)
    samples = next(two[0].parent.glob("samples_*"))
    assert "give the results_ file beside it" in refused(capsys, "compare", two[0], samples)


def test_truncated(capsys, two):
    whole = two[1].read_text()
    two[1].write_text(whole[: len(whole) // 2])
    assert "not complete JSON" in refused(capsys, "compare", *two)
    two[1].write_text("")
    assert "not complete JSON" in refused(capsys, "compare", *two)


def test_truncated_samples(capsys, two):
    samples = next(two[1].parent.glob("samples_*"))
    samples.write_text(samples.read_text()[:-40])
    assert "not complete JSON" in refused(capsys, "compare", *two)
    samples.write_text('{"a": 1}\n')
    assert "not a sample" in refused(capsys, "compare", *two)


def test_folder_without_results(capsys, two, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no results file" in refused(capsys, "compare", two[0], tmp_path / "empty")
    assert "does not exist" in refused(capsys, "compare", two[0], tmp_path / "missing")


def test_same_run_twice(capsys, two):
    assert "the same run" in refused(capsys, "compare", two[0], two[0])
    assert "the same run" in refused(capsys, "compare", two[0], two[0].parents[1])
    status, out, _ = call(capsys, "compare", two[0], two[0], "--allow-same-run", "--format", "json")
    assert status == 0
    assert all(row["difference"] == 0 and row["p_value"] == 1 for row in json.loads(out)["rows"])


def test_no_shared_tasks(capsys, two, tmp_path):
    other = write_run(tmp_path / "c", {"hellaswag": [0.0, 1.0]})
    assert "no task in common" in refused(capsys, "compare", two[0], other)


def test_nan(capsys, two):
    raw = json.loads(two[1].read_text())
    raw["results"]["bbh_ttt_snarks"]["acc,answer"] = float("nan")
    two[1].write_text(json.dumps(raw))
    assert "is nan" in refused(capsys, "compare", *two)


def test_one_name_for_two_runs(capsys, two):
    assert "given to two runs" in refused(capsys, "compare", f"a={two[0]}", f"a={two[1]}")


def run_process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "ttt_harness.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False, **options)


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, ttt_harness.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'numpy', 'scipy', 'rich', 'torch', 'lm_eval'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True
        )
        best = min(best, time.perf_counter() - start)
    assert done.stdout.endswith("[]\n")
    assert best < 0.5


def test_process_ends_with_a_sentence_and_no_traceback(tmp_path):
    done = run_process("compare", tmp_path, tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert run_process("compare").returncode == 2
    assert run_process().returncode == 2


def test_closed_pipe_is_quiet(two):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = f"{sys.executable} -m ttt_harness.cli compare {two[0]} {two[1]} --format json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.stderr == ""
