"""The BBH data set: where it is looked for, in which order, and what is said when it is missing or damaged."""

import json
import os
import pickle

import datasets
import pytest

from ttt_harness.data import bbh
from ttt_harness.errors import DataError

EXAMPLES = [{"input": f"{i} + 1 is", "target": str(i + 1)} for i in range(3)]


@pytest.fixture(autouse=True)
def no_source(monkeypatch, tmp_path):
    """Start every test without the variable, without the submodule, and with a hub that must not be asked."""
    monkeypatch.delenv("TTT_BBH_DIR", raising=False)
    monkeypatch.setattr(bbh, "SUBMODULE", tmp_path / "no-submodule")
    monkeypatch.setattr(bbh.datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bbh"
    folder.mkdir()
    return folder


def write(folder, examples, task="sums"):
    (folder / f"{task}.json").write_text(json.dumps({"canary": "...", "examples": examples}), encoding="utf-8")


def test_the_folder_of_the_variable_comes_first(monkeypatch, tmp_path, folder):
    submodule = tmp_path / "submodule"
    submodule.mkdir()
    write(folder, EXAMPLES)
    write(submodule, EXAMPLES[:1])
    monkeypatch.setattr(bbh, "SUBMODULE", submodule)
    monkeypatch.setenv("TTT_BBH_DIR", str(folder))
    data = bbh.load_bbh(bbh_task="sums", version=1.0, seed=7)
    assert list(data) == ["test"]
    assert data["test"].to_list() == EXAMPLES


def test_then_the_submodule(monkeypatch, folder):
    write(folder, EXAMPLES)
    monkeypatch.setattr(bbh, "SUBMODULE", folder)
    monkeypatch.setenv("TTT_BBH_DIR", "")
    assert bbh.load_bbh(bbh_task="sums")["test"].to_list() == EXAMPLES


def test_then_the_hub(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{**example, "idx": i} for i, example in enumerate(EXAMPLES)])

    monkeypatch.setattr(bbh.datasets, "load_dataset", load_dataset)
    assert bbh.load_bbh(bbh_task="sums")["test"].to_list() == EXAMPLES
    assert calls == [(("SaylorTwift/bbh", "sums"), {"split": "test"})]


def test_with_no_source_one_error_lists_the_three_ways(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(bbh.datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        bbh.load_bbh(bbh_task="sums")
    for part in ("'sums'", "TTT_BBH_DIR", "git submodule update --init", "SaylorTwift/bbh", "Couldn't reach the Hub"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_wrong_folder_is_an_error_and_not_a_reason_to_look_elsewhere(monkeypatch, tmp_path, folder):
    write(folder, EXAMPLES)
    monkeypatch.setattr(bbh, "SUBMODULE", folder)
    monkeypatch.setenv("TTT_BBH_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"TTT_BBH_DIR is '.*nowhere', which is not a folder"):
        bbh.load_bbh(bbh_task="sums")
    monkeypatch.setenv("TTT_BBH_DIR", str(folder))
    with pytest.raises(DataError, match=r"TTT_BBH_DIR is '.*bbh', which has no products\.json"):
        bbh.load_bbh(bbh_task="products")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not JSON"),
        (b'{"examples": [{"input": "a", ', "not JSON: .* in line 1, column"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"[]", 'it has no "examples"'),
        (b'{"example": []}', 'it has no "examples"'),
        (b'{"examples": []}', "at least one example"),
        (b'{"examples": {"input": "a", "target": "b"}}', "must be a list"),
        (b'{"examples": [{"input": "a", "target": "b"}, {"target": "b"}]}', 'example 1 has no "input"'),
        (b'{"examples": [{"input": "a"}]}', 'example 0 has no "target"'),
        (b'{"examples": ["a"]}', 'example 0 has no "input"'),
        (
            b'{"examples": [{"input": "a", "target": 8}]}',
            '"target" of example 0 must be a text that is not empty, not 8',
        ),
        (b'{"examples": [{"input": "", "target": "b"}]}', '"input" of example 0 must be a text'),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(monkeypatch, folder, content, problem):
    (folder / "sums.json").write_bytes(content)
    monkeypatch.setenv("TTT_BBH_DIR", str(folder))
    with pytest.raises(DataError, match=rf"sums\.json is damaged: .*{problem}"):
        bbh.load_bbh(bbh_task="sums")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_named(monkeypatch, folder):
    write(folder, EXAMPLES)
    (folder / "sums.json").chmod(0)
    monkeypatch.setenv("TTT_BBH_DIR", str(folder))
    with pytest.raises(DataError, match=r"sums\.json cannot be read \(Permission denied\)"):
        bbh.load_bbh(bbh_task="sums")
