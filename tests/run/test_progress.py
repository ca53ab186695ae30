"""The display of a run shows the names of tasks as they are, and does not end a run that it cannot print."""

import io
import sys

import pytest
from rich.console import Console

from ttt_harness.run import progress
from ttt_harness.run.progress import RunDisplay

NAMES = ["[/b]", "[red]x[/red]", "\x1b[2J", "\x9b31m", "\u202etxt"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_the_bar_of_a_terminal(name, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=out, force_terminal=True, width=100))
    with RunDisplay() as display:
        display.show(0.5, f"fitting {name}")
        display.print(f"note on {name}")
        display.bars.refresh()
    shown = name.replace("\x1b", "[U+001B]").replace("\x9b", "[U+009B]").replace("\u202e", "[U+202E]")
    assert f"fitting {shown}" in out.getvalue()
    assert f"note on {shown}" in out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_lines(name, capsys):
    with RunDisplay() as display:
        display.show(0.5, f"fitting {name}", line=True)
    said = capsys.readouterr().err
    assert not [c for c in said if ord(c) < 32 and c != "\n"]
    assert "fitting [" in said


def test_a_full_disk_under_stderr_ends_no_run(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with RunDisplay() as display:
            display.show(0.5, "fitting t", line=True)
