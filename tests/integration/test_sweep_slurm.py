"""A real SLURM cluster on this machine, started here with a configuration of its own: a sweep, and a run with Ray."""

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(MISSING), reason=f"SLURM is not installed (apt install slurmctld slurmd): no {MISSING}"),
]

# of a grid of one method, two learning rates and two seeds, and one method without learning rates
CELLS = {
    *(f"random, seed {seed}" for seed in (42, 43)),
    *(f"ttt, lr={lr}, seed {seed}" for seed in (42, 43) for lr in ("5e-3", "0.01")),
}
SETTINGS = "k=3,num_permutations=2,lora_rank=8,max_model_len=1024,dtype=float32"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
KillWait=1
SchedulerParameters=bf_interval=1,sched_interval=1
RequeueExit=200
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "this has taken too long"
        time.sleep(0.1)
    return found


@pytest.fixture
def slurm(request, tmp_path_factory):
    """The environment in which SLURM's commands reach the cluster, of as many nodes as the test asks for, or one."""
    folder, count = tmp_path_factory.mktemp("slurm"), getattr(request, "param", 1)
    host = socket.gethostname().partition(".")[0]
    names = [host] if count == 1 else [f"node{number}" for number in range(count)]
    port, *ports = free_ports(1 + count)
    node = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs={} State=UNKNOWN"
    nodes = [node.format(name, host, its_port, 2 // count) for name, its_port in zip(names, ports, strict=True)]
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=host, port=port, nodes="\n".join(nodes), user=getpass.getuser(), folder=folder)
    )
    for name in ("state", *(f"spool-{name}" for name in names)):
        (folder / name).mkdir()
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    processes = []
    try:
        for daemon in (["slurmctld"], *(["slurmd", *(["-N", name] if count > 1 else [])] for name in names)):
            with (folder / f"{'-'.join(daemon)}.log").open("w") as log:
                processes.append(subprocess.Popen([*daemon, "-D", "-c"], env=environment, stdout=log, stderr=log))

        def idle():
            if count > 1 and processes[0].poll() is not None:
                pytest.skip("this build of SLURM runs one slurmd on a machine (no --enable-multiple-slurmd)")
            sinfo = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=environment, capture_output=True, text=True)
            return sinfo.stdout.strip() == f"idle {count}"

        wait_for(idle, 30)
        yield environment
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--full", "--user", getpass.getuser()], env=environment)
        subprocess.run(["scancel", "--user", getpass.getuser()], env=environment)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def test_a_sweep_of_six_cells_one_of_them_killed_ends_complete(slurm, tiny_model, tmp_path):
    out = tmp_path / "out"
    grid = [
        *("--methods", "random,ttt", "--seeds", "42-43", "--grid", "lr=5e-3,0.01"),
        *("--tasks", "procedural_ttt_boolean_expressions"),
        *("--limit", "4", "--output_path", str(out)),
        *("--model_args", f"pretrained={tiny_model},adapter_dir={tmp_path / 'adapters'},{SETTINGS}"),
    ]

    def sweep(*arguments):
        command = [sys.executable, "-m", "ttt_harness.cli", "sweep", *arguments]
        result = subprocess.run(command, env=slurm, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr + result.stdout
        return result

    def states():
        told = sweep("--status", "--output_path", str(out)).stdout.splitlines()[:-1]
        found = {}
        for line in told:
            name, state = re.split(r"(?<=seed \d\d) +", line, maxsplit=1)
            found[name] = " ".join(state.split())
        return found

    def call(*command):
        subprocess.run(command, env=slurm, check=True)

    def finished():
        return [*out.glob("*/seed??/cell.json"), *out.glob("*/*/seed??/cell.json")]

    submit = ["--slurm", "--time", "20", "--gpus", "0", "--cells_per_job", "3", "--partition", "main"]
    told = sweep(*grid, *submit, "--sbatch=--comment=study").stderr
    assert "6 cells are in SLURM's queue as 2 jobs" in told
    assert set(states()) == CELLS
    # the same again while all of it is queued: nothing is submitted twice
    assert "0 of 6 cells are done, 6 are queued or running: skipped." in sweep(*grid, *submit).stderr

    def at_work():
        """Folder and name of each cell of ttt that a process is at."""
        partial = list(out.glob("ttt/*/*.partial"))
        return {path: f"ttt, {path.parent.name}, seed {path.stem.removeprefix('seed')}" for path in partial}

    ((_, name), *_) = wait_for(at_work, 240).items()
    state = states()[name]
    assert state.startswith("running job "), state
    job = state.split()[2].rstrip(";")
    call("scancel", "--signal=KILL", "--full", job)
    wait_for(lambda: states()[name].startswith(f"failed job {job} ended without its results: CANCELLED"), 30)
    done = {path: path.stat().st_mtime_ns for path in finished()}
    assert done  # the job's first cell
    call("scontrol", "requeue", job)

    # another, asked to make room as before a time limit, queues itself again
    def running_elsewhere():
        now = states()
        return [(path, now[cell]) for path, cell in at_work().items() if cell != name and "running job " in now[cell]]

    partial, state = wait_for(running_elsewhere, 240)[0]
    second = state.split()[2].rstrip(";")
    call("scancel", "--signal=USR2", second)
    log = partial.with_suffix(".log")

    wait_for(lambda: len(finished()) == 6, 400)
    assert set(states()) == CELLS
    assert all(state.startswith("done") for state in states().values())
    assert done.items() <= {path: path.stat().st_mtime_ns for path in finished()}.items()
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("*.lock"))
    assert all(path.parent.with_suffix(".log").exists() for path in finished())
    assert "ttt, lr=" in log.read_text()
    said = Path(next(out.glob(f"slurm/{second}_*_log.err"))).read_text()
    assert "Stopped at ttt" in said
    told = sweep(*grid, *submit).stderr
    assert "6 of 6 cells are done, 0 are queued or running: skipped." in told


@pytest.mark.parametrize("slurm", [2], indirect=True)
def test_one_run_on_two_nodes_of_a_job(slurm, tiny_model, tmp_path):
    """Each node has one core, so that two workers are one on each."""
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("ray")
    slurm["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{slurm['PATH']}"  # as in an activated environment
    log = tmp_path / "job.log"

    def job(*command):
        script = subprocess.run(["ttt-harness", "ray-in-slurm"], env=slurm, capture_output=True, text=True, check=True)
        return ["sbatch", "--nodes=2", "--time=10", f"--output={log}", script.stdout.strip(), *command]

    def left():
        """The processes of jobs: all that know the cluster, but the daemons."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == slurm["SLURM_CONF"] and "SLURM_JOB_ID" in process.environ():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    settings = f"pretrained={tiny_model},adapter_dir={tmp_path / 'adapters'},data_parallel_size=2,{SETTINGS}"
    run = ["lm_eval", "--model", "ttt_vllm", "--model_args", settings, "--limit", "4", "--output_path", str(tmp_path)]
    submit = job(*run, "--tasks", "procedural_ttt_boolean_expressions,procedural_ttt_navigate")
    ended = subprocess.run([*submit[:1], "--wait", *submit[1:]], env=slurm, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr + log.read_text()
    (results,) = tmp_path.rglob("results_*.json")
    assert len(json.loads(results.read_text())["config"]["ttt"]["tasks"]) == 2
    wait_for(lambda: not left(), 20)

    mark = tmp_path / "mark"
    submitted = subprocess.run(job("sh", "-c", f"touch {mark}; sleep 500"), env=slurm, check=True, capture_output=True)
    wait_for(mark.exists, 60)
    assert left()
    subprocess.run(["scancel", submitted.stdout.split()[-1].decode()], env=slurm, check=True)
    wait_for(lambda: not left(), 30)
