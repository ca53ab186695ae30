"""Reads what lm-eval 0.4 leaves behind: one results file per run and, with `--log_samples`, one samples file per task.

    <output_path>/<model>/results_<date>.json
    <output_path>/<model>/samples_<task>_<date>.jsonl

`find_run` and `find_runs` take what a person types (a file or a folder) and give `Run`s. A `Run` gives what the file
says of a thing, or None where it says nothing or something of another type; files.py finds and reads, samples.py knows
the single questions. What the numbers mean is left to compare.py.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ttt_harness.errors import ReportError
from ttt_harness.methods import Method, is_guessing, method_of, setting_name
from ttt_harness.records import TaskRecord
from ttt_harness.report.files import read_json, read_json_lines, results_files, samples_files
from ttt_harness.report.samples import NO_SCORE, Sample, is_sample, sample

_NOT_METRICS = {"name", "alias", "sample_len", "sample_count", "samples", NO_SCORE}
# settings that may differ between runs of one setup: the seed, where the run was, and how its model is fitted if it is
_NOT_SETUP = ("method", "seed", "model_dir", "device", "way", "left_out")
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

    @property
    def is_share(self) -> bool:
        """Whether it reads best in percent. lm-eval does not say, and an error rate may lie between 0 and 1 too."""
        return self.higher_is_better and 0 <= self.value <= 1


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
        return name.rstrip("/").rsplit("/", 1)[-1] or name

    @property
    def source(self) -> str:
        """The lm-eval model class: hf, vllm, ttt_vllm, ..."""
        return str(self.raw.get("model_source") or self.config.get("model") or "")

    @property
    def config(self) -> dict[str, Any]:
        """How lm-eval was called."""
        return _dict(self.raw.get("config"))

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Task or group -> its table of scores."""
        return _dict(self.raw.get("results"))

    @property
    def date(self) -> float | None:
        """When the run began, seconds since 1970."""
        return _number(self.raw.get("date"))

    @property
    def seconds(self) -> float | None:
        """How long the whole run took."""
        try:
            seconds = float(self.raw["total_evaluation_time_seconds"])  # lm-eval writes it as a text
        except (KeyError, TypeError, ValueError):
            return None
        return seconds if math.isfinite(seconds) and seconds >= 0 else None

    @property
    def lm_eval_version(self) -> str | None:
        """The version of lm-eval that wrote the file."""
        version = self.raw.get("lm_eval_version")
        return None if version is None else str(version)

    @property
    def limit(self) -> int | float | None:
        """How many questions of each task, or which share of them, were asked for; None for all."""
        limit = _number(self.config.get("limit"))
        return int(limit) if limit is not None and limit.is_integer() else limit

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Group -> all tasks below it, through nested groups, in the file's order."""
        children = {
            group: [name for name in below if isinstance(name, str)]
            for group, below in _dict(self.raw.get("group_subtasks")).items()
            if isinstance(below, list)
        }
        children = {group: below for group, below in children.items() if below}  # older versions list tasks, as empty

        def tasks_below(group: str) -> list[str]:
            found: list[str] = []
            waiting, seen = [group], set()
            while waiting:
                name = waiting.pop()
                if name in seen:  # a file may hold a circle
                    continue
                seen.add(name)
                if name in children:
                    waiting += reversed(children[name])
                elif name in self.results:
                    found.append(name)
            return found

        return {group: tasks_below(group) for group in children}

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that were evaluated, groups left out."""
        return [name for name in self.results if name not in self.groups]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `ttt_vllm`; empty for other models."""
        return _dict(_dict(self.config.get("ttt")).get("settings"))

    @property
    def ttt_method(self) -> Method | None:
        """The method of `ttt_vllm` that was run; None for other models."""
        return method_of(self.settings)

    @property
    def fits(self) -> bool:
        """Whether adapters were fitted."""
        return self.ttt_method is not None and self.ttt_method.fits

    @property
    def zero_shot(self) -> bool:
        """Whether no prompt held demonstrations."""
        return {self.shots(task) for task in self.tasks} == {0}

    @property
    def setting(self) -> str | None:
        """The setting of the study that was run, in the manner of `methods.SETTINGS`; None where nothing tells it.

        Another model than `ttt_vllm` fits nothing; how many demonstrations its prompts held tells the setting.
        """
        if "method" not in self.settings and None in {self.shots(task) for task in self.tasks}:
            return None
        return setting_name(
            self.settings,
            zero_shot=self.zero_shot,
            leave_one_out=any(self.metadata(task, "leave_one_out") for task in self.tasks),
            vote=any(self.votes(task) > 1 for task in self.tasks),
        )

    @property
    def method(self) -> str:
        """The setting that was run ("zero_shot", "ttt_vote"); for other models the shots ("10-shot")."""
        if self.settings.get("method") is not None:
            return self.setting or "run"
        shots = {self.shots(task) for task in self.tasks}
        return f"{shots.pop()}-shot" if len(shots) == 1 and None not in shots else (self.source or "run")

    @property
    def seed(self) -> Any:
        """The seed of the split; None where no task names one. A text where a file has something else than a number."""
        found = next((seed for task in self.tasks if (seed := self.metadata(task, "seed")) is not None), None)
        return found if found is None or _number(found) is not None else str(found)

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The seeds whose mean the run stands for."""
        return (self.seed,)

    @cached_property
    def setup(self) -> dict[str, Any]:
        """What the run was asked for, by name: runs differ in the seed alone where this is the same.

        Of what each task has its own, the value of all tasks where they agree, else a list.
        """
        tasks = sorted(self.tasks)

        def of_tasks(values: list[Any]) -> Any:
            return values[0] if all(value == values[0] for value in values) else values

        return {
            "method": self.method,
            # lm-eval makes up a name where no model is given
            "model": self.model if self.has_model else None,
            "limit": self.limit,
            **{key: value for key, value in self.settings.items() if key not in _NOT_SETUP},
            # not where a machine keeps the model, but which revision
            "weights": Path(str(self.settings.get("model_dir", ""))).name or None,
            "shots": of_tasks([self.shots(task) for task in tasks]),
            **{key: of_tasks([self.metadata(task, key) for task in tasks]) for key in _OF_TASKS},
            "chat_template_sha": self.raw.get("chat_template_sha"),
            "system_instruction_sha": self.raw.get("system_instruction_sha"),
            "tasks": tasks,
            "lm-eval model": self.source,
        }

    @property
    def has_model(self) -> bool:
        """Whether a model answered, and not chance."""
        return not is_guessing(self.settings)

    def fit(self, task: str) -> TaskRecord | None:
        """What `ttt_vllm` states about the task; None where there is nothing."""
        said = _dict(_dict(_dict(self.config.get("ttt")).get("tasks")).get(task))
        return TaskRecord.from_dict(said) if said else None

    def task_config(self, task: str) -> dict[str, Any]:
        """The task's YAML as lm-eval ran it."""
        return _dict(_dict(self.raw.get("configs")).get(task))

    def metadata(self, task: str, key: str) -> Any:
        """A task setting (k, seed, vote_permutations, ...): the YAML's metadata, or else the model's settings."""
        found = _dict(self.task_config(task).get("metadata")).get(key)
        return self.settings.get(key) if found is None else found

    def votes(self, task: str) -> int:
        """How many prompts of a question vote on its answer."""
        return _whole(self.metadata(task, "vote_permutations")) or 1

    def shots(self, task: str) -> int | None:
        """How many demonstrations stand in the task's prompts."""
        return _whole(_dict(self.raw.get("n-shot")).get(task))

    def version(self, task: str) -> Any:
        """The version of the task."""
        return _dict(self.raw.get("versions")).get(task)

    def task_hash(self, task: str) -> Any:
        """lm-eval's hash of the task's questions and prompts; None where no samples were kept."""
        return _dict(self.raw.get("task_hashes")).get(task)

    def questions(self, task: str) -> int | None:
        """How many questions of the task were scored."""
        counted = _dict(_dict(self.raw.get("n-samples")).get(task)).get("effective")
        return _whole(counted if counted is not None else self.results[task].get("sample_len"))

    def metrics(self, name: str) -> list[Metric]:
        """The metrics of a task or group that have a number, in the file's order; errors of metrics left out."""
        return [
            metric
            for key, value in self.results.get(name, {}).items()
            if _is_number(value) and (metric := _metric(key)) and metric.name not in _NOT_METRICS
        ]

    def predicted_only(self, name: str) -> bool:
        """Whether the task was answered, but not scored (`--predict_only`)."""
        return not self.metrics(name) and bool(self.filters(name))

    def filters(self, task: str) -> list[str]:
        """The filters over the answers of a task, scored or not, in the file's order."""
        found = [metric.filter for key in self.results.get(task, {}) if (metric := _metric(key))]
        return list(dict.fromkeys(found))

    def score(self, name: str, metric: Metric) -> Score:
        """The score of a task or group. Raises ReportError where it is NaN or infinite."""
        entry = self.results[name]
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
        return task in self.sample_files or isinstance(_dict(self.raw.get("samples")).get(task), list)

    def samples(self, task: str, filter_name: str) -> list[Sample]:
        """The task's questions under one filter, in the file's order; empty where none were kept.

        Read anew on each call: a run's prompts are tens of megabytes. Raises ReportError for a damaged file.
        """
        inside = _dict(self.raw.get("samples")).get(task)  # `simple_evaluate` keeps them in its result
        if task in self.sample_files:
            where, lines = self.sample_files[task], read_json_lines(self.sample_files[task])
        elif isinstance(inside, list):
            where, lines = self.path, iter(inside)
        else:
            return []
        filters, metrics = self.filters(task), [metric.name for metric in self.metrics(task)]
        turns: Counter[str] = Counter()
        found = []
        for number, line in enumerate(lines, 1):
            if not is_sample(line):
                raise ReportError(f"{where}, line {number}: not a sample of lm-eval (no doc_id); run it again.")
            own = line.get("filter")
            if own is None:  # before 0.4.6: all questions under the first filter, then all under the second, ...
                turn = turns[str(line["doc_id"])]
                turns[str(line["doc_id"])] += 1
                own = filters[turn] if turn < len(filters) else None
            if own == filter_name:
                found.append(sample(line, metrics))
        return found


def find_run(given: str | Path) -> tuple[Run, list[str]]:
    """The run that a file or a folder holds, and remarks for the reader.

    A folder is searched to any depth. Where it holds several results files the newest counts, and a remark says so.
    """
    path = Path(given)
    runs, remarks = search_runs(path)
    if len(runs) > 1:
        remarks.append(f"{path} holds {len(runs)} results files: took the newest, {runs[-1].path.relative_to(path)}.")
    return runs[-1], remarks


def find_runs(given: str | Path) -> list[Run]:
    """All runs that a file or a folder (to any depth) holds, oldest first; ReportError where one cannot be read."""
    files, remarks = results_files(given)
    if remarks:
        raise ReportError(remarks[0].replace("; left out", ""))
    return [read_run(file) for file in files]


def search_runs(given: str | Path) -> tuple[list[Run], list[str]]:
    """All runs that a file or a folder (to any depth) holds, oldest first, and remarks on what was left out.

    In a folder, what other programs call results is left out, and so is what may not be read. A results file that is
    damaged is a ReportError, for its score is missed in any table.
    """
    files, remarks = results_files(given)
    runs, foreign = [], []
    for file in files:
        try:
            runs.append(read_run(file))
        except ForeignError as error:
            foreign.append(error)
    if not runs:
        raise foreign[0]
    return runs, [*remarks, *(f"Left out: {error}" for error in foreign)]


def holds_results(given: str | Path) -> bool:
    """Whether a folder holds a file that is called as lm-eval calls results."""
    try:
        return Path(given).is_dir() and bool(results_files(given)[0])
    except ReportError:
        return False


class ForeignError(ReportError):
    """A file that is JSON, but no results file of lm-eval."""


def read_run(path: Path) -> Run:
    """One results file. Raises ReportError when it is not one, is damaged, or holds no task."""
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("results"), dict):
        hint = " (it holds samples; give the results_ file beside it)" if path.name.startswith("samples_") else ""
        raise ForeignError(f"{path} is not a results file of lm-eval: it has no 'results'{hint}.")
    if not all(isinstance(entry, dict) for entry in raw["results"].values()):
        raise ForeignError(f"{path} is not a results file of lm-eval: its 'results' are not one table per task.")
    run = Run(path, raw, samples_files(path, list(raw["results"])))
    if not run.tasks:
        raise ReportError(f"{path} holds no scored task; did that lm_eval run end early?")
    return run


def same_run(one: Run, two: Run) -> bool:
    """Whether two files are of one run: the same file, or the same start, duration and scores."""
    if one.path.resolve() == two.path.resolve():
        return True
    keys = ("date", "total_evaluation_time_seconds", "results")
    return one.date is not None and all(one.raw.get(key) == two.raw.get(key) for key in keys)


def _metric(key: str) -> Metric | None:
    """The metric that a key of a table of scores names; None for its standard error, and what is no metric."""
    name, comma, filter_name = key.partition(",")
    return Metric(name, filter_name) if comma and not name.endswith("_stderr") else None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
