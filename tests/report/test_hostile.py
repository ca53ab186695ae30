"""Results files that anybody may have written: each command shows them, or refuses them in one sentence.

`mutated` changes a valid file in the ways that files of other tools and other days, of disks and of people differ from
it. The seeds are fixed: a failure names the one that shows it again.
"""

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.errors import ReportError
from ttt_harness.report.compare import compare_runs
from ttt_harness.report.files import parse
from ttt_harness.report.page.page import build_page
from ttt_harness.report.results import find_run, find_runs, read_run, search_runs
from ttt_harness.report.seeds import find_compared

DEEP = "[" * 5000 + "]" * 5000
NESTED = json.loads("[" * 90 + "]" * 90)
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 999, 10**18, 1e308, -0.5, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "N/A",
        "[/b]",
        "[red]x",
        "\x1b[2J\x9b31m",
        "\u202eabc",
        "\ud800",
        "a" * 300,
        "../../etc/passwd",
        "nan",
        "inf",
    ),
    *("10", "²", "None", "ttt", "icl", "acc,none", "0", "\x00", "a\nb"),
    *([], {}, [1, 2], [None], [[]], {"a": 1}, {"": None}, ["x"], [float("nan")], [{"a": []}], NESTED),
]
# Numbers that json.dumps cannot write: they are put in as text.
MARKS = {"@big@": "9" * 5000, "@long@": "1" + "0" * 400, "@deep@": DEEP, "@exp@": "1e999"}

AS_ANOTHER_USER = """
import os, sys
from ttt_harness.errors import ReportError
from ttt_harness.report.results import find_runs, search_runs

whole, closed = sys.argv[1:]
os.chmod(whole, 0o755)
if os.getuid() == 0:
    os.setuid(12345)
runs, remarks = search_runs(whole)
print(len(runs), remarks)
for call, path in ((find_runs, whole), (search_runs, closed), (search_runs, closed + "/x")):
    try:
        call(path)
    except ReportError as error:
        print(error)
"""


def mutated(value: Any, draw: random.Random) -> Any:
    """The value with one to three changes anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw.choice(keys)
            below = at[key]
            if isinstance(below, dict | list) and below and draw.random() < 0.8:
                at = below
                continue
            change(at, key, draw)
            break
    return value


def change(at: Any, key: Any, draw: random.Random) -> None:
    kind = draw.randrange(5)
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        name = draw.choice([v for v in VALUES if isinstance(v, str)])
        at[name if draw.random() < 0.7 else f"{name},{name}"] = at.pop(key)
    elif kind == 2:
        at[key] = draw.choice(list(MARKS))
    elif kind == 3:
        at[key] = [at[key]] if draw.random() < 0.5 else {"x": at[key]}
    else:
        at[key] = draw.choice(VALUES)


def as_text(value: Any) -> str:
    text = json.dumps(value)
    for mark, number in MARKS.items():
        text = text.replace(f'"{mark}"', number)
    return text


def sentence_or_nothing(capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
    """The command prints and ends with 0, or refuses its input with one sentence; no control character is printed."""
    status = cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    if status:
        assert status == 1
        lines = [line for line in captured.err.splitlines() if not line.startswith(("warning: ", "note: "))]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert lines[0].endswith((".", "?")), lines[0]
    else:
        assert captured.out
    both = captured.out + captured.err
    assert not [c for c in both if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c in "\u202e\ud800"]


def base_and_other(folder: Path, seed: int) -> tuple[Path, Path]:
    """Two runs, and beside them a third with another learning rate, which makes a sweep."""
    tasks = {"bbh_ttt_snarks": [1.0, 0.0, 1.0, 0.0], "bbh_ttt_navigate": [0.0, 1.0, 1.0]}
    settings = {"seed": seed % 2 + 42}
    base = write_run(folder / "icl", tasks, group="bbh_ttt", metadata={"choices": ["(A)", "(B)"]})
    other = write_run(folder / "ttt", tasks, group="bbh_ttt", source="ttt_vllm", ttt=ttt(list(tasks), **settings))
    facts = ttt(list(tasks), lr=3e-4, **settings)
    write_run(folder / "lr=3e-4", tasks, group="bbh_ttt", source="ttt_vllm", ttt=facts)
    return base, other


@pytest.mark.parametrize("part", range(10))
def test_mutated_results_are_shown_or_refused(tmp_path, capsys, monkeypatch, part):
    """A thousand files; each command reads each of them."""
    monkeypatch.setenv("COLUMNS", "120")
    base, other = base_and_other(tmp_path, part)
    content, samples = json.loads(other.read_text()), next(other.parent.glob("samples_bbh_ttt_snarks*"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for seed in range(100 * part, 100 * part + 100):
        draw = random.Random(seed)
        in_samples = draw.random() < 0.3
        other.write_text(as_text(content if in_samples else mutated(content, draw)))
        changed = [mutated(line, draw) if in_samples and draw.random() < 0.5 else line for line in lines]
        samples.write_text("".join(as_text(line) + "\n" for line in changed))
        shape = draw.choice(["table", "markdown", "csv", "json", "latex"])
        try:
            sentence_or_nothing(capsys, "compare", base, other, "--format", shape, "--reference", "published")
            sentence_or_nothing(capsys, "compare", other, base)
            sentence_or_nothing(capsys, "summary", tmp_path, "--format", "table" if shape == "latex" else shape)
            if seed % 4 == 0:
                sentence_or_nothing(capsys, "report", tmp_path, "-o", tmp_path / "page.html")
                sentence_or_nothing(capsys, "report", other, "-o", tmp_path / "page.html", "--reference", "published")
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def change_results(path: Path, **changes: Any) -> Path:
    path.write_text(as_text({**json.loads(path.read_text()), **changes}))
    return path


@pytest.fixture
def two(tmp_path):
    return base_and_other(tmp_path, 0)


@pytest.mark.parametrize(
    "damage",
    [
        {"results": "@deep@"},
        {"config": "@deep@"},
        {"config": NESTED},
        {"configs": {"bbh_ttt_snarks": {"metadata": {"seed": "@big@", "k": "@long@"}}}},
        {"date": "@exp@", "total_evaluation_time_seconds": "inf"},
        {"total_evaluation_time_seconds": float("nan")},
        {"versions": None, "n-shot": None, "n-samples": None, "higher_is_better": None, "task_hashes": None},
        {"group_subtasks": {"bbh_ttt": [["a"], {"b": 1}, None, "bbh_ttt"]}},
        {"model_name": ["a"], "model_source": {"b": 1}},
        {"lm_eval_version": {"a": 1}},
    ],
)
def test_damage_is_shown_or_refused(two, capsys, tmp_path, damage):
    change_results(two[1], **damage)
    for command in (["compare", *two], ["summary", tmp_path], ["report", tmp_path, "-o", tmp_path / "page.html"]):
        sentence_or_nothing(capsys, *command)


def test_groups_within_groups_do_not_multiply(two):
    levels = {f"g{i}": [f"g{i + 1}", f"g{i + 1}"] for i in range(3000)} | {"g3000": ["bbh_ttt_snarks"]}
    run = read_run(change_results(two[1], group_subtasks=levels))
    assert run.groups["g0"] == ["bbh_ttt_snarks"]


def test_a_list_as_a_seed_is_shown(two, capsys):
    content = json.loads(two[1].read_text())
    for config in content["configs"].values():
        config["metadata"]["seed"] = [1, 2]
    change_results(two[1], configs=content["configs"])
    assert read_run(two[1]).seed == "[1, 2]"
    sentence_or_nothing(capsys, "summary", two[1])


@pytest.mark.parametrize("name", ["../../../etc/passwd", "a/b", "a" * 300, "..", "", "\x00", "[/b]", "\x1b[2J", "a,b"])
def test_any_name_of_a_task(two, capsys, tmp_path, name):
    for path in two:
        text = path.read_text().replace("bbh_ttt_snarks", json.dumps(name)[1:-1])
        path.write_text(text)
        assert name in read_run(path).tasks
    sentence_or_nothing(capsys, "compare", *two)
    sentence_or_nothing(capsys, "summary", tmp_path)
    sentence_or_nothing(capsys, "report", tmp_path, "-o", tmp_path / "page.html")


def test_samples_of_another_folder_are_not_read(tmp_path):
    path = write_run(tmp_path / "run", {"t": [1.0]})
    (tmp_path / "run" / f"samples_secret_{path.stem.removeprefix('results_')}.jsonl").write_text("{}\n")
    path.write_text(path.read_text().replace('"t"', '"/../../samples_secret"'))
    assert read_run(path).sample_files == {}


def test_long_names_leave_the_scores_on_the_screen(two, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for path in two:
        path.write_text(path.read_text().replace("bbh_ttt_snarks", "a" * 300))
    for command in (["compare", *two], ["summary", *two]):
        assert cli.main(list(map(str, command))) == 0
        out = capsys.readouterr().out
        assert "50.0" in out
        assert max(map(len, out.split("\n\n")[0].splitlines())) <= 100


class TestPredictOnly:
    """`--predict_only`: lm-eval writes 999 as the score of each task."""

    @pytest.fixture
    def answered(self, tmp_path):
        return write_run(tmp_path / "answered", {"t": [999.0, 999.0]}, metric="bypass", filter_name="none")

    def test_summary_says_no_score(self, answered, capsys):
        assert cli.main(["summary", str(answered)]) == 0
        out = capsys.readouterr().out
        assert "no score" in out
        assert "999" not in out

    @pytest.mark.parametrize("shape", ["csv", "json", "markdown"])
    def test_in_every_format(self, answered, capsys, shape):
        assert cli.main(["summary", str(answered), "--format", shape]) == 0
        assert "999" not in capsys.readouterr().out.replace(str(answered), "")

    def test_compare_says_why(self, answered, tmp_path, capsys):
        scored = write_run(tmp_path / "scored", {"t": [1.0, 0.0]})
        assert cli.main(["compare", str(scored), str(answered)]) == 1
        assert "--predict_only" in capsys.readouterr().err

    def test_report_shows_the_answers(self, answered):
        page = build_page([read_run(answered)])
        data = json.loads(page.split('id="data">')[1].split("</script>")[0])
        assert data["questions"]["id"] == [0, 1]
        assert data["questions"]["methods"][0]["score"] == [None, None]
        assert "999" not in page.split('<section id="settings"')[0].replace(str(answered), "")


class TestOldSamples:
    """Before 0.4.6 a line named neither its filter nor its metrics: all questions under one filter, then the next."""

    @pytest.fixture
    def old(self, tmp_path):
        path = write_run(tmp_path, {"t": [1.0, 0.0, 1.0]}, filter_name="strict")
        raw = json.loads(path.read_text())
        raw["results"]["t"] |= {"acc,loose": 1.0, "acc_stderr,loose": 0.0}
        path.write_text(json.dumps(raw))
        samples = next(path.parent.glob("samples_*"))
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            del line["filter"], line["metrics"]
        loose = [{**line, "acc": 1.0, "filtered_resps": ["loose"]} for line in lines]
        samples.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *loose]))
        return path

    def test_each_filter_has_its_own(self, old):
        run = read_run(old)
        assert [s.values for s in run.samples("t", "strict")] == [{"acc": 1.0}, {"acc": 0.0}, {"acc": 1.0}]
        assert [s.values for s in run.samples("t", "loose")] == [{"acc": 1.0}] * 3
        assert {s.answer for s in run.samples("t", "loose")} == {"loose"}

    def test_before_there_were_hashes_they_are_those_of_today(self, old, tmp_path):
        """A run of lm-eval 0.4.2 is paired with one of today: the hashes are made as lm-eval makes them."""
        new = write_run(tmp_path / "new", {"t": [1.0, 1.0, 1.0]}, filter_name="strict")
        samples = next(new.parent.glob("samples_*"))
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            text = json.dumps(line["doc"], indent=2, ensure_ascii=False)
            line["doc_hash"] = hashlib.sha256(text.encode()).hexdigest()
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        samples = next(old.parent.glob("samples_*"))
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            del line["doc_hash"], line["prompt_hash"], line["target_hash"]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
        against = compare_runs(read_run(old), [read_run(new)]).others[0]
        assert against.rows[0].paired
        assert not any("Prompts differ" in warning for warning in against.warnings)

    def test_they_are_paired(self, old, tmp_path):
        new = write_run(tmp_path / "new", {"t": [1.0, 1.0, 1.0]}, filter_name="strict")
        row = compare_runs(read_run(old), [read_run(new)]).others[0].rows[0]
        assert (row.won, row.lost, row.n) == (1, 0, 3)


class TestFinding:
    def test_folders_called_results(self, tmp_path):
        path = write_run(tmp_path / "results.json", {"t": [1.0]})
        (tmp_path / "results.json" / "results_2026-01-01T00-00-00.json").mkdir()
        assert [run.path for run in find_runs(tmp_path)] == [path]
        assert find_run(tmp_path / "results.json")[0].path == path

    def test_loops_pipes_and_dangling_links(self, tmp_path):
        path = write_run(tmp_path, {"t": [1.0]})
        (tmp_path / "again").symlink_to(tmp_path)
        (tmp_path / "results_self.json").symlink_to(tmp_path / "results_self.json")
        (tmp_path / "results_gone.json").symlink_to(tmp_path / "nowhere")
        os.mkfifo(tmp_path / "results_pipe.json")
        assert [run.path for run in find_runs(tmp_path)] == [path]
        with pytest.raises(ReportError, match="cannot be read: Too many levels of symbolic links"):
            find_run(tmp_path / "results_self.json")
        with pytest.raises(ReportError, match="does not exist"):
            find_run(tmp_path / "results_gone.json")

    def test_what_a_sweep_still_writes_is_left_out(self, tmp_path):
        write_run(tmp_path / "ttt" / "seed42.partial", {"t": [1.0]})
        with pytest.raises(ReportError, match="holds no results file"):
            find_runs(tmp_path)
        assert find_runs(tmp_path / "ttt" / "seed42.partial")

    def test_other_programs_results_are_named_and_left_out(self, tmp_path):
        path = write_run(tmp_path, {"t": [1.0]})
        for name, text in (("results_a.json", '{"accuracy": 1}'), ("results_b.json", '[{"results": 3}]')):
            (tmp_path / name).write_text(text)
        runs, remarks = search_runs(tmp_path)
        assert [run.path for run in runs] == [path]
        assert len(remarks) == 2
        assert all("is not a results file of lm-eval" in remark for remark in remarks)
        assert find_compared(tmp_path)[0].path == path
        with pytest.raises(ReportError, match="is not a results file"):
            find_runs(tmp_path)

    def test_only_other_programs_results_are_refused(self, tmp_path):
        (tmp_path / "results_a.json").write_text('{"accuracy": 1}')
        with pytest.raises(ReportError, match="is not a results file"):
            search_runs(tmp_path)

    def test_a_damaged_file_is_not_left_out(self, tmp_path):
        write_run(tmp_path / "a", {"t": [1.0]})
        damaged = write_run(tmp_path / "b", {"t": [1.0]})
        damaged.write_text(damaged.read_text()[:-30])
        with pytest.raises(ReportError, match="not complete JSON"):
            search_runs(tmp_path)

    @pytest.mark.parametrize("name", ["a" * 300, "a\x00b", "x/" * 3000])
    def test_paths_that_cannot_be(self, name):
        for text in (name, f"{name}=x", f"x={name}"):
            with pytest.raises(ReportError, match=r"cannot be read|does not exist|is no path"):
                find_run(text)
            assert cli.main(["compare", text, text + "2"]) == 1

    def test_unreadable_folders(self, tmp_path):
        """As another user than root, for whom no folder is closed."""
        write_run(tmp_path / "open", {"t": [1.0, 0.0]})
        closed = tmp_path / "closed"
        write_run(closed, {"t": [1.0, 0.0]})
        closed.chmod(0)
        outer = [folder for folder in tmp_path.parents if "pytest" in folder.name]
        modes = [folder.stat().st_mode for folder in outer]
        try:
            for folder in outer:
                folder.chmod(0o755)
            done = subprocess.run(
                [sys.executable, "-c", AS_ANOTHER_USER, str(tmp_path), str(closed)],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
        finally:
            closed.chmod(0o755)
            for folder, mode in zip(outer, modes, strict=True):
                folder.chmod(mode)
        assert done.returncode == 0, done.stderr
        first, *others = done.stdout.splitlines()
        assert first == f"1 ['{closed} cannot be read: Permission denied; left out.']"
        refused = f"{closed} cannot be read: Permission denied."
        assert others == [refused, refused, f"{closed / 'x'} cannot be read: Permission denied."]


def test_parsing_keeps_numbers_that_python_can_count_with():
    assert parse('{"a": [1, 12345678901234567890123, 1e400]}') == {"a": [1, 12345678901234567890123.0, float("inf")]}
    assert parse("9" * 5000) == float("inf")
    for deep in (DEEP, '{"a":' * 200 + "1" + "}" * 200):
        with pytest.raises(RecursionError):
            parse(deep)
