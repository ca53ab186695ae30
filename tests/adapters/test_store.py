"""The adapter store: what is written comes back, damage is noticed, and nothing is left half-written."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ttt_harness.adapters.names import adapter_key, fingerprint
from ttt_harness.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
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


HOLD = """
import sys, time
from pathlib import Path
from ttt_harness.adapters.store import AdapterStore
with AdapterStore(Path(sys.argv[1])).fitting("k"):
    print("held", flush=True)
    time.sleep(60)
"""


def change_json(path, change):
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# What may be wrong with an adapter of this version: what does it, and what the warning says.
DAMAGE = {
    "weights cut": (lambda f: (f / WEIGHTS_NAME).write_bytes((f / WEIGHTS_NAME).read_bytes()[:-1]), "damaged"),
    "a bit flipped": (lambda f: flip_last_bit(f / WEIGHTS_NAME), "damaged or was changed"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), "cannot be read"),
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), "cannot be read"),
    "no record": (lambda f: (f / RECORD_NAME).unlink(), "cannot be read"),
    "record cut": (lambda f: (f / RECORD_NAME).write_text((f / RECORD_NAME).read_text()[:20]), "not JSON"),
    "record of bytes": (lambda f: (f / RECORD_NAME).write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "record a list": (lambda f: (f / RECORD_NAME).write_text("[]"), "no JSON object"),
    "record null": (lambda f: (f / RECORD_NAME).write_text("null"), "no JSON object"),
    "record nested": (lambda f: (f / RECORD_NAME).write_text("[" * 100_000), "not JSON"),
    "config a list": (lambda f: (f / CONFIG_NAME).write_text("[]"), "changed"),
    "config null": (lambda f: (f / CONFIG_NAME).write_text("null"), "changed"),
    "alpha changed": (lambda f: change_json(f / CONFIG_NAME, lambda c: c.update(lora_alpha=16)), "changed"),
    "losses changed": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(losses=[0.1])), "was changed"),
    "losses null": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(losses=None)), "losses=None"),
    "losses of words": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(losses=["a"])), "losses="),
    "time of NaN": (
        lambda f: change_json(f / RECORD_NAME, lambda r: r.update(fit_seconds=float("nan"))),
        "fit_seconds",
    ),
    "tokens a word": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(train_tokens="many")), "train_tokens="),
    "settings a list": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(settings=[])), "settings="),
    "task a number": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(task=3)), "task=3"),
    "key changed": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(key="other")), "was changed"),
    "no digest": (lambda f: change_json(f / RECORD_NAME, lambda r: r.pop("digest")), "was changed"),
    "digest a number": (lambda f: change_json(f / RECORD_NAME, lambda r: r.update(digest=3)), "was changed"),
    "more weights": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin, which no fit"),
    "weights a folder": (lambda f: ((f / WEIGHTS_NAME).unlink(), (f / WEIGHTS_NAME).mkdir()), "cannot be read"),
    "weights a dangling link": (
        lambda f: ((f / WEIGHTS_NAME).unlink(), (f / WEIGHTS_NAME).symlink_to("nothing")),
        "cannot be read",
    ),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "cannot be read"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "no folder"),
    "a dangling link": (lambda f: (shutil.rmtree(f), f.symlink_to("nothing")), "link to nothing"),
    "a link to itself": (lambda f: (shutil.rmtree(f), f.symlink_to(f.name)), "link to nothing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_not_loaded_and_replaced(name, store, caplog):
    damage, words = DAMAGE[name]
    path = save(store, losses=[1.0], train_tokens=5, task="t", settings={}, fit_seconds=1.5).path
    damage(path)
    with pytest.raises(StoreError, match=re.escape(words)):
        store.read("k")
    assert store.load("k") is None
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "it is fitted again" in record.getMessage()
    assert not os.path.lexists(path)  # its place is free before the fit
    with store.fitting("k"):
        save(store)
    assert store.load("k") is not None
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_while_another_is_written_is_replaced(name, store):
    other = AdapterStore(store.root.parent / "other")
    save(other)
    damage, _ = DAMAGE[name]
    damage(save(store, losses=[1.0]).path)
    store.add("k", other.files("k"))
    assert store.load("k") is not None


def test_what_no_fit_has_written_is_kept(store, caplog):
    path = save(store).path
    (path / "notes.txt").write_text("mine")
    assert store.load("k") is not None  # notes beside it do no harm
    (path / WEIGHTS_NAME).unlink()
    assert store.load("k") is None
    assert "what was there is now k.set-aside" in caplog.text
    assert (store.root / "k.set-aside" / "notes.txt").read_text() == "mine"
    path.write_text("also mine")
    assert store.load("k") is None
    kept = [entry for entry in store.root.iterdir() if entry.is_file()]
    assert [entry.read_text() for entry in kept] == ["also mine"]


def test_the_folder_of_another_adapter_is_not_taken(store, caplog):
    save(store, "other", weights={name: tensor + 1 for name, tensor in WEIGHTS.items()}).path.rename(store.root / "k")
    assert store.load("k") is None
    assert "holds another adapter, other" in caplog.text


def test_an_adapter_may_lie_elsewhere(store, tmp_path):
    path = save(store).path
    path.rename(tmp_path / "large-disk")
    path.symlink_to(tmp_path / "large-disk")
    assert store.load("k") is not None


def as_older_version(path, **changes):
    """Have a record as versions before this one wrote it."""
    record = {"task": "t", "settings": {"lora_rank": 4, "lora_alpha": 8}, "losses": [1.0], **changes}
    weights = hashlib.sha256((path / WEIGHTS_NAME).read_bytes()).hexdigest()
    (path / RECORD_NAME).write_text(json.dumps({**record, "sha256": weights}))


OLDER_DAMAGE = {
    "weights": (lambda f: flip_last_bit(f / WEIGHTS_NAME), "damaged or was changed"),
    "alpha": (lambda f: change_json(f / CONFIG_NAME, lambda c: c.update(lora_alpha=16)), "changed (lora_alpha)"),
    "rank": (lambda f: change_json(f / CONFIG_NAME, lambda c: c.update(r=8, lora_alpha=16)), "changed (r)"),
    "modules": (lambda f: change_json(f / CONFIG_NAME, lambda c: c.update(target_modules=["k_proj"])), "changed"),
    "config a list": (lambda f: (f / CONFIG_NAME).write_text("[]"), "no JSON object"),
    "config empty": (lambda f: (f / CONFIG_NAME).write_text("{}"), "changed"),
    "losses": (lambda f: as_older_version(f, losses=[1.0, float("nan")]), "losses="),
    "settings": (lambda f: as_older_version(f, settings={"lora_rank": "x", "lora_alpha": 8}), "changed"),
}


def test_adapters_of_older_versions_stay_usable(store):
    path = save(store).path
    as_older_version(path)
    assert store.load("k").record["losses"] == [1.0]
    as_older_version(path, settings={})
    assert store.load("k") is not None


@pytest.mark.parametrize("name", OLDER_DAMAGE)
def test_what_can_be_checked_of_older_versions_is(name, store, caplog):
    damage, words = OLDER_DAMAGE[name]
    path = save(store).path
    as_older_version(path)
    damage(path)
    assert store.load("k") is None
    assert words in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_neither_stored_nor_taken_from_older_versions(value, store, caplog):
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    weights[f"{PREFIX}.lora_B.weight"][3, 2] = value
    with pytest.raises(StoreError, match=r"lora_B.*not finite; use a smaller lr=") as refusal:
        save(store, weights=weights)
    assert "\n" not in str(refusal.value)
    assert not store.root.exists()
    path = save(store).path
    save_file(weights, path / WEIGHTS_NAME)
    as_older_version(path)
    assert store.load("k") is None
    assert "not finite" in caplog.text


@pytest.fixture
def somebody(tmp_path):
    """Runs a block as a user who owns nothing here; where tests run as such a one, as that."""

    @contextmanager
    def block():
        if os.geteuid():
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    for folder in [*reversed(tmp_path.parents), tmp_path]:  # pytest's own folders are closed to others
        if folder.owner() == Path.home().owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o711)
    return block


def test_a_store_that_can_only_be_read_serves_what_it_holds(store, somebody):
    save(store)
    store.root.chmod(0o555)
    try:
        with somebody():
            assert store.load("k") is not None
            with store.using("k") as stored:
                assert stored is not None
            with pytest.raises(StoreError, match="adapter_dir="), store.fitting("new"):
                pass
            with pytest.raises(StoreError, match=r"adapters cannot be written to .*adapter_dir="):
                store.check_room(1)
            store.check_room(0)  # of a run that fits nothing
    finally:
        store.root.chmod(0o755)


def test_what_is_damaged_and_cannot_be_replaced_is_told_before_a_fit(store, somebody):
    flip_last_bit(save(store).path / WEIGHTS_NAME)
    store.root.chmod(0o555)
    try:
        with somebody(), pytest.raises(StoreError, match=r"changed, and cannot be replaced \(.*\); remove it"):
            store.load("k")
    finally:
        store.root.chmod(0o755)


def test_a_folder_that_cannot_be_read_is_set_aside(store, somebody, caplog):
    path = save(store).path
    store.root.chmod(0o777)
    path.chmod(0)
    with somebody():
        assert store.load("k") is None
    assert "cannot be read" in caplog.text
    (store.root / "k.set-aside").chmod(0o755)
    assert (store.root / "k.set-aside" / WEIGHTS_NAME).exists()


@pytest.mark.parametrize("mode", [0o644, 0o600])
@pytest.mark.parametrize("sticky", [0o777, 0o1777])
def test_a_lock_that_another_user_has_left_hinders_nobody(mode, sticky, store, somebody, caplog):
    store.root.mkdir()
    store.root.chmod(sticky)
    lock = store.root / ".k.lock"
    lock.touch()
    lock.chmod(mode)
    with somebody():
        with store.fitting("k"):
            save(store)
        assert store.load("k") is not None
    if os.geteuid() == 0:  # else it is the test's own
        assert ("cannot be opened" in caplog.text) == (mode == 0o600)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_no_file_is_one_sentence(kind, store, tmp_path):
    store.root.mkdir()
    lock = store.root / ".k.lock"
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(tmp_path / "made-through-a-link")
    with pytest.raises(StoreError, match=r"the lock .* is no file .*; remove it"), store.fitting("k"):
        pass
    assert not (tmp_path / "made-through-a-link").exists()


def test_room_is_told_and_asked_for(store):
    free = store.free_bytes()
    assert abs(store.check_room(1000) - free) < 1e9
    with pytest.raises(StoreError, match=r"take 1e\+06 TB|take 1000000 TB .* are free there; free space"):
        store.check_room(10**18)
    assert list(store.root.iterdir()) == []


def test_loading_notes_the_use(store):
    path = save(store).path / RECORD_NAME
    os.utime(path, (1000, 1000))
    store.load("k")
    assert time.time() - path.stat().st_mtime < 100


def test_what_is_removed_is_gone(store):
    path = save(store).path
    assert store.remove("k")
    assert list(store.root.iterdir()) == []
    path.symlink_to("nothing")
    assert store.remove("k")
    assert list(store.root.iterdir()) == []
    assert store.remove("k")  # another process was faster


USE = HOLD.replace('.fitting("k")', '.using("k")')


@pytest.mark.parametrize("code", ["HOLD", "USE"])
def test_what_a_process_fits_or_serves_is_not_removed(code, store):
    save(store)
    process = subprocess.Popen([sys.executable, "-c", globals()[code], str(store.root)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    assert store.is_busy("k")
    assert not store.remove("k")
    with store.using("k") as stored:  # others may serve it, too
        assert stored is not None
    process.kill()
    process.wait()
    process.stdout.close()
    assert not store.is_busy("k")
    assert store.remove("k")


def test_several_may_serve_an_adapter_at_once(store):
    save(store)
    with store.using("k"), store.using("k") as stored:
        assert stored is not None
        assert not store.remove("k")
    assert store.remove("k")
    with store.using("k") as stored:
        assert stored is None


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
