"""The runs of one method with several seeds, as one run: a question's score is its mean over the seeds that asked it.

Seeds draw other demonstrations, so that the seeds' answers to one question are no separate questions. With one score
for each question the tests of compare.py hold as they are.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ttt_harness.report.results import Metric, Run, Score, find_run, search_runs
from ttt_harness.report.samples import Sample


@dataclass(frozen=True, eq=False)
class SeedsRun(Run):
    """Runs that differ in the seed alone, under the interface of one; groups are left out."""

    runs: tuple[Run, ...] = ()
    _kept: dict[tuple[str, str], list[Sample]] = field(default_factory=dict, repr=False)

    @property
    def seeds(self) -> tuple[Any, ...]:
        """Those of the runs, in rising order."""
        return tuple(run.seed for run in self.runs)

    def metadata(self, task: str, key: str) -> Any:
        """As of one run; all seeds for `seed`."""
        return ", ".join(map(str, self.seeds)) if key == "seed" else super().metadata(task, key)

    def metrics(self, name: str) -> list[Metric]:
        """Those that all runs have."""
        return [metric for metric in super().metrics(name) if all(metric in run.metrics(name) for run in self.runs)]

    def questions(self, task: str) -> int | None:
        """How many different questions were scored; without samples, how many in the run with most."""
        if self.has_samples(task):
            return len(self.samples(task, self.metrics(task)[0].filter))
        counts = [run.questions(task) for run in self.runs]
        return None if None in counts else max(count or 0 for count in counts)

    def has_samples(self, task: str) -> bool:
        """Whether all runs have kept them."""
        return all(run.has_samples(task) for run in self.runs)

    def score(self, name: str, metric: Metric) -> Score:
        """The mean over the questions; without samples, over the runs."""
        scores = [run.score(name, metric) for run in self.runs]
        samples = self.samples(name, metric.filter) if self.has_samples(name) else []
        if samples and all(metric.name in sample.values for sample in samples):
            values = [sample.values[metric.name] for sample in samples]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            return Score(statistics.fmean(values), error, scores[0].higher_is_better)
        # No smaller for more seeds: they ask the same questions, and how alike the answers are only samples tell.
        errors = [score.stderr for score in scores if score.stderr is not None]
        error = statistics.fmean(errors) if len(errors) == len(scores) else None
        return Score(statistics.fmean(score.value for score in scores), error, scores[0].higher_is_better)

    def samples(self, task: str, filter_name: str) -> list[Sample]:
        """A sample for each question, without texts; its hash tells which seeds asked it."""
        if (task, filter_name) not in self._kept:
            asked: dict[tuple[str, int], dict[Any, Sample]] = defaultdict(dict)
            for run in self.runs:
                again: Counter[str] = Counter()  # a task may hold a question twice
                for sample in run.samples(task, filter_name):
                    asked[sample.doc_hash, again[sample.doc_hash]][run.seed] = sample
                    again[sample.doc_hash] += 1
            self._kept[task, filter_name] = [_mean(number, by_seed) for number, by_seed in enumerate(asked.values())]
        return self._kept[task, filter_name]


def find_compared(given: str | Path) -> tuple[Run, list[str]]:
    """As `find_run`; but where a folder holds one method's runs with several seeds, all of them as one."""
    found, remarks = search_runs(given)
    newest = found[-1]
    by_seed = {run.seed: run for run in found}  # the newest of each seed
    if len(by_seed) < 2 or any(run.setup != newest.setup for run in found):
        return find_run(given)
    run = as_one(by_seed, Path(given))
    seeds = ", ".join(map(str, run.seeds))
    return run, [*remarks, f"{given} holds the seeds {seeds}: each question's mean over them is compared."]


def as_one(by_seed: Mapping[Any, Run], path: Path) -> Run:
    """Runs that differ in the seed alone as one, which is called `path`; the run itself where there is one seed."""
    runs = tuple(by_seed[seed] for seed in sorted(by_seed, key=str))
    last = runs[-1]
    if len(runs) == 1:
        return last
    results = {task: last.results[task] for task in last.tasks}
    hashes = {task: [run.task_hash(task) for run in runs] for task in last.tasks}
    raw = {**last.raw, "results": results, "group_subtasks": {}, "task_hashes": hashes}
    return SeedsRun(path, raw, {}, runs=runs)


def _mean(number: int, by_seed: dict[Any, Sample]) -> Sample:
    order: Sequence[Any] = sorted(by_seed, key=str)
    some = [by_seed[seed] for seed in order]
    shared = set.intersection(*(set(sample.values) for sample in some))
    return Sample(
        doc_id=number,
        doc_hash=f"{some[0].doc_hash} {order}",
        prompt_hash=" ".join(sample.prompt_hash for sample in some),
        prompt="",
        target="",
        answer="",
        responses=(),
        values={name: statistics.fmean(sample.values[name] for sample in some) for name in shared},
    )
