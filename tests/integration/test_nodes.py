"""Nodes of a Ray cluster that was there before the run: joined, refused, without a common folder, or lost."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
import venv
from importlib.metadata import version

import pytest

from ttt_harness.adapters.store import AdapterStore

psutil = pytest.importorskip("psutil")
pytest.importorskip("ray", reason="Ray is not installed (pip install 'ttt-harness[cluster]')")
pytestmark = pytest.mark.integration

TASKS = [f"procedural_ttt_{name}" for name in ("boolean_expressions", "navigate")]
JOIN = """
from ttt_harness.cluster.pool import Pool
import ray
pool = Pool(3)
print(ray.get_runtime_context().gcs_address)
pool.close()
assert not ray.is_initialized()
"""


@contextlib.contextmanager
def started(*arguments, said, before=(), python=sys.executable, **environment):
    """A node in processes of its own; yields the first of them, and the match of `said` in what it prints.

    Args:
        arguments: of `ray start`.
        said: a pattern, of what it prints once it is there.
        before: a command that starts another.
        python: the interpreter of its workers.
        environment: variables of its own.
    """
    start = [*before, python, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    environment = {**os.environ, **environment}
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            match = None
            while match is None:
                line = process.stdout.readline()
                assert line, "the node has not started"
                match = re.search(said, line)
            yield process, match
        finally:
            process.terminate()
            process.stdout.read()


@contextlib.contextmanager
def node(cores, **how):
    """A cluster of one node with so many cores; yields its address. how: as `started` has it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    head = ("--head", "--include-dashboard=false", f"--port={port}", f"--num-cpus={cores}")
    with started(*head, said=rf"[\d.]+:{port}", **how) as (_, match):
        yield match[0]


def test_a_cluster_that_runs_is_joined_and_left_running():
    """In a process of its own, as a user's: Ray reads its settings when it is imported."""
    with node(3) as address:
        for _ in range(2):  # it runs on when the first has left
            environment = {**os.environ, "RAY_ADDRESS": address}
            joined = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True)
            assert joined.returncode == 0, joined.stderr
            assert joined.stdout.strip() == address


def command(model, store, *more, tasks=TASKS[:1], permutations=2):
    """A run on two workers, as arguments of `lm_eval`."""
    settings = f"data_parallel_size=2,k=3,num_permutations={permutations},lora_rank=8,lr=1e-2"
    settings += ",max_model_len=2048,dtype=float32"
    command = ["run", "--model", "ttt_vllm", "--limit", "16", "--tasks", ",".join(tasks), *more]
    return [*command, "--model_args", f"pretrained={model},adapter_dir={store},{settings}"]


def lm_eval(address, model, store, *more):
    """A run on two workers of the cluster, away from the checkout, which Ray would tell the workers of."""
    run = [sys.executable, "-m", "lm_eval", *command(model, store, *more)]
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.run(run, env=environment, cwd=store.parent, capture_output=True, text=True, timeout=300)


def refusal(address, model, store):
    """What a run says before it ends, having fitted nothing."""
    run = lm_eval(address, model, store)
    assert run.returncode == 1, run.stderr
    assert not list(store.iterdir())
    assert "Traceback" not in run.stderr
    assert "fitting" not in run.stderr
    (said,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    return said


@pytest.fixture
def store(tmp_path):
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def test_a_node_with_another_version(tiny_model, store, tmp_path):
    installed = tmp_path / "installed" / "torchtune-9.9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torchtune\nVersion: 9.9\n")
    path = os.pathsep.join([str(installed.parent), os.environ.get("PYTHONPATH", "")])
    with node(2, PYTHONPATH=path) as address:
        said = refusal(address, tiny_model, store)
    assert f"torchtune is 9.9 on {socket.gethostname()}, and {version('torchtune')} where the run was started" in said


def test_a_node_without_this_package(tiny_model, store, tmp_path):
    """Its Python has Ray and all else, by path entries, which leave out an editable install's."""
    venv.create(tmp_path / "bare")
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    with node(2, python=str(tmp_path / "bare" / "bin" / "python"), PYTHONPATH="") as address:
        said = refusal(address, tiny_model, store)
    assert "could not be started: ModuleNotFoundError: No module named 'ttt_harness'; its node needs" in said


def elsewhere(*commands):
    """Starts a command on what looks like another machine: in a mount namespace, after `commands` have changed it."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no mount namespaces here: {tried.stderr.strip()}")
    return [*unshare, "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]


def test_a_store_that_a_node_may_only_read(tiny_model, store):
    before = elsewhere(f"mount --bind {store} {store}", f"mount -o remount,bind,ro {store}")
    with node(2, before=before) as address:
        said = refusal(address, tiny_model, store)
    assert f"the adapter store {store} cannot be written on {socket.gethostname()}: Read-only file system" in said
    assert "adapter_dir=" in said


def test_a_node_that_neither_sees_the_store_nor_has_one(tiny_model, store, tmp_path):
    (tmp_path / "file").write_text("")
    before = elsewhere(f"mount -t tmpfs none {store}")
    with node(2, before=before, TTT_CACHE_DIR=str(tmp_path / "file" / "cache")) as address:
        said = refusal(address, tiny_model, store)
    assert f"cannot be written on {socket.gethostname()}: Not a directory; set TTT_CACHE_DIR there" in said


def test_adapters_come_from_a_node_that_does_not_see_the_store(tiny_model, store, tmp_path):
    """Both workers answer, so that the adapter also goes to the one that has not fitted it."""
    before = elsewhere(f"mount -t tmpfs none {store}")
    out = tmp_path / "out"
    with node(2, before=before, TTT_CACHE_DIR=str(tmp_path / "node")) as address:
        run = lm_eval(address, tiny_model, store, "--output_path", str(out))
    assert run.returncode == 0, run.stderr
    (adapter,) = store.iterdir()
    assert AdapterStore(store).load(adapter.name)
    (results,) = out.rglob("results_*.json")
    (record,) = json.loads(results.read_text())["config"]["ttt"]["tasks"].values()
    assert record["adapter"] == str(adapter)
    assert record["changes_output"]
    assert record["requests"] == 16


# Nodes that are lost in a run

PATIENCE = 5
IMPATIENT = f"""
import runpy
from ttt_harness.cluster import pool, session
pool.SECONDS_TO_REPLACE = session.SECONDS_WITHOUT_HEAD = {PATIENCE}
runpy.run_module("lm_eval", run_name="__main__")
"""


@pytest.fixture
def token(monkeypatch):
    """Where there is a token in the home folder, Ray asks for it at the head node but gives it to no other."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", str(uuid.uuid4()))


@contextlib.contextmanager
def joined(address):
    """Another node of the cluster, with one core; yields its first process."""
    with started(f"--address={address}", "--num-cpus=1", said="Ray runtime started") as (process, _):
        yield psutil.Process(process.pid)


@contextlib.contextmanager
def going(address, folder, *run):
    """A run in a process of its own, which has ended thereafter."""
    environment = {**os.environ, "RAY_ADDRESS": address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *run], env=environment, cwd=folder, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(node, method, run):
    """Wait until a worker of the node is at `method`; Ray names a process by what it runs."""
    end = time.monotonic() + 120
    while not any(line.startswith(f"ray::RayWorker.{method}") for line in map(line_of, node.children(recursive=True))):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def line_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def lose(node):
    """Kill all processes of the node, as if its machine had gone off."""
    for process in [node, *node.children(recursive=True)]:
        process.kill()


@pytest.mark.usefixtures("token")
def test_a_sweep_goes_on_without_a_node_that_is_lost(tiny_model, store):
    sweep = ["-m", "ttt_harness.cli", "sweep", "--methods", "ttt", "--seeds", "42,43", "--output_path", "out"]
    sweep += command(tiny_model, store, tasks=TASKS, permutations=300)[3:]
    with node(0) as address, joined(address) as one, joined(address), going(address, store.parent, *sweep) as run:
        wait_for(one, "fit", run)
        lose(one)
        _, err = run.communicate(timeout=200)
    assert run.returncode == 0, err
    found = [json.loads(file.read_text()) for file in (store.parent / "out").rglob("results_*.json")]
    assert [[task["requests"] for task in one["config"]["ttt"]["tasks"].values()] for one in found] == [[16, 16]] * 2


@pytest.mark.usefixtures("token")
def test_a_run_without_a_node_left_ends_with_one_sentence(tiny_model, store):
    lm_eval = ["-c", IMPATIENT, *command(tiny_model, store, tasks=TASKS, permutations=2000)]
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(node(0))
        nodes = [stack.enter_context(joined(address)) for _ in range(2)]
        run = stack.enter_context(going(address, store.parent, *lm_eval))
        for one in nodes:
            wait_for(one, "fit", run)
        children = psutil.Process(run.pid).children(recursive=True)
        for one in nodes:
            lose(one)
        start = time.monotonic()
        _, err = run.communicate(timeout=60)
        seconds = time.monotonic() - start
    assert PATIENCE < seconds < PATIENCE + 20
    assert run.returncode == 1
    assert "Traceback" not in err
    host = socket.gethostname()
    assert err.splitlines()[-1] == (
        f"error: all workers are lost (0 on {host}, 1 on {host}), and for {PATIENCE} s there has been no node with 1 "
        f"free core for another; start Ray on one and run the same command again, which goes on with the adapters in "
        f"{store}."
    )
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not list(store.glob(".driver-*"))


@pytest.mark.usefixtures("token")
def test_a_run_without_the_head_node_ends_with_one_sentence(tiny_model, store):
    lm_eval = ["-c", IMPATIENT, *command(tiny_model, store, tasks=TASKS, permutations=2000)]
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(node(0))
        other = stack.enter_context(joined(address))
        stack.enter_context(joined(address))
        run = stack.enter_context(going(address, store.parent, *lm_eval))
        wait_for(other, "fit", run)
        children = psutil.Process(run.pid).children(recursive=True)
        everything = psutil.Process().children(recursive=True)
        (server,) = [one for one in everything if line_of(one).partition(" ")[0].endswith("/gcs_server")]
        server.kill()
        start = time.monotonic()
        _, err = run.communicate(timeout=90)
        seconds = time.monotonic() - start
        for one in psutil.Process().children(recursive=True):
            one.kill()  # a node without its head takes half a minute to end by itself
    assert run.returncode == 1
    assert "Traceback" not in err
    assert PATIENCE < seconds < PATIENCE + 45  # Ray itself ends the process after 60 s
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: the head node of the Ray cluster, {address}, has not answered for {PATIENCE} s")
    assert not psutil.wait_procs(children, timeout=10)[1]
