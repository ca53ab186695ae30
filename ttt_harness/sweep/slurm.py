"""A sweep on a SLURM cluster: its cells as the jobs of an array, and what has become of them.

`submit` hands the cells that are not done to submitit. A job runs its cells one after the other, as a sweep by itself
does (`runner.run_cells`), so a job that is started again skips what is done. In the folder of the sweep:

    <method>/seed<N>/       a finished cell, as of any sweep
    <method>/seed<N>.log    what its job printed while it ran the cell, from each of its starts
    slurm/                  submitit's files; <array>.json: the cells of each job of an array

`status` reads these and asks SLURM; it changes nothing.
"""

import getpass
import importlib.util
import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.locks import is_locked
from ttt_harness.serving.environment import environment_as_given
from ttt_harness.sweep.cells import LOCK, RECORD, failure, is_done, is_partial, locked, noted_grid
from ttt_harness.sweep.grid import Cell

FOLDER = "slurm"
STATES = DONE, RUNNING, WAITING, FAILED, STOPPED, NEW = "done", "running", "waiting", "failed", "stopped", "not started"

# States of SLURM in which a job is still to run its cells, or is at them.
_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "RESIZING"}
_ACTIVE = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED"}
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class Resources:
    """What each job asks SLURM for.

    Args:
        time: in SLURM's own notation, `90` (minutes), `4:00:00` or `1-12`. A job that runs out of it is queued again,
            three times at most.
        gpus: on its node; 0 asks for none.
        cells_per_job: how many cells one job runs, with one engine start.
        flags: of sbatch, e.g. `--qos=high --cpus-per-task=16`.
    """

    time: str | None
    gpus: int = 1
    partition: str | None = None
    account: str | None = None
    cells_per_job: int = 1
    flags: str = ""

    def parameters(self) -> dict[str, Any]:
        """The parameters of submitit's executor.

        Raises:
            ConfigError: one is missing or has a value that is not allowed.
        """
        for name, least in (("gpus", 0), ("cells_per_job", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)} is not allowed: it must be at least {least}.")
        parameters: dict[str, Any] = {
            "job_name": "ttt-harness",
            "time": minutes(self.time),
            "additional_parameters": {"requeue": True, **_flags(self.flags)},
            # Since SLURM 22.05 a step no longer takes over how many cores its job has asked for.
            "setup": ['[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'],
        }
        given = {"partition": self.partition, "account": self.account, "gpus_per_node": self.gpus}
        return parameters | {name: value for name, value in given.items() if value}


def minutes(time: str | None) -> int:
    """A time limit in SLURM's notation, in whole minutes.

    Raises:
        ConfigError: it is none.
    """
    if time is None:
        raise ConfigError("--slurm needs the time that a job may take: give --time, as in --time 4:00:00.")
    match = _TIME.fullmatch(time)
    if match:
        days, *parts = (int(part) if part else 0 for part in match.groups())
        if match["days"]:  # days-hours:minutes:seconds
            seconds = days * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
        elif match["third"]:
            seconds = parts[0] * 3600 + parts[1] * 60 + parts[2]
        else:  # minutes:seconds
            seconds = parts[0] * 60 + parts[1]
    if not match or not seconds:
        raise ConfigError(f"--time {time} is not allowed: write minutes, hours:minutes:seconds or days-hours.")
    return -(-seconds // 60)


def _flags(text: str) -> dict[str, Any]:
    """Flags of sbatch as submitit takes them: name -> value, or True where it has none."""
    flags: dict[str, Any] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--sbatch={text} is not allowed: {str(error).lower()}; quote as in a shell.") from None
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise ConfigError(f"--sbatch {word} is not allowed: write each flag as --name or --name=value.")
        flags[name[2:]] = value if equals else True
    return flags


class Job:
    """What a job of the array does; submitit pickles it and runs it on the node."""

    def __init__(self, cells: Sequence[Cell], root: Path) -> None:
        self.cells, self.root = cells, root

    def __call__(self) -> None:
        """Run the cells that are not done.

        Raises:
            TTTError: some of them have failed.
        """
        from lm_eval.utils import setup_logging

        from ttt_harness.sweep.runner import run_cells

        setup_logging(logging.ERROR)
        _stop_as_by_ctrl_c()
        with locked(self.root, shared=True):
            status = run_cells(self.cells, self.root, logs=True)
        if status == 130:
            sys.exit(status)
        if status:
            raise TTTError(f"not all of {', '.join(cell.name for cell in self.cells)} are done")

    def checkpoint(self) -> Any:
        """What submitit queues when the time is up or the job has to make room: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _stop_as_by_ctrl_c() -> None:
    """Have submitit's handler, which queues the job again, end the cells at work as Ctrl-C does.

    It leaves by `sys.exit`, which within a cell would be taken for the end of that cell.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

    number = getattr(signal, "SIG" + SlurmJobEnvironment.USR_SIG)
    handler = signal.getsignal(number)

    def stop(signum: int, frame: Any) -> None:
        try:
            handler(signum, frame)  # type: ignore[operator, misc]
        except SystemExit:
            raise KeyboardInterrupt from None

    if callable(handler):
        signal.signal(number, stop)


def submit(cells: Sequence[Cell], root: Path, resources: Resources) -> int:
    """Submit the cells that are neither done nor queued. Returns the exit status.

    Raises:
        ConfigError: submitit or SLURM is missing, or SLURM refuses the job.
    """
    parameters = resources.parameters()
    check_installed()
    from ttt_harness.sweep.runner import load_tasks

    states = {(row.method, row.seed): row.state for row in _rows(root, cells)}
    done = [cell for cell in cells if is_done(cell, root)]
    todo = [c for c in cells if c not in done and states[c.method, c.seed] not in (RUNNING, WAITING)]
    if len(todo) < len(cells):
        queued = len(cells) - len(todo) - len(done)
        print(f"{len(done)} of {len(cells)} cells are done, {queued} are queued or running: skipped.", file=sys.stderr)
    if not todo:
        return 0
    with locked(root, shared=True):
        load_tasks(todo[0])
        per_job = resources.cells_per_job
        groups = [todo[start : start + per_job] for start in range(0, len(todo), per_job)]
        array = _submit([Job(group, root.resolve()) for group in groups], root, parameters)
    print(
        f"{len(todo)} cells are in SLURM's queue as {len(groups)} job{'s' * (len(groups) > 1)}, {array}; "
        f"`ttt-harness sweep --status --output_path {root}` shows them.",
        file=sys.stderr,
    )
    return 0


def check_installed() -> None:
    """Raises ConfigError where submitit or SLURM is missing."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("--slurm needs submitit, which is not installed: pip install 'ttt-harness[cluster]'.")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError(
            "--slurm needs SLURM's commands, and there is no sbatch here; run it on a node that has them."
        )


def _submit(jobs: Sequence[Job], root: Path, parameters: Mapping[str, Any]) -> str:
    """Hand the jobs to SLURM as one array, and note which cells each has. Returns the array's number."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = (root / FOLDER).resolve()
    try:
        executor = SlurmExecutor(folder)
        executor.update_parameters(**parameters)
        with environment_as_given():  # the node makes its own choice of threads
            if len(jobs) == 1:
                submitted = [executor.submit(jobs[0])]
            else:
                with executor.batch():
                    submitted = [executor.submit(job) for job in jobs]
        array = submitted[0].job_id.partition("_")[0]
        cells = {
            job.job_id: [[cell.method, cell.seed] for cell in what.cells]
            for job, what in zip(submitted, jobs, strict=True)
        }
        (folder / f"{array}.json").write_text(json.dumps(cells, indent=2) + "\n", encoding="utf-8")
    except (FailedJobError, FailedSubmissionError) as error:
        said = re.findall(r"error: (.*)", str(error)) or str(error).splitlines()
        raise ConfigError(f"SLURM refuses the job: {said[-1].strip().rstrip('.')}.") from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; choose another --output_path.") from None
    return array


# What has become of the cells


@dataclass(frozen=True)
class Row:
    """The state of one cell, and why it is so, or where it is."""

    method: str
    seed: int
    state: str
    note: str


def status(root: Path, methods: Sequence[str], seeds: Sequence[int]) -> int:
    """Print the state of each cell of the last grid, of those that ran or were submitted before, and of those given.

    Raises:
        ConfigError: there is no such folder.
    """
    if not root.is_dir():
        raise ConfigError(f"--output_path {root} is no folder: give the one that the sweep was started with.")
    rows = _rows(root, [Cell(method, seed, {}) for seed in seeds for method in methods])
    width = max((len(f"{row.method}, seed {row.seed}") for row in rows), default=0)
    for row in rows:
        name = f"{row.method}, seed {row.seed}"
        print(f"{name:{width}}  {row.state:11}  {row.note}".rstrip())
    counts = {
        state: sum(row.state == state for row in rows) for state in (DONE, RUNNING, WAITING, FAILED, STOPPED, NEW)
    }
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "No cell has been started.")
    return 0


def _rows(root: Path, cells: Iterable[Cell]) -> list[Row]:
    """One row for each cell that is given, in the last grid, submitted, or has left something in the folder."""
    jobs: dict[tuple[str, int], str] = {}
    for file in sorted((root / FOLDER).glob("*.json"), key=lambda file: file.stat().st_mtime):
        for job, its_cells in json.loads(file.read_text(encoding="utf-8")).items():
            jobs |= dict.fromkeys(map(tuple, its_cells), job)  # the newest job of a cell counts
    names = dict.fromkeys([*((cell.method, cell.seed) for cell in cells), *noted_grid(root), *jobs])
    for path in sorted(root.glob("*/seed*")):
        if match := re.fullmatch(r"seed(\d+)(\.partial|\.failed)?", path.name):
            names[path.parent.name, int(match[1])] = None
    open_jobs = {job for name, job in jobs.items() if not (Cell(*name, {}).folder(root) / RECORD).exists()}
    states = _states(open_jobs) if open_jobs else {}
    alone = is_locked(root / LOCK)
    return [_row(root, Cell(*name, {}), jobs.get(name), states, alone) for name in names]


def _row(root: Path, cell: Cell, job: str | None, states: Mapping[str, tuple[str, str]], alone: bool) -> Row:
    def row(state: str, note: str) -> Row:
        return Row(cell.method, cell.seed, state, note)

    if (cell.folder(root) / RECORD).exists():
        return row(DONE, str(cell.folder(root)))
    log = cell.log(root)
    see = f"; see {log}" if log.exists() else ""
    reason = failure(cell, root)
    state, why = states.get(job, ("", "")) if job else ("", "")
    if state in _QUEUED:
        return row(WAITING, f"job {job}: {state}{f' ({why})' if why not in ('', 'None') else ''}")
    if state in _ACTIVE or (not job and alone):
        if is_partial(cell, root):
            return row(RUNNING, f"job {job}{see}" if job else "")
        return row(FAILED, reason + see) if reason else row(WAITING, f"job {job} comes to it" if job else "")
    if reason:
        return row(FAILED, reason + see)
    if job:
        said = _last_words(root, job)
        return row(FAILED, f"job {job} ended without its results: {state or 'SLURM does not know it'}{said}{see}")
    if is_partial(cell, root):
        return row(STOPPED, "the same command goes on from there")
    return row(NEW, "")


def _states(jobs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """job -> (state, reason), of the jobs that SLURM still knows: its queue, then its accounting where there is one."""
    squeue = ["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r"]
    arrays = ",".join(sorted({job.partition("_")[0] for job in jobs}))
    sacct = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={arrays}", "--format=JobID,State,Reason"]
    states: dict[str, tuple[str, str]] = {}
    for command in (squeue, sacct):
        if set(jobs) <= set(states):
            break
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"SLURM does not answer ({command[0]}: {type(error).__name__}).") from None
        if told.returncode and command is squeue:
            raise ConfigError(f"SLURM does not answer: {' '.join(told.stderr.split()) or 'squeue failed'}.")
        for line in told.stdout.splitlines():
            job, state, reason = [*line.split("|"), "", ""][:3]
            states.setdefault(job, (state.split()[0] if state else "", reason))
    return states


def _last_words(root: Path, job: str) -> str:
    """What SLURM wrote into a job's log when it ended it, such as "CANCELLED AT 2026-11-23T12:00:00"."""
    said = []
    for file in sorted((root / FOLDER).glob(f"{job}_*_log.err")):
        said += re.findall(r"^(?:slurmstepd|srun): error: (.*)$", file.read_text(errors="replace"), re.MULTILINE)
    return f", {said[-1].strip(' *')}" if said else ""
