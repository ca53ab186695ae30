"""The driver's side of a run on several workers: one Ray actor for each, kept for as long as this process lives.

A pool begins to start its workers as soon as it is told what they have to load, beside whatever the driver does
meanwhile. For each run it gives a `PoolCrew`, which the run's executor hands its pieces to.
"""

import atexit
import contextlib
import importlib.util
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_harness.adapters.store import AdapterStore
from ttt_harness.cluster import session
from ttt_harness.cluster.worker import Board, RayWorker, WorkerEnvironment
from ttt_harness.config import LMEvalSettings, TTTConfig
from ttt_harness.errors import ClusterError, ConfigError, StoreError
from ttt_harness.run.evaluation import MOST_REPEATS
from ttt_harness.run.executor import SECONDS_BETWEEN_LOOKS, WorkerLost
from ttt_harness.run.orders import FitOrder, Order, Outcome, Report
from ttt_harness.run.progress import RunProgress
from ttt_harness.run.schedule import Stages

# How long a run without any worker waits for a node on which one in the place of a lost one can be started.
SECONDS_TO_REPLACE = 300.0
# A worker's fit, its answers and what the driver asks of it meanwhile.
CALLS_AT_A_TIME = 4


class Pool:
    """Workers, in processes of Ray's.

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
        self.lost: dict[int, int] = {}  # worker -> how many in its place were lost, while there is none
        self.loading: dict[Any, int] = {}  # reference -> worker, whose environment is there once it has loaded
        self._given: Mapping[str, Any] = {}
        self._loads = 0  # how often the workers were told what to load
        self._workers: dict[int, Any] = {}
        self._placed: dict[int, Any] = {}  # worker -> reference to its machine's name, which is there once it has one
        self._nodes: dict[int, str] = {}  # of those that have been ready
        session.connect()
        self._options = session.resources(workers, gpus_per_worker)
        if "num_gpus" in self._options:
            self._options["max_concurrency"] = CALLS_AT_A_TIME
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the driver's own machine, so that it is not lost with another node.
        here = NodeAffinitySchedulingStrategy(session.ray().get_runtime_context().get_node_id(), soft=False)
        self._board = session.ray().remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
        atexit.register(self.close)

    def load(self, given: Mapping[str, Any]) -> None:
        """Have each worker load what the model arguments `given` ask for; nobody waits for it here."""
        self._given = given
        self._loads += 1
        self.loading = {self._load(number): number for number in range(self.size)}

    def _load(self, number: int) -> Any:
        if number not in self._workers:
            worker = session.ray().remote(RayWorker).options(**self._options).remote(number, self._board)
            self._workers[number], self._placed[number] = worker, worker.node.remote()
        return self._workers[number].load.remote(self._given, self._loads)

    def replace(self, number: int) -> None:
        """Have another worker in the place of worker `number`, which is lost."""
        self.lost[number] = self.lost.get(number, -1) + 1
        del self._workers[number]
        self.loading[self._load(number)] = number

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        for worker in self._workers.values():
            with contextlib.suppress(Exception):
                session.ray().kill(worker)
        session.ray().shutdown()

    @contextlib.contextmanager
    def crew(self, store: AdapterStore, environment: WorkerEnvironment, progress: RunProgress) -> Iterator["PoolCrew"]:
        """The workers for one run. A run that ends with an error ends them.

        Args:
            store: the driver's.
            environment: of the driver, with which each worker's is compared.
            progress: shows what the workers do.

        Raises:
            StoreError: the store cannot be written.
        """
        mark = _mark(store.root)
        try:
            progress.say(f"starting {self.size} workers")
            yield PoolCrew(self, store, mark, environment, progress)
        except BaseException:
            self.close()
            raise
        finally:
            mark.unlink(missing_ok=True)

    def loaded(self, number: int, reference: Any) -> WorkerEnvironment | None:
        """The environment of a worker that has loaded; None if it, or the one in whose place it comes, is lost.

        Raises:
            TTTError: it cannot load.
        """
        ray = session.ray()
        try:
            environment = ray.get(reference)
            self._nodes[number] = ray.get(self._placed[number])
        except ray.exceptions.RayTaskError as error:
            raise session.cause(error, f"worker {number}") from None
        except ray.exceptions.RayError as error:
            reason = session.first_line(error)
            if getattr(error, "actor_init_failed", False):  # at its imports: what failed is at the end
                reason = f"{str(error).strip().splitlines()[-1]}; its node needs the packages of this environment."
            elif number in self._nodes and self.lost.get(number, 0) < MOST_REPEATS:
                return None
            raise ClusterError(f"worker {number} could not be started: {reason}") from None
        self.lost.pop(number, None)
        return environment

    def no_worker_left(self, store: Path) -> ClusterError | None:
        """What to tell once all workers are lost and have been for too long; None if one in their place has a node."""
        placed, _ = session.ray().wait([self._placed[number] for number in self.lost], num_returns=1, timeout=0)
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

    def node(self, number: int) -> str:
        """The machine of worker `number`, which has been ready."""
        return self._nodes[number]

    def told(self) -> Mapping[tuple[int, str], tuple[float, str, bool]]:
        """What the workers have told of their progress since this was asked last."""
        try:
            return session.ray().get(self._board.read.remote(), timeout=2)
        except session.ray().exceptions.RayError:  # it is lost; the answers do not depend on it
            return {}


class PoolCrew:
    """The workers of one run, as its executor sees them."""

    def __init__(
        self, pool: Pool, store: AdapterStore, mark: Path, environment: WorkerEnvironment, progress: RunProgress
    ) -> None:
        self._pool, self._store, self._mark = pool, store, mark
        self._environment, self._progress = environment, progress
        self._stages: dict[int, Stages] = {}  # of the workers that take pieces
        self._sees_store: dict[int, bool] = {}
        self._files: dict[str, Any] = {}  # key -> reference to the adapter's files, for workers elsewhere
        self._running: dict[Any, tuple[int, Any, Order]] = {}  # reference -> worker, its handle, what it does
        self._reports: dict[tuple[int, str], Report] = {}
        self._head = session.Head()
        self._begun = False
        self._manned = time.monotonic()  # when there last was a worker

    def ready(self) -> Collection[int]:
        """The workers that take pieces: none until all are known to be like the driver, but for those that are lost."""
        self._begun = self._begun or not set(self._pool.loading.values()) - self._pool.lost.keys()
        return tuple(self._stages) if self._begun else ()

    def stages_of(self, worker: int) -> Stages:
        """How a worker goes about fits and answers."""
        return self._stages[worker]

    def begin(self, worker: int, order: Order, report: Report) -> Any:
        """Have a worker begin a piece."""

        def report_here(share: float, what: str, line: bool) -> None:
            report(share, f"{what} (worker {worker})", line)

        actor = self._pool.worker(worker)
        if isinstance(order, FitOrder):
            self._reports[worker, "fit"] = report_here
            reference = actor.fit.remote(order)
        else:
            self._reports[worker, "answer"] = report_here
            reference = actor.answer.remote(order, self._adapter_files(worker, order.key))
        self._running[reference] = worker, actor, order
        return reference

    def wait(self, running: Collection[Any]) -> Sequence[Any]:
        """Wait a little, take in the workers that have loaded, and show what all do. Returns those that are done.

        Raises:
            TTTError: a worker cannot be used, or all are lost and there is no node for another.
        """
        self._head.check(self._store.root)
        references = [*running, *self._pool.loading]
        done, _ = session.ray().wait(references, num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
        for reference in done:
            if reference in self._pool.loading:
                self._take_in(self._pool.loading.pop(reference), reference)
        for who, told in self._pool.told().items():
            if who in self._reports:
                self._reports[who](*told)
        if self._stages or len(self._pool.lost) < self._pool.size:
            self._manned = time.monotonic()
        elif time.monotonic() - self._manned > SECONDS_TO_REPLACE and (
            error := self._pool.no_worker_left(self._store.root)
        ):
            raise error
        return [reference for reference in done if reference in running]

    def result(self, handle: Any) -> Outcome:
        """What came of a piece.

        Raises:
            WorkerLost: its worker is gone; another is started.
            TTTError: what the worker raised.
        """
        ray = session.ray()
        worker, actor, order = self._running.pop(handle)
        self._reports.pop((worker, "fit" if isinstance(order, FitOrder) else "answer"), None)
        try:
            outcome = ray.get(handle)
            if isinstance(order, FitOrder) and not self._sees_store[worker]:
                self._store.add(order.key, ray.get(actor.files.remote(order.key)))
        except ray.exceptions.RayTaskError as error:
            raise session.cause(error, order.task) from None
        except ray.exceptions.RayError as error:
            if self._pool.worker(worker) is actor:  # else another is there already: it was at two pieces
                self._lose(worker)
            self._progress.say(f"{order.where}: its worker is lost; it is done again elsewhere")
            raise WorkerLost(session.first_line(error)) from None
        if outcome.record.adapter is not None and order.key is not None:
            outcome.record.adapter = str(self._store.root / order.key)
        return outcome

    def _take_in(self, worker: int, reference: Any) -> None:
        """Have a worker that has loaded take pieces, once it is known to be like the driver."""
        environment = self._pool.loaded(worker, reference)
        if environment is None:
            self._lose(worker)
            return
        ours = self._environment
        for name, version in environment.versions.items():
            if version != ours.versions[name]:
                raise ClusterError(
                    f"{name} is {version} on {self._pool.node(worker)}, and {ours.versions[name]} where the run was "
                    "started; install the same on both."
                )
        for what in ("device", "dtype", "base_model"):
            if getattr(environment, what) != getattr(ours, what):
                raise ClusterError(
                    f"the {what.replace('_', ' ')} of worker {worker} is {getattr(environment, what)}, and "
                    f"{getattr(ours, what)} here; run this command on a node like those of the workers."
                )
        ray = session.ray()
        try:
            self._sees_store[worker] = ray.get(self._pool.worker(worker).use_store.remote(self._mark))
        except ray.exceptions.RayTaskError as error:
            raise session.cause(error, f"worker {worker}") from None
        except ray.exceptions.RayError:
            self._lose(worker)
            return
        self._stages[worker] = environment.stages

    def _lose(self, worker: int) -> None:
        self._stages.pop(worker, None)
        self._pool.replace(worker)

    def _adapter_files(self, worker: int, key: str | None) -> Any:
        """The adapter's files, by reference, for a worker that cannot read them in the store."""
        if key is None or self._sees_store[worker]:
            return None
        if key not in self._files:
            self._files[key] = session.ray().put(self._store.files(key))
        return self._files[key]


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


_pool: Pool | None = None


def shared_pool(workers: int, *, gpus_per_worker: int) -> Pool:
    """This process's pool; the one there is, if it has as many workers, else a new one in its place."""
    global _pool
    if _pool is None or _pool.closed or _pool.size != workers:
        if _pool is not None:
            _pool.close()
        _pool = Pool(workers, gpus_per_worker=gpus_per_worker)
    return _pool


def begin_workers(pretrained: str | None, dtype: str, model_args: Mapping[str, Any]) -> Pool | None:
    """The workers of a run with `data_parallel_size` above 1, which begin to load; what is wrong is said later."""
    asked = LMEvalSettings.from_mapping(model_args)
    workers = asked.data_parallel_size or 1
    if pretrained is None or workers < 2:
        return None
    if TTTConfig.from_mapping(model_args).settings is not None:
        from ttt_harness.run.model_arguments import explicit_arguments

        model_args = explicit_arguments(pretrained, model_args)
    pool = shared_pool(workers, gpus_per_worker=asked.tensor_parallel_size or 1)
    given = {name: value for name, value in model_args.items() if name not in ("data_parallel_size", "device")}
    pool.load({"pretrained": pretrained, "dtype": dtype, **given})
    return pool
