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
    method = _method(run)
    data = published_results()
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
    if any(run.config.get("limit") for run in runs):
        found.append("only some of the questions (--limit)")
    if any(run.metadata(task, "generation_budget") not in (None, "published") for run in runs for task in tasks):
        found.append("answers are not cut at the published number of tokens")
    for run in runs:
        published = published_for(run)
        if published and run.settings.get("method") not in (None, "icl"):
            found += _changed_settings(run, published.method)
    return "; ".join(dict.fromkeys(found))


def _method(run: Run) -> str | None:
    settings, method = run.settings, run.settings.get("method")
    if any(run.metadata(task, "leave_one_out") for task in run.tasks):
        return None  # an ablation without published figures
    votes = any((run.metadata(task, "vote_permutations") or 1) > 1 for task in run.tasks)
    if method in (None, "icl"):
        shots = {run.shots(task) for task in run.tasks if task.startswith(TASK_PREFIX)}
        if shots == {0}:
            return "zero_shot"
        return ("few_shot_vote" if votes else "few_shot") if shots else None
    if method == "ttt":
        if settings.get("loss_on", "outputs") != "outputs":
            return f"ttt_loss_{settings['loss_on']}"
        return "ttt" + ("" if settings.get("shuffle", True) else "_no_shuffle") + ("_vote" if votes else "")
    return str(method)


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
    family = next((name for name in ("shared_ttt", "shared_e2e", "e2e") if method.startswith(name)), "ttt")
    expected = {**table["ttt"], **table.get("e2e" if family == "shared_e2e" else family, {}), **table.get(family, {})}
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
