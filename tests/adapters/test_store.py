"""The adapter store: what is written comes back, damage is noticed, and nothing is left half-written."""

import json
import resource
import subprocess
import sys
import threading

import pytest
import torch

from ttt_harness.adapters.names import adapter_key, fingerprint
from ttt_harness.adapters.peft import WEIGHTS_NAME, read_adapter
from ttt_harness.adapters.store import RECORD_NAME, AdapterStore
from ttt_harness.errors import StoreError

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = {f"{PREFIX}.lora_A.weight": torch.ones(4, 8), f"{PREFIX}.lora_B.weight": torch.arange(32.0).view(8, 4)}
SETTINGS = {"base_model": "some/model", "rank": 4, "alpha": 8, "dropout": 0.05}


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "adapters")


def save(store, key="k", weights=WEIGHTS, **record):
    return store.save(key, weights, **SETTINGS, record=record)


def test_what_is_saved_is_loaded(store):
    saved = save(store, losses=[1.0, 0.5])
    loaded = store.load("k")
    assert loaded == saved
    assert loaded.record["losses"] == [1.0, 0.5]
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in read_adapter(loaded.path).items())
    config = json.loads((loaded.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj"])
    assert sorted(path.name for path in store.root.iterdir()) == ["k"]


def test_an_unknown_key_is_not_there(store):
    assert store.load("k") is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "no weights", "no record", "record cut"])
def test_a_damaged_adapter_is_not_loaded_and_can_be_replaced(store, damage, caplog):
    path = save(store).path
    weights, record = path / WEIGHTS_NAME, path / RECORD_NAME
    match damage:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "flipped":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        case "no weights":
            weights.unlink()
        case "no record":
            record.unlink()
        case "record cut":
            record.write_text(record.read_text()[:20])
    assert store.load("k") is None
    assert "damaged" in caplog.text
    save(store)
    assert store.load("k") is not None


def test_a_full_disk_is_one_sentence_and_leaves_nothing(store):
    large = {f"{PREFIX}.lora_A.weight": torch.ones(64, 4096)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # the kernel refuses to write more into a file
    try:
        with pytest.raises(StoreError, match=r"could not be written to .*; free space there") as refusal:
            save(store, weights=large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(refusal.value)
    assert list(store.root.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="adapter_dir="):
        save(AdapterStore(tmp_path / "file" / "adapters"))


def test_writers_of_one_adapter_do_not_disturb_each_other(store):
    threads = [threading.Thread(target=save, args=(store,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.load("k") is not None
    assert [path.name for path in store.root.iterdir()] == ["k"]


HOLD = """
import sys, time
from pathlib import Path
from ttt_harness.adapters.store import AdapterStore
with AdapterStore(Path(sys.argv[1])).fitting("k"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_whoever_needs_an_adapter_that_is_being_fitted_waits_for_it(store):
    order = []

    def fit(number):
        with store.fitting("k"):
            if store.load("k") is None:
                order.append(number)
                save(store, number=number)

    threads = [threading.Thread(target=fit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == 1
    assert store.load("k").record["number"] == order[0]
    assert [path.name for path in store.root.iterdir()] == ["k"]


def test_a_process_that_is_killed_while_it_fits_keeps_nobody_waiting(store):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(store.root)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    waiting = threading.Thread(target=lambda: store.fitting("k").__enter__())
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    process.kill()
    process.wait()
    process.stdout.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_an_adapter_can_be_carried_to_another_store(store, tmp_path):
    saved = save(store, losses=[1.0])
    other = AdapterStore(tmp_path / "other")
    added = other.add("k", store.files("k"))
    assert added == other.load("k")
    assert added.record == saved.record
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in read_adapter(added.path).items())


def test_a_key_depends_on_every_determinant_and_not_on_their_order():
    assert adapter_key({"lr": 1e-4, "seed": 1}) == adapter_key({"seed": 1, "lr": 1e-4})
    assert adapter_key({"lr": 1e-4, "seed": 1}) != adapter_key({"lr": 1e-4, "seed": 2})
    assert len(adapter_key({})) == 32


@pytest.mark.parametrize("piece", [1000, 1300, 2**24])
def test_a_fingerprint_sees_every_byte_of_the_weights_and_their_order(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("ttt_harness.adapters.names.PIECE", piece)
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    contents = [b"0" * 5000, b"0" * 4999, b"0" * 4999 + b"1", b"1" + b"0" * 4999, b"1" * 1000 + b"0" * 4000]
    contents.append(contents[-1][::-1])
    seen = set()
    for content in contents:
        weights.write_bytes(content)
        seen.add(fingerprint(tmp_path))
        assert fingerprint(tmp_path) in seen
    assert len(seen) == len(contents)
