"""One run of this project on one worker and on several, in turn on one machine: does another GPU pay?

Each number of workers is measured as often as asked, in turn, so that a machine that grows slower does not favour one.
Answers are compared too: how many are the same as in the first run on one worker.
"""

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ours
from ttt_harness.config import TTTConfig

# The lines of a run's log that tell when its workers were at what.
TOLD = ("starting", "memory:", "fitting (worker", "answering", "done)")


def measure(
    names: Sequence[str],
    folder: Path,
    *,
    workers: Sequence[int],
    runs: int,
    model: str,
    config: TTTConfig,
    limit: int,
    engine: Mapping[str, Any],
    seconds: float,
    say: Callable[[str], None],
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Run each number of workers `runs` times.

    Args:
        names, model, config, limit, engine, seconds: as of `ours.evaluate`.
        folder: for logs and adapters, which are removed after each run.
        workers: numbers of workers.
        runs: how often each.
        say: tells what is being run.
        keep: is given all that is measured so far, after each run.

    Returns:
        For each run: workers, seconds of the process and from first request to last answer, summed seconds of fits and
        answers, and the share of answers that are those of the first run.
    """
    found: list[dict[str, Any]] = []
    first: dict[str, list[str]] = {}
    for number in range(1, runs + 1):
        for count in workers:
            say(f"run {number}: {count} worker{'s' * (count > 1)}")
            work = folder / f"{count}-{number}"
            asked = {**engine, "data_parallel_size": count} if count > 1 else dict(engine)
            done = ours.evaluate(names, work, model=model, config=config, limit=limit, engine=asked, seconds=seconds)
            texts = {name: answer["texts"] for name, answer in done.pop("answers").items()}
            first = first or texts
            pairs = [pair for name in texts for pair in zip(texts[name], first[name], strict=True)]
            log = (work / "log.txt").read_text(errors="replace").splitlines()
            found.append(
                {
                    "workers": count,
                    **{key: value for key, value in done.items() if key != "tasks"},
                    "same_answers": sum(one == other for one, other in pairs) / len(pairs),
                    "log": [line[:160] for line in log if any(word in line for word in TOLD)],
                }
            )
            shutil.rmtree(work / "adapters", ignore_errors=True)
            keep(found)
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Medians by number of workers, in Markdown, with the ratio to the smallest number."""
    least = min(one["workers"] for one in found)

    def median(count: int, key: str) -> float:
        return statistics.median(one[key] for one in found if one["workers"] == count)

    lines = [
        "| workers | first request to last answer | whole process | fits, answers (summed) | same answers |",
        "|---:|---:|---:|---:|---:|",
    ]
    for count in sorted({one["workers"] for one in found}):
        run, whole = median(count, "run_seconds"), median(count, "seconds")
        ratios = median(least, "run_seconds") / run, median(least, "seconds") / whole
        lines.append(
            f"| {count} | {run:.0f} s ({ratios[0]:.2f}) | {whole:.0f} s ({ratios[1]:.2f}) | "
            f"{median(count, 'fit_seconds'):.0f}, {median(count, 'generate_seconds'):.0f} s | "
            f"{median(count, 'same_answers'):.1%} |"
        )
    return "\n".join(lines)
