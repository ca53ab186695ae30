"""What SLURM is asked for, and what is told of a sweep's cells, without a cluster."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from ttt_harness import cli
from ttt_harness.errors import ConfigError
from ttt_harness.report import summary
from ttt_harness.report.results import find_runs
from ttt_harness.sweep import runner
from ttt_harness.sweep.cells import LOCK, locked
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.notes import GRID as GRID_FILE
from ttt_harness.sweep.runner import run_cells
from ttt_harness.sweep.slurm import Resources, minutes

GRID = ["--methods", "random", "--seeds", "1-2", "--tasks", "procedural_ttt", "--output_path", "out"]


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90),
        ("4:00:00", 240),
        ("0:00:30", 1),
        ("90:30", 91),
        ("1-12", 2160),
        ("1-0:30", 1470),
        ("2-1:00:01", 2941),
    ],
)
def test_time_is_read_as_slurm_reads_it(time, expected):
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["", "0", "x", "1:2:3:4", "-5", "1d", "1.5"])
def test_time_that_is_none(time):
    with pytest.raises(ConfigError, match=r"--time .*is not allowed"):
        minutes(time)


def test_what_is_asked_for_is_in_the_batch_file():
    slurm_module = pytest.importorskip("submitit.slurm.slurm")
    resources = Resources("1:30:00", gpus=2, partition="long", account="me", flags="--qos=high --exclusive")
    text = slurm_module._make_sbatch_string("run", "logs", **resources.parameters())
    flags = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    asked = {"--time=90", "--gpus-per-node=2", "--partition=long", "--account=me", "--qos=high", "--exclusive"}
    assert asked | {"--requeue"} <= flags
    without = slurm_module._make_sbatch_string("run", "logs", **Resources("5", gpus=0).parameters())
    assert "gpus" not in without


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slurm"], "give --time"),
        (["--slurm", "--time", "soon"], "--time soon is not allowed"),
        (["--slurm", "--time", "5", "--gpus", "-1"], "--gpus -1 is not allowed"),
        (["--slurm", "--time", "5", "--cells_per_job", "0"], "--cells_per_job 0 is not allowed"),
        (["--slurm", "--time", "5", "--sbatch", "qos=high"], "--sbatch qos=high is not allowed"),
        (["--slurm", "--time", "5", "--sbatch=--x --"], "--sbatch -- is not allowed"),
        (["--slurm", "--time", "5", "--sbatch=--comment='x"], "--sbatch=--comment='x is not allowed: no closing quot"),
        (["--gpus", "2"], "go with --slurm"),
        (["--slurm", "--time", "5"], "submitit, which is not installed: pip install 'ttt-harness[cluster]'"),
        (["--status", "--output_path", "nowhere"], "nowhere is no folder"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(["sweep", *GRID, *arguments]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_machine_without_slurm_is_one_sentence(capsys, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert cli.main(["sweep", *GRID, "--slurm", "--time", "5"]) == 1
    assert "there is no sbatch here" in capsys.readouterr().err


class TestStatus:
    """Of a sweep on this machine; tests/integration/test_sweep_slurm.py has the one of a cluster's."""

    def shown(self, capsys, root, *arguments):
        assert cli.main(["sweep", "--status", "--output_path", str(root), *arguments]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    def test_tells_done_from_failed_and_why(self, capsys, tmp_path):
        def execute(options):
            if options["model_args"]["seed"] == 2:
                raise ValueError("no memory left")
            content = {"results": {"t": {"acc,none": 0.5}}}
            (tmp_path / "random/seed1.partial/results_x.json").write_text(json.dumps(content))

        cells = [Cell("random", seed, {"model_args": {"seed": seed}}) for seed in (1, 2)]
        run_cells(cells, tmp_path, execute)
        capsys.readouterr()
        assert self.shown(capsys, tmp_path, "--methods", "random", "--seeds", "1-3") == [
            f"random, seed 1 done {tmp_path}/random/seed1",
            "random, seed 2 failed ValueError: no memory left",
            "random, seed 3 not started",
            "1 done, 1 failed, 1 not started",
        ]

    def test_tells_a_running_cell_from_one_that_was_killed(self, capsys, tmp_path):
        (tmp_path / "ttt/seed1.partial").mkdir(parents=True)
        with locked(tmp_path):
            assert self.shown(capsys, tmp_path) == ["ttt, seed 1 running", "1 running"]
        (tmp_path / LOCK).write_text("")
        assert self.shown(capsys, tmp_path)[1] == "1 stopped"

    def test_lists_the_cells_that_a_stopped_sweep_has_not_come_to(self, capsys, tmp_path, monkeypatch):
        def stopped_at_seed_2(options):
            if options["model_args"]["seed"] == 2:
                raise KeyboardInterrupt
            (Path(options["output_path"]) / "results_x.json").write_text('{"results": {"t": {"acc,none": 0.5}}}')

        monkeypatch.setattr(runner, "_check", lambda *_: None)
        monkeypatch.setattr(runner, "run_lm_eval", stopped_at_seed_2)
        out = tmp_path / "out"
        assert cli.main(["sweep", *GRID[:2], "--seeds", "1-3", *GRID[4:-1], str(out)]) == 130
        capsys.readouterr()
        assert self.shown(capsys, out) == [
            f"random, seed 1 done {out}/random/seed1",
            "random, seed 2 not started",
            "random, seed 3 not started",
            "1 done, 2 not started",
        ]
        assert [run.path.name for run in find_runs(out)] == ["results_x.json"]
        assert summary.read([out]).labels == ["run"]
        (out / GRID_FILE).write_text("[[")  # as of a full disk
        assert len(self.shown(capsys, out)) == 2

    def test_of_an_empty_folder(self, capsys, tmp_path):
        assert self.shown(capsys, tmp_path) == ["No cell has been started."]

    def test_goes_by_what_slurm_knows(self, capsys, tmp_path, monkeypatch):
        """What squeue and sacct print, in the place of a cluster that would have to be brought into each state."""
        (tmp_path / "slurm").mkdir()
        jobs = {f"7_{index}": [["ttt", index]] for index in range(6)}
        (tmp_path / "slurm/7.json").write_text(json.dumps(jobs))
        (tmp_path / "slurm/7_4_0_log.err").write_text("x\nslurmstepd: error: *** JOB 9 ON n1 CANCELLED AT noon ***\n")
        (tmp_path / "ttt").mkdir()
        (tmp_path / "ttt/seed1.partial").mkdir()
        (tmp_path / "ttt/seed3.failed").write_text("bad input\n")
        told = "7_0|PENDING|Resources\n7_1|RUNNING|None\n7_2|RUNNING|None\n7_3|FAILED|NonZeroExitCode\n"
        (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat <<END\n{told}END\n")
        (tmp_path / "sacct").write_text("#!/bin/sh\necho '7_5|OUT_OF_MEMORY|None'\n")
        for name in ("squeue", "sacct"):
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        assert self.shown(capsys, tmp_path) == [
            "ttt, seed 0 waiting job 7_0: PENDING (Resources)",
            "ttt, seed 1 running job 7_1",
            "ttt, seed 2 waiting job 7_2 comes to it",
            "ttt, seed 3 failed bad input",
            "ttt, seed 4 failed job 7_4 ended without its results: SLURM does not know it, "
            "JOB 9 ON n1 CANCELLED AT noon",
            "ttt, seed 5 failed job 7_5 ended without its results: OUT_OF_MEMORY",
            "1 running, 2 waiting, 3 failed",
        ]
