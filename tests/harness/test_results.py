"""What cannot be written is told before anything is answered, or saved elsewhere; the status is never 0 then."""

import json
import logging
import math
import sys
from pathlib import Path

import lm_eval.utils
import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import _index

YAML = """\
task: {name}
class: !function ttt_harness.TTTTask
dataset_path: json
dataset_kwargs: {{data_files: rows.jsonl}}
test_split: train
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: answer
output_type: generate_until
metadata: {{k: 2, version: 1}}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs `lm_eval --model ttt_random` in a folder of its own; returns the status and the lines of stderr."""
    rows = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(tmp_path, "sums")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))
    defaults, build = Path(_index.__file__).parent, _index.TaskIndex.build
    # lm-eval's own tasks, which nothing here needs, take 12 s to index.
    monkeypatch.setattr(
        _index.TaskIndex, "build", staticmethod(lambda paths, **kw: build([p for p in paths if p != defaults], **kw))
    )

    def run(*options, tasks="sums"):
        argv = ["lm_eval", "run", "--model", "ttt_random", "--tasks", tasks, "--include_path", ".", *options]
        monkeypatch.setattr(sys, "argv", argv)
        # else lm-eval's handler keeps the stderr of the first test
        monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
        for attribute, value in {"handlers": [], "propagate": False, "level": logging.INFO}.items():
            monkeypatch.setattr(logging.getLogger("lm_eval"), attribute, value)
        capfd.readouterr()
        try:
            cli_evaluate()
        except SystemExit as end:
            return end.code, capfd.readouterr().err.splitlines()
        return 0, capfd.readouterr().err.splitlines()

    return run


def write_task(folder, name, more=""):
    (folder / f"{name}.yaml").write_text(YAML.format(name=name) + more)


def written(folder):
    return sorted(path.name.partition("_2")[0] for path in folder.rglob("*") if path.is_file())


def test_a_run_leaves_results_and_nothing_else(command, tmp_path):
    status, _ = command("--output_path", "out", "--log_samples", "--model_args", "pretrained=m")
    assert status == 0
    assert written(tmp_path / "out") == ["results", "samples_sums"]
    assert written(tmp_path / "out" / "m") == ["results", "samples_sums"]
    assert not (tmp_path / "cache").exists()


def test_a_run_without_a_folder_leaves_nothing(command, tmp_path):
    status, _ = command()
    assert status == 0
    assert written(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("rows.jsonl/out", "Not a directory"),
        ("/dev/full", "Not a directory"),
        ("/dev/full/results.json", "it is a file"),
        ("/proc/results", "No such file or directory"),
        ("x" * 300, "File name too long"),
        ("/".join(["x" * 200] * 20) + "/" + "y" * 90, "File name too long"),
        (f"{'x' * 240}.json", "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_answered(command, monkeypatch, output, reason):
    from ttt_harness.harness.answer_log import AnswerLog

    monkeypatch.setattr(AnswerLog, "add", lambda *_: pytest.fail("answered"))
    status, err = command("--output_path", output)
    assert status == 1
    assert err[-1].startswith("error: the results cannot be written to ")
    assert err[-1].endswith(f"({reason}); make room there, or name another folder with --output_path.")
    assert "Traceback" not in "\n".join(err)


@pytest.mark.parametrize("name", ["x" * 230])
def test_samples_that_could_not_be_named_are_told_before_anything_is_answered(command, tmp_path, name):
    write_task(tmp_path, name)
    status, err = command("--output_path", "out", "--log_samples", tasks=name)
    assert status == 1
    assert err[-1].startswith(f"error: the samples of {name} cannot be written to out")
    assert command("--output_path", "out", tasks=name)[0] == 0


def test_results_that_cannot_be_written_in_the_end_are_saved_elsewhere(command, tmp_path):
    (tmp_path / "functions.py").write_text(
        "import pathlib, shutil\n"
        "def remove_folder(doc, results):\n"
        "    if pathlib.Path('out').is_dir():\n"
        "        shutil.rmtree('out')\n"
        "        pathlib.Path('out').touch()\n"
        "    return {'acc': 1.0}\n"
    )
    write_task(tmp_path, "sums", "process_results: !function functions.remove_folder\nmetric_list: [{metric: acc}]\n")
    status, err = command("--output_path", "out", "--log_samples", "--model_args", "pretrained=m")
    assert status == 1
    saved = tmp_path / "cache" / "unwritten" / "m"
    assert written(saved) == ["results", "samples_sums"]
    assert json.loads(next(saved.glob("results_*")).read_text())["results"]["sums"]["acc,none"] == 1.0
    samples = next(saved.glob("samples_*")).read_text().splitlines()
    assert len(samples) == 18
    assert json.loads(samples[0])["arguments"]["gen_args_0"]["arg_0"].startswith("Q: ")
    assert err[-1] == f"error: the results could not be written to out/m (Not a directory); they are in {saved}."
    assert not [line for line in err if "Could not save" in line or "Traceback" in line]


@pytest.mark.parametrize("text", ["a \ud800 surrogate"])
def test_samples_that_no_file_takes_are_told(command, tmp_path, text):
    rows = [{"question": f"{text} {n}", "answer": str(n)} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, err = command("--output_path", "out", "--log_samples")
    assert status == 1
    assert err[-1].startswith("error: ")


FAILING = {
    "process_results": (
        "calls = []\n"
        "def process_results(doc, results):\n"
        "    calls.append(1)\n"
        "    return {'acc': 1 // (len(calls) - 15)}\n",
        "process_results: !function failing.process_results\nmetric_list: [{metric: acc}]\n",
    ),
    "aggregation": (
        "def aggregate(scores):\n    return 1 // (len(scores) - 18)\n",
        "metric_list: [{metric: exact_match, aggregation: !function failing.aggregate, higher_is_better: true}]\n",
    ),
}


@pytest.mark.parametrize("where", FAILING)
def test_a_task_that_cannot_be_scored_costs_the_others_nothing(command, tmp_path, where):
    code, yaml = FAILING[where]
    (tmp_path / "failing.py").write_text(code)
    write_task(tmp_path, "fails", yaml)
    status, err = command("--output_path", "out", "--log_samples", "--model_args", "pretrained=m", tasks="fails,sums")
    assert status == 1
    assert err[-1].startswith("error: fails (")
    assert "ZeroDivisionError" in err[-1]
    assert "Traceback" not in "\n".join(err)
    results = json.loads(next((tmp_path / "out" / "m").glob("results_*")).read_text())["results"]
    assert results["sums"]["exact_match,none"] == 0
    assert all(
        math.isnan(value) for key, value in results["fails"].items() if key.endswith(",none") and "std" not in key
    )
    (note,) = (line for line in err if line.startswith("note: the 36 answers of this run are in "))
    kept = [json.loads(line) for line in Path(note.rpartition(" ")[2]).read_text().splitlines()]
    assert {(answer["task"], answer["kind"]) for answer in kept} == {(n, "generate_until") for n in ("fails", "sums")}
    assert all(answer["prompt"].startswith("Q: ") and answer["answer"] == "" for answer in kept)
    assert {answer["doc_id"] for answer in kept} == set(range(18))


def test_debugging_adds_the_tracebacks_of_what_failed(command, tmp_path, monkeypatch):
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "DEBUG")
    code, yaml = FAILING["aggregation"]
    (tmp_path / "failing.py").write_text(code)
    write_task(tmp_path, "fails", yaml)
    status, err = command("--output_path", "out", tasks="fails")
    assert status == 1
    assert [line for line in err if line.endswith(", in aggregate")]
    assert err[-1].startswith("error: fails (")
