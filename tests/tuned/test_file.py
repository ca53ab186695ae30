"""`tuned.json`: what is written is read back, and anything else is refused in one sentence."""

import json
import os
from typing import Any

import pytest

from tests.tuned.files import IN_CONTEXT, candidate, tuned
from ttt_harness.errors import ConfigError
from ttt_harness.tuned import Asked, Candidate, newest, read_tuned, write_tuned
from ttt_harness.tuned.file import TUNABLE, tuned_folder

FAST = candidate(1e-4)


@pytest.fixture
def one():
    return tuned({"a": {"icl": [1, 0, 1, 1], FAST.name: [1, 1]}, "b\u2028": {"icl": [0]}}, [FAST], orders=2)


def test_what_is_written_is_read_back(one, tmp_path):
    path = tmp_path / "new" / "tuned.json"
    write_tuned(one, path)
    assert read_tuned(path) == one
    assert [file.name for file in path.parent.iterdir()] == ["tuned.json"]
    said = json.loads(path.read_text())
    assert said["tasks"]["a"]["icl"] == {"42/0/0": 1, "42/0/1": 0, "42/1/0": 1, "42/1/1": 1}
    assert said["candidates"][1] == {"name": FAST.name, "model_args": dict(FAST.model_args), "fit_seconds": 10.0}


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_nothing(one, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "tuned.json", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0"):
        with pytest.raises(ConfigError, match="cannot be written") as caught:
            write_tuned(one, path)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def change(said: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for part in above:
        said = said[int(part)] if isinstance(said, list) else said[part]
    if value is None:
        del said[int(last) if isinstance(said, list) else last]
    else:
        said[int(last) if isinstance(said, list) else last] = value


HUGE = "9" * 30


@pytest.mark.parametrize(
    ("part", "value", "telling"),
    [
        ("kind", "something", "no tuned.json"),
        ("kind", None, "no tuned.json"),
        ("version", 2, "version 2"),
        ("version", [], "version"),
        ("base_model", [], "base_model"),
        ("base_model.fingerprint", None, "fingerprint"),
        ("base_model.name", 3, "name"),
        ("method", "tt", "method='tt'"),
        ("method", "icl", "method='icl'"),
        ("method", "e2e", "not of method=e2e"),
        ("k", "10", "k has"),
        ("k", True, "k has"),
        ("k", 0, "k=0"),
        ("seeds", [1.5], "seeds"),
        ("seeds", {}, "seeds"),
        ("versions", [], "versions"),
        ("candidates", {}, "candidates"),
        ("candidates", [], "exactly one"),
        ("candidates.0", None, "exactly one"),
        ("candidates.0", "icl", "a candidate"),
        ("candidates.0.name", FAST.name, "same name"),
        ("candidates.0.name", [], "name"),
        ("candidates.0.model_args", {}, "not of method"),
        ("candidates.1.model_args", {"method": "icl"}, "exactly one"),
        ("candidates.1.model_args.lr", "fast", "lr='fast'"),
        ("candidates.1.model_args.lr", [], r"lr=\[\]"),
        ("candidates.1.model_args.epoch", 3, "'epochs'"),
        ("candidates.1.model_args.pretrained", "x", "'pretrained'"),
        ("candidates.1.model_args.k", 5, "'k'"),
        ("candidates.1.model_args.method", "no", "method='no'"),
        ("candidates.1.fit_seconds", -1, "fit_seconds"),
        ("candidates.1.fit_seconds", "1", "fit_seconds"),
        ("candidates.1.fit_seconds", float("nan"), "fit_seconds"),
        ("tasks", {}, "no task"),
        ("tasks", [], "tasks"),
        ("tasks.a", [], "'a'"),
        ("tasks.a.icl", None, "no outcome of in-context"),
        ("tasks.a.icl", {}, "no outcome of in-context"),
        ("tasks.a.icl", [1], "mapping"),
        ("tasks.a.other", {}, "'other'"),
        ("tasks.a.icl", {"42/0": 1}, "42/0"),
        ("tasks.a.icl", {"42/0/-1": 1}, "42/0/-1"),
        ("tasks.a.icl", {f"42/0/{HUGE}": 1}, HUGE),
        ("tasks.a.icl", {"42/0/0": 2}, "2"),
        ("tasks.a.icl", {"42/0/0": 0.5}, "0.5"),
        ("tasks.a.icl", {"42/0/0": True}, "True"),
        ("tasks.a.icl", {"42/0/0": "1"}, "'1'"),
    ],
)
def test_another_file_is_refused_in_one_sentence(one, tmp_path, part, value, telling):
    said = one.to_dict()
    change(said, part, value)
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=telling) as caught:
        read_tuned(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 10**5, b"9" * 5000, b'{"results": {}}'])
def test_what_is_no_such_file_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "tuned.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is no tuned\.json"):
        read_tuned(path)


def test_a_path_that_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.json", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ConfigError) as caught:
            read_tuned(path)
        assert "\n" not in str(caught.value)


def test_the_newest_file_of_this_model_is_found(one, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TTT_CACHE_DIR", str(tmp_path))
    wanted = {"fingerprint": "0" * 64, "method": "ttt", "k": 10}
    assert newest(**wanted) is None
    for age, name in enumerate(["new.json", "old.json", "sub/oldest.json"]):
        write_tuned(one, tuned_folder() / name)
        os.utime(tuned_folder() / name, (100 - age, 100 - age))
    (tuned_folder() / "other.json").write_text("{}")
    damaged = one.to_dict() | {"tasks": {}}
    (tuned_folder() / "damaged.json").write_text(json.dumps(damaged))
    assert newest(**wanted) == tuned_folder() / "new.json"
    assert [record.getMessage() for record in caplog.records if "damaged.json" in record.getMessage()]
    for other in ({"k": 5}, {"method": "e2e"}, {"fingerprint": "1" * 64}):
        assert newest(**wanted | other) is None


def test_candidates_state_arguments_of_fits_alone():
    from ttt_harness.config import TTTConfig
    from ttt_harness.sweep.axes import FIT_AXES

    assert set(TUNABLE) == {"method", *FIT_AXES}
    assert set(TUNABLE) <= set(TTTConfig.names())
    assert FAST.fits
    assert not IN_CONTEXT.fits
    assert str(Asked.parse("42/3/1")) == "42/3/1"
    assert Candidate("x", {"method": "ttt"}).fit_seconds == 0
