"""One question of a run, as lm-eval's samples files state it: what was asked, answered and scored.

The layouts of lm-eval 0.4.0 to 0.4.13 are read: requests as lists or as mappings, and files from before 0.4.6, whose
lines name neither their filter nor their metrics.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# lm-eval's metric of --predict_only: 999, whatever was answered
NO_SCORE = "bypass"


@dataclass(frozen=True)
class Sample:
    """One question of a run under one filter.

    doc_id: the question's place in the evaluated split; doc_hash, prompt_hash: lm-eval's SHA-256 of them.
    prompt: all that the model was shown; target: the right answer as lm-eval writes it.
    answer: what was scored, after the filter; responses: what the model wrote, before it.
    values: metric name -> this question's score, for the metrics that are one plain number per question.
    """

    doc_id: int
    doc_hash: str
    prompt_hash: str
    prompt: str
    target: str
    answer: str
    responses: tuple[str, ...]
    values: Mapping[str, float]


def is_sample(line: Any) -> bool:
    """Whether a line of a samples file is one."""
    return isinstance(line, dict) and "doc_id" in line


def sample(line: Mapping[str, Any], metrics: Collection[str]) -> Sample:
    """The sample that a line states. metrics: those of the task, for lines that do not name their own."""
    calls = _calls(line.get("arguments"))
    scored = line.get("filtered_resps")
    scored = scored if isinstance(scored, list) else [scored]
    ranked = _choices(calls, scored)
    if ranked:
        answer = _text(calls[ranked[0]][1]).strip()
        responses = [f"{_text(calls[i][1]).strip()}  (log-likelihood {_text(scored[i][0])})" for i in ranked]
    else:
        answer = "\n".join(_flat(scored))
        responses = list(_flat(line.get("resps")))
    named = line.get("metrics")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else metrics
    doc_id = line["doc_id"]
    return Sample(
        doc_id=int(doc_id) if _is_number(doc_id) else -1,
        doc_hash=str(line.get("doc_hash") or _hash(json.dumps(line.get("doc", doc_id), indent=2, ensure_ascii=False))),
        prompt_hash=str(line.get("prompt_hash") or _hash(_text(calls[0][0]))),
        prompt=_text(calls[0][0]),
        target=_target(line.get("target"), calls),
        answer=answer,
        responses=tuple(responses),
        values={name: float(line[name]) for name in names if name != NO_SCORE and _is_number(line.get(name))},
    )


def _hash(text: str) -> str:
    """As lm-eval makes the hashes that its older versions did not write."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _calls(arguments: Any) -> list[list[Any]]:
    """The requests of a question, each a list that begins with its prompt; at least one.

    In a samples file: {"gen_args_0": {"arg_0": prompt, "arg_1": ...}}; in a `simple_evaluate` result: [[prompt, ...]].
    """
    calls = list(arguments.values()) if isinstance(arguments, dict) else arguments
    calls = [list(c.values()) if isinstance(c, dict) else c for c in calls] if isinstance(calls, list | tuple) else []
    return [list(c) if isinstance(c, list | tuple) and c else [""] for c in calls] or [[""]]


def _choices(calls: list[list[Any]], scored: list[Any]) -> list[int]:
    """For a choice by log-likelihood: the choices' places, the likeliest first; empty for other requests."""
    if len(scored) != len(calls) or len(calls) < 2 or not _are_choices(calls):
        return []
    try:
        likelihood = [float(pair[0]) for pair in scored if isinstance(pair, list | tuple) and len(pair) == 2]
    except (TypeError, ValueError):
        return []
    if len(likelihood) != len(calls):
        return []
    return sorted(range(len(calls)), key=lambda i: -likelihood[i])


def _are_choices(calls: list[list[Any]]) -> bool:
    return all(len(call) > 1 and isinstance(call[1], str) for call in calls)


def _target(given: Any, calls: list[list[Any]]) -> str:
    """The right answer; a choice's number becomes the choice's text."""
    target = "\n".join(_flat(given)) if isinstance(given, list) else _text(given)
    if target in map(str, range(len(calls))) and _are_choices(calls):
        return str(calls[int(target)][1]).strip()
    return target


def _flat(value: Any) -> Iterator[str]:
    """The texts of a list, and of the lists in it."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
