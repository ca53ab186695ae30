"""What is wrong with a task is said in one sentence before any model is asked, and nothing else is changed by looking.

Every task here is written to a folder as a user would, and run by lm-eval itself with a model that counts what it is
asked. `TTT_CASES_DIR` may name a folder of more inputs: one folder each, with a task and the arguments in `cmd`.
"""

import copy
import csv
import json
import math
import os
import pickle
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from ttt_harness.errors import TTTError


class Counting(LM):
    """Answers, and counts the calls."""

    def __init__(self, answer=" yes"):
        super().__init__()
        self.answer, self.calls = answer, 0

    def generate_until(self, requests, disable_tqdm=False):  # noqa: ARG002
        self.calls += 1
        return [self.answer(request) if callable(self.answer) else self.answer for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):  # noqa: ARG002
        self.calls += 1
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


GENERATE = """
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: a
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metadata: {k: 3}
"""
CHOOSE = """
output_type: multiple_choice
doc_to_text: "Q: {{q}}\\nA:"
doc_to_target: g
doc_to_choice: c
metadata: {k: 3}
"""
ROWS = [{"q": f"q{i}?", "a": f"answer {i}"} for i in range(9)]
CHOSEN = [{"q": f"q{i}?", "c": ["red", "green"], "g": i % 2} for i in range(9)]


def write(folder, yaml, rows, functions=""):
    with (folder / "d.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "functions.py").write_text(functions, encoding="utf-8")
    head = "task: mine\nclass: !function ttt_harness.TTTTask\ndataset_path: json\n"
    if "dataset_kwargs" not in yaml:
        head += "dataset_kwargs: {data_files: d.jsonl}\n"
    (folder / "mine.yaml").write_text(head + yaml, encoding="utf-8")
    return folder


def evaluate(folder, model=None, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=options.pop("metadata", None))
    return simple_evaluate(model or Counting(), tasks=["mine"], task_manager=manager, bootstrap_iters=0, **options)


def refusal(folder, **options):
    """The sentence, after a check that it came before the model was asked, and names the task and its file."""
    model = Counting()
    with pytest.raises(TTTError) as raised:
        evaluate(folder, model, **options)
    message = str(raised.value)
    assert not model.calls
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert len(message) < 1000
    assert "\x1b" not in message
    assert str(pickle.loads(pickle.dumps(raised.value))) == message
    return message


def drawn(folder, question, seed):
    """Whether a question is among the demonstrations."""
    manager = TaskManager(include_path=str(folder), include_defaults=False, metadata={"seed": seed})
    return question in [doc["q"] for doc in manager.load(["mine"])["tasks"]["mine"].fewshot_docs()]


def without(yaml, added):
    """A YAML without the keys that `added` has as well."""
    keys = {line.partition(":")[0] for line in added.splitlines()}
    return "".join(f"{line}\n" for line in yaml.splitlines() if line.partition(":")[0] not in keys)


def changed(rows, at, **values):
    rows = copy.deepcopy(rows)
    for index in at if isinstance(at, list) else [at]:
        rows[index].update(values)
    return rows


# A and B: what is tried at scoring, and what users' code raises


METRIC = "metric_list: [{{metric: {}, aggregation: {}, higher_is_better: true}}]\n"
FILTER = "filter_list: [{{name: x, filter: [{}]}}]\n"


@pytest.mark.parametrize(
    ("yaml", "functions", "telling"),
    [
        (METRIC.format("exact_mach", "mean"), "", ["no metric 'exact_mach'", "Did you mean 'exact_match'?"]),
        (METRIC.format("exact_match", "average"), "", ["no aggregation 'average'", "mean, median"]),
        (METRIC.format("exact_match", "maen"), "", ["Did you mean 'mean'?"]),
        ("metric_list: [{aggregation: mean}]\n", "", ["{'aggregation': 'mean'}", "mapping with a metric"]),
        ("metric_list: []\n", "", ["metric_list is empty"]),
        ("metric_list: exact_match\n", "", ["metric_list is 'exact_match'", "a list"]),
        ("metric_list: [{metric: score}]\nprocess_results: !function functions.s\n", "s = len", ["add one, e.g."]),
        (METRIC.format("!function functions.f", "mean"), "def f(**_): raise ValueError('no')", ["scoring", ": no)"]),
        (METRIC.format("exact_match", "!function functions.f"), "def f(x): return x[9]", ["aggregation", "IndexError"]),
        (METRIC.format("exact_match", "!function functions.f"), "def f(x): return 'ok'", ["gives 'ok'", "no number"]),
        (METRIC.format("exact_match", "!function functions.f"), "def f(x): return None", ["gives None, and no number"]),
        ("process_results: !function functions.f\n", "def f(d, r): return d['gold']", ["process_results", "'gold'"]),
        ("process_results: !function functions.f\n", "def f(doc, r): return 1.0", ["gives 1.0", "mapping of metrics"]),
        ("process_results: !function functions.f\n", "def f(doc): return {}", ["TypeError", "positional argument"]),
        ("process_results: functions.f\n", "", ["process_results is 'functions.f'", "!function"]),
        (FILTER.format("{function: strip}"), "", ["{'function': 'strip'}", "remove_whitespace"]),
        (FILTER.format("{function: regex, regex_pattern: '('}"), "", ["the filter 'x'", "unterminated subpattern"]),
        (FILTER.format("{function: take_first_k}"), "", ["the filter 'x'", "KeyError: 'k'"]),
        (FILTER.format("{function: bbh_answer, rule: lettr}"), "", ["no rule 'lettr'"]),
        (FILTER.format("{function: custom, filter_fn: !function functions.f}"), "def f(r, d): return []", ["0 of"]),
        ("filter_list: [{name: x}]\n", "", ["the steps None", "take_first"]),
        ("filter_list: [{filter: [{function: take_first}]}]\n", "", ["mapping with a name"]),
        ("filter_list: " + str([{"name": "x", "filter": [{"function": "take_first"}]}] * 2) + "\n", "", ["twice"]),
        ("process_docs: !function functions.f\n", "def f(docs): raise KeyError('col')", ["process_docs", "'col'"]),
        ("process_docs: !function functions.f\n", "def f(docs): return None", ["process_docs", "TypeError"]),
        ("process_docs: !function functions.f\n", "def f(docs): return [1, 2]", ["process_docs"]),
        ("metadata:\nfewshot_config: {samples: !function functions.f}\n", "def f(): return 1 / 0", ["ZeroDivision"]),
        ("metadata:\nfewshot_config: {samples: [1]}\n", "", ["fewshot_config.samples", "mappings"]),
        ("description: '{{nothing}}'\n", "", ["'nothing' is undefined", "row's columns are q, a"]),
        ("gen_prefix: '{{q | explode}}'\n", "", ["explode"]),
        (METRIC.format("exact_match", "mean").replace("}]", ", ignore_cas: true}]"), "", ["argument 'ignore_cas'"]),
        ("metric_list: [{metric: bleu}, {metric: bleu, aggregation: median}]\n", "", ["bleu twice", "the last alone"]),
        ("process_results: !function functions.f\n", "import numpy\ndef f(d, r): return {'x': numpy.ones(2)}",
         ["the aggregation of the metric x gives array"]),
        ("process_results: !function functions.f\n", "def f(d, r): return {'x': 'yes'}", ["aggregation of the metric"]),
        ("process_results: !function functions.f\n", "def f(d, r): exit()", ["process_results", "SystemExit"]),
        ("process_results: !function functions.f\n", "raise SystemExit(0)", ["cannot be read", "SystemExit"]),
        ("doc_to_target: answer\n", "", ["doc_to_target is 'answer'", "no column", "q, a"]),
        ("doc_to_text: qq\n", "", ["doc_to_text is 'qq'", "no column", "Did you mean 'q'?"]),
        ("doc_to_text: !function functions.f\n", "def f(doc): exit()", ["doc_to_text fails", "SystemExit"]),
        ("gen_prefix: n\nprocess_docs: !function functions.f\n",
         "def f(docs): return docs.map(lambda row: {**row, 'n': 3})", ["'n' is 3", "where a text belongs"]),
    ],
)  # fmt: skip
def test_scoring_is_tried_before_the_model_is_asked(tmp_path, yaml, functions, telling):
    message = refusal(write(tmp_path, without(GENERATE, yaml) + yaml, ROWS, functions))
    assert message.startswith((f"mine ({tmp_path}/mine.yaml)", f"the task in {tmp_path}/mine.yaml"))
    for words in telling:
        assert words in message


@pytest.mark.parametrize(
    ("raises", "telling"),
    [
        ("raise RuntimeError('x' * 5000)", "RuntimeError: xxx"),
        ("raise RuntimeError('first\\nsecond')", "(RuntimeError: first)"),
        ("raise RuntimeError", "(RuntimeError)"),
        ("raise RuntimeError('\\x1b[31mred')", "RuntimeError: \\x1b[31mred"),
        ("return doc['c']", "KeyError: 'c'"),
        ("return int('9' * 5000)", "ValueError: Exceeds the limit"),
        ("return f(doc)", "RecursionError"),
        ("return None", "is None, which is no text"),
        ("return 7", "is 7, which is no text"),
    ],
)
def test_what_a_function_raises_names_row_value_and_cause(tmp_path, raises, telling):
    functions = f"def f(doc):\n    if doc['q'] != 'q3?':\n        return doc['q']\n    {raises}\n"
    yaml = GENERATE.replace('"Q: {{q}}\\nA:"', "!function functions.f")
    for seed in (1, 2, 3):  # the row is a demonstration, or is evaluated
        message = refusal(write(tmp_path, yaml, ROWS, functions), metadata={"seed": seed})
        assert telling in message
        assert "row 4 of the split 'train'" in message
        if "is no text" not in telling:
            assert "'q': 'q3?'" in message


def test_the_traceback_is_chained_for_who_asks_for_it(tmp_path):
    folder = write(tmp_path, GENERATE + "process_docs: !function functions.f\n", ROWS, "def f(docs):\n    1 / 0\n")
    with pytest.raises(TTTError) as raised:
        evaluate(folder)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("functions", "telling"),
    [
        ("def f(doc, r):\n    assert r[0] != ' yes', 'a real answer'\n    return {'acc': 1.0}", "a real answer"),
        ("def f(doc, r): return {'acc': 1.0} if r[0] != ' yes' else None", "process_results gives None for"),
    ],
)
def test_what_only_real_answers_bring_about_is_a_sentence_too(tmp_path, functions, telling):
    yaml = GENERATE + "process_results: !function functions.f\n" + METRIC.format("acc", "mean")
    model = Counting()
    with pytest.raises(TTTError) as raised:
        evaluate(write(tmp_path, yaml, ROWS, functions), model)
    assert model.calls
    assert telling in str(raised.value)
    assert "of the split 'train'" in str(raised.value)


def test_trying_changes_nothing(tmp_path):
    functions = """
import random
def scores(doc, results):
    return {"acc": float(results[0].strip() == doc["a"]), "luck": random.random()}
def last(values): return values[-1]
"""
    yaml = GENERATE + (
        "process_results: !function functions.scores\n"
        "metric_list: [{metric: acc, aggregation: mean}, {metric: luck, aggregation: !function functions.last}]\n"
    )
    task = TaskManager(include_path=str(write(tmp_path, yaml, ROWS, functions)), include_defaults=False).load(["mine"])
    task = task["tasks"]["mine"]
    random.seed(5)
    np.random.seed(5)
    task.build_all_requests()
    after = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    assert after == (random.random(), np.random.rand())
    assert all(instance.resps == [] and instance.filtered_resps == {} for instance in task.instances)
    assert list(task.aggregation()) == ["acc", "luck"]


def test_errors_of_the_mean_are_still_computed(tmp_path):
    write(tmp_path, GENERATE + METRIC.format("exact_match", "mean"), ROWS)
    results = simple_evaluate(
        Counting(lambda request: "" if "q1?" in request.args[0][-9:] else f" {request.doc['a']}"),
        tasks=["mine"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=10,
    )["results"]["mine"]
    assert isinstance(results["exact_match_stderr,none"], float)


@pytest.mark.filterwarnings("ignore:A single label:UserWarning")  # in a resample, of matthews_corrcoef
@pytest.mark.parametrize("aggregation", ["median", "perplexity", "matthews_corrcoef", "nanmean"])
def test_standard_errors_are_drawn_as_for_other_tasks(tmp_path, monkeypatch, aggregation):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of lm-eval
    functions = "def f(doc, r):\n    n = int(doc['a'][-1]) & 1\n    return {'acc': (n, n) if %s else n / 2}"
    functions %= aggregation == "matthews_corrcoef"
    yaml = GENERATE + "process_results: !function functions.f\n" + METRIC.format("acc", aggregation)
    results = simple_evaluate(
        Counting(),
        tasks=["mine"],
        task_manager=TaskManager(include_path=str(write(tmp_path, yaml, ROWS, functions)), include_defaults=False),
        bootstrap_iters=20,
    )["results"]["mine"]
    assert isinstance(results["acc_stderr,none"], float)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_standard_error_that_fails_is_one_sentence(tmp_path):
    functions = "def f(doc, r): return {'acc': 1.0 if r[0] != ' yes' else None}\ndef g(values): return 0.5"
    yaml = GENERATE + "process_results: !function functions.f\n" + METRIC.format("acc", "mean")
    with pytest.raises(TTTError, match="of the metric acc over 6 scores fails"):
        simple_evaluate(
            Counting(),
            tasks=["mine"],
            task_manager=TaskManager(include_path=str(write(tmp_path, yaml, ROWS, functions)), include_defaults=False),
        )


@pytest.mark.parametrize("at", [1, 5, 8])
@pytest.mark.parametrize("column", ["q", "a"])
def test_a_row_that_is_no_utf8_is_named(tmp_path, at, column):
    folder = write(tmp_path, GENERATE, changed(ROWS, at, **{column: "caf\u00e9"}))
    data = (folder / "d.jsonl").read_text().replace("\\u00e9", "\u00e9")
    (folder / "d.jsonl").write_bytes(data.encode("latin-1"))
    message = refusal(folder)
    assert "UnicodeDecodeError" in message
    if "its declaration" not in message:  # lm-eval reads the first row
        assert f"row {at + 1} of the split 'train' cannot be read" in message


def test_data_that_cannot_be_read_are_told_by_their_reader(tmp_path):
    folder = write(tmp_path, GENERATE, ROWS)
    with (folder / "d.jsonl").open("a") as file:
        file.write("{bad\n")
    assert "JSON parse error" in refusal(folder)


def test_splits_may_be_lists_of_rows(tmp_path):
    functions = f"def f(**_): return {{'test': {ROWS!r}}}"
    folder = write(tmp_path, GENERATE + "custom_dataset: !function functions.f\n", ROWS, functions)
    assert evaluate(folder)["n-samples"]["mine"]["effective"] == 6


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\u202eb", "a\x9bb"])
def test_a_name_that_a_terminal_would_obey_is_refused(tmp_path, name):
    folder = write(tmp_path, GENERATE, ROWS)
    text = (folder / "mine.yaml").read_text().replace("task: mine", f"task: {json.dumps(name)}")
    (folder / "mine.yaml").write_text(text)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(TTTError, match="no terminal prints") as raised:
        manager.load([name])
    assert name not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "instead", "telling"),
    [
        ("class: !function ttt_harness.TTTTask", "class: !function ttt_harness.TTTask", "no function 'TTTask'"),
        ("class: !function ttt_harness.TTTTask", "class: ttt_harness.TTTTask", "write class: !function"),
        ("task: mine", "task: 5", "the name 5, which is no text"),
        ("task: mine", "task: yes", "the name True, which is no text"),
    ],
)
def test_a_head_that_lm_eval_would_fall_over_is_refused(tmp_path, line, instead, telling):
    folder = write(tmp_path, GENERATE, ROWS)
    (folder / "mine.yaml").write_text((folder / "mine.yaml").read_text().replace(line, instead))
    with pytest.raises(TTTError, match=telling) as raised:
        TaskManager(include_path=str(folder), include_defaults=False).load(["mine"])
    assert f"{folder}/mine.yaml" in str(raised.value)


# D and F: data that does not fit, and values that lm-eval reads as others


@pytest.mark.parametrize("at", [1, 5, [0, 2, 4, 6, 8]])
@pytest.mark.parametrize("missing", [None, "", "  ", math.nan])
@pytest.mark.parametrize("template", ["a", "'{{a}}'", "'The answer is {{a}}'", "!function functions.f"])
def test_rows_without_an_answer_are_named(tmp_path, at, missing, template):
    if template.startswith("'The") and isinstance(missing, str):
        pytest.skip("the answer is not empty then")
    rows = changed([{**row, "a": 1.5} for row in ROWS] if missing != missing else ROWS, at, a=missing)
    yaml = GENERATE.replace("doc_to_target: a", f"doc_to_target: {template}")
    message = refusal(write(tmp_path, yaml, rows, "def f(doc): return doc['a']"))
    numbers = [index + 1 for index in at] if isinstance(at, list) else [at + 1]
    *most, last = map(str, numbers)
    assert (f"rows {', '.join(most)} and {last} of" if most else f"row {last} of") in message
    assert "null or a blank text" in message


@pytest.mark.parametrize("limit", [1, 2])
def test_rows_that_are_not_evaluated_may_be_what_they_like(tmp_path, limit):
    folder = write(tmp_path, GENERATE + "fewshot_config: {samples: [{q: x, a: y}]}\n", changed(ROWS, [5, 6], a=None))
    folder_yaml = (folder / "mine.yaml").read_text().replace("metadata: {k: 3}\n", "")
    (folder / "mine.yaml").write_text(folder_yaml)
    assert evaluate(folder, limit=limit)["n-samples"]["mine"]["effective"] == limit
    assert evaluate(folder, samples={"mine": [8, 0]})["n-samples"]["mine"]["effective"] == 2
    assert "rows 6 and 7" in refusal(folder)


@pytest.mark.parametrize(
    ("yaml", "rows", "telling"),
    [
        (CHOOSE, changed(CHOSEN, 4, g="Red"), ["row 5 of", "'Red'", "(the nearest is 'red')"]),
        (CHOOSE, changed(CHOSEN, 4, g="rde"), ["(the nearest is 'red')"]),
        (CHOOSE, changed(CHOSEN, 4, g=2), ["row 5 of", "the label 2", "2 choices"]),
        (CHOOSE, changed(CHOSEN, 4, g=-1), ["row 5 of", "the label -1"]),
        (CHOOSE.replace(": g", ": '{{g}}'"), changed(CHOSEN, 4, g=3), ["the label 3"]),
        (CHOOSE.replace(": g", ": '{{g + 0.0}}'"), CHOSEN, ["none of its choices"]),
        (CHOOSE.replace(": g", ": '{{c.index(g)}}'"), CHOSEN, ["doc_to_target fails", "is not in list"]),
        (CHOOSE.replace(": g", ": '{{[g, [g]][q < \"q4\"]}}'"), CHOSEN, ["the first row", "or one answer"]),
        (CHOOSE.replace("doc_to_choice: c", "doc_to_choice: [no, yes]"), CHOSEN, ["choice 0 of every row is False"]),
        (CHOOSE.replace("doc_to_choice: c", "doc_to_choice: [1, 2]"), CHOSEN, ["choice 0 of every row is 1"]),
        (CHOOSE.replace("doc_to_choice: c", "doc_to_choice: []"), CHOSEN, ["every row has no choices"]),
        (CHOOSE.replace("doc_to_choice: c", "doc_to_choice: {a: off, b: on}"), CHOSEN, ["every row is False"]),
        (CHOOSE.replace("doc_to_choice: c", "doc_to_choice: 3"), CHOSEN, ["doc_to_choice is 3"]),
        (CHOOSE, [{**row, "c": [True, False]} for row in CHOSEN], ["is True, which is no text"]),
        (CHOOSE, [{**row, "c": [1, 2]} for row in CHOSEN], ["is 1", "map('string')"]),
        (CHOOSE, [{**row, "c": [{"text": "x"}, {"text": "y"}]} for row in CHOSEN], ["{{c | map(attribute='text')"]),
        (CHOOSE, [{**row, "c": {"text": ["x", "y"], "label": ["A"]}} for row in CHOSEN], ["{{c.text}}"]),
        (CHOOSE, [{**row, "c": "red, green"} for row in CHOSEN], ["'red, green'", "no list of texts"]),
        (CHOOSE, changed(CHOSEN, 4, c=["", "x"]), ["choice 0 of", "row 5 of", "an empty text"]),
        (CHOOSE, changed(CHOSEN, 4, c=["x", None]), ["choice 1 of", "row 5 of", "an empty cell"]),
        (CHOOSE, changed(CHOSEN, 4, c=[]), ["row 5 of", "has no choices"]),
        (CHOOSE.replace(": c", ": \"['{{c[0]}}', 'x']\""), changed(CHOSEN, 4, c=["Tom's"]), ["row 5", "Tom's", "{{["]),
        (CHOOSE.replace(": c", ": '{{c[0]}}, x'"), CHOSEN, ["'red, x'", "no list of texts"]),
        (CHOOSE.replace("Q: {{q}}\\nA:", "{{g}}"), CHOSEN, ["digits alone"]),
        (CHOOSE + "metric_list: [{metric: bleu}]\n", CHOSEN, ["bleu is not computed for output_type multiple_choice"]),
        (CHOOSE, [{**row, "c": ["1", "2", "3"], "g": "1"} for row in CHOSEN], None),
        (CHOOSE.replace(": g", ": '{{g}}'"), [{**row, "c": ["1", "2"], "g": "1"} for row in CHOSEN], ["the text '1'"]),
        (GENERATE.replace(": a", ": l"), [{**row, "l": [3, 4]} for row in ROWS], ["[3, 4]", "neither a text nor"]),
        (GENERATE.replace(": a", ": l"), [{**row, "l": {"x": "y"}} for row in ROWS], ["{'x': 'y'}", "neither a text"]),
        (GENERATE.replace(": a", ": l"), [{**row, "l": []} for row in ROWS], ["9 rows have no right answer"]),
        (GENERATE + "doc_to_choice: [x, y]\n", ROWS, ["none of its choices ['x', 'y']"]),
    ],
)  # fmt: skip
def test_a_declaration_that_does_not_fit_the_data_is_refused(tmp_path, yaml, rows, telling):
    for seed in (1, 2, 3):
        folder = write(tmp_path, yaml, rows)
        if telling is None:
            assert evaluate(folder, metadata={"seed": seed})
            continue
        message = refusal(folder, metadata={"seed": seed})
        assert f"({tmp_path}/mine.yaml)" in message
        for words in telling:
            assert words in message


@pytest.mark.parametrize(
    ("yaml", "answers"),
    [
        ("'{{a}}'", ["[3, 4]", "[0, 1]"]),
        ("'{{a}}'", ["['x']", "['y', 'z']"]),
        ("'{{a}}'", ["[]", "[ ]"]),
        ("'{{a}}'", ["007", "7"]),
        ("'{{a}}'", ["None", "nan"]),
        ("'{{a}}'", ["{'a': 1}", "(1, 2)"]),
        ("'{{a}}'", ["1" * 5000, "1e400"]),
        ("a", ["[3, 4]", "True"]),
        ("'[{{a}}, {{a}}]'", [3, 4]),
        ("'{{a}}'", [[3, 4], [5]]),
        ("!function functions.f", ["[3, 4]", "0"]),
    ],
)
def test_an_answer_is_fitted_and_scored_as_the_text_that_it_is(tmp_path, yaml, answers):
    rows = changed(changed(ROWS, list(range(9)), a=answers[0]), [1, 3, 5, 7], a=answers[1])
    folder = write(tmp_path, GENERATE.replace("target: a", f"target: {yaml}"), rows, "def f(doc): return doc['a']")

    def text(row):
        return f"[{row['a']}, {row['a']}]" if yaml.startswith("'[") else str(row["a"])

    model = Counting(lambda request: text(request.doc))
    results = evaluate(folder, model)
    assert results["results"]["mine"]["exact_match,none"] == 1.0
    task = TaskManager(include_path=str(folder), include_defaults=False).load(["mine"])["tasks"]["mine"]
    task.build_all_requests()
    learnt = [pair.answer for pair in task.instances[0].support_set.demonstrations]
    assert learnt == [text(row) for row in task.fewshot_docs()]


def test_lists_of_texts_are_several_right_answers_as_in_lm_eval(tmp_path):
    rows = [{**row, "l": [f"one {i}", f"two {i}"]} for i, row in enumerate(ROWS)]
    for template in ("l", "'{{l}}'", "\"['{{l[0]}}', '{{l[1]}}']\""):
        folder = write(tmp_path, GENERATE.replace("target: a", f"target: {template}"), rows)
        model = Counting(lambda request: request.doc["l"][1])
        assert evaluate(folder, model)["results"]["mine"]["exact_match,none"] == 1.0
    functions = "def f(doc): return doc['l'] if doc['q'] != 'q5?' else 'one'"
    folder = write(tmp_path, GENERATE.replace("target: a", "target: !function functions.f"), rows, functions)
    sentences = [refusal(folder, metadata={"seed": seed}) for seed in range(3) if not drawn(folder, "q5?", seed)]
    assert sentences
    assert all("row 6 of" in sentence or "a list of right answers" in sentence for sentence in sentences)


def test_choices_with_quotation_marks_and_questions_of_digits_work(tmp_path):
    rows = [{"q": "17" if i == 4 else f"q{i}", "c": ["Tom's", 'the "b"'], "g": i % 2} for i in range(9)]
    yaml = CHOOSE.replace("Q: {{q}}\\nA:", "{{q}}").replace("doc_to_choice: c", "doc_to_choice: '{{[c[0], c[1]]}}'")
    assert evaluate(write(tmp_path, yaml, rows), metadata={"seed": 2})["n-samples"]["mine"]["effective"] == 6


@pytest.mark.parametrize("kind", ["csv", "nan"])
def test_empty_cells_of_a_table_are_named(tmp_path, kind):
    folder = write(tmp_path, GENERATE + "dataset_kwargs: {data_files: d.csv}\n", [])
    yaml = (folder / "mine.yaml").read_text().replace("dataset_path: json", "dataset_path: csv")
    (folder / "mine.yaml").write_text(yaml)
    with (folder / "d.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["q", "a"])
        writer.writerows([f"q{i}", "" if i == 3 else (i + 0.5 if kind == "nan" else f"x{i}")] for i in range(9))
    assert "row 4 of the split 'train'" in refusal(folder)


# E: arguments, and numbers where words belong


@pytest.mark.parametrize(
    ("options", "telling"),
    [
        ({"limit": 0}, "--limit 0 is not allowed"),
        ({"limit": -1}, "is not allowed"),
        ({"limit": -0.5}, "is not allowed"),
        ({"samples": {"mine": [-1]}}, "--samples has -1"),
        ({"samples": {"mine": [6]}}, "numbered from 0 to 5"),
        ({"samples": {"mine": []}}, "--samples has []"),
        ({"samples": {"mine": [1, 1]}}, "--samples has 1 twice"),
        ({"samples": {"mine": ["1"]}}, "--samples has '1'"),
        ({"samples": {"mine": [1.0]}}, "--samples has 1.0"),
        ({"samples": {"mine": "all"}}, "--samples has 'all'"),
        ({"samples": {"mine": [10**50]}}, "--samples has 1000"),
    ],
)
def test_a_selection_that_selects_nothing_is_refused(tmp_path, options, telling):
    assert telling in refusal(write(tmp_path, GENERATE, ROWS), **options)


@pytest.mark.parametrize(
    "argument",
    [
        {"until": [""]},
        {"until": ""},
        {"until": ["\n", 3]},
        {"until": {"a": "b"}},
        {"max_gen_toks": 0},
        {"max_gen_toks": -3},
        {"max_gen_toks": "8k"},
        {"max_new_tokens": 2.5},
        {"max_tokens": True},
        {"max_completion_tokens": math.nan},
    ],
)
def test_what_can_end_no_answer_is_refused(tmp_path, argument):
    ((name, value),) = argument.items()
    assert f"the generation argument {name}={value!r} is not allowed" in refusal(
        write(tmp_path, GENERATE, ROWS), gen_kwargs=argument
    )


@pytest.mark.parametrize("argument", [{"until": "\n"}, {"until": []}, {"max_gen_toks": 8.0}, {"top_k": -1}])
def test_what_may_end_an_answer_is_let_through(tmp_path, argument):
    results = evaluate(write(tmp_path, GENERATE, ROWS), gen_kwargs=argument)
    assert argument.items() <= results["samples"]["mine"][0]["arguments"][0][1].items()


@pytest.mark.parametrize("samples", [[5, 2, 4], [0], [3, 4, 5], [5, 4, 3, 2, 1, 0]])
def test_samples_keep_their_numbers_in_any_order(tmp_path, samples):
    folder = write(tmp_path, GENERATE, ROWS)
    everything = {sample["doc_id"]: sample["doc"] for sample in evaluate(folder)["samples"]["mine"]}
    chosen = evaluate(folder, samples={"mine": samples})["samples"]["mine"]
    assert [sample["doc_id"] for sample in chosen] == samples
    assert all(sample["doc"] == everything[sample["doc_id"]] for sample in chosen)
    assert all(sample["doc"]["q"] in sample["arguments"][0][0][-12:] for sample in chosen)


@pytest.mark.parametrize("limit", [1, 2.0, 0.5, 100])
def test_a_limit_takes_the_first_rows(tmp_path, limit):
    ids = [sample["doc_id"] for sample in evaluate(write(tmp_path, GENERATE, ROWS), limit=limit)["samples"]["mine"]]
    assert ids == list(range({1: 1, 2.0: 2, 0.5: 3, 100: 6}[limit]))


BOMB = "x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("yaml", "telling"),
    [
        ("dataset_kwargs: abc\n", "dataset_kwargs is 'abc', but has to be a mapping"),
        ("dataset_name: 2020\n", "dataset_name is 2020, but has to be a text"),
        ("test_split: 1\n", "test_split is 1"),
        ("description: no\n", "description is False"),
        ("fewshot_delimiter: 2\n", "fewshot_delimiter is 2"),
        ("repeats: 0\n", "repeats is 0, but has to be a whole number from 1 to 1000"),
        ("repeats: 100000000000000000000\n", "but has to be a whole number from 1 to 1000"),
        ("repeats: ~\n", "repeats is null"),
        ("target_delimiter: ~\n", "target_delimiter is null"),
        ("fewshot_config: {target_delimiter: ~}\n", "fewshot_config.target_delimiter is null"),
        ("unsafe_code: maybe\n", "unsafe_code is 'maybe'"),
        ("doc_to_image: []\n", "asks about image"),
        ('test_split: "\\e[31m"\n', "no split '\\x1b[31m'"),
        ("repeats: two\n", "repeats is 'two'"),
        ("num_fewshot: three\n", "num_fewshot is 'three'"),
        ("num_fewshot: -1\n", "num_fewshot is -1"),
        ("output_type: 3\n", "output_type is 3"),
        ("process_docs: drop\n", "process_docs is 'drop', but has to be a function"),
        ("generation_kwargs: [1]\n", "generation_kwargs is [1]"),
        ("generation_kwargs: {temperature: hot}\n", "could not convert string to float: 'hot'"),
        ("fewshot_config: 3\n", "fewshot_config is 3"),
        ("fewshot_config: {doc_to_text: 1}\n", "fewshot_config.doc_to_text is 1"),
        ("1: 2\n", "the key 1 is no text"),
        ("yes: 2\n", "the key True is no text"),
        ("generation_kwargs: {1: 2}\n", "the key 1 in generation_kwargs is no text"),
        ("metric_list: [{metric: exact_match, aggregation: mean, 3: x}]\n", "the key 3 in metric_list is no text"),
        ("metadata: [{version: 1}, {k: 3}]\n", "metadata is [{'version': 1}, {'k': 3}], but has to be a mapping"),
        ("metadata: 3\n", "metadata is 3, but has to be a mapping"),
        ("metadata: text\n", "metadata is 'text', but has to be a mapping"),
        ("metadata: {k: three}\n", "k='three' is not allowed"),
        ("metadata: {1: 3}\n", "the key 1 in metadata is no text"),
        ("doc_to_text: 3\n", "doc_to_text is the number 3"),
        ("doc_to_text: 3.5\n", "doc_to_text is 3.5"),
        ("doc_to_target: 3.5\n", "doc_to_target is 3.5"),
        ("doc_to_target: ~\n", "no targets"),
        ("metadata:\n  k: 3\n" + "".join(f"  {line}\n" for line in BOMB.splitlines()), "'metadata' holds more than"),
        ("metadata: {k: 3, a: &a [*a]}\n", "'metadata' holds more than"),
    ],
)
def test_a_value_of_another_kind_is_refused(tmp_path, yaml, telling):
    assert telling in refusal(write(tmp_path, without(GENERATE, yaml) + yaml, ROWS))


def test_no_demonstrations_in_a_yaml_are_a_zero_shot_task(tmp_path):
    folder = write(tmp_path, GENERATE.replace("metadata: {k: 3}", "num_fewshot: 0"), ROWS)
    results = evaluate(folder)
    assert results["n-samples"]["mine"]["effective"] == 9
    assert {sample["arguments"][0][0] for sample in results["samples"]["mine"]} == {f"Q: q{i}?\nA:" for i in range(9)}
    assert results["configs"]["mine"]["metadata"]["k"] == 0


# The inputs that were made after public reports


EXPECTED = {  # by the number of the folder: words of the sentence for each line of `cmd`, or None where it runs
    "04": ["ValueError: 'Red ' is not in list"],
    "06": ["YAML takes no"],
    "08": ["Tom's"],
    "09": ["Did you mean 'exact_match'?"],
    "10": ["no aggregation 'average'"],
    "11": ["no such function"],
    "15": ["until=['']"],
    "17": [None],
    "18": ["no right answer"],
    "22": ["an empty text"],
    "24": ["{{c.text}}"],
    "25": ["the nearest is 'Yes'"],
    "30": [None, "--limit 0", "is not allowed", None],
    "31": [None, "--samples has -1", "--samples has []", "--samples has 99", "names 'other'"],
    "43": ["metadata is"],
    "49": [None],
}


@pytest.mark.skipif("TTT_CASES_DIR" not in os.environ, reason="TTT_CASES_DIR is not set: there are no cases to read")
@pytest.mark.parametrize("number", sorted(EXPECTED))
def test_cases_are_answered_right(number, monkeypatch):
    (folder,) = Path(os.environ["TTT_CASES_DIR"]).glob(f"{number}_*")
    monkeypatch.chdir(folder)
    lines = (folder / "cmd").read_text(encoding="utf-8").splitlines()
    for line, telling in zip(filter(None, lines), EXPECTED[number], strict=True):
        words = shlex.split(line)
        given = {name: words[words.index(name) + 1] for name in ("--tasks", "--limit", "--samples") if name in words}
        limit = float(given["--limit"]) if "--limit" in given else None
        samples = json.loads(given["--samples"]) if "--samples" in given else None
        model = Counting()
        manager = TaskManager(include_path=".", include_defaults=False)
        run = {"tasks": [given["--tasks"]], "task_manager": manager, "limit": limit, "samples": samples}
        if telling is None:
            results = simple_evaluate(model, bootstrap_iters=0, **run)
            if samples and given["--tasks"] in samples:
                assert [sample["doc_id"] for sample in results["samples"]["h31"]] == [5, 2, 7]
            continue
        with pytest.raises(TTTError) as raised:
            simple_evaluate(model, **run)
        assert telling in str(raised.value)
        assert not model.calls
