"""Reads what lm-eval 0.4 leaves behind: one results file per run and, with `--log_samples`, one samples file per task.

    <output_path>/<model>/results_<date>.json
    <output_path>/<model>/samples_<task>_<date>.jsonl

`find_run` and `find_runs` take what a person types (a file or a directory) and give `Run`s; everything a file can have
wrong with it ends in a `ReportError` of one sentence. What the numbers mean is left to compare.py.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ttt_harness.errors import ReportError
from ttt_harness.methods import setting_name

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?")
_NOT_METRICS = {"name", "alias", "sample_len", "sample_count", "samples"}
_OF_TASKS = ("k", "vote_permutations", "leave_one_out", "generation_budget")


class Metric(NamedTuple):
    """One way of scoring a task: lm-eval scores each metric once per filter over the answers."""

    name: str
    filter: str

    def __str__(self) -> str:
        return f"{self.name},{self.filter}"


@dataclass(frozen=True)
class Score:
    """A metric's value for one task or group, in the metric's own unit (accuracies: 0 to 1)."""

    value: float
    stderr: float | None
    higher_is_better: bool


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


@dataclass(frozen=True)
class TaskFit:
    """What one test-time training of `ttt_vllm` cost, and its loss per optimizer step."""

    adapter: str | None
    reused: bool
    train_tokens: int | None
    train_sequences: int | None
    losses: tuple[float, ...]
    fit_seconds: float | None
    generate_seconds: float | None


@dataclass(frozen=True, eq=False)  # two runs are the same when `same_run` says so
class Run:
    """One results file. Attributes are what the file says; missing optional parts are None or empty.

    path: the file; raw: its whole content; sample_files: task -> its samples file, for tasks that have one.
    """

    path: Path
    raw: dict[str, Any] = field(repr=False)
    sample_files: dict[str, Path] = field(repr=False)

    @property
    def model(self) -> str:
        """The model's name without the folders before it."""
        name = str(self.raw.get("model_name") or self.config.get("model") or "model")
        return name.rstrip("/").rsplit("/", 1)[-1]

    @property
    def source(self) -> str:
        """The lm-eval model class: hf, vllm, ttt_vllm, ..."""
        return str(self.raw.get("model_source") or self.config.get("model") or "")

    @property
    def config(self) -> dict[str, Any]:
        """How lm-eval was called."""
        return _dict(self.raw.get("config"))

    @property
    def date(self) -> float | None:
        """When the run began, seconds since 1970."""
        return _number(self.raw.get("date"))

    @property
    def seconds(self) -> float | None:
        """How long the whole run took."""
        try:
            return float(self.raw["total_evaluation_time_seconds"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def lm_eval_version(self) -> str | None:
        """The version of lm-eval that wrote the file."""
        return self.raw.get("lm_eval_version")

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Group -> all tasks below it, through nested groups, in the file's order."""
        children = {g: c for g, c in _dict(self.raw.get("group_subtasks")).items() if isinstance(c, list) and c}

        def leaves(name: str, above: tuple[str, ...]) -> Iterator[str]:
            if name not in children:
                yield name
                return
            for child in children[name]:
                if child not in above:  # a hand-made file may hold a cycle
                    yield from leaves(child, (*above, name))

        return {
            group: [task for task in dict.fromkeys(leaves(group, ())) if task in self.raw["results"]]
            for group in children
        }

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that were scored, groups left out."""
        return [name for name in self.raw["results"] if name not in self.groups]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `ttt_vllm`; empty for other models."""
        return _dict(_dict(self.config.get("ttt")).get("settings"))

    @property
    def method(self) -> str:
        """The published setting that was run ("zero_shot", "ttt_vote"); for other models the shots ("10-shot")."""
        settings, method = self.settings, self.settings.get("method")
        shots = {self.shots(task) for task in self.tasks}
        if method is None:
            return f"{shots.pop()}-shot" if len(shots) == 1 and None not in shots else (self.source or "run")
        return setting_name(
            settings,
            zero_shot=shots == {0},
            leave_one_out=any(self.metadata(task, "leave_one_out") for task in self.tasks),
            vote=any((self.metadata(task, "vote_permutations") or 1) > 1 for task in self.tasks),
        )

    @property
    def seed(self) -> Any:
        """The seed of the split; None where no task names one."""
        return next((seed for task in self.tasks if (seed := self.metadata(task, "seed")) is not None), None)

    @cached_property
    def setup(self) -> dict[str, Any]:
        """What the run was asked for, by name: runs differ in the seed alone where this is the same.

        Of what each task has its own, the value of all tasks where they agree, else a list.
        """
        tasks, limit = sorted(self.tasks), _number(self.config.get("limit"))

        def of_tasks(values: list[Any]) -> Any:
            return values[0] if all(value == values[0] for value in values) else values

        return {
            "method": self.method,
            # lm-eval makes up a name where no model is given
            "model": None if self.method == "random" else self.model,
            "limit": int(limit) if limit is not None and limit.is_integer() else limit,
            **{key: value for key, value in self.settings.items() if key not in ("method", "seed", "model_dir")},
            # not where a machine keeps the model, but which revision
            "weights": Path(str(self.settings.get("model_dir", ""))).name or None,
            "shots": of_tasks([self.shots(task) for task in tasks]),
            **{key: of_tasks([self.metadata(task, key) for task in tasks]) for key in _OF_TASKS},
            "chat_template_sha": self.raw.get("chat_template_sha"),
            "system_instruction_sha": self.raw.get("system_instruction_sha"),
            "tasks": tasks,
            "lm-eval model": self.source,
        }

    def fit(self, task: str) -> TaskFit | None:
        """What `ttt_vllm` reports of the task's training; None where there is nothing."""
        raw = _dict(_dict(_dict(self.config.get("ttt")).get("tasks")).get(task))
        if not raw:
            return None
        losses = raw.get("losses")
        return TaskFit(
            adapter=raw.get("adapter"),
            reused=bool(raw.get("reused")),
            train_tokens=_whole(raw.get("train_tokens")),
            train_sequences=_whole(raw.get("train_sequences")),
            losses=tuple(x for x in map(_number, losses) if x is not None) if isinstance(losses, list) else (),
            fit_seconds=_number(raw.get("fit_seconds")),
            generate_seconds=_number(raw.get("generate_seconds")),
        )

    def task_config(self, task: str) -> dict[str, Any]:
        """The task's YAML as lm-eval ran it."""
        return _dict(_dict(self.raw.get("configs")).get(task))

    def metadata(self, task: str, key: str) -> Any:
        """A task setting (k, seed, vote_permutations, ...): the YAML's metadata, or else the model's settings."""
        found = _dict(self.task_config(task).get("metadata")).get(key)
        return self.settings.get(key) if found is None else found

    def shots(self, task: str) -> int | None:
        """How many demonstrations stand in the task's prompts."""
        return _whole(_dict(self.raw.get("n-shot")).get(task))

    def questions(self, task: str) -> int | None:
        """How many questions of the task were scored."""
        counted = _dict(_dict(self.raw.get("n-samples")).get(task)).get("effective")
        return _whole(counted if counted is not None else self.raw["results"][task].get("sample_len"))

    def metrics(self, name: str) -> list[Metric]:
        """The metrics of a task or group that have a number, in the file's order; errors of metrics left out."""
        found = []
        for key, value in self.raw["results"][name].items():
            metric = _metric(key)
            if metric and not metric.name.endswith("_stderr") and _is_number(value):
                found.append(metric)
        return found

    def score(self, name: str, metric: Metric) -> Score:
        """The score of a task or group. Raises ReportError where it is NaN or infinite."""
        entry = self.raw["results"][name]
        value = float(entry[str(metric)])
        if not math.isfinite(value):
            raise ReportError(
                f"{self.path}: the {metric.name} of {name} is {value}, which cannot be compared; "
                f"look for what went wrong in that run."
            )
        higher = _dict(_dict(self.raw.get("higher_is_better")).get(name)).get(metric.name, True)
        return Score(value, _number(entry.get(f"{metric.name}_stderr,{metric.filter}")), higher is not False)

    def has_samples(self, task: str) -> bool:
        """Whether the answers to the task's single questions were kept (`--log_samples`)."""
        return task in self.sample_files or bool(_dict(self.raw.get("samples")).get(task))

    def samples(self, task: str, filter_name: str) -> list[Sample]:
        """The task's questions under one filter, in the file's order; empty where none were kept.

        Read anew on each call: a run's prompts are tens of megabytes. Raises ReportError for a damaged file.
        """
        inside = _dict(self.raw.get("samples")).get(task)  # `simple_evaluate` keeps them in its result
        if task not in self.sample_files and isinstance(inside, list):
            where, lines = self.path, iter(inside)
        elif task in self.sample_files:
            where, lines = self.sample_files[task], _json_lines(self.sample_files[task])
        else:
            return []
        found = []
        for number, line in enumerate(lines, 1):
            if not isinstance(line, dict) or "doc_id" not in line:
                raise ReportError(f"{where}, line {number}: not a sample of lm-eval (no doc_id); run it again.")
            if line.get("filter", "none") == filter_name:
                found.append(_sample(line))
        return found


def find_run(given: str | Path) -> tuple[Run, list[str]]:
    """The run that a file or a directory holds, and remarks for the reader.

    A directory is searched to any depth. Where it holds several results files the newest counts, and a remark says so.
    """
    path = Path(given)
    files = _results_files(path)
    remarks = []
    if len(files) > 1:
        remarks.append(f"{path} holds {len(files)} results files: took the newest, {files[-1].relative_to(path)}.")
    return read_run(files[-1]), remarks


def find_runs(given: str | Path) -> list[Run]:
    """All runs that a file or a directory (to any depth) holds, oldest first."""
    return [read_run(file) for file in _results_files(Path(given))]


def read_run(path: Path) -> Run:
    """One results file. Raises ReportError when it is not one, is damaged, or holds no task."""
    raw = _load(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict):
        hint = " (it holds samples; give the results_ file beside it)" if path.name.startswith("samples_") else ""
        raise ReportError(f"{path} is not a results file of lm-eval: it has no 'results'{hint}.")
    if not all(isinstance(entry, dict) for entry in raw["results"].values()):
        raise ReportError(f"{path} is not a results file of lm-eval: its 'results' are not one table per task.")
    run = Run(path, raw, _samples_files(path, list(raw["results"])))
    if not run.tasks:
        raise ReportError(f"{path} holds no scored task; did that lm_eval run end early?")
    return run


def same_run(one: Run, two: Run) -> bool:
    """Whether two files are of one run: the same file, or the same start, duration and scores."""
    if one.path.resolve() == two.path.resolve():
        return True
    keys = ("date", "total_evaluation_time_seconds", "results")
    return one.date is not None and all(one.raw.get(key) == two.raw.get(key) for key in keys)


def _results_files(path: Path) -> list[Path]:
    """The results files under a path, oldest first (by the date in the name, else by file time)."""
    if not path.exists():
        raise ReportError(f"{path} does not exist; give a results file of lm-eval, or the folder it was written to.")
    if not path.is_dir():
        return [path]
    files = [f for f in path.rglob("*.json") if f.name.startswith("results") or _DATE.search(f.name)]
    if not files:
        raise ReportError(f"{path} holds no results file (results_<date>.json); run lm_eval with --output_path {path}.")
    return sorted(files, key=lambda f: (_date_in(f) or "", f.stat().st_mtime, str(f)))


def _samples_files(path: Path, tasks: list[str]) -> dict[str, Path]:
    """Task -> the samples file that belongs to this results file.

    They share the date in their names. A results file that was renamed takes the only samples file of that task beside
    it; whether it fits is seen from the scores (compare.py).
    """
    date = _date_in(path)
    found = {}
    for task in tasks:
        if date:
            file = path.with_name(f"samples_{task}_{date}.jsonl")
            if file.is_file():
                found[task] = file
        else:
            dated = [f for f in path.parent.glob("samples_*.jsonl") if _names_samples_of(f, task)]
            if len(dated) == 1:
                found[task] = dated[0]
    return found


def _names_samples_of(file: Path, task: str) -> bool:
    rest = file.name.removeprefix(f"samples_{task}_").removesuffix(".jsonl")
    return file.name == f"samples_{task}.jsonl" or bool(_DATE.fullmatch(rest))


def _date_in(path: Path) -> str | None:
    found = _DATE.search(path.name)
    return found.group() if found else None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if path.name.startswith("samples_") and path.suffix == ".jsonl":
            raise ReportError(f"{path} holds samples; give the results_ file beside it.") from error
        raise ReportError(
            f"{path} is not complete JSON (line {error.lineno}: {error.msg}); it was cut off, or is no results file."
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ReportError(f"{path} is not a results file of lm-eval: it is not JSON text.") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error


def _json_lines(path: Path) -> Iterator[Any]:
    # split at "\n" only: str.splitlines would also split inside answers, at U+2028 and its like
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except (json.JSONDecodeError, RecursionError) as error:
                        raise ReportError(
                            f"{path}, line {number}: not complete JSON; the file was cut off, so run it again or "
                            f"delete it to compare without samples."
                        ) from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8 text; it was damaged, so run it again.") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error


def _sample(line: dict[str, Any]) -> Sample:
    # in a samples file: {"gen_args_0": {"arg_0": prompt, "arg_1": ...}}; in a `simple_evaluate` result: [[prompt, ...]]
    arguments = line.get("arguments")
    calls = (
        list(arguments.values()) if isinstance(arguments, dict) else arguments if isinstance(arguments, list) else []
    )
    calls = [list(c.values()) if isinstance(c, dict) else c for c in calls]
    calls = [c if isinstance(c, list | tuple) and c else [""] for c in calls] or [[""]]
    scored = line.get("filtered_resps")
    scored = scored if isinstance(scored, list) else [scored]
    ranked = _choices(calls, scored)
    if ranked:
        answer = _text(calls[ranked[0]][1]).strip()
        responses = [f"{_text(calls[i][1]).strip()}  (log-likelihood {_text(scored[i][0])})" for i in ranked]
    else:
        answer = _text(scored[0] if len(scored) == 1 else scored)
        responses = list(_flat(line.get("resps")))
    values: dict[str, Any] = {name: line.get(name) for name in line.get("metrics", [])}
    return Sample(
        doc_id=int(line["doc_id"]) if _is_number(line["doc_id"]) else -1,
        doc_hash=str(line.get("doc_hash") or json.dumps(line.get("doc", line["doc_id"]), sort_keys=True, default=str)),
        prompt_hash=str(line.get("prompt_hash") or ""),
        prompt=_text(calls[0][0]),
        target=_target(line, calls),
        answer=answer,
        responses=tuple(responses),
        values={name: float(value) for name, value in values.items() if _is_number(value) or isinstance(value, bool)},
    )


def _choices(calls: list[Any], scored: list[Any]) -> list[int]:
    """For a choice by log-likelihood: the choices' places, the likeliest first; empty for other requests."""
    if len(scored) != len(calls) or len(calls) < 2:
        return []
    try:
        likelihood = [float(pair[0]) for pair in scored if isinstance(pair, list | tuple) and len(pair) == 2]
    except (TypeError, ValueError):
        return []
    if len(likelihood) != len(calls) or not all(len(c) > 1 and isinstance(c[1], str) for c in calls):
        return []
    return sorted(range(len(calls)), key=lambda i: -likelihood[i])


def _target(line: dict[str, Any], calls: list[Any]) -> str:
    """The right answer; a choice's number becomes the choice's text."""
    target = _text(line.get("target"))
    if target.isdigit() and len(calls) > int(target) and all(len(c) > 1 and isinstance(c[1], str) for c in calls):
        return str(calls[int(target)][1]).strip()
    return target


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif value is not None:
        yield _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _metric(key: str) -> Metric | None:
    name, comma, filter_name = key.partition(",")
    return Metric(name, filter_name) if comma and name not in _NOT_METRICS else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
