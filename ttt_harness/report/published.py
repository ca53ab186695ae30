"""The published accuracies of test-time training on BIG-Bench Hard, and which of them stands beside a run.

published_results.json is a copy of the project's reference file; its source is named in it and in every table that
quotes it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ttt_harness.methods import SETTINGS
from ttt_harness.report.results import Run

TASK_PREFIX = "bbh_ttt_"
GROUP = "bbh_ttt"
_SHORT_SOURCE = "Akyürek et al., arXiv 2411.07279; figures from adamzweiger/Fewshot-TTT (ad40084)"


@dataclass(frozen=True)
class Published:
    """One method's published figures: `method` names it as the source does; scores are accuracies from 0 to 1."""

    method: str
    scores: dict[str, float]

    def score(self, name: str) -> float | None:
        """The published accuracy of a task (`bbh_ttt_<name>`) or of the group `bbh_ttt`; None where there is none."""
        return self.scores.get(name)


def published_for(run: Run) -> Published | None:
    """The published method that a run repeats, as closely as its settings tell; None when there is none."""
    return published_setting(run.setting)


@cache
def published_setting(name: str | None) -> Published | None:
    """The published method that stands for a setting (see `methods.SETTINGS`); None where there is none."""
    method, data = SETTINGS[name].published if name in SETTINGS else None, published_results()
    if method is None or method not in data["per_task"]:
        return None
    scores = {TASK_PREFIX + task: percent / 100 for task, percent in data["per_task"][method].items()}
    return Published(method, {GROUP: data["average"][method] / 100, **scores})


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
    text = files("ttt_harness.report").joinpath("published_results.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
