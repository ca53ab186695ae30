"""Runs a stage as a process of its own: its wall-clock, when it said what, and the memory that it took at most."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ttt_harness.errors import TTTError

ROOT = Path(__file__).resolve().parents[1]
# As the user has it: importing the project's task classes sets variables for vLLM, which the original pipeline is not
# to get. The command line imports this module before those.
ENVIRONMENT = dict(os.environ)
SECONDS_BETWEEN_SAMPLES = 0.5


class StageError(TTTError):
    """A stage of the benchmark failed or ran into its time limit."""


@dataclass
class Finished:
    """A process that ended well.

    seconds: its wall-clock, start and end included. marks: name -> seconds after the start at which a line of its
    output first matched. peak_bytes: the largest resident set of the process and its children together, as sampled;
    gpu_peak_bytes: the first card's memory in use, likewise.
    """

    seconds: float
    marks: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    gpu_peak_bytes: int | None = None


def run(
    what: str,
    command: Sequence[str],
    *,
    log: Path,
    limit: float,
    env: Mapping[str, str | None] | None = None,
    marks: Mapping[str, str] | None = None,
) -> Finished:
    """Run `command` from the project's root, its output going to `log`, and wait for it.

    Args:
        what: the stage, for messages.
        command: program and arguments.
        log: file for its output.
        limit: seconds after which it is ended.
        env: variables to set (a text) or to take away (None).
        marks: name -> regular expression, searched in each line of the output.

    Raises:
        StageError: it failed, or took longer than `limit`; the message names the log.
    """
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), ENVIRONMENT.get("PYTHONPATH", "")])}
    environment["PYTHONUNBUFFERED"] = "1"
    for name, value in (env or {}).items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    result = Finished(0.0)
    reader = threading.Thread(target=_read, args=(process, log, start, marks or {}, result.marks), daemon=True)
    reader.start()
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, ended, result), daemon=True)
    sampler.start()
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        _end(process)
        raise StageError(
            f"{what}: not done after {limit:.0f} s, the limit for a stage; "
            f"raise --stage-limit or ask for less (its output: {log})."
        ) from None
    except BaseException:
        _end(process)
        raise
    finally:
        ended.set()
        result.seconds = time.perf_counter() - start
    reader.join(timeout=10)
    sampler.join(timeout=10)
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise StageError(f"{what}: ended with status {code}: {lines[-1] if lines else 'no output'} (all of it: {log})")
    return result


def python(module: str, *arguments: Any) -> list[str]:
    """The command that runs `module` with this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def _read(process: subprocess.Popen, log: Path, start: float, marks: Mapping[str, str], seen: dict[str, float]) -> None:
    assert process.stdout is not None
    with process.stdout as lines, log.open("wb") as file:
        for line in lines:
            now = time.perf_counter() - start
            file.write(line)
            file.flush()
            text = line.decode(errors="replace")
            for name, pattern in marks.items():
                if name not in seen and re.search(pattern, text):
                    seen[name] = now


def _sample(pid: int, ended: threading.Event, result: Finished) -> None:
    gpu = _gpu_memory() is not None
    while not ended.wait(SECONDS_BETWEEN_SAMPLES):
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
        except psutil.Error:
            return
        total = 0
        for member in family:
            try:
                total += member.memory_info().rss
            except psutil.Error:
                continue
        result.peak_bytes = max(result.peak_bytes, total)
        if gpu:
            result.gpu_peak_bytes = max(result.gpu_peak_bytes or 0, _gpu_memory() or 0)


def _gpu_memory() -> int | None:
    """Bytes in use on the first GPU; None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout) * 2**20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _end(process: subprocess.Popen) -> None:
    """End the process and all that it started, which are a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
