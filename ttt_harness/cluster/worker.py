"""What runs on the other side: a worker in a process of Ray's, and the board that it reports to.

Both are ordinary classes, of which `pool` makes Ray actors. The worker itself is that of `run`.
"""

import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_harness.config import TTTConfig
from ttt_harness.errors import StoreError
from ttt_harness.run.orders import Answered, AnswerOrder, FitOrder, Fitted, Report
from ttt_harness.run.schedule import Stages

if TYPE_CHECKING:
    from ttt_harness.run.model_arguments import ModelArguments
    from ttt_harness.run.worker import Worker
    from ttt_harness.serving.answering import Answering

SECONDS_BETWEEN_REPORTS = 0.5
PACKAGES = ("ttt-harness", "lm-eval", "torch", "torchtune", "transformers")


def versions() -> dict[str, str]:
    """Of the packages on which a worker's results depend."""
    from vllm import __version__ as vllm_version

    return {name: version(name) for name in PACKAGES} | {"vllm": vllm_version}


@dataclass(frozen=True)
class WorkerEnvironment:
    """What a worker's results depend on besides its orders, to be compared with the driver's.

    base_model: the hash of its weights; None where nothing is fitted.
    stages: how the worker goes about fits and answers, for the schedule.
    """

    device: str
    dtype: str
    base_model: str | None
    versions: Mapping[str, str]
    stages: Stages = Stages.SEQUENTIAL


class RayWorker:
    """One of the workers of a run, in a process of its own.

    Args:
        number: which one, from 0.
        board: where it reports what it is doing (a handle of a `Board`).
    """

    def __init__(self, number: int, board: Any) -> None:
        self.number = number
        self._board = board
        self._given: Mapping[str, Any] | None = None
        self._newest_load = 0
        self._load_lock = threading.Lock()  # a worker on a GPU takes several calls at a time, in any order
        self._arguments: ModelArguments
        self._answering: Answering
        self._worker: Worker
        self._store: Path | None = None

    def node(self) -> str:
        """The name of its machine."""
        return socket.gethostname()

    def load(self, given: Mapping[str, Any], count: int) -> WorkerEnvironment:
        """Begin to load what the model arguments `given` ask for; engine and trainer are shared with those before.

        Args:
            given: the model arguments of a run.
            count: how often the pool has told its workers to load. A call that comes after a newer one changes
                nothing.

        Raises:
            TTTError: the model is not there or cannot be used.
        """
        with self._load_lock:
            if count >= self._newest_load:
                self._newest_load = count
                self._load(given)
            return self._environment()

    def _load(self, given: Mapping[str, Any]) -> None:
        from ttt_harness.run import local
        from ttt_harness.run.model_arguments import ModelArguments
        from ttt_harness.serving.answering import Answering

        if self._given != given:
            arguments = ModelArguments.parse(**given)
            self._answering = Answering(arguments.model_dir, arguments.engine, arguments.adapters)
            self._arguments, self._given = arguments, given
            local.preload(self._arguments, self._answering)

    def _environment(self) -> WorkerEnvironment:
        from ttt_harness.adapters.names import fingerprint
        from ttt_harness.run import local

        return WorkerEnvironment(
            device=local.fit_device(),
            dtype=self._answering.dtype_name,
            base_model=fingerprint(self._arguments.model_dir) if self._arguments.config.fits else None,
            versions=versions(),
            stages=local.stages_of(self._arguments.memory),
        )

    def use_store(self, mark: Path) -> bool:
        """Work in the driver's store, if this machine sees `mark`, a file that the driver has made in it.

        Returns:
            Whether it does; else this machine has a store of its own.

        Raises:
            StoreError: adapters cannot be kept on this machine.
        """
        from ttt_harness.adapters.store import AdapterStore
        from ttt_harness.run import local

        self._store = mark.parent if os.path.exists(mark) else None  # Path.exists raises where it may not look
        store, remedy = self._store, "choose another folder with adapter_dir="
        if store is None:
            store, remedy = TTTConfig().adapter_store, "set TTT_CACHE_DIR there to another folder"
        try:
            store.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=store):
                pass
        except OSError as error:
            raise StoreError(
                f"the adapter store {store} cannot be written on {self.node()}: {error.strerror}; {remedy}."
            ) from None
        self._worker = local.make_worker(self._arguments, self._answering, AdapterStore(store))
        return self._store is not None

    def fit(self, order: FitOrder) -> Fitted:
        """Have an adapter in the store, or on its way there.

        Raises:
            TTTError: as `Worker.fit`.
        """
        return self._worker.fit(order, self._report("fit"))

    def files(self, key: str) -> dict[str, bytes]:
        """The files of an adapter that was fitted here, once it is stored, for those who do not see this store."""
        return self._worker.store.files(self._worker.stored(key).key)

    def answer(self, order: AnswerOrder, files: Mapping[str, bytes] | None) -> Answered:
        """Answer requests.

        Args:
            order: what to answer.
            files: of the adapter, where this machine does not see the driver's store.

        Raises:
            TTTError: as `Worker.answer`.
        """
        store = self._worker.store
        if files and order.key is not None and store.load(order.key) is None:
            store.add(order.key, files)
        return self._worker.answer(order, self._report("answer"))

    def _report(self, stage: str) -> Report:
        last = 0.0

        def report(share: float, what: str, line: bool) -> None:
            nonlocal last
            now = time.monotonic()
            if line or now - last >= SECONDS_BETWEEN_REPORTS:
                last = now
                self._board.tell.remote((self.number, stage), (share, what, line))

        return report


class Board:
    """What each worker is doing in each of its stages, for the driver to look at."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, str], tuple[float, str, bool]] = {}

    def tell(self, who: tuple[int, str], what: tuple[float, str, bool]) -> None:
        """A worker's stage has done a share of its piece, does something, which is worth a line or not."""
        self._told[who] = what

    def read(self) -> dict[tuple[int, str], tuple[float, str, bool]]:
        """What has been told since the last look."""
        told, self._told = self._told, {}
        return told
