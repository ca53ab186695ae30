"""Nodes of a Ray cluster that was there before the run: joined, refused before any fit, or without a common folder."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import venv
from importlib.metadata import version

import pytest

from ttt_harness.adapters.store import AdapterStore

pytest.importorskip("ray", reason="Ray is not installed (pip install 'ttt-harness[cluster]')")
pytestmark = pytest.mark.integration

JOIN = """
from ttt_harness.cluster.pool import Pool
import ray
pool = Pool(3)
print(ray.get_runtime_context().gcs_address)
pool.close()
assert not ray.is_initialized()
"""


@contextlib.contextmanager
def node(cores, *, before=(), python=sys.executable, **environment):
    """A cluster of one node in processes of its own; yields its address.

    Args:
        cores: that it offers.
        before: a command that starts another.
        python: the interpreter of its workers.
        environment: variables of its own.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start = [*before, python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    start += [f"--port={port}", f"--num-cpus={cores}"]
    environment = {**os.environ, **environment}
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=environment) as head:
        try:
            address = None
            while address is None:
                line = head.stdout.readline()
                assert line, "the node has not started"
                address = re.search(rf"[\d.]+:{port}", line)
            yield address[0]
        finally:
            head.terminate()
            head.stdout.read()


def test_a_cluster_that_runs_is_joined_and_left_running():
    """In a process of its own, as a user's: Ray reads its settings when it is imported."""
    with node(3) as address:
        for _ in range(2):  # it runs on when the first has left
            environment = {**os.environ, "RAY_ADDRESS": address}
            joined = subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True)
            assert joined.returncode == 0, joined.stderr
            assert joined.stdout.strip() == address


def lm_eval(address, model, store, *more):
    """A run on two workers of the cluster, away from the checkout, which Ray would tell the workers of."""
    settings = "data_parallel_size=2,k=3,num_permutations=2,lora_rank=8,lr=1e-2,max_model_len=1024,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "ttt_vllm", "--limit", "16", *more]
    command += ["--model_args", f"pretrained={model},adapter_dir={store},{settings}"]
    command += ["--tasks", "procedural_ttt_boolean_expressions"]
    environment = {**os.environ, "RAY_ADDRESS": address}
    return subprocess.run(command, env=environment, cwd=store.parent, capture_output=True, text=True, timeout=300)


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
