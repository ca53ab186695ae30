"""The package's exceptions.

Each message is one sentence for a person: it names the value that was given, the rule it breaks and the remedy.
A command ends with that sentence and without a traceback (`ending_in_one_sentence`), and so does a Python program that
makes a `ttt_vllm` model (`report_errors_in_one_sentence`); `LMEVAL_LOG_LEVEL=DEBUG` adds the traceback. Python callers
catch `TTTError`, or one of its kinds, as usual.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from ttt_harness.terminal import complain, trace_if_asked


class TTTError(Exception):
    """Base of everything this package raises on purpose. The only argument is the message, so that it pickles."""


class ConfigError(TTTError):
    """An argument or a metadata key has a value that is not allowed."""


class DataError(TTTError):
    """A data set is missing, damaged, or does not hold what a task needs."""


class ModelError(TTTError):
    """A base model is missing, damaged, or of an architecture that is not supported."""


class DivergedError(ModelError):
    """A fit has produced infinities or NaN."""


class StoreError(TTTError):
    """An adapter could not be written to the store."""


class ClusterError(TTTError):
    """Workers could not be started, differ from the driver, or were lost again and again."""


class ResultsError(TTTError):
    """The results of a run cannot be written, or a task could not be scored."""


class ReportError(TTTError):
    """A results file is missing, damaged, or cannot be compared with another."""


@contextmanager
def ending_in_one_sentence(interrupted: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """End the process with status 1 and the message of a `TTTError` that leaves the block; with 130 after Ctrl-C.

    The notes of an error stand before its message.

    Args:
        interrupted: whether Ctrl-C is to end in one line too; it is asked when that happens.
    """
    try:
        yield
    except TTTError as error:
        trace_if_asked(error)
        for note in getattr(error, "__notes__", ()):
            complain(f"note: {note}")
        complain(f"error: {error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt as error:
        if not interrupted():
            raise
        trace_if_asked(error)
        complain("; ".join(["Stopped", *getattr(error, "__notes__", ())]))
        raise SystemExit(130) from None


def report_errors_in_one_sentence() -> None:
    """End the process with the message of an uncaught `TTTError`, and no traceback unless one is asked for.

    Safe to call twice. Other exceptions go to the hook that was there before.
    """
    previous = sys.excepthook
    if getattr(previous, "_reports_ttt_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, TTTError):
            trace_if_asked(error)
            complain(f"error: {error}")
        else:
            previous(kind, error, trace)

    hook._reports_ttt_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
