"""The published accuracies of test-time training on BIG-Bench Hard, and which of them stands beside a run.

published_results.json and published_seeds.json are copies of the project's reference files; their source is named in
them and in every table that quotes them.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ttt_harness.methods import SETTINGS
from ttt_harness.report.results import Run
from ttt_harness.statistics import prediction_interval

TASK_PREFIX = "bbh_ttt_"
GROUP = "bbh_ttt"
_SHORT_SOURCE = "Akyürek et al., arXiv 2411.07279; figures from adamzweiger/Fewshot-TTT (ad40084)"


@dataclass(frozen=True)
class Figure:
    """A published accuracy from 0 to 1: the mean over the seeds, and each seed's own where the source has them."""

    mean: float
    by_seed: tuple[float, ...] = ()

    @property
    def sd(self) -> float | None:
        """Standard deviation over the seeds (n - 1)."""
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else None

    def redrawn(self, seeds: int) -> tuple[float, float] | None:
        """Where the mean of another draw of so many seeds lies in 95 % of all cases; None without the seeds' own."""
        if self.sd is None:
            return None
        low, high = prediction_interval(self.mean, self.sd, len(self.by_seed), seeds)
        return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class Published:
    """One method's published figures: `method` names it as the source does; `figures` by task (`bbh_ttt_<name>`)."""

    method: str
    figures: dict[str, Figure]
    average: Figure

    def figure(self, name: str) -> Figure | None:
        """The published accuracy of a task, or of the group `bbh_ttt`; None where there is none."""
        return self.average if name == GROUP else self.figures.get(name)

    def mean_of(self, tasks: Iterable[str]) -> Figure | None:
        """The plain mean over tasks; None where one of them has no figure."""
        found = [self.figures.get(task) for task in tasks]
        known = [figure for figure in found if figure]
        if not known or len(known) < len(found):
            return None
        by_seed = zip(*(figure.by_seed for figure in known), strict=True)
        return Figure(statistics.fmean(f.mean for f in known), tuple(map(statistics.fmean, by_seed)))

    def median_of(self, tasks: Iterable[str]) -> float | None:
        """The median over tasks of their means; None where one of them has no figure."""
        found = [self.figures.get(task) for task in tasks]
        return statistics.median(figure.mean for figure in found if figure) if found and all(found) else None


def published_for(run: Run) -> Published | None:
    """The published method that a run repeats, as closely as its settings tell; None when there is none."""
    return published_setting(run.setting)


@cache
def published_setting(name: str | None) -> Published | None:
    """The published method that stands for a setting (see `methods.SETTINGS`); None where there is none."""
    method, data = SETTINGS[name].published if name in SETTINGS else None, published_results()
    if method is None or method not in data["per_task"]:
        return None
    by_seed = published_seeds()["per_seed"].get(method, [])

    def figure(percent: float, of_seeds: Iterable[float]) -> Figure:
        return Figure(percent / 100, tuple(one / 100 for one in of_seeds))

    return Published(
        method,
        {
            TASK_PREFIX + task: figure(percent, [of_seed[task] for of_seed in by_seed])
            for task, percent in data["per_task"][method].items()
        },
        figure(data["average"][method], [statistics.fmean(of_seed.values()) for of_seed in by_seed]),
    )


def place(value: float, interval: tuple[float, float]) -> str:
    """Where a value lies: "within", "below" or "above" the interval."""
    low, high = interval
    return "below" if value < low else "above" if value > high else "within"


def covers(runs: Sequence[Run]) -> bool:
    """Whether there are published figures for anything in these runs."""
    return any(published_for(run) and any(task.startswith(TASK_PREFIX) for task in run.tasks) for run in runs)


def source() -> str:
    """One line that names where the published figures are from."""
    return (
        f"{_SHORT_SOURCE}: {published_results()['model']}, accuracy, mean of {len(published_results()['seeds'])} seeds"
    )


def differences(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    """One line on what sets these runs apart from the published ones; empty where nothing is known to."""
    data, found = published_results(), []
    models = sorted({run.model for run in runs if run.model.lower() != data["model"].lower()})
    if models:
        found.append(f"{' and '.join(models)} (published: {data['model']})")
    seeds = sorted({str(seed) for run in runs for task in tasks if (seed := run.metadata(task, "seed")) is not None})
    found.append(f"seed {', '.join(seeds) or 'unknown'} (mean over {data['seeds'][0]} to {data['seeds'][-1]})")
    counts = {str(k) for run in runs for task in tasks if (k := run.metadata(task, "k")) not in (None, data["k"])}
    if counts:
        found.append(f"k={', '.join(sorted(counts))} ({data['k']})")
    if any(run.limit is not None for run in runs):
        found.append("only some of the questions (--limit)")
    if any(run.metadata(task, "generation_budget") not in (None, "published") for run in runs for task in tasks):
        found.append("answers are not cut at the published number of tokens")
    for run in runs:
        published = published_for(run)
        if published and run.fits:
            found += _changed_settings(run, published.method)
    return "; ".join(dict.fromkeys(found))


# our setting -> its name in the published hyperparameters
_SETTINGS = {
    "num_permutations": "num_permutations",
    "fit_batch_size": "batch_size",
    "epochs": "epochs",
    "lr": "lr",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
}


def _changed_settings(run: Run, method: str) -> list[str]:
    table = published_results()["hyperparameters"]
    expected = {**table["ttt"], **table.get(method, {})}  # a method's own row tells what differs from the first
    return [
        f"{ours}={run.settings[ours]} ({expected[theirs]})"
        for ours, theirs in _SETTINGS.items()
        if ours in run.settings and theirs in expected and run.settings[ours] != expected[theirs]
    ]


@cache
def published_results() -> dict[str, Any]:
    """The published figures and hyperparameters, as in the source: percent, by method and task."""
    return _read("published_results.json")


@cache
def published_seeds() -> dict[str, Any]:
    """The published figures of each seed, as in the source: percent, by method, seed (in their order) and task."""
    return _read("published_seeds.json")


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(files("ttt_harness.report").joinpath(name).read_text(encoding="utf-8"))
    return content
