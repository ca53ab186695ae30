"""What reaches a terminal: text of others made harmless, and an output that may be closed, full or of few characters.

Names of tasks, methods, models and folders, and the words of errors, come from files and command lines that others
wrote. They pass through `visible` before they are printed, and go into rich's tables by `cell`, which reads no markup.
`run_command` is the frame of a command: whatever stdout is, it ends with a status and no traceback of printing.
"""

import codecs
import io
import json
import logging
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Exit statuses as a shell gives them to what a signal ended: 128 + SIGINT, 128 + SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141

# Control characters; format characters, among them the marks that reorder text; lone surrogates; line separators.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # these are part of Persian words, and of emoji

# Our own signs, for output that has no such characters; its other characters are shown by their code.
_PLAIN = {
    "Δ": "diff", "±": "+-", "−": "-", "–": "-", "—": "-", "…": "...", "→": "->", "·": "|", "×": "x", "≤": "<=",
    "≥": ">=", "│": "|", "─": "-", "━": "-",
}  # fmt: skip
_ERRORS = "ttt_harness.plain"


def visible(text: object) -> str:
    """The text in one line, each character that a terminal would obey, hide or not print as its code: `[U+001B]`."""
    return "".join(_code(c) if _is_unseen(c) else c for c in str(text))


def shortened(text: str, room: int) -> str:
    """The text in at most `room` characters, its middle left out where it is longer: names differ at their ends."""
    if len(text) <= room:
        return text
    tail = (room - 1) // 2
    return f"{text[: room - 1 - tail]}…{text[len(text) - tail :]}"


def visible_json(text: str) -> str:
    """JSON text with the same characters as JSON's own escapes, `\\u009b`: what it says stays the same."""
    return "".join(json.dumps(c)[1:-1] if c > "\x7e" and _is_unseen(c) else c for c in text)


def cell(text: object, style: str = "") -> "Text":
    """Text of others for one of rich's tables or lines: shown as it is, in square brackets or not."""
    from rich.text import Text

    return Text(visible(text), style=style)


def console(file: TextIO | None = None, *, width: int | None = None, otherwise: int = 100) -> "Console":
    """A rich console. width: in columns, by default the terminal's; `otherwise` where the output is no terminal."""
    from rich.console import Console

    class Raising(Console):
        def on_broken_pipe(self) -> None:
            """Leave the error to `run_command`; rich would end the process with status 1."""
            raise

    found = Raising(file=file, highlight=False, width=width)
    if width is None and not found.is_terminal and "COLUMNS" not in os.environ:
        found = Raising(file=file, highlight=False, width=otherwise)
    return found


def complain(text: object) -> None:
    """Print one line for a person on stderr; where stderr cannot be written, nothing is to be done."""
    try:
        print(visible(" ".join(str(text).splitlines())), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def trace_if_asked(error: BaseException) -> None:
    """Print the traceback of `error` where the user asks for it, with `LMEVAL_LOG_LEVEL=DEBUG` or lm-eval's logger.

    It holds the errors that led to `error`, those too in whose place a sentence was put (`raise ... from None`).
    """
    asked = os.environ.get("LMEVAL_LOG_LEVEL", "").upper() == "DEBUG"
    if not (asked or logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG)):
        return
    one: BaseException | None = error
    while one is not None:
        one.__suppress_context__ = one.__cause__ is not None
        one = one.__cause__ or one.__context__
    for line in "".join(traceback.format_exception(error)).splitlines():
        complain(line)


def run_command(command: Callable[[], int], refusal: type[Exception]) -> int:
    """Run a command and return its exit status.

    A `refusal` that it raises is its sentence on stderr, status 1. A reader that has seen enough (`| head`) ends the
    command quietly; an output that is full, with a sentence, status 1. Output without a character (ASCII, Latin-1) gets
    another in its place. Ctrl-C is one line, status 130. Other exceptions, `SystemExit` among them, go to the caller.
    """
    _open_what_is_closed()
    out, err = _watch("stdout"), _watch("stderr")
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except refusal as error:
        trace_if_asked(error)
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        complain("Stopped.")
        return INTERRUPTED
    except (OSError, SystemExit) as error:  # argparse ends with SystemExit even if it could not write its help
        failed = out.failed if out else None
        if failed and (error is failed or isinstance(error, SystemExit)):
            _discard(sys.stdout)
            if isinstance(failed, BrokenPipeError):
                return BROKEN_PIPE
            complain(f"error: the output cannot be written: {failed.strerror}; send it to another file or disk.")
            return 1
        if err and error is err.failed:
            _discard(sys.stderr)
            return 1
        raise


class _Watched(io.FileIO):
    """A descriptor that keeps the error of writing to it: no other error of the system is to be taken for that."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


def _is_unseen(character: str) -> bool:
    return unicodedata.category(character) in _UNSEEN and character not in _JOINERS


def _code(character: str) -> str:
    return f"[U+{ord(character):04X}]"


def _open_what_is_closed() -> None:
    """Have the null device in place of standard streams that are closed: Python's are None then.

    It also takes their descriptors, so that no results file is opened as number 1, where libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the rest of the process


def _watch(name: str) -> _Watched | None:
    """Have a standard stream print every character, and watch it; None where another has been put in its place."""
    codecs.register_error(_ERRORS, _plain)
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__") or not hasattr(stream, "reconfigure"):
        return None
    stream.flush()
    raw = _Watched(stream.fileno(), "w", closefd=False)
    again = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    setattr(sys, name, again)
    return raw


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What to write for characters that an encoding lacks; see `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, c.encode("ascii", "backslashreplace").decode()) for c in lacking), error.end


def _discard(stream: TextIO) -> None:
    """Throw away what a stream cannot write, or Python complains of it once more as it ends."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file of the system's
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), number)
