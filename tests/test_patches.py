"""What is replaced in other libraries: each target is there, and one that has moved is told in one line."""

import pytest

from ttt_harness import patches
from ttt_harness.errors import TTTError
from ttt_harness.patches import PATCHES, Patch

HERE = __name__


class Library:
    """Stands for a class of another library."""

    limit = 3

    def run(self, tokens: int) -> int:
        return tokens + 1

    @staticmethod
    def read(path: str) -> str:
        return path

    @classmethod
    def name(cls) -> str:
        return cls.__name__


@pytest.fixture
def add(monkeypatch):
    """Adds an entry to the table: of an attribute of `Library`, which gets back what it was."""

    def add(attribute: str, expected) -> str:
        if hasattr(Library, attribute):
            monkeypatch.setattr(Library, attribute, Library.__dict__[attribute])
        patch = Patch(f"{HERE}:Library.{attribute}", expected, "why", "https://example.org", "it is slow")
        monkeypatch.setitem(PATCHES, "library: thing", patch)
        return "library: thing"

    return add


@pytest.mark.parametrize("name", PATCHES)
def test_every_target_is_there_and_as_expected(name):
    patches.find(name)


@pytest.mark.parametrize("name", PATCHES)
def test_every_entry_says_why_and_where_upstream(name):
    assert PATCHES[name].link.startswith("https://github.com/")
    assert PATCHES[name].why
    assert PATCHES[name].without


@pytest.mark.parametrize(
    ("attribute", "expected", "call"),
    [("run", ("tokens",), (1,)), ("read", ("path",), ("a",)), ("name", (), ())],
)
def test_methods_of_each_kind_are_replaced_once(add, attribute, expected, call):
    before = getattr(Library(), attribute)(*call)
    name = add(attribute, expected)
    for _ in range(2):
        assert patches.apply(name, lambda original: lambda *args: original(*args) * 2)
    assert getattr(Library(), attribute)(*call) == before * 2


def test_a_value_is_replaced(add):
    assert patches.apply(add("limit", int), lambda limit: limit + 1)
    assert Library.limit == 4


@pytest.mark.parametrize(
    ("attribute", "expected", "said"),
    [
        ("gone", (), f"there is no {HERE}:Library.gone"),
        ("run", ("prompts",), "takes (tokens) and not (prompts)"),
        ("run", ("prompts", ...), "takes (tokens) and not (prompts, ...)"),
        ("limit", (), "is no function"),
        ("limit", str, "is no str"),
    ],
)
def test_a_target_that_has_moved_stays_and_is_told_in_one_line(add, caplog, attribute, expected, said):
    name, before = add(attribute, expected), dict(Library.__dict__)
    assert not patches.apply(name, lambda _: pytest.fail("made"))
    assert dict(Library.__dict__) == before
    (record,) = caplog.records
    assert said in record.message
    assert record.message.endswith("it is slow.")
    assert "\n" not in record.message
    with pytest.raises(TTTError, match="it is slow"), patches.applied(name, None):
        pass
    with patches.applied(name, None, needed=False):
        assert dict(Library.__dict__) == before
    assert len(caplog.records) == 2


def test_parameters_may_follow_those_that_are_expected(add):
    assert patches.apply(add("run", (...,)), lambda original: lambda *args: original(*args) * 0)
    assert Library().run(1) == 0


def test_a_replacement_for_a_while_is_taken_back(add):
    with patches.applied(add("limit", int), 5):
        assert Library.limit == 5
    assert Library.limit == 3
