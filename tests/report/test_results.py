"""Reading result files: lm-eval's own, and damaged ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.runs import ttt, write_run
from ttt_harness.errors import ReportError
from ttt_harness.report.compare import compare_runs
from ttt_harness.report.results import Metric, find_run, find_runs, read_run, same_run

DOCUMENTS = [{"input": f"{i} and True is", "target": str(bool(i % 2))} for i in range(6)]

TASK = """
task: toy_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {output_type}
doc_to_text: "Q: {{{{input}}}}\\nA:"
doc_to_target: "{{{{target}}}}"
metadata: {{version: 1.0, k: 10, seed: 42}}
"""


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """Two runs that lm-eval itself wrote: a generating task with two filters, a multiple-choice task, and a group."""
    folder = tmp_path_factory.mktemp("real")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    (folder / "choice.yaml").write_text(
        TASK.format(name="choice", data=data, output_type="multiple_choice") + 'doc_to_choice: ["True", "False"]\n'
    )
    (folder / "text.yaml").write_text(
        TASK.format(name="text", data=data, output_type="generate_until")
        + 'generation_kwargs: {until: ["\\nQ:"], max_gen_toks: 8}\n'
        + "filter_list: [{name: strict, filter: [{function: take_first}]}, "
        + "{name: loose, filter: [{function: lowercase}, {function: take_first}]}]\n"
        + "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "group.yaml").write_text(
        "group: toy\ntask: [toy_choice, toy_text]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "0"}
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "lm_eval", "--model", "dummy", "--include_path", str(folder), "--tasks", "toy"]
        command += ["--output_path", str(folder / seed), "--log_samples", "--seed", seed]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.integration
def test_real_results_are_read(real_runs):
    pytest.importorskip("lm_eval")
    run, remarks = find_run(real_runs / "1")
    assert remarks == []
    assert run.tasks == ["toy_choice", "toy_text"]
    assert run.groups == {"toy": ["toy_choice", "toy_text"]}
    assert run.source == "dummy"
    assert run.lm_eval_version == "0.4.13"
    assert run.questions("toy_choice") == 6
    assert run.metadata("toy_choice", "seed") == 42
    assert run.metrics("toy_choice") == [Metric("acc", "none"), Metric("acc_norm", "none")]
    assert run.metrics("toy_text") == [Metric("exact_match", "strict"), Metric("exact_match", "loose")]

    choice = run.samples("toy_choice", "none")
    assert [s.doc_id for s in choice] == list(range(6))
    assert {s.answer for s in choice} <= {"True", "False"}
    assert all((s.answer == s.target) == (s.values["acc"] == 1) for s in choice)
    assert len(choice[0].responses) == 2

    text = run.samples("toy_text", "strict")
    assert text[0].prompt == "Q: 0 and True is\nA:"
    assert (text[0].answer, text[0].target, text[0].responses) == ("lol", "False", ("lol",))
    assert run.samples("toy_text", "missing") == []


@pytest.mark.integration
def test_real_results_are_compared(real_runs):
    base, other = (find_run(real_runs / seed)[0] for seed in "12")
    assert not same_run(base, other)
    against = compare_runs(base, [other]).others[0]
    rows = {row.name: row for row in against.rows}
    assert rows["toy_text"].difference.value == 0
    assert rows["toy_choice"].difference.test == "mcnemar_exact"
    assert against.warnings == ()


def test_ttt_settings_and_fits(tmp_path):
    run = read_run(write_run(tmp_path, {"t": [1.0]}, source="ttt_vllm", ttt=ttt(["t"], lr=5e-5)))
    assert (run.method, run.settings["lr"]) == ("ttt", 5e-5)
    fit = run.fit("t")
    assert (fit.train_tokens, fit.reused, fit.fit_seconds) == (12000, False, 12.3)
    assert len(fit.losses) == 8
    assert run.fit("u") is None


@pytest.mark.parametrize("damage", [None, [], "text", {"settings": 3, "tasks": []}, {"tasks": {"t": {"losses": "no"}}}])
def test_odd_ttt_entries_are_no_error(tmp_path, damage):
    run = read_run(write_run(tmp_path, {"t": [1.0]}, ttt=ttt(["t"])))
    run.raw["config"]["ttt"] = damage
    assert run.method == "10-shot"
    fit = run.fit("t")
    assert fit is None or fit.losses == []


def test_method_of_other_models(tmp_path):
    assert read_run(write_run(tmp_path, {"t": [1.0]}, shots=0)).method == "0-shot"
    assert read_run(write_run(tmp_path, {"t": [1.0]}, change={"n-shot": {}})).method == "vllm"


def test_nested_groups_and_old_layout(tmp_path):
    path = write_run(tmp_path, {"t": [1.0], "u": [0.0], "v": [1.0]})
    raw = json.loads(path.read_text())
    raw["results"] |= {"outer": {"acc,answer": 0.6}, "inner": {"acc,answer": 0.5}}
    # older versions list each task with an empty list of subtasks; and a cycle must not hang
    raw["group_subtasks"] = {"outer": ["inner", "v"], "inner": ["t", "u", "outer"], "t": [], "u": [], "v": []}
    path.write_text(json.dumps(raw))
    run = read_run(path)
    assert run.tasks == ["t", "u", "v"]
    assert run.groups == {"outer": ["t", "u", "v"], "inner": ["t", "u", "v"]}


def test_several_runs_of_a_folder_oldest_first(tmp_path):
    paths = [write_run(tmp_path / name, {"t": [1.0]}) for name in ("b", "a", "c")]
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [run.path for run in find_runs(tmp_path)] == paths


def test_a_renamed_results_file_keeps_its_samples(tmp_path):
    path = write_run(tmp_path, {"t": [1.0, 0.0]})
    renamed = path.rename(path.with_name("base.json"))
    assert len(read_run(renamed).samples("t", "answer")) == 2


def test_samples_inside_the_results(tmp_path):
    path = write_run(tmp_path, {"t": [1.0, 0.0]})
    (samples,) = path.parent.glob("samples_*")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        line["arguments"] = [[line["arguments"]["gen_args_0"]["arg_0"], {"until": ["\n"]}]]
    raw = json.loads(path.read_text())
    raw["samples"] = {"t": lines}
    samples.unlink()
    path.write_text(json.dumps(raw))
    run = read_run(path)
    assert run.has_samples("t")
    assert run.samples("t", "answer")[0].prompt.endswith("A:")


def test_line_separators_in_answers_do_not_cut_lines(tmp_path):
    path = write_run(tmp_path, {"t": [1.0, 0.0]}, answer=lambda _t, _i, _s: "a\u2028b\u0085c\x0bd")
    assert [s.answer for s in read_run(path).samples("t", "answer")] == ["a\u2028b\u0085c\x0bd"] * 2


def test_unreadable_file(tmp_path):
    path = tmp_path / "results.json"
    path.mkdir()
    with pytest.raises(ReportError, match="holds no results file"):
        find_run(path)
    with pytest.raises(ReportError, match="cannot be read"):
        read_run(Path(path))
