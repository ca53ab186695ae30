"""What one worker does in a second, as given or as a run has measured it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ttt_harness.errors import ConfigError, ReportError
from ttt_harness.estimate.tokens import TokenCounts
from ttt_harness.records import TaskRecord
from ttt_harness.report.results import find_runs
from ttt_harness.run.schedule import Stages


@dataclass(frozen=True)
class Rates:
    """What one worker does.

    fit, answer: tokens per second; start: seconds until it is ready; source: where the figures are from; stages: how
    it went about fits and answers, whose rates are those of one beside the other where they overlap.
    """

    fit: float
    answer: float
    start: float
    source: str
    stages: Stages = Stages.SEQUENTIAL


def measured_rates(path: Path, tokens: Mapping[str, TokenCounts], start: float | None) -> Rates:
    """The rates of a run: a result of `lm_eval --model ttt_vllm`, or of the benchmark.

    Args:
        path: a results file, or a folder with some, of which the newest with a fit counts.
        tokens: of the tasks by name; the run's tasks have to be among them.
        start: seconds of a worker's start, in place of 0 where the run does not tell them.

    Raises:
        ConfigError: there is no such run, or it has none of the tasks.
    """
    records, seconds, stages = _records(path)
    fits = [one for one in records.values() if one.fitted]
    answers = {name: one for name, one in records.items() if name in tokens and one.generate_seconds > 0}
    if not fits:
        raise ConfigError(f"{path} holds no run with a fit that could be timed; give --fit_rate and --answer_rate.")
    if not answers:
        raise ConfigError(f"{path} holds none of these tasks, whose answers could be timed; give --answer_rate.")
    fitted = sum(one.train_tokens or 0 for one in fits)
    if not fitted:
        raise ConfigError(f"{path} states no tokens of its fits; give --fit_rate.")
    asked = 0.0
    for name, one in answers.items():
        own = tokens[name]
        asked += own.demonstrations + one.requests * (own.question + own.answer)
    return Rates(
        fit=fitted / sum(one.fit_seconds or 0 for one in fits),
        answer=asked / sum(one.generate_seconds for one in answers.values()),
        start=start if start is not None else seconds,
        source=str(path),
        stages=stages,
    )


def _records(path: Path) -> tuple[dict[str, TaskRecord], float, Stages]:
    """What a run states of each of its tasks, the seconds of its start as far as it states them, and its stages."""
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--measured {path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--measured {path} cannot be read: it is no JSON ({error}).") from None
        runs = content.get("runs") if isinstance(content, dict) else None
        if isinstance(runs, list):
            return _of_benchmark(path, runs)
    try:
        found = find_runs(path)
    except ReportError as error:
        raise ConfigError(f"--measured: {error}") from None
    for one in reversed(found):
        stated = one.config.get("ttt")
        stated = stated if isinstance(stated, dict) else {}
        records = _task_records(stated.get("tasks"))
        if any(record.fitted for record in records.values()):
            named = {stages.name.lower(): stages for stages in Stages}
            return records, 0.0, named.get(str(stated.get("stages")), Stages.SEQUENTIAL)
    return {}, 0.0, Stages.SEQUENTIAL


def _of_benchmark(path: Path, runs: list[object]) -> tuple[dict[str, TaskRecord], float, Stages]:
    """The newest of the benchmark's runs; the time that it was neither fitting nor answering is its start."""
    for run in reversed(runs):
        stages = run.get("stages") if isinstance(run, dict) else None
        own = stages.get("ours") if isinstance(stages, dict) else None
        if isinstance(own, dict):
            times = [own.get(name) for name in ("seconds", "fit_seconds", "generate_seconds")]
            total, fit, generate = (time if isinstance(time, int | float) else 0.0 for time in times)
            rest = total - fit - generate
            return _task_records(own.get("tasks")), max(0.0, rest), Stages.OVERLAPPED if rest < 0 else Stages.SEQUENTIAL
    raise ConfigError(f"{path} holds no run of this project; give --fit_rate and --answer_rate.")


def _task_records(tasks: object) -> dict[str, TaskRecord]:
    given = tasks if isinstance(tasks, dict) else {}
    return {str(name): TaskRecord.from_dict(said) for name, said in given.items() if isinstance(said, dict)}


def newest_benchmark(folder: Path) -> Path | None:
    """The newest results of the benchmark in `folder`."""
    files = [file for file in folder.glob("*.json") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)
