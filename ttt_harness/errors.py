"""The package's exceptions.

Each message is one sentence for a person: it names the value that was given, the rule it breaks and the remedy.
`report_errors_in_one_sentence` makes an uncaught one end the process with that sentence instead of a traceback;
Python callers catch `TTTError`, or one of its kinds, as usual.
"""

import logging
import sys
from types import TracebackType


class TTTError(Exception):
    """Base of everything this package raises on purpose. The only argument is the message, so that it pickles."""


class ConfigError(TTTError):
    """An argument or a metadata key has a value that is not allowed."""


class DataError(TTTError):
    """A data set is missing, damaged, or does not hold what a task needs."""


class ModelError(TTTError):
    """A base model is missing, damaged, or of an architecture that is not supported."""


class StoreError(TTTError):
    """An adapter could not be written to the store."""


class ClusterError(TTTError):
    """Workers could not be started, differ from the driver, or were lost again and again."""


class ReportError(TTTError):
    """A results file is missing, damaged, or cannot be compared with another."""


def report_errors_in_one_sentence() -> None:
    """End the process with the message of an uncaught `TTTError`, and no traceback unless logging is at DEBUG.

    Safe to call twice. Other exceptions go to the hook that was there before.
    """
    previous = sys.excepthook
    if getattr(previous, "_reports_ttt_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, TTTError) and not logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            print(f"error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook._reports_ttt_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
