"""What reaches a terminal: other people's text, and outputs that are closed, full or of few characters."""

import io
import os
import subprocess
import sys

import pytest
from rich.table import Table

from tests.report.runs import ttt, write_run
from ttt_harness import cli
from ttt_harness.errors import ReportError
from ttt_harness.terminal import cell, console, run_command, shortened, visible

COMMAND = [sys.executable, "-m", "ttt_harness.cli"]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"COLUMNS": "100"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "[U+001B][31mred"),
        ("\x9b31m", "[U+009B]31m"),
        ("a\rb\nc\td\x00e\x7f", "a[U+000D]b[U+000A]c[U+0009]d[U+0000]e[U+007F]"),
        ("\u202egpj.exe\u2066", "[U+202E]gpj.exe[U+2066]"),
        ("\ud800\udc9b \u200b\ufeff\u2028", "[U+D800][U+DC9B] [U+200B][U+FEFF][U+2028]"),
        ("\U000e0041", "[U+E0041]"),
        ("[red]é 漢 می‌روم 👩‍👦[/red]", "[red]é 漢 می‌روم 👩‍👦[/red]"),
    ],
)
def test_characters_that_a_terminal_obeys_are_shown_by_their_code(text, shown):
    assert visible(text) == shown


def test_no_control_character_is_left():
    every = "".join(map(chr, range(0x3000)))
    assert not [c for c in visible(every) if ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E]


@pytest.mark.parametrize("text", ["[/b]", "[bold]", "[link=http://x]y[/link]", "[icl]=A", ":smile:", "\\[b]"])
def test_markup_is_text(text):
    table = Table()
    table.add_column(cell(text))
    table.add_row(cell(text, "dim"))
    out = io.StringIO()
    console(out, width=60).print(cell(text), table)
    assert out.getvalue().count(text) == 3


def test_shortened_names_keep_both_ends():
    assert shortened("abc", 3) == "abc"
    assert shortened("a" * 200 + "b" * 100, 21) == "a" * 10 + "…" + "b" * 10


def test_an_error_is_one_line(capsys):
    def fails() -> int:
        raise ReportError("no task \x1b[2J\nfound.")

    assert run_command(fails, ReportError) == 1
    assert capsys.readouterr().err == "error: no task [U+001B][2J found.\n"


def test_an_error_of_something_else_is_not_blamed_on_the_output():
    def fails() -> int:
        raise BrokenPipeError(32, "a worker has gone")

    with pytest.raises(BrokenPipeError):
        run_command(fails, ReportError)


def test_ctrl_c_is_one_line(capsys):
    def stopped() -> int:
        raise KeyboardInterrupt

    assert run_command(stopped, ReportError) == 130
    assert capsys.readouterr().err == "Stopped.\n"


@pytest.fixture
def two(tmp_path):
    scores = {f"task_{i}_with_Δ": [0.0, 1.0] * 9 for i in range(200)}
    base = write_run(tmp_path / "icl", scores, samples=False)
    other = write_run(tmp_path / "ttt", scores, samples=False, source="ttt_vllm", ttt=ttt(list(scores)))
    return [str(base), str(other)]


def in_shell(tail, arguments, **environment):
    """Run `ttt-harness ARGUMENTS TAIL` in a shell; `tail` redirects. The status is the command's own."""
    line = f'"$@" {tail}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", line, "bash", *COMMAND, *arguments],
        capture_output=True,
        env={**ENVIRONMENT, **environment},
        timeout=120,
        check=False,
    )


COMMANDS = {
    "table": ["compare"],
    "csv": ["compare", "--format", "csv"],
    "summary": ["summary"],
    "markdown": ["summary", "--format", "markdown"],
}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_seen_enough_ends_it_quietly(two, command, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *COMMANDS[command], *two],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": unbuffered},
        timeout=120,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141
    assert [line for line in done.stderr.splitlines() if not line.startswith((b"note: ", b"warning: "))] == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_a_sentence(two, command, unbuffered):
    done = in_shell("> /dev/full", [*COMMANDS[command], *two], PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == ["error: the output cannot be written: No space left on device; send it to another file or disk."]
    assert not any("Traceback" in line or "Exception ignored" in line for line in lines)


@pytest.mark.parametrize("tail", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "2> /dev/full", "2>&-"])
def test_what_is_closed_does_no_harm(two, tail):
    done = in_shell(tail, ["compare", *two])
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("tail", [">&- 2>&-", "> /dev/full 2>&1", "2> /dev/full"])
def test_errors_that_nobody_can_see_are_a_status(tail):
    assert in_shell(tail, ["compare", "/nowhere", "/either"]).returncode == 1


def test_help_that_cannot_be_written_is_a_sentence():
    done = in_shell("> /dev/full", ["--help"])
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: the output cannot be written")
    assert in_shell("| true", ["--help"]).returncode in (0, 141)  # 0: written before the reader had gone


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_of_few_characters_gets_others(two, command, encoding):
    done = in_shell("", [*COMMANDS[command], *two], PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert "_diff" in text.replace("\\", "")
    assert "Traceback" not in done.stderr.decode(encoding)


def test_a_locale_without_utf8(two):
    done = in_shell("", ["compare", *two], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_errors_of_names_that_are_no_utf8(capsys):
    assert cli.main(["compare", "\udcff\x1b[31m", "b"]) == 1
    assert capsys.readouterr().err.startswith("error: [U+DCFF][U+001B][31m does not exist")
