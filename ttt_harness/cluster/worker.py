"""What runs on the other side: a worker with a base model and an engine of its own, and the board it reports to.

Both are ordinary classes, of which `pool` makes Ray actors. A worker's model is a `TTTVLLM` like the driver's, and the
groups of requests that it is handed are the driver's, so that both name an adapter alike.
"""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_harness.config import TTTConfig
from ttt_harness.errors import ClusterError, StoreError
from ttt_harness.run.progress import Display, RunProgress, showing

if TYPE_CHECKING:
    from ttt_harness.harness.model import TTTVLLM

SECONDS_BETWEEN_REPORTS = 0.5
PACKAGES = ("ttt-harness", "lm-eval", "torch", "torchtune", "transformers")


def versions() -> dict[str, str]:
    """Of the packages on which a worker's results depend."""
    from vllm import __version__ as vllm_version

    return {name: version(name) for name in PACKAGES} | {"vllm": vllm_version}


@dataclass(frozen=True)
class Circumstances:
    """What a worker's results depend on besides its orders and its versions, to be held against the driver's."""

    device: str
    dtype: str
    base_model: str

    @classmethod
    def of(cls, model: "TTTVLLM") -> "Circumstances":
        """Those of the process that `model` lives in."""
        return cls(model.fit_device, model.dtype_name, model.base_model_hash)


class Worker:
    """One of the workers of a run.

    Args:
        number: which one, from 0.
        board: where it reports what it is doing (a handle of a `Board`).
    """

    def __init__(self, number: int, board: Any) -> None:
        self.number = number
        self._board = board
        self._model: TTTVLLM | None = None
        self._model_args: Mapping[str, Any] = {}
        self._store: Path | None = None

    def node(self) -> str:
        """The name of its machine."""
        return socket.gethostname()

    def start(
        self, model_args: Mapping[str, Any], mark: Path, driver_versions: Mapping[str, str]
    ) -> tuple[Circumstances, bool]:
        """Make the model, without loading it yet.

        Args:
            model_args: of `TTTVLLM`.
            mark: a file that the driver has made in its store.
            driver_versions: the driver's `versions()`.

        Returns:
            What the results depend on, and whether this machine sees the driver's store.

        Raises:
            ClusterError: this machine has other versions.
            TTTError: the model is not there or cannot be used, or the store cannot be written.
        """
        self._store = mark.parent if os.path.exists(mark) else None  # Path.exists raises where it may not look
        self._check_store()
        for name, here in versions().items():
            if here != driver_versions[name]:
                raise ClusterError(
                    f"{name} is {here} on {self.node()}, and {driver_versions[name]} where the run was started; "
                    "install the same on both."
                )
        return Circumstances.of(self._model_with(model_args)), self._store is not None

    def _check_store(self) -> None:
        """Raises StoreError where adapters cannot be kept on this machine."""
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

    def fit(self, model_args: Mapping[str, Any], group: Any) -> tuple[dict[str, Any], dict[str, bytes] | None]:
        """Have the group's adapter in the store.

        Returns:
            The record of the fit, and the adapter's files where the driver cannot see them.
        """
        model = self._model_with(model_args)
        model.begin_fits()
        with (
            self._reporting(),
            RunProgress(model.fit_work(group.sequences)) as progress,
            ThreadPoolExecutor(1) as writer,
        ):
            stored = model.fit_group(group, progress, group.task, writer)
            if stored is not None:
                stored.result()
        model.adapter_of(group, fitted=stored is not None)
        files = None if self._store else model.store.files(group.key)
        return model.records[group.task], files

    def answer(
        self,
        model_args: Mapping[str, Any],
        group: Any,
        requests: list[Any],
        kind: str,
        files: Mapping[str, bytes] | None,
    ) -> tuple[list[Any], dict[str, Any]]:
        """Answer some of a group's requests.

        Args:
            model_args: of `TTTVLLM`.
            group: whose adapter is in the store, or comes as `files`.
            requests: which of them.
            kind: the method of lm-eval's that answers them.
            files: of the adapter, where the driver's store cannot be seen.

        Returns:
            The answers in order, and the record of the group.
        """
        model = self._model_with(model_args)
        if files and model.store.load(group.key) is None:
            model.store.add(group.key, files)
        with self._reporting(), RunProgress(1.0) as progress:
            values = model.answer_group(group, requests, kind, progress, group.task, 1.0)
        return values, model.records[group.task]

    def _model_with(self, model_args: Mapping[str, Any]) -> "TTTVLLM":
        """The model with these arguments; it shares its engine and its trainer with the one before."""
        from ttt_harness.harness.model import TTTVLLM

        if self._model is None or self._model_args != model_args:
            folder = {"adapter_dir": str(self._store)} if self._store else {}
            own = {name: value for name, value in model_args.items() if name != "adapter_dir"}
            self._model, self._model_args = TTTVLLM(**{**own, **folder}), model_args
        return self._model

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        with showing(_Reports(self.number, self._board)):
            yield


class _Reports(Display):
    """Shows progress on the board."""

    def __init__(self, number: int, board: Any) -> None:
        super().__init__()
        self._number, self._board = number, board
        self._last = 0.0

    def show(self, share: float, what: str, *, line: bool = False) -> None:
        """Report it, if the last report is some time ago or this is worth a line."""
        now = time.monotonic()
        if line or now - self._last >= SECONDS_BETWEEN_REPORTS:
            self._last = now
            self._board.tell.remote(self._number, share, what)


class Board:
    """What each worker is doing, for the driver to look at."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[float, str]] = {}

    def tell(self, number: int, share: float, what: str) -> None:
        """Worker `number` has done this share of its piece, from 0 to 1, and does `what`."""
        self._told[number] = (share, what)

    def read(self) -> dict[int, tuple[float, str]]:
        """What has been told since the last look."""
        told, self._told = self._told, {}
        return told
