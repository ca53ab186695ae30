"""`ttt-harness adapters`: what it shows of a store, and what it removes and what not."""

import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.adapters.stores import MODELS, PREFIX, add_adapter
from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ttt_harness.adapters.record import RECORD_NAME
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.run.served_check import compare_served
from ttt_harness.training.trainer import LogProbabilities

COMMAND = [sys.executable, "-m", "ttt_harness.cli", "adapters"]


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def call(store, capsys, monkeypatch):
    """Runs a subcommand on the store; `typed` is what stdin holds."""

    def run(name, *arguments, typed="", adapter_dir=None):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        where = ["--adapter_dir", str(adapter_dir or store.root)]
        status = cli.main(["adapters", name, *where, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    def run(name, *arguments, **options):
        status, _, err = call(name, *arguments, **options)
        assert status == 1
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


def keys_in(store):
    return {path.name for path in store.root.iterdir() if not path.name.startswith(".")}


def results_naming(folder, stored, task="bbh_ttt_snarks", **record):
    """A results file of a run that was answered with this adapter; keyword arguments add to what it states."""
    said = ttt([task])
    said["tasks"][task] |= {"adapter": str(stored.path), **record}
    return write_run(folder, {task: [1, 0, 1, 1]}, source="ttt_vllm", ttt=said)


def test_list_tells_what_each_adapter_is(store, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    one = add_adapter(store, lr=5e-5, seed=43, days_unused=3)
    two = add_adapter(store, "bbh_ttt_navigate", model=MODELS[1], method="e2e", k=5)
    status, out, _ = call("list")
    assert status == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if re.match(r"[0-9a-f]{12} ", line)}
    assert list(rows) == [two.key[:12], one.key[:12]]  # the last used first
    assert rows[one.key[:12]][1:4] == ["bbh_ttt_snarks", "meta-llama/Llama-3.1-8B", "ttt"]
    assert rows[one.key[:12]][4].startswith("lr=5e-05,lora_rank=4,lora_alpha=8")
    assert rows[one.key[:12]][5:] == ["10", "43", *f"{size_of(one)} kB now 3 d".split()]
    assert rows[two.key[:12]][1:4] == ["bbh_ttt_navigate", "SmolLM2-135M-Instruct", "e2e"]
    assert f" kB, in {store.root}; " in out.partition("2 adapters, ")[2]


def size_of(stored):
    return f"{sum(path.stat().st_size for path in stored.path.iterdir()) / 1000:.3g}"


def test_list_as_json_and_csv(store, call, tmp_path):
    one = add_adapter(store)
    add_adapter(store, "bbh_ttt_navigate")
    results = results_naming(tmp_path / "out", one)
    _, out, _ = call("list", "--format", "json", "--results", tmp_path / "out", "--sort", "task")
    other, entry = json.loads(out)
    assert (other["tasks"], other["results"]) == (["bbh_ttt_navigate"], [])
    assert entry["key"] == one.key
    assert entry["settings"]["lora_rank"] == 4
    assert entry["results"] == [
        {"file": str(results), "task": "bbh_ttt_snarks", "scores": {"acc,answer": 0.75}, "served_check": None}
    ]
    _, out, _ = call("list", "--format", "csv", "--results", tmp_path / "out", "--sort", "key")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["key"] for row in rows] == sorted(keys_in(store))
    assert {row["results"] for row in rows} == {"", str(results)}


@pytest.mark.parametrize("order", ["used", "age", "size", "task", "model", "method", "key"])
def test_list_is_sorted(order, store, call):
    add_adapter(store, "a", rows=16, days_unused=1)
    add_adapter(store, "b", model=MODELS[1], method="e2e")
    add_adapter(store, "c", model=MODELS[2], method="icl", days_unused=2)
    _, out, _ = call("list", "--format", "csv", "--sort", order)
    rows = list(csv.DictReader(io.StringIO(out)))
    column = {"age": "created", "used": "used"}.get(order, order)
    values = [row[column] if order != "size" else int(row[column]) for row in rows]
    assert values == sorted(values, reverse=order in ("used", "size", "age"))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--model", "meta-llama/Llama-3.1-8B"], 1),
        (["--model", "llama-3.1-8b"], 1),
        (["--model", MODELS[1]], 1),
        (["--model", "*2*"], 2),
        (["--model", "llama"], 0),
        (["--task", "bbh_ttt_*"], 2),
        (["--task", "other", "--method", "e2e"], 1),
        (["--method", "ttt"], 2),
    ],
)
def test_list_is_filtered(options, count, store, call):
    add_adapter(store, "bbh_ttt_a")
    add_adapter(store, "bbh_ttt_b", model=MODELS[1])
    add_adapter(store, "other", model=MODELS[2], method="e2e")
    _, out, _ = call("list", "--format", "json", *options)
    assert len(json.loads(out)) == count


def test_what_is_no_adapter_is_neither_listed_nor_removed(store, call):
    add_adapter(store)
    for name in ("notes", ".my-settings", ".hidden"):
        (store.root / name).mkdir()
        (store.root / name / "file").write_text("mine")
        os.utime(store.root / name, (0, 0))
    (store.root / "ttt.json").write_text("{}")
    (store.root / "link").symlink_to("nothing")
    _, out, _ = call("list", "--format", "json")
    assert len(json.loads(out)) == 1
    status, out, _ = call("prune", "--keep", "0B", "--damaged", "--yes")
    assert status == 0
    call("prune", "--keep", "0B", "--yes")
    assert {path.name for path in store.root.iterdir()} == {"notes", ".my-settings", ".hidden", "ttt.json", "link"}


def test_names_of_others_reach_no_terminal_unseen(store, call):
    add_adapter(store, "evil\x1b]0;\x9b[/b][red]", model="/models/\x1b[31m")
    for form in ("table", "csv"):
        _, out, _ = call("list", "--format", form)
        assert "\x1b" not in out
        assert "\x9b" not in out
    assert "[U+001B]" in out
    _, out, _ = call("show", next(iter(keys_in(store))))
    assert "\x1b" not in out


def test_a_record_that_cannot_be_read_is_listed_as_such(store, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stored = add_adapter(store)
    for content in ("[]", "{", '{"settings": [], "task": 3, "tasks": "a"}', '{"settings": {"method": 3, "k": "x"}}'):
        (stored.path / RECORD_NAME).write_text(content)
        status, out, _ = call("list")
        assert status == 0
        assert stored.key[:12] in out
    (stored.path / CONFIG_NAME).write_text("[]")
    assert "adapter_config.json that holds no JSON object" in " ".join(call("list")[1].split())


def test_a_store_that_is_not_there_is_one_sentence(refused, tmp_path):
    for command in (["list"], ["verify"], ["show", "abcd"], ["prune", "--keep", "1GB"]):
        assert "no store of adapters" in refused(*command, adapter_dir=tmp_path / "nothing")


def test_show_tells_all_that_determines_an_adapter(store, call, tmp_path):
    stored = add_adapter(store, lr=5e-5)
    results = results_naming(tmp_path / "out", stored)
    status, out, _ = call("show", stored.key[:8], "--results", results)
    assert status == 0
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines())
    assert facts["lr"] == "5e-05"
    assert facts["losses"] == "2.5000 1.2500"
    assert facts["intact"] == "yes"
    assert facts["sequences"] == stored.record["determinants"]["sequences"]
    assert facts["named by"] == f"{results}: bbh_ttt_snarks (acc,answer 0.7500)"
    _, out, _ = call("show", stored.key, "--format", "json")
    assert json.loads(out)["record"] == stored.record


def test_show_tells_whether_vllm_served_the_adapter_as_trained(store, call, tmp_path):
    stored = add_adapter(store)
    log_probabilities = LogProbabilities((-1.0, -2.0), (-3.0, -4.5))
    check = compare_served(log_probabilities, LogProbabilities((-1.001, -2.0), (-3.0, -4.5)), dtype="float32")
    checked = results_naming(tmp_path / "checked", stored, served_check=check.as_record())
    others = results_naming(tmp_path / "others", stored)
    _, out, _ = call("show", stored.key, "--results", checked, others)
    (line,) = (line for line in out.splitlines() if line.startswith("served check"))
    assert f"{checked}: served as trained (log-probabilities, nats: mean difference 0.0005, largest 0.001, " in line
    assert line.endswith("tokens: 2)")
    _, out, _ = call("show", stored.key, "--results", others)
    assert "none in these results" in out
    _, out, _ = call("show", stored.key, "--results", checked, "--format", "json")
    assert json.loads(out)["results"][0]["served_check"] == check.as_record()


@pytest.mark.parametrize("check", [{"verdict": None}, {"verdict": "\x1b[2J", "mean_difference": "far"}, {"tokens": []}])
def test_show_of_a_check_that_is_none(check, store, call, tmp_path):
    stored = add_adapter(store)
    status, out, _ = call("show", stored.key, "--results", results_naming(tmp_path, stored, served_check=check))
    assert status == 0
    assert "served check" in out
    assert "\x1b" not in out


def test_show_of_a_damaged_one(store, call):
    stored = add_adapter(store)
    (stored.path / WEIGHTS_NAME).write_bytes(b"")
    status, out, _ = call("show", stored.key)
    assert status == 1
    assert "damaged or was changed" in out


def test_a_key_that_names_none_or_several(store, refused):
    for number in range(30):
        add_adapter(store, f"task{number}")
    assert "no adapter abc" in refused("show", "abc")
    assert "no adapter ." in refused("show", "../..")
    stored = add_adapter(store, "more")
    twin = stored.path.with_name(stored.key[:-1] + ("0" if stored.key[-1] != "0" else "1"))
    stored.path.rename(twin)
    add_adapter(store, "more")
    assert f"2 adapters in {store.root} begin with {stored.key[:10]}" in refused("show", stored.key[:10])


def test_prune_by_last_use(store, call):
    old = [add_adapter(store, f"old{number}", days_unused=31) for number in range(2)]
    new = add_adapter(store, "new", days_unused=29)
    status, out, _ = call("prune", "--older", "30d", typed="n\n")
    assert status == 1
    assert all(one.key[:12] in out for one in old)
    assert new.key[:12] not in out
    assert "Remove 2 adapters" in out
    assert "Nothing was removed." in out
    assert len(keys_in(store)) == 3
    status, out, _ = call("prune", "--older", "30d", typed="y\n")
    assert status == 0
    assert keys_in(store) == {new.key}
    assert call("prune", "--older", "30d")[:2] == (0, "Nothing is to go.\n")


def test_prune_to_a_size_takes_those_that_were_used_longest_ago(store, call):
    made = [add_adapter(store, f"t{days}", days_unused=days) for days in range(5)]
    size = sum(path.stat().st_size for path in made[0].path.iterdir())
    status, _, _ = call("prune", "--keep", f"{2 * size + 100}B", "--yes")
    assert status == 0
    assert keys_in(store) == {made[0].key, made[1].key}


def test_prune_by_model_and_task(store, call):
    add_adapter(store, "a")
    kept = [add_adapter(store, "b"), add_adapter(store, "a", model=MODELS[1])]
    call("prune", "--model", "Llama-3.1-8B", "--task", "a", "--yes")
    assert keys_in(store) == {one.key for one in kept}


def test_prune_keeps_what_results_name(store, call, refused, tmp_path):
    named = add_adapter(store, "bbh_ttt_snarks")
    add_adapter(store, "other")
    results = results_naming(tmp_path / "out", named)
    status, _, _ = call("prune", "--unused-by", tmp_path / "out", "--yes")
    assert status == 0
    assert keys_in(store) == {named.key}
    results.write_text(results.read_text()[:100])  # what a results file names cannot be told any more
    refused("prune", "--unused-by", tmp_path / "out", "--yes")
    refused("prune", "--unused-by", tmp_path / "nothing", "--yes")
    assert keys_in(store) == {named.key}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "prune has to know what may go"),
        (["--yes"], "prune has to know what may go"),
        (["--older", "soon"], "--older=soon is no time"),
        (["--older", "30"], "--older=30 is no time"),
        (["--older", "-1d"], "--older"),
        (["--keep", "much"], "--keep=much is no size"),
        (["--keep", "1GB", "--older", "9" * 400 + "d"], "is no time"),
        (["--older", "0d"], "nobody answers"),
    ],
)
def test_prune_refuses_what_it_cannot_take(options, words, store, refused):
    add_adapter(store)
    if options[:1] == ["--older"] and options[1].startswith("-"):
        options = [f"--older={options[1]}"]
    assert words in refused("prune", *options)
    assert len(keys_in(store)) == 1


def test_what_a_process_serves_is_kept(store, call):
    served, other = add_adapter(store, "served"), add_adapter(store, "other")
    with store.using(served.key):
        status, out, _ = call("prune", "--older", "0d", "--yes")
    assert status == 0
    assert "In use by other processes, and kept: 1 adapter." in out
    assert served.key[:12] not in out
    assert keys_in(store) == {served.key}
    assert other.key[:12] in out


def test_prune_and_fits_of_two_processes(store, call):
    """One process writes adapters and reads each back, while the other prunes all it can."""
    code = """
import sys
from pathlib import Path
from tests.adapters.stores import add_adapter
from ttt_harness.adapters.store import AdapterStore
store = AdapterStore(Path(sys.argv[1]))
print("ready", flush=True)
for number in range(60):
    seed = number % 3
    key = add_adapter(AdapterStore(Path(sys.argv[2])), "t", seed=seed).key
    with store.using(key) as stored:
        if stored is None:
            with store.fitting(key):
                add_adapter(store, "t", seed=seed)
        from ttt_harness.adapters.peft import read_adapter
        assert len(read_adapter(store.root / key)) == 2
"""
    root = Path(cli.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root), str(store.root.with_name("keys"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    process.stdout.readline()
    removed = 0
    while process.poll() is None:
        if store.root.exists():
            status, out, _ = call("prune", "--older", "0d", "--yes")
            assert status == 0
            removed += int(found[1]) if (found := re.search(r"Removed (\d+)", out)) else 0
    assert process.returncode == 0, process.stderr.read().decode()
    process.stdout.close()
    process.stderr.close()
    assert removed > 3
    call("prune", "--older", "0d", "--yes")
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize("moment", range(0, 60, 12))
def test_a_prune_that_is_killed_loses_nothing_that_it_did_not_name(moment, store, call):
    kept = [add_adapter(store, f"new{number}").key for number in range(3)]
    old = [add_adapter(store, f"old{number}", days_unused=40).key for number in range(40)]
    root = Path(cli.__file__).parents[1]
    process = subprocess.Popen(
        [*COMMAND, "prune", "--adapter_dir", str(store.root), "--older", "30d", "--yes"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    while process.poll() is None and len(keys_in(store)) == 43:
        time.sleep(0.0005)
    time.sleep(moment / 10_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = keys_in(store)
    assert set(kept) <= left <= {*kept, *old}
    status, _, _ = call("verify")  # those that are there are whole
    assert status == 0
    call("prune", "--older", "30d", "--yes")
    assert {path.name for path in store.root.iterdir() if path.suffix not in (".lock", ".use")} == set(kept)


def test_what_killed_processes_have_left_goes_along(store, call):
    stored = add_adapter(store)
    work = store.root / f".{stored.key}-abc123_z"
    work.mkdir()
    (work / WEIGHTS_NAME).write_bytes(b"half")
    call("prune", "--older", "30d", "--yes")
    assert work.exists()  # it may still be written
    os.utime(work, (0, 0))
    _, out, _ = call("prune", "--older", "30d", "--yes")
    assert f"{work.name}: left by a process that was killed, 4 B" in out
    assert not work.exists()
    assert keys_in(store) == {stored.key}


def test_verify_finds_what_is_damaged_and_prune_removes_it(store, call):
    good, cut, endless = (add_adapter(store, task) for task in ("good", "cut", "endless"))
    assert call("verify")[:2] == (0, "3 adapters: 3 intact, 0 damaged.\n")
    (cut.path / WEIGHTS_NAME).write_bytes(b"")
    weights = read_adapter(endless.path)
    weights[f"{PREFIX}.lora_A.weight"][0, 0] = torch.inf
    save_file(weights, endless.path / WEIGHTS_NAME)
    status, out, _ = call("verify")
    assert status == 1
    assert "3 adapters: 1 intact, 2 damaged." in out
    assert call("verify", good.key)[0] == 0
    _, out, _ = call("verify", "--format", "json", cut.key[:6])
    assert json.loads(out)[0]["problem"]
    assert keys_in(store) == {good.key, cut.key, endless.key}  # it only looks
    (cut.path / "notes.txt").write_text("mine")
    assert store.load(cut.key) is None
    assert "Set aside: " in call("list")[1]
    call("prune", "--damaged", "--yes")
    assert keys_in(store) == {good.key}


def test_a_hundred_adapters_of_three_models_are_listed_within_a_second(store):
    for number in range(100):
        add_adapter(store, f"task{number // 3}", model=MODELS[number % 3])
    root = Path(cli.__file__).parents[1]
    assert min(seconds_of([*COMMAND, "list", "--adapter_dir", str(store.root)], root) for _ in range(3)) < 1


def seconds_of(command, root):
    """What a command takes of a processor, with Python's start: on a busy machine it lasts longer than that."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": str(root)}, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out.count(b"task") >= 100
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_listing_takes_no_torch():
    code = (
        "import sys, ttt_harness.adapters.command; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    root = Path(cli.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=True)
