"""`ttt-harness fit`: the adapters that a run would fit, and no engine."""

import json
from pathlib import Path

import pytest

from ttt_harness import cli
from ttt_harness.adapters import find, open_store

TASKS = Path(__file__).parents[1] / "user_tasks"


@pytest.fixture
def call(tiny_model, tmp_path, no_engine, capsys):  # noqa: ARG001 - an engine that starts fails the test
    """Runs the command on two tasks, with the arguments of a small fit; an engine that starts fails the test."""
    fit = f"num_permutations=2,fit_batch_size=1,lora_rank=4,dtype=float32,adapter_dir={tmp_path / 'store'}"

    def run(*options, args="k=2", tasks="capitals,antonyms"):
        given = ["--model_args", f"pretrained={tiny_model},{fit},{args}", "--tasks", tasks]
        status = cli.main(["fit", "--include_path", str(TASKS), *given, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_fits_are_stored_and_found_again(call, tmp_path):
    status, out, err = call("--format", "json")
    assert status == 0, err
    made = json.loads(out)
    assert [one["task"] for one in made] == ["capitals", "antonyms"]
    found = {entry.key: entry for entry in find(open_store(tmp_path / "store"))}
    assert {one["key"] for one in made} == set(found)
    for one in made:
        entry = found[one["key"]]
        assert entry.tasks == (one["task"],)
        assert (one["adapter"], one["reused"], len(one["losses"])) == (str(entry.path), False, 2)
        record = open_store(tmp_path / "store").read(entry.key).record
        assert {"sequences", "base_model", "rank", "fit"} <= set(record["determinants"])
    status, out, _ = call()
    assert status == 0
    assert out.splitlines() == [f"{one['task']}  {one['adapter']}" for one in made]
    _, out, _ = call("--format", "json")
    assert all(one["reused"] for one in json.loads(out))
    _, out, _ = call("--format", "json", args="k=2,method=shared_ttt")
    one, two = json.loads(out)
    assert one["key"] == two["key"]
    shared = find(open_store(tmp_path / "store"), method="shared_ttt")
    assert [entry.tasks for entry in shared] == [("capitals", "antonyms")]


@pytest.mark.parametrize(
    ("given", "telling"),
    [
        ({"args": "method=icl"}, "method=icl fits nothing"),
        ({"args": "adapter_limit=1kB"}, "adapter_limit=1 kB is less than what this run's adapters take"),
        ({"args": "lora_rank=0"}, "lora_rank=0 is not allowed"),
        ({"tasks": "nothing_of_this_name"}, "nothing_of_this_name"),
    ],
)
def test_what_cannot_be_fitted_is_one_sentence(given, telling, call, tmp_path):
    status, out, err = call(**given)
    assert status == 1
    assert out == ""
    assert telling in err.splitlines()[-1]
    assert not list(tmp_path.glob("store/*"))


def test_results_have_no_place(call):
    status, _, err = call("--output_path", "x")
    assert status == 1
    assert "has no results to write" in err
