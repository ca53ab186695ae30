"""How this project's time grows as the number of tasks, of demonstrations, and of permutations is doubled.

A base run, and for each of the three a run with twice as many of it and the rest as in the base. Compared are the
seconds of a stage and the tokens that went through it. What happens once in a run, whatever is asked (process, base
model, engine), is in the whole process only.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.compare import Settings
from benchmarks.figures import Stages, own_rows

DOUBLED = ("tasks", "k", "permutations")
# Times within this factor of the tokens' growth count as equal: two runs of the same thing differ by as much.
TOLERANCE = 1.15
# Below this growth of the tokens, an exponent says nothing.
LEAST_GROWTH = 1.05


def variants(base: Settings, more_tasks: tuple[str, ...]) -> dict[str, Settings]:
    """The settings of the base and of its doublings; `more_tasks` come on top of the base's tasks."""
    tasks = (*base.tasks, *more_tasks)
    return {
        "base": base,
        "tasks": replace(base, tasks=tasks, original_tasks=tasks),
        "k": replace(base, k=2 * base.k),
        "permutations": replace(base, permutations=2 * base.permutations),
    }


def rows(stages: Stages) -> list[dict[str, Any]]:
    """For each doubling that was measured and each stage: tokens and seconds (base, doubled), and how they grew.

    `exponent` is log(time ratio) / log(token ratio); None where the tokens hardly grew.
    """
    found: list[dict[str, Any]] = []
    for doubled in DOUBLED:
        if "base" not in stages or doubled not in stages:
            continue
        before, after = _stages(stages["base"]), _stages(stages[doubled])
        for stage, (tokens, seconds) in before.items():
            more_tokens, more_seconds = after[stage]
            token_ratio, time_ratio = more_tokens / tokens, more_seconds / seconds
            grew = token_ratio >= LEAST_GROWTH
            found.append(
                {
                    "doubled": doubled,
                    "stage": stage,
                    "tokens": (tokens, more_tokens),
                    "seconds": (seconds, more_seconds),
                    "token_ratio": token_ratio,
                    "time_ratio": time_ratio,
                    "exponent": math.log(time_ratio) / math.log(token_ratio) if grew else None,
                    "faster_than_tokens": time_ratio > TOLERANCE * token_ratio,
                }
            )
    return found


def figures(stages: Stages) -> dict[str, float]:
    """The exponents of one run, by name: `exponent_fit_tasks`, ..."""
    return {
        f"exponent_{row['stage'].replace(' ', '_')}_{row['doubled']}": row["exponent"]
        for row in rows(stages)
        if row["exponent"] is not None
    }


def _stages(done: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Stage -> (tokens, seconds)."""
    by_name = {row.stage: row for row in own_rows(done)}
    fit, generate = by_name["fit"], by_name["generate"]
    assert fit.tokens is not None
    assert generate.tokens is not None
    return {
        "fit": (fit.tokens, fit.seconds),
        "generate": (generate.tokens, generate.seconds),
        "whole process": (fit.tokens + generate.tokens, by_name["total"].seconds),
    }
