"""The answers of a run on disk, from the moment they are given until lm-eval has written its results.

One JSON object a line: `{"task", "doc_id", "kind", "prompt", "argument", "answer"}`. `argument` is what stands beside
the prompt: the continuation that was scored, or the generation arguments. Lines are in the order of the answers.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.instance import Instance
from lm_eval.utils import handle_non_serializable

_log = logging.getLogger(__name__)


class AnswerLog:
    """A file that grows with each group of answers. It is made by the first of them.

    Attributes:
        path: of the file.
        answers: how many it holds.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: an existing one, where the file will be."""
        self.path = folder / f"answers_{datetime.now():%Y-%m-%dT%H-%M-%S.%f}_{os.getpid()}.jsonl"
        self.answers = 0
        self._file: TextIO | None = None
        self._lock = threading.Lock()
        self._lost = False

    def add(self, requests: Sequence[Instance], answers: Sequence[Any]) -> None:
        """Write the answers to `requests`, in the same order, so that they survive the end of this process.

        Where they cannot be written any more, a warning says so, and the run goes on.
        """
        lines = [
            json.dumps(
                {
                    "task": request.task_name,
                    "doc_id": request.doc_id,
                    "kind": request.request_type,
                    "prompt": request.args[0],
                    "argument": request.args[1] if len(request.args) > 1 else None,
                    "answer": answer,
                },
                default=handle_non_serializable,
            )
            for request, answer in zip(requests, answers, strict=True)
        ]
        with self._lock:
            if self._lost:
                return
            try:
                if self._file is None:
                    self._file = self.path.open("w", encoding="ascii")
                self._file.write("".join(line + "\n" for line in lines))
                self._file.flush()
            except OSError as error:
                self._lost = True
                _log.warning("answers are no longer kept in %s (%s).", self.path, error.strerror)
            else:
                self.answers += len(lines)

    def close(self) -> None:
        """Keep the file, and write no more to it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._file.close()
            self._file = None

    def remove(self) -> None:
        """The answers are no longer needed."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.answers = 0
