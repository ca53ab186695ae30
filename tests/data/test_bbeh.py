"""BIG-Bench Extra Hard comes from the user's folder, in either of two layouts, else from the hub."""

import json

import datasets
import pytest

from ttt_harness.data import bbeh
from ttt_harness.errors import DataError

EXAMPLES = [{"input": f"question {i}", "target": f"({i})"} for i in range(5)]


@pytest.fixture(autouse=True)
def no_source(monkeypatch):
    """No folder is named, and asking the hub fails the test."""
    monkeypatch.delenv("TTT_BBEH_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.mark.parametrize("file", ["bbeh_sums.json", "bbeh_sums/task.json"])
def test_a_folder_of_either_layout_is_read_in_file_order(monkeypatch, tmp_path, file):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"canary": "x", "examples": EXAMPLES}), encoding="utf-8")
    monkeypatch.setenv("TTT_BBEH_DIR", str(tmp_path))
    data = bbeh.load_bbeh(bbeh_task="sums", k=3)
    assert list(data) == ["test"]
    assert data["test"].to_list() == EXAMPLES


def test_the_hub_is_the_last_source(monkeypatch):
    calls = []

    def load_dataset(*where, **how):
        calls.append((where, how))
        return datasets.Dataset.from_list([{**example, "mini": 1} for example in EXAMPLES])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert bbeh.load_bbeh(bbeh_task="sums")["test"].to_list() == EXAMPLES
    assert calls == [(("jgyasu/bbeh", "sums"), {"split": "train"})]


def test_a_wrong_folder_is_an_error_and_not_a_reason_to_look_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("TTT_BBEH_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"TTT_BBEH_DIR is '.*nowhere', which is not a folder"):
        bbeh.load_bbeh(bbeh_task="sums")
    monkeypatch.setenv("TTT_BBEH_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"which has no bbeh_sums\.json: .*bbeh_<task>\.json"):
        bbeh.load_bbeh(bbeh_task="sums")


def test_with_no_source_one_sentence_lists_the_ways(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        bbeh.load_bbeh(bbeh_task="sums")
    for part in ("BBEH task 'sums'", "TTT_BBEH_DIR", "bbeh_sums.json", "jgyasu/bbeh", "Couldn't reach the Hub"):
        assert part in str(caught.value)
    assert "submodule" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"examples": [{"input": "a", "target": ' + b"9" * 5000 + b"}]}"])
def test_a_file_that_breaks_the_parser_is_named(monkeypatch, tmp_path, content):
    (tmp_path / "bbeh_sums.json").write_bytes(content)
    monkeypatch.setenv("TTT_BBEH_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"bbeh_sums\.json is damaged: not JSON"):
        bbeh.load_bbeh(bbeh_task="sums")
