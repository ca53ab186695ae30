"""What SLURM knows of a sweep's jobs: which cells were submitted, the states of their jobs, how a job ended.

slurm/<array>.json      in the folder of the sweep: the cells of each job of an array
slurm/<job>_*_log.err   submitit's: what the job printed, and SLURM when it ended it
"""

import getpass
import json
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ttt_harness.errors import ConfigError
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.notes import named_cell

FOLDER = "slurm"

# States of SLURM in which a job is still to run its cells, or is at them.
QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "RESIZING"}
ACTIVE = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED"}


def note_array(root: Path, array: str, jobs: Mapping[str, Sequence[Cell]]) -> None:
    """Keep which cells each job of an array has.

    Raises:
        OSError: the file cannot be written.
    """
    rows = {
        job: [[cell.method, cell.seed, *([cell.point] if cell.point else [])] for cell in cells]
        for job, cells in jobs.items()
    }
    (root / FOLDER / f"{array}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def submitted_cells(root: Path) -> dict[tuple[str, str, int], tuple[Cell, str]]:
    """Each cell that was submitted, by its key, with its newest job. Files that hold something else are left out."""
    found: dict[tuple[str, str, int], tuple[Cell, str]] = {}
    for file in sorted((root / FOLDER).glob("*.json"), key=lambda file: file.lstat().st_mtime):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            cells = [(named_cell(*row), job) for job, rows in content.items() for row in rows]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue  # not one of these files, or one that cannot be read now
        found |= {cell.key: (cell, job) for cell, job in cells}
    return found


def job_states(jobs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """job -> (state, reason), of the jobs that SLURM still knows: its queue, then its accounting where there is one.

    Raises:
        ConfigError: SLURM does not answer.
    """
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


def last_words(root: Path, job: str) -> str:
    """What SLURM wrote into a job's log when it ended it, such as "CANCELLED AT 2026-11-23T12:00:00"."""
    said = []
    for file in sorted((root / FOLDER).glob(f"{job}_*_log.err")):
        said += re.findall(r"^(?:slurmstepd|srun): error: (.*)$", file.read_text(errors="replace"), re.MULTILINE)
    return said[-1].strip(" *") if said else ""
