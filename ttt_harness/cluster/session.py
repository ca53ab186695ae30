"""The Ray cluster of a run: the one that `RAY_ADDRESS` names, or one on this machine, which ends with this process.

Ray is imported when a cluster is asked for.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ttt_harness.errors import ClusterError, ConfigError, TTTError
from ttt_harness.serving.environment import environment_as_given

SECONDS_TO_CONNECT = 30.0
# How long a run goes on without the head node; after 60 s (gcs_rpc_server_reconnect_timeout_s) Ray ends the process.
SECONDS_WITHOUT_HEAD = 30.0
SECONDS_BETWEEN_HEAD_CHECKS = 5.0
# What travels through Ray are prompts, answers, and adapters between machines without a common folder.
OBJECT_STORE_BYTES = 256 * 2**20


def ray() -> Any:
    """The module, imported when it is first needed."""
    import ray
    import ray.exceptions

    return ray


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS`, or start one here.

    Raises:
        ClusterError: it does not answer, is of another version, or cannot be started.
    """
    if ray().is_initialized():
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
            ray().init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"Ray cannot be used at RAY_ADDRESS={address}: {first_line(error)}") from None


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


def resources(workers: int, gpus_per_worker: int) -> dict[str, Any]:
    """What each worker's actor asks Ray for.

    Raises:
        ConfigError: the cluster has too few GPUs or cores.
    """
    nodes = [node["Resources"] for node in ray().nodes() if node["Alive"]]
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


def most_cores(nodes: Sequence[int], workers: int) -> int:
    """The most cores that each of the workers can have, on nodes with these numbers of cores; a worker is on one node.

    There are at least as many cores as workers.
    """
    return next(most for most in range(max(nodes), 0, -1) if sum(cores // most for cores in nodes) >= workers)


class Head:
    """Watches the cluster's head node."""

    def __init__(self) -> None:
        self._checked = self._headed = time.monotonic()  # when it was last asked, and when it last answered

    def check(self, store: object) -> None:
        """Ask the head node for a sign, if the last one is some time ago.

        Args:
            store: where the adapters that are done are, for the message.

        Raises:
            ClusterError: it has not answered for some time.
        """
        if time.monotonic() - self._checked < SECONDS_BETWEEN_HEAD_CHECKS:
            return
        address = ray().get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS_BETWEEN_HEAD_CHECKS).close()
            self._headed = time.monotonic()
        except OSError as error:
            if time.monotonic() - self._headed > SECONDS_WITHOUT_HEAD:
                raise ClusterError(
                    f"the head node of the Ray cluster, {address}, has not answered for {SECONDS_WITHOUT_HEAD:.0f} s "
                    f"({error.strerror or error}), and no cluster runs on without it; start one again and run the same "
                    f"command again, which goes on with the adapters in {store}."
                ) from None
        self._checked = time.monotonic()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def cause(error: Any, where: str) -> TTTError:
    """What a worker has raised (`error` is Ray's `RayTaskError`), as this process raises it."""
    if isinstance(error.cause, TTTError):
        return error.cause
    return ClusterError(f"{where}: {type(error.cause).__name__}: {first_line(error.cause)}")
