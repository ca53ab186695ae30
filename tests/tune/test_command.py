"""`ttt-harness tune` on a tiny model: what it reads, what it writes, what it refuses; no engine starts."""

import json
from pathlib import Path

import pytest

from ttt_harness import cli
from ttt_harness.tuned import read_tuned

TASKS = Path(__file__).parents[1] / "user_tasks"
FIT = "num_permutations=4,fit_batch_size=2,lora_rank=4,lora_alpha=8,dtype=float32,k=4"


@pytest.fixture
def call(tiny_model, tmp_path, no_engine, monkeypatch, capsys):  # noqa: ARG001 - an engine that starts fails the test
    """Runs the command with a small grid; an engine that starts, or an adapter that is stored, fails the test."""
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path / "cache"))

    def run(*options, args="", tasks="capitals,antonyms", fit=FIT, include=TASKS):
        model_args = ",".join(text for text in (f"pretrained={tiny_model}", fit, args) if text)
        given = ["--include_path", str(include), "--tasks", tasks, "--model_args", model_args]
        status = cli.main(["tune", *given, *options])
        captured = capsys.readouterr()
        assert not (tmp_path / "cache" / "adapters").exists()
        return status, captured.out, captured.err

    return run


GRID = ("--grid", "lr=1e-3,1e-2", "--grid", "epochs=1,2", "--folds", "2")
# The demonstrations of `drawn` come out of the evaluated split, those of `apart` out of one of their own.
HIDING = """
task: {name}
class: !function ttt_harness.TTTTask
custom_dataset: !function rows.load
test_split: test
{more}
output_type: {kind}
doc_to_text: !function rows.question
doc_to_target: !function rows.answer
doc_to_choice: !function rows.choices
metadata: {{k: 4}}
"""
ROWS = """
import random
import datasets

order = list(range(12))
random.Random(42).shuffle(order)
SHOWN = set(order[:4])

def load(**_):
    test = [{"number": number, "split": "test"} for number in range(12)]
    train = [{"number": number, "split": "train"} for number in range(20, 26)]
    return {"test": datasets.Dataset.from_list(test), "train": datasets.Dataset.from_list(train)}

def seen(doc):
    if doc["split"] == "test" and (doc["number"] not in SHOWN or APART):
        raise ValueError("an evaluated row was rendered")
    return doc["number"]

def question(doc):
    return f"Q: {seen(doc)}"

def answer(doc):
    return ["yes", "no"][seen(doc) % 2]

def choices(doc):
    seen(doc)
    return ["yes", "no"]
"""


@pytest.mark.parametrize(
    ("more", "kind"), [("", "multiple_choice"), ("fewshot_split: train", "multiple_choice"), ("", "generate_until")]
)
def test_evaluated_rows_are_never_rendered(call, tmp_path, more, kind):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.py").write_text(f"APART = {bool(more)}\n{ROWS}")
    text = HIDING.format(name="hiding", more=more, kind=kind)
    if kind == "generate_until":
        text = text.replace("doc_to_choice: !function rows.choices\n", "")
    (folder / "hiding.yaml").write_text(text)
    out = tmp_path / "out"
    status, _, err = call(
        "--grid", "epochs=1", "--folds", "2", "--output_path", str(out), tasks="hiding", include=folder
    )
    assert status == 0, err
    asked = read_tuned(out / "tuned.json").tasks["hiding"]["icl"]
    assert {each.demonstration for each in asked} == {0, 1, 2, 3}


def test_what_is_written_and_printed_and_that_it_goes_on(call, tmp_path):
    out = tmp_path / "out"
    given = (*GRID, "--seeds", "42,43", "--orders", "1", "--output_path", str(out))
    status, said, err = call(*given, tasks="capitals,colours")
    assert status == 0, err
    tuned = read_tuned(out / "tuned.json")
    assert (tuned.k, tuned.seeds, tuned.folds, tuned.orders, tuned.method) == (4, (42, 43), 2, 1, "ttt")
    names = ["icl", "lr=1e-3, epochs=1", "lr=1e-3, epochs=2", "lr=0.01, epochs=1", "lr=0.01, epochs=2"]
    assert [one.name for one in tuned.candidates] == names
    assert tuned.candidates[-1].model_args["num_permutations"] == 4  # stated, so that a run fits as was tried
    for task in ("capitals", "colours"):
        assert {(each.seed, each.demonstration) for each in tuned.tasks[task]["icl"]} == {
            (seed, place) for seed in (42, 43) for place in range(4)
        }
    assert all(name in said for name in names)
    assert "No setting" in said or "is better than in-context" in said
    assert "--model_args pretrained=" in said
    assert "fits of a run for each task and seed" in said
    log = (out / "search.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in log}) == len(log)
    assert {path.name for path in out.iterdir()} == {"tuned.json", "search.jsonl"}
    status, again, err = call(*given, tasks="capitals,colours")
    assert status == 0
    assert (out / "search.jsonl").read_text().splitlines() == log
    assert read_tuned(out / "tuned.json") == tuned
    assert "done before" in again


def test_a_sample_of_the_tasks_is_drawn_with_the_seed(call, tmp_path):
    found = set()
    for number in range(2):
        out = tmp_path / str(number)
        options = ("--grid", "epochs=0", "--folds", "2", "--sample_tasks", "1", "--output_path", str(out))
        status, _, err = call(*options, tasks="capitals,colours,sums")
        assert status == 0, err
        found.add(tuple(read_tuned(out / "tuned.json").tasks))
    ((_,),) = found


@pytest.mark.parametrize(
    ("options", "given", "telling"),
    [
        (("--folds", "1"), {}, "--folds 1 is not allowed"),
        (("--folds", "5"), {}, "which has 4 demonstrations; use at most 4"),
        (("--orders", "0"), {}, "--orders 0 is not allowed"),
        (("--sample_tasks", "0"), {}, "--sample_tasks 0 is not allowed"),
        (("--seeds", "a"), {}, "seeds=a is not allowed"),
        (("--grid", "k=2,3"), {}, "k cannot be tuned"),
        (("--grid", "lr=2"), {}, "it must be a number from 0 to 1"),
        (("--grid", "num_permutations=4"), {}, "num_permutations stands in --model_args and is an axis"),
        ((), {"args": "method=icl"}, "cannot be tuned"),
        ((), {"args": "method=shared_ttt"}, "cannot be tuned"),
        ((), {"args": "method=e2e"}, "use method=ttt"),
        ((), {"args": "seed=1"}, "use --seeds"),
        ((), {"args": "data_parallel_size=2"}, "fits in one process"),
        ((), {"args": "vote_permutations=3"}, "vote_permutations=3 is not allowed"),
        ((), {"args": "settings=auto"}, "settings is not allowed with tune"),
        ((), {"args": "lora_rnk=2"}, "lora_rnk is not a model argument"),
        (("--seed", "1"), {}, "--seed is not an option of tune"),
        (("--num_fewshot", "2"), {}, "--num_fewshot is not an option of tune"),
        (("--model", "hf"), {}, "--model is not an option of tune"),
        ((), {"fit": "k=1"}, "1 different demonstration"),
        ((), {"tasks": "nothing_of_this_name"}, "nothing_of_this_name"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(call, tmp_path, options, given, telling):
    out = tmp_path / "out"
    status, said, err = call("--output_path", str(out), *options, **given)
    assert (status, said) == (1, "")
    assert telling in err
    assert "Traceback" not in err
    assert not out.exists()


def test_a_task_that_is_no_ttt_task_is_refused(call, tmp_path):
    text = (TASKS / "capitals.yaml").read_text().replace("class: !function ttt_harness.TTTTask\n", "")
    rows = TASKS / "data" / "capitals.jsonl"
    text = text.replace("data/capitals.jsonl", f"{{test: {rows}}}").replace("task: capitals", "task: plain")
    (tmp_path / "plain.yaml").write_text(f"{text}test_split: test\n")
    status, _, err = call(*GRID, tasks="plain", include=tmp_path)
    assert status == 1
    assert "plain is not a TTT task" in err


def test_a_folder_that_cannot_be_written_is_one_sentence(call, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = call(*GRID, "--output_path", str(tmp_path / "file"))
    assert status == 1
    assert "is no folder" in err
