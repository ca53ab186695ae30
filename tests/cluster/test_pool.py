"""Bad input to a run on several workers: one sentence each, before anything is loaded or fitted."""

import importlib.util
import os
import socket
import time

import pytest

from ttt_harness.cluster import pool
from ttt_harness.cluster.pool import Pool
from ttt_harness.cluster.session import connect, most_cores
from ttt_harness.errors import ClusterError, ConfigError, StoreError, TTTError


def said(error: type[TTTError], call) -> str:
    with pytest.raises(error) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_no_ray_tells_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'ttt-harness[cluster]'" in said(ConfigError, lambda: Pool(2))


@pytest.mark.parametrize("address", ["head", "head:", "head:x", "head:65536", "ray://head:10001"])
def test_an_address_that_is_none(address, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert "is not allowed" in said(ConfigError, connect)


def test_an_address_at_which_nothing_answers(monkeypatch):
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    start = time.monotonic()
    assert "no Ray cluster answers" in said(ClusterError, connect)
    assert time.monotonic() - start < 30


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another folder" in said(StoreError, lambda: pool._mark(tmp_path / "file" / "store"))


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"), [([8], 2, 4), ([8], 3, 2), ([1, 1], 2, 1), ([4, 2], 2, 2), ([2, 2, 2], 2, 2)]
)
def test_each_worker_gets_the_cores_that_a_node_has_for_it(nodes, workers, cores):
    assert most_cores(nodes, workers) == cores


@pytest.mark.integration
def test_an_address_at_which_something_else_answers(monkeypatch):
    pytest.importorskip("ray")
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        assert "no Ray cluster answers" in said(ClusterError, connect)
    assert time.monotonic() - start < 30


@pytest.mark.integration
def test_auto_where_the_last_cluster_is_gone(tmp_path, monkeypatch):
    """Ray keeps its address, also of one whose processes were killed."""
    pytest.importorskip("ray")
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert "no Ray cluster answers at RAY_ADDRESS=auto (nothing within 30 s)" in said(ClusterError, connect)
    assert time.monotonic() - start < 30


@pytest.mark.integration
def test_more_workers_than_the_machine_has_cores():
    ray = pytest.importorskip("ray")
    cores = len(os.sched_getaffinity(0))
    try:
        assert f"there are {cores} cores and no GPU; use at most {cores}." in said(ConfigError, lambda: Pool(cores + 1))
        assert ray.cluster_resources()["CPU"] == cores
    finally:
        ray.shutdown()


@pytest.mark.integration
def test_more_workers_than_the_cluster_has_gpus():
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, logging_level="ERROR")
    try:
        assert "there are 3 GPUs; use at most 1" in said(ConfigError, lambda: Pool(2, gpus_per_worker=2))
        assert "there are 3 GPUs; use a smaller tensor_parallel_size" in said(
            ConfigError, lambda: Pool(1, gpus_per_worker=4)
        )
        Pool(1, gpus_per_worker=2).close()
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
