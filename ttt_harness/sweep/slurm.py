"""A sweep on a SLURM cluster: its cells as the jobs of an array.

`submit` hands the cells that are not done to submitit. A job runs its cells one after the other, as a sweep by itself
does (`runner.run_cells`), so a job that is started again skips what is done. In the folder of the sweep:

    <method>/[<point>/]seed<N>/       a finished cell, as of any sweep
    <method>/[<point>/]seed<N>.log    what its job printed while it ran the cell, from each of its starts
    slurm/                            submitit's files; <array>.json: the cells of each job of an array
"""

import importlib.util
import logging
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.serving.environment import environment_as_given
from ttt_harness.sweep.cells import locked
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.lm_eval_call import load_tasks
from ttt_harness.sweep.queue import FOLDER, note_array
from ttt_harness.sweep.runner import run_cells, sort_cells
from ttt_harness.sweep.status import RUNNING, WAITING, rows_of
from ttt_harness.terminal import INTERRUPTED, complain

_NUMBER = r"\d{1,9}"
_TIME = re.compile(
    rf"(?:(?P<days>{_NUMBER})-)?(?P<first>{_NUMBER})(?::(?P<second>{_NUMBER}))?(?::(?P<third>{_NUMBER}))?", re.ASCII
)


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
        raise ConfigError(f"--time {time[:40]} is not allowed: write minutes, hours:minutes:seconds or days-hours.")
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

        setup_logging(logging.ERROR)
        _stop_as_by_ctrl_c()
        with locked(self.root, shared=True):
            status = run_cells(self.cells, self.root, logs=True)
        if status == INTERRUPTED:
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
    todo, kept = sort_cells(cells, root)
    queued = {row.cell.key for row in rows_of(root, cells) if row.state in (RUNNING, WAITING)}
    done = len(cells) - len(todo) - len(kept)
    waiting = [cell for cell in todo if cell.key in queued]
    todo = [cell for cell in todo if cell.key not in queued]
    if done or waiting:
        told = f"{done} of {len(cells)} cells are done, {len(waiting)} are queued or running: skipped."
        complain(told)
    if not todo:
        return 1 if kept else 0
    with locked(root, shared=True):
        load_tasks(todo[0].call)
        per_job = resources.cells_per_job
        groups = [todo[start : start + per_job] for start in range(0, len(todo), per_job)]
        array = _submit([Job(group, root.resolve()) for group in groups], root, parameters)
    complain(
        f"{len(todo)} cells are in SLURM's queue as {len(groups)} job{'s' * (len(groups) > 1)}, {array}; "
        f"`ttt-harness sweep --status --output_path {root}` shows them.",
    )
    return 1 if kept else 0


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
        note_array(root, array, {job.job_id: what.cells for job, what in zip(submitted, jobs, strict=True)})
    except (FailedJobError, FailedSubmissionError) as error:
        said = re.findall(r"error: (.*)", str(error)) or str(error).splitlines()
        raise ConfigError(f"SLURM refuses the job: {said[-1].strip().rstrip('.')}.") from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; choose another --output_path.") from None
    return array
