"""The driver's side of a run on several workers: one Ray actor for each, kept for as long as this process lives.

A pool joins the cluster that `RAY_ADDRESS` names, or starts one on this machine, which ends with this process. Ray is
imported when the first pool is made.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttt_harness.cluster.schedule import Piece, Schedule, Task
from ttt_harness.cluster.worker import Board, Circumstances, Worker, versions
from ttt_harness.errors import ClusterError, ConfigError, StoreError, TTTError
from ttt_harness.run.progress import RunProgress
from ttt_harness.serving.environment import environment_as_given

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ttt_harness.harness.model import TTTVLLM, Group

# How often a piece of work is given to another worker after its own has died.
MOST_REPEATS = 2
# How long a run without any worker waits for a node on which one in the place of a lost one can be started.
SECONDS_TO_REPLACE = 300.0
SECONDS_TO_CONNECT = 30.0
# How long a run goes on without the head node; after 60 s (gcs_rpc_server_reconnect_timeout_s) Ray ends the process.
SECONDS_WITHOUT_HEAD = 30.0
SECONDS_BETWEEN_HEAD_CHECKS = 5.0
SECONDS_BETWEEN_LOOKS = 0.5
# What travels through Ray are prompts, answers, and adapters between machines without a common folder.
OBJECT_STORE_BYTES = 256 * 2**20


class Pool:
    """Workers that are started by the first run that needs them.

    Args:
        workers: how many.
        gpus_per_worker: GPUs that each takes, where the cluster has any.

    Raises:
        ConfigError: Ray is missing, or the cluster has too few GPUs or cores.
        ClusterError: the cluster cannot be reached or joined.
    """

    def __init__(self, workers: int, *, gpus_per_worker: int = 1) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(
                f"data_parallel_size={workers} needs Ray, which is not installed: pip install 'ttt-harness[cluster]'."
            )
        self.size = workers
        self.closed = False
        self._workers: dict[int, Any] = {}
        self._placed: dict[int, Any] = {}  # worker -> reference to its machine's name, which is there once it has one
        self._nodes: dict[int, str] = {}  # of those that have been ready
        self._sees_store: dict[int, bool] = {}
        self.lost: dict[int, int] = {}  # worker -> how many in its place were lost, while there is none
        connect()
        self._options = self._resources(workers, gpus_per_worker)
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the driver's own machine, so that it is not lost with another node.
        here = NodeAffinitySchedulingStrategy(_ray().get_runtime_context().get_node_id(), soft=False)
        self._board = _ray().remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        atexit.register(self.close)

    def _resources(self, workers: int, gpus_per_worker: int) -> dict[str, Any]:
        """What each actor asks Ray for."""
        nodes = [node["Resources"] for node in _ray().nodes() if node["Alive"]]
        gpus, cores = ([int(node.get(kind, 0)) for node in nodes] for kind in ("GPU", "CPU"))
        if any(gpus):
            places = sum(count // gpus_per_worker for count in gpus)
            if workers > places:
                each = f" with tensor_parallel_size={gpus_per_worker}" if gpus_per_worker > 1 else ""
                where = f" on {len(gpus)} nodes" if len(gpus) > 1 else ""
                raise ConfigError(
                    f"data_parallel_size={workers} is not allowed{each}: there are {sum(gpus)} GPUs{where}; "
                    + (f"use at most {places}." if places else "use a smaller tensor_parallel_size.")
                )
            return {"num_cpus": 0, "num_gpus": gpus_per_worker}
        if workers > sum(cores):
            most = f"use at most {sum(cores)}" if any(cores) else "join nodes that have some"
            raise ConfigError(
                f"data_parallel_size={workers} is not allowed: there are {sum(cores)} cores and no GPU; {most}."
            )
        threads = most_cores(cores, workers)
        return {"num_cpus": threads, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        for worker in self._workers.values():
            with contextlib.suppress(Exception):
                _ray().kill(worker)
        _ray().shutdown()

    # A run

    def answer(
        self,
        model: "TTTVLLM",
        groups: "Sequence[Group]",
        requests: "Sequence[Instance]",
        kind: str,
        progress: RunProgress,
        fit_work: Mapping[str, float],
        read_work: Mapping[str, float],
    ) -> list[Any]:
        """Fit and answer the groups on the workers; puts what it took into the model's records.

        Args:
            model: the driver's, which neither fits nor answers.
            groups: of requests, with their sequences and keys.
            requests: all of them.
            kind: the method of lm-eval's that answers them.
            progress: counts the work of all groups.
            fit_work: key -> the work of each fit that is to be done.
            read_work: task -> the work of its answers.

        Returns:
            The answers in the order of the requests.

        Raises:
            TTTError: a worker cannot do its work, a piece of it has ended its workers again and again, or no worker is
                left and there is no node for another.
        """
        run = _Run(self, model, groups, requests, kind, progress)
        self._mark = _mark(model.store.root)
        try:
            run.start()
            shared = {key for key in fit_work if sum(group.key == key for group in groups) > 1}
            first = [next(i for i, group in enumerate(groups) if group.key == key) for key in shared]
            run.work([Task(groups[i].task, fit_work[groups[i].key or ""], 0, 0) for i in first], first)
            tasks = [
                Task(
                    group.task,
                    0 if group.key in shared else fit_work.get(group.key or "", 0),
                    read_work[group.task],
                    len(group.indices),
                )
                for group in groups
            ]
            run.work(tasks, range(len(groups)))
        except BaseException:
            self.close()
            raise
        finally:
            self._mark.unlink(missing_ok=True)
        return run.answers

    def start_worker(self, number: int, model: "TTTVLLM") -> Any:
        """Have worker `number` make the model; the worker is started if it is not there.

        Returns:
            The reference that is there once it is ready.
        """
        if number not in self._workers:
            worker = _ray().remote(Worker).options(**self._options).remote(number, self._board)
            self._workers[number], self._placed[number] = worker, worker.node.remote()
        return self._workers[number].start.remote(model.worker_args, self._mark, versions())

    def replace_worker(self, number: int, model: "TTTVLLM") -> Any:
        """Have another worker in the place of worker `number`, which is lost; as `start_worker`."""
        self.lost[number] = self.lost.get(number, -1) + 1
        del self._workers[number]
        return self.start_worker(number, model)

    def is_ready(self, number: int, reference: Any, model: "TTTVLLM") -> bool:
        """Take note of a worker that has started.

        Returns:
            Whether it is there; False if it was there before, or one in whose place it comes, and is lost.

        Raises:
            TTTError: it has other versions, another device or another model than the driver, or has not started.
        """
        try:
            theirs, self._sees_store[number] = _ray().get(reference)
            self._nodes[number] = _ray().get(self._placed[number])
        except _ray().exceptions.RayTaskError as error:
            raise _cause(error, f"worker {number}") from None
        except _ray().exceptions.RayError as error:
            reason = _first_line(error)
            if getattr(error, "actor_init_failed", False):  # at its imports: what failed is at the end
                reason = f"{str(error).strip().splitlines()[-1]}; its node needs the packages of this environment."
            elif number in self._nodes and self.lost.get(number, 0) < MOST_REPEATS:
                return False
            raise ClusterError(f"worker {number} could not be started: {reason}") from None
        ours = Circumstances.of(model)
        for what in ("device", "dtype", "base_model"):
            if getattr(theirs, what) != getattr(ours, what):
                raise ClusterError(
                    f"the {what.replace('_', ' ')} of worker {number} is {getattr(theirs, what)}, and "
                    f"{getattr(ours, what)} here; run this command on a node like those of the workers."
                )
        self.lost.pop(number, None)
        return True

    def no_worker_left(self, store: Path) -> ClusterError | None:
        """What to tell once all workers are lost and have been for too long; None if one in their place has a node."""
        placed, _ = _ray().wait([self._placed[number] for number in self.lost], num_returns=1, timeout=0)
        if placed:
            return None
        where = ", ".join(f"{number} on {self._nodes[number]}" for number in sorted(self.lost))
        kind = "num_gpus" if "num_gpus" in self._options else "num_cpus"
        count = self._options[kind]
        needs = f"{count} free {'GPU' if kind == 'num_gpus' else 'core'}{'s' * (count > 1)}"
        return ClusterError(
            f"all workers are lost ({where}), and for {SECONDS_TO_REPLACE:.0f} s there has been no node with {needs} "
            f"for another; start Ray on one and run the same command again, which goes on with the adapters in {store}."
        )

    def worker(self, number: int) -> Any:
        """The handle of worker `number`."""
        return self._workers[number]

    def sees_store(self, number: int) -> bool:
        """Whether worker `number` works in the driver's store."""
        return self._sees_store[number]

    def told(self) -> dict[int, tuple[float, str]]:
        """What the workers have told of their progress since this was asked last."""
        try:
            return _ray().get(self._board.read.remote(), timeout=2)
        except _ray().exceptions.RayError:  # it is lost; the answers do not depend on it
            return {}


def most_cores(nodes: Sequence[int], workers: int) -> int:
    """The most cores that each of the workers can have, on nodes with these numbers of cores; a worker is on one node.

    There are at least as many cores as workers.
    """
    return next(most for most in range(max(nodes), 0, -1) if sum(cores // most for cores in nodes) >= workers)


class _Run:
    """One call of the model's: who is at what, and what has come of it."""

    def __init__(
        self,
        pool: Pool,
        model: "TTTVLLM",
        groups: "Sequence[Group]",
        requests: "Sequence[Instance]",
        kind: str,
        progress: RunProgress,
    ) -> None:
        self.answers: list[Any] = [None] * len(requests)
        self._pool, self._model, self._groups, self._requests = pool, model, groups, requests
        self._kind, self._progress = kind, progress
        self._files: dict[str, Any] = {}  # key -> reference to the adapter's files, for workers elsewhere
        self._lost: dict[Piece, int] = {}
        self._shown: dict[int, float] = {}  # worker -> the share of its piece that is counted
        self._idle: list[int] = []
        self._starting: dict[Any, int] = {}  # reference -> worker, which is ready once the reference is there
        self._manned = time.monotonic()  # when there last was a worker
        self._checked = self._headed = self._manned  # when the head node was last asked, and when it last answered

    def start(self) -> None:
        """Have each worker make the model, and hold what its results depend on against the driver's.

        Those that were lost before are not waited for, as long as there is another.
        """
        self._progress.say(f"starting {self._pool.size} workers")
        self._starting = {self._pool.start_worker(number, self._model): number for number in range(self._pool.size)}
        while not self._idle or not self._pool.lost.keys() >= set(self._starting.values()):
            self._wait([])

    def _wait(self, running: Collection[Any]) -> list[Any]:
        """Wait a little, and take in the workers that have become ready. Returns those of `running` that are done.

        Raises:
            TTTError: a worker cannot be used, or all are lost and there is no node for another.
        """
        self._check_head()
        ready, _ = _ray().wait([*running, *self._starting], num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        for reference in ready:
            if reference in self._starting:
                number = self._starting.pop(reference)
                if self._pool.is_ready(number, reference, self._model):
                    self._idle.append(number)
                else:
                    self._starting[self._pool.replace_worker(number, self._model)] = number
        if running or self._idle or len(self._pool.lost) < self._pool.size:
            self._manned = time.monotonic()
        elif time.monotonic() - self._manned > SECONDS_TO_REPLACE and (
            error := self._pool.no_worker_left(self._model.store.root)
        ):
            raise error
        return [reference for reference in ready if reference in running]

    def _check_head(self) -> None:
        """Raises ClusterError where the cluster's head node has not answered for some time."""
        if time.monotonic() - self._checked < SECONDS_BETWEEN_HEAD_CHECKS:
            return
        address = _ray().get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_BETWEEN_HEAD_CHECKS).close()
            self._headed = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._headed > SECONDS_WITHOUT_HEAD:
                raise ClusterError(
                    f"the head node of the Ray cluster, {address}, has not answered for {SECONDS_WITHOUT_HEAD:.0f} s "
                    f"({error.strerror or error}), and no cluster runs on without it; start one again and run the same "
                    f"command again, which goes on with the adapters in {self._model.store.root}."
                ) from None
        self._checked = time.monotonic()

    def work(self, tasks: Sequence[Task], groups: Sequence[int]) -> None:
        """Have the pieces of `tasks` done; task number i is that of group number groups[i]."""
        ray = _ray()
        schedule = Schedule(tasks, self._pool.size)
        running: dict[Any, tuple[int, Piece]] = {}
        while True:
            for number in list(self._idle):
                if (piece := schedule.next(number)) is not None:
                    self._idle.remove(number)
                    running[self._begin(number, piece, self._groups[groups[piece.task]])] = (number, piece)
            if not running and not schedule.left:
                return
            done = self._wait(running)
            self._show(tasks, dict(running.values()))
            for reference in done:
                number, piece = running.pop(reference)
                group = self._groups[groups[piece.task]]
                try:
                    self._end(piece, group, ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    raise _cause(error, group.task) from None
                except ray.exceptions.RayError as error:
                    self._again(piece, group, error)
                    schedule.failed(piece)
                    self._progress.advance(-self._shown.pop(number, 0.0) * _work(piece, tasks), group.task)
                    self._starting[self._pool.replace_worker(number, self._model)] = number
                    continue
                if piece.fits:
                    schedule.fitted(piece.task, number)
                self._progress.advance((1 - self._shown.pop(number, 0.0)) * _work(piece, tasks), group.task)
                self._idle.append(number)

    def _begin(self, number: int, piece: Piece, group: "Group") -> Any:
        worker, args = self._pool.worker(number), self._model.worker_args
        if piece.fits:
            self._progress.say(f"{group.task}: fitting (worker {number})")
            return worker.fit.remote(args, dataclasses.replace(group, support=None, indices=[]))
        self._progress.say(f"{group.task}: answering {piece.stop - piece.start} requests (worker {number})")
        requests = [self._requests[index] for index in group.indices[piece.start : piece.stop]]
        head = dataclasses.replace(group, support=None, indices=[], sequences=group.sequences[:1])
        return worker.answer.remote(args, head, requests, self._kind, self._adapter_files(number, group))

    def _adapter_files(self, number: int, group: "Group") -> Any:
        """The adapter's files, by reference, for a worker that cannot read them in the store."""
        if group.key is None or self._pool.sees_store(number):
            return None
        if group.key not in self._files:
            self._files[group.key] = _ray().put(self._model.store.files(group.key))
        return self._files[group.key]

    def _end(self, piece: Piece, group: "Group", result: tuple[Any, Any]) -> None:
        records = self._model.records
        if piece.fits:
            record, files = result
            if files is not None:
                assert group.key is not None
                self._model.store.add(group.key, files)
            records[group.task] = {**record, **self._place(group)}
            return
        values, record = result
        for index, value in zip(group.indices[piece.start : piece.stop], values, strict=True):
            self.answers[index] = value
        mine = records.setdefault(group.task, {**record, **self._place(group), "requests": 0, "generate_seconds": 0.0})
        if "changes_output" in record:
            mine["changes_output"] = record["changes_output"]
        mine["requests"] = mine.get("requests", 0) + record["requests"]
        mine["generate_seconds"] = round(mine.get("generate_seconds", 0.0) + record["generate_seconds"], 3)

    def _place(self, group: "Group") -> dict[str, Any]:
        """Where the adapter is in the driver's store."""
        return {"adapter": str(self._model.store.root / group.key)} if group.key else {}

    def _again(self, piece: Piece, group: "Group", error: Exception) -> None:
        """Count how often the piece has ended its worker.

        Raises:
            ClusterError: too often.
        """
        self._lost[piece] = self._lost.get(piece, 0) + 1
        what = "fit" if piece.fits else "answers"
        if self._lost[piece] > MOST_REPEATS:
            raise ClusterError(
                f"the {what} of {group.task} ended {self._lost[piece]} workers: {_first_line(error)} "
                f"All adapters that are done are in {self._model.store.root}."
            ) from None
        self._progress.say(f"{group.task}: its worker is lost, its {what} are done again elsewhere")

    def _show(self, tasks: Sequence[Task], at: Mapping[int, Piece]) -> None:
        for number, (share, what) in self._pool.told().items():
            if number in at:
                self._progress.advance((share - self._shown.get(number, 0.0)) * _work(at[number], tasks), what)
                self._shown[number] = share


def _work(piece: Piece, tasks: Sequence[Task]) -> float:
    task = tasks[piece.task]
    return task.fit if piece.fits else task.answer * (piece.stop - piece.start) / task.questions


# Ray


def _ray() -> Any:
    import ray
    import ray.exceptions

    return ray


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, or start one here.

    Raises:
        ClusterError: it does not answer, is of another version, or cannot be started.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address != "local":
        _reach(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if address == "local":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options |= {"num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES}
    else:
        del options["include_dashboard"]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with environment_as_given():  # each worker makes its own choice of threads
            ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"Ray cannot be used at RAY_ADDRESS={address}: {_first_line(error)}") from None


def _reach(address: str) -> None:
    """Find out whether a cluster answers at HOST:PORT, by joining it in another process: Ray would try for minutes.

    `auto` is the address that Ray keeps of the last cluster of this machine, which may be there no more.
    """
    host, colon, port = address.rpartition(":")
    known = colon and re.fullmatch("[0-9]{1,5}", port) and int(port) < 2**16 and "://" not in address
    if not known and address != "auto":
        raise ConfigError(
            f"RAY_ADDRESS={address} is not allowed: it is HOST:PORT of a cluster's head node, auto, or unset for a "
            "cluster of this machine's."
        )
    join = [sys.executable, "-c", "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)", address]
    try:
        if known:
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_CONNECT / 4).close()
        tried = subprocess.run(join, capture_output=True, text=True, timeout=SECONDS_TO_CONNECT * 3 / 4, check=False)
        lines = tried.stderr.strip().splitlines()
        reason = lines[-1].strip() if tried.returncode and lines else ""
    except OSError as error:
        reason = error.strerror or str(error)
    except subprocess.TimeoutExpired:
        reason = f"nothing within {SECONDS_TO_CONNECT:.0f} s"
    if reason:
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({reason.rstrip('.')}); start one there with `ray start "
            "--head`, or unset RAY_ADDRESS to start one on this machine."
        )


def _mark(root: Path) -> Path:
    """A new file in the store, by which a worker knows that it sees the same folder.

    Raises:
        StoreError: the folder cannot be written.
    """
    mark = root.expanduser().resolve() / f".driver-{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise StoreError(
            f"the adapter store {root} cannot be written: {error.strerror}; choose another folder with adapter_dir=."
        ) from None
    return mark


def _cause(error: Any, where: str) -> Exception:
    """What a worker has raised, as this process raises it."""
    cause = error.cause
    if isinstance(cause, TTTError):
        return cause
    return ClusterError(f"{where}: {type(cause).__name__}: {_first_line(cause)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_pool: Pool | None = None


def shared_pool(workers: int, *, gpus_per_worker: int) -> Pool:
    """This process's pool; the one there is, if it has as many workers, else a new one in its place."""
    global _pool
    if _pool is None or _pool.closed or _pool.size != workers:
        if _pool is not None:
            _pool.close()
        _pool = Pool(workers, gpus_per_worker=gpus_per_worker)
    return _pool
