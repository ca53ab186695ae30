"""What a task YAML declares, checked before any data or model is loaded.

lm-eval takes a YAML as it is and fails later, far from the file; these checks name the file and the remedy. They also
find the three lines that make a TTT task of a task that is none.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lm_eval.api.metrics  # fills the registries of metrics and aggregations
import lm_eval.filters  # and that of filters
import lm_eval.tasks
import yaml
from lm_eval.api import registry
from lm_eval.api.task import ALL_OUTPUT_TYPES
from lm_eval.config.task import FewshotConfig, TaskConfig

from ttt_harness.config import nearest
from ttt_harness.errors import ConfigError
from ttt_harness.harness.rows import choices_problem
from ttt_harness.harness.user_code import own_words, printable, shown
from ttt_harness.terminal import visible

# Besides the fields of TaskConfig: what lm-eval itself takes out of a YAML.
STRUCTURE_KEYS = ("class", "group", "include", "tag", "task_list")
SAMPLERS = ("default", "first_n")
# Mappings whose keys are numbers: of tokens.
NUMBERED = ("generation_kwargs.logit_bias",)
# Of one key, written out. Listed samples of long texts are a few hundred.
MOST_VALUES = 100_000


def where(config: Mapping[str, Any]) -> str:
    """A task as messages name it: with its YAML, where lm-eval has told it."""
    name = config.get("task")
    name = printable(name) if isinstance(name, str) and name else "this task"
    source = _source(config)
    return f"{name} ({printable(source)})" if source else name


def folder_of(config: Mapping[str, Any]) -> Path | None:
    """The folder of a task's YAML, where there is one."""
    source = _source(config)
    return Path(source).parent if source else None


def _source(config: Mapping[str, Any]) -> str | None:
    metadata = config.get("metadata")
    source = metadata.get("config_source") if isinstance(metadata, Mapping) else None
    return source if isinstance(source, str) and source != "inline" else None


def check(config: Mapping[str, Any]) -> None:
    """Refuse a declaration that no demonstrations could be drawn, asked or fitted with.

    Raises:
        ConfigError: an unknown key, a value of a kind that does not belong there, a metric or a filter that lm-eval
            does not know, a kind of task without demonstrations, or no targets.
    """
    _check_size(config)
    task = where(config)
    _check_name(task, config)
    _check_texts_as_keys(task, config)
    _check_metadata(task, config)
    _check_keys(task, config, {f.name for f in fields(TaskConfig)}, STRUCTURE_KEYS, "")
    _check_kinds(task, config, KINDS, "")
    fewshot = config.get("fewshot_config") or {}
    _check_keys(task, fewshot, {f.name for f in fields(FewshotConfig)}, (), "fewshot_config.")
    _check_kinds(task, fewshot, FEWSHOT_KINDS, "fewshot_config.")
    _check_metric_list(task, config)
    _check_filter_list(task, config)
    kind = config.get("output_type", "generate_until")
    if kind == "loglikelihood_rolling":
        raise ConfigError(
            f"{task} cannot be a TTT task: output_type loglikelihood_rolling scores whole texts, and there is no "
            "answer to fit on; evaluate it with method=icl and without the line 'class: ...'."
        )
    if kind not in ALL_OUTPUT_TYPES:
        raise ConfigError(
            f"{task}: output_type {shown(kind)} is not allowed; use one of generate_until, loglikelihood, "
            "multiple_choice."
        )
    if senses := [key for key in ("doc_to_image", "doc_to_audio") if config.get(key) is not None]:
        raise ConfigError(
            f"{task} cannot be a TTT task: {senses[0]} asks about {senses[0].removeprefix('doc_to_')}, "
            "and only text can be fitted and served; take out that key, or evaluate the task with a multimodal model."
        )
    _check_fields(task, config, kind)
    sampler = fewshot.get("sampler", "default")
    if sampler not in SAMPLERS:
        raise ConfigError(
            f"{task}: fewshot_config.sampler {shown(sampler)} is not allowed, since a TTT task has one set of "
            f"demonstrations for all questions; use one of {', '.join(SAMPLERS)}."
        )


def _check_fields(task: str, config: Mapping[str, Any], kind: str) -> None:
    """Refuse a task that says not what to ask, or not what is right."""
    prompted = config.get("use_prompt") is not None
    text, target, choices = (config.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    if text is None and not prompted:
        raise ConfigError(f'{task} has no doc_to_text; add it, e.g. doc_to_text: "Q: {{{{question}}}}\\nA:".')
    if isinstance(text, int) and choices is None:
        raise ConfigError(
            f"{task}: doc_to_text is the number {text}, which asks nothing where there are no choices; write a "
            'template, e.g. doc_to_text: "Q: {{question}}\\nA:".'
        )
    # A number without choices is how lm-eval's tasks say that there is no right answer to compare with (ifeval).
    constant = isinstance(target, int) and choices is None
    if (target in (None, "") or constant) and not prompted:
        raise ConfigError(
            f"{task} has no targets to fit on and to score with; add doc_to_target, e.g. the name of the column that "
            "holds the right answer."
        )
    if kind == "multiple_choice" and choices is None and not prompted:
        raise ConfigError(f"{task} is a multiple_choice task without choices; add doc_to_choice.")
    if isinstance(choices, list | dict):
        listed = list(choices.values()) if isinstance(choices, dict) else choices
        if problem := choices_problem("every row", listed, None):
            raise ConfigError(f"{task}: {problem}.")


def check_columns(task: str, config: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Refuse a name that was meant for a column and is none: lm-eval takes it for the text of every row.

    Args:
        task: the task, as messages name it.
        config: the declaration.
        columns: of the data set.

    Raises:
        ConfigError: a field is a name and no column.
    """
    columns, choices = list(columns), config.get("doc_to_choice")
    listed = [str(choice) for choice in choices] if isinstance(choices, list | Mapping) else []
    own_scores = config.get("process_results") is not None
    for key in ("doc_to_text", "doc_to_target"):
        source = config.get(key)
        if not isinstance(source, str) or not source.isidentifier() or source in (*columns, *listed):
            continue
        if key == "doc_to_text" or not own_scores:  # which may need no right answer
            raise ConfigError(
                f"{task}: {key} is {shown(source)}, which is no column of the data (it has {', '.join(columns)}), and "
                f"would be the same for every row; name a column, or write a template.{nearest(source, columns)}"
            )


def unreadable_yaml(path: Path, error: BaseException) -> ConfigError:
    """The sentence about a task's YAML that cannot be read, or that names a function which cannot be had."""
    problem = own_words(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = f"{error.problem or error.context} in line {mark.line + 1}, column {mark.column + 1}"
    return ConfigError(f"the task in {path} cannot be read ({problem}); correct it, or take it out of the folder.")


# Values


def _whole(least: int, most: int | None = None) -> tuple[str, Callable[[Any], bool]]:
    return (
        f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value and (most is None or value <= most),
    )


def _of(words: str, *types: type) -> tuple[str, Callable[[Any], bool]]:
    return words, lambda value: isinstance(value, types) and not (isinstance(value, bool) and bool not in types)


_TEXT = _of("a text (numbers and words such as no or on in quotes)", str)
_MAPPING = _of("a mapping of names to values", Mapping)
_FUNCTION = ("a function (!function module.name)", callable)
_FIELD = ("a text (a column, or a template) or a function", lambda value: isinstance(value, str) or callable(value))
_NUMBERED = (
    "a text (a column, or a template), the number of a choice, or a function",
    lambda value: isinstance(value, str) or type(value) is int or callable(value),
)
_TARGET = (_NUMBERED[0] + ", or a list", lambda value: isinstance(value, list) or _NUMBERED[1](value))
_CHOICES = (
    "a list, a mapping, a text (a column, or a template) or a function",
    lambda value: isinstance(value, str | list | Mapping) or callable(value),
)

# What a key's value has to be: in words, and as a check. Keys without a row here are checked elsewhere.
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "task": _TEXT,
    "custom_dataset": _FUNCTION,
    "dataset_path": _TEXT,
    "dataset_name": _TEXT,
    "dataset_kwargs": _MAPPING,
    "training_split": _TEXT,
    "validation_split": _TEXT,
    "test_split": _TEXT,
    "fewshot_split": _TEXT,
    "process_docs": _FUNCTION,
    "doc_to_text": _NUMBERED,
    "doc_to_target": _TARGET,
    "doc_to_choice": _CHOICES,
    "process_results": _FUNCTION,
    "description": _TEXT,
    "target_delimiter": _TEXT,
    "fewshot_delimiter": _TEXT,
    "fewshot_config": _MAPPING,
    "num_fewshot": _whole(0),
    "metric_list": _of("a list of mappings, each with a metric", list),
    "output_type": _TEXT,
    "generation_kwargs": _MAPPING,
    "repeats": _whole(1, 1000),
    "unsafe_code": _of("true or false", bool),
    "filter_list": _of("a list of mappings, each with a name and a filter", list),
    "gen_prefix": _TEXT,
}
# Keys whose defaults a null would put out of force.
NOT_NULL = ("fewshot_delimiter", "output_type", "repeats", "target_delimiter")
FEWSHOT_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "sampler": _TEXT,
    "split": _TEXT,
    "process_docs": _FUNCTION,
    "doc_to_text": _FIELD,
    "doc_to_choice": _CHOICES,
    "doc_to_target": _TARGET,
    "gen_prefix": _TEXT,
    "fewshot_delimiter": _TEXT,
    "target_delimiter": _TEXT,
}


def _check_kinds(
    task: str, given: Mapping[str, Any], kinds: Mapping[str, tuple[str, Callable[[Any], bool]]], path: str
) -> None:
    for key, (words, allowed) in kinds.items():
        value = given.get(key)
        if value is None and key in given and key in NOT_NULL:
            raise ConfigError(f"{task}: {path}{key} is null, but has to be {words}; write one, or leave the key out.")
        if value is not None and not allowed(value):
            raise ConfigError(f"{task}: {path}{key} is {shown(value)}, but has to be {words}.")


def _check_name(task: str, config: Mapping[str, Any]) -> None:
    """Refuse a name that a terminal would obey: lm-eval prints it as it is."""
    name = config.get("task")
    if isinstance(name, str) and visible(name) != name:
        raise ConfigError(f"{task}: the task's name has characters that no terminal prints; take them out of it.")


def _check_size(config: Mapping[str, Any]) -> None:
    """Refuse what is too large written out, as lm-eval writes every declaration into its results.

    A few lines of YAML can stand for billions of values, or for a value that holds itself, through aliases.
    """
    sizes: dict[int, float] = {}

    def size(value: Any) -> float:
        if not isinstance(value, Mapping | list | tuple):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = float("inf")  # should it hold itself
            inner = value.values() if isinstance(value, Mapping) else value
            sizes[id(value)] = 1 + sum(map(size, inner))
        return sizes[id(value)]

    for key, value in config.items():
        try:
            count = size(value)
        except RecursionError:
            count = float("inf")
        if count > MOST_VALUES:
            raise ConfigError(
                f"{where(config)}: {shown(key)} holds more than {MOST_VALUES} values once its aliases are written out; "
                "keep data in a file that dataset_path names."
            )


def _check_texts_as_keys(task: str, value: Any, path: str = "") -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) and path not in NUMBERED:
                raise ConfigError(
                    f"{task}: the key {shown(key)}{f' in {path}' if path else ''} is no text; keys are names, and YAML "
                    "takes numbers and words such as no or on for other things: write it in quotes."
                )
            _check_texts_as_keys(task, inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_texts_as_keys(task, inner, path)


def _check_metadata(task: str, config: Mapping[str, Any]) -> None:
    metadata = config.get("metadata")
    if isinstance(metadata, Mapping):
        metadata = metadata.get("_metadata")  # where lm-eval puts what is no mapping
    if metadata is not None:
        raise ConfigError(
            f"{task}: metadata is {shown(metadata)}, but has to be a mapping; write its keys below it without dashes, "
            "e.g. 'metadata: {k: 3}'."
        )


# Metrics and filters


def _check_metric_list(task: str, config: Mapping[str, Any]) -> None:
    listed = config.get("metric_list")
    if listed is None:
        return
    if not listed:
        raise ConfigError(f"{task}: metric_list is empty; list a metric, or leave it out for lm-eval's own.")
    names: dict[str, Any] = {}
    for entry in listed:
        name = _name(entry.get("metric")) if isinstance(entry, Mapping) else ""
        if entry != names.setdefault(name, entry):
            raise ConfigError(
                f"{task}: metric_list has the metric {name} twice, of which lm-eval would compute the last alone; list "
                "it once, or give the second to a task of its own."
            )
        if not isinstance(entry, Mapping) or not entry.get("metric"):
            raise ConfigError(
                f"{task}: metric_list has {shown(entry)}, where a mapping with a metric belongs, e.g. "
                "{metric: exact_match, aggregation: mean, higher_is_better: true}."
            )
        metric, aggregation = entry["metric"], entry.get("aggregation")
        if not (isinstance(metric, str) or callable(metric)):
            raise ConfigError(f"{task}: the metric {shown(metric)} is neither a name nor a function.")
        if callable(aggregation):
            continue
        if aggregation is not None and aggregation not in _names(registry.aggregation_registry):
            raise ConfigError(
                f"{task}: lm-eval has no aggregation {shown(aggregation)} (of the metric {_name(metric)}); use one of "
                f"{', '.join(_names(registry.aggregation_registry))}, or a function."
                f"{nearest(str(aggregation), _names(registry.aggregation_registry))}"
            )
        if aggregation is None and _name(metric) not in _names(registry.metric_agg_registry):
            raise ConfigError(
                f"{task}: the metric {_name(metric)} has no aggregation of its own; add one, e.g. aggregation: mean."
                f"{nearest(_name(metric), _names(registry.metric_registry))}"
            )


def check_metrics(task: str, resolved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse metrics that lm-eval has looked for, also in Hugging Face's `evaluate`, and not found.

    Args:
        task: the task, as messages name it.
        resolved: functions by the metrics' names.
        config: the declaration; with a `process_results`, metrics are only names.

    Raises:
        ConfigError: a metric has no function.
    """
    for name, function in resolved.items():
        if function is None and config.get("process_results") is None:
            known = _names(registry.metric_registry)
            raise ConfigError(
                f"{task}: lm-eval has no metric {shown(name)}, and Hugging Face's evaluate could not load one; use one "
                f"of {', '.join(known)}, or write a process_results.{nearest(name, known)}"
            )


def _check_filter_list(task: str, config: Mapping[str, Any]) -> None:
    names = set()
    for pipeline in config.get("filter_list") or []:
        if not isinstance(pipeline, Mapping) or not isinstance(pipeline.get("name"), str):
            raise ConfigError(
                f"{task}: filter_list has {shown(pipeline)}, where a mapping with a name belongs, e.g. "
                "{name: answer, filter: [{function: take_first}]}."
            )
        name, steps = pipeline["name"], pipeline.get("filter")
        if name in names:
            raise ConfigError(f"{task}: filter_list has the name {shown(name)} twice; give each filter its own.")
        names.add(name)
        if not isinstance(steps, list) or not steps:
            raise ConfigError(
                f"{task}: the filter {shown(name)} of filter_list has the steps {shown(steps)}, where a list belongs, "
                "e.g. filter: [{function: take_first}]."
            )
        for step in steps:
            function = step.get("function") if isinstance(step, Mapping) else None
            if callable(function):
                continue
            known = _names(registry.filter_registry)
            if function not in known:
                raise ConfigError(
                    f"{task}: the filter {shown(name)} of filter_list has the step {shown(step)}, and lm-eval has no "
                    f"such function; use one of {', '.join(known)}.{nearest(str(function), known)}"
                )


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", str(metric))


def _names(names: Iterable[str]) -> list[str]:
    return sorted(names)


def _check_keys(task: str, given: Mapping[str, Any], known: set[str], also: tuple[str, ...], path: str) -> None:
    for key in given:
        if key not in known and key not in also:
            raise ConfigError(
                f"{task}: {path}{shown(key)[1:-1]} is not a key of a task YAML; correct it or take it out."
                f"{nearest(key, known)}"
            )


def find_beside(path: Any, folder: Path | None) -> Any:
    """A data path, or a list or mapping of such, that is looked for beside the YAML if it is not found from here."""
    if isinstance(path, Mapping):
        return {key: find_beside(value, folder) for key, value in path.items()}
    if isinstance(path, (list, tuple)):
        return [find_beside(value, folder) for value in path]
    if not isinstance(path, str) or folder is None or "://" in path or Path(path).is_absolute():
        return path
    return str(folder / path) if not any(Path().glob(path)) and any(folder.glob(path)) else path


def three_lines(task: str) -> str:
    """The YAML that makes a TTT task of the task named `task`."""
    return f"include: {_yaml_of(task)}\ntask: {task}_ttt\nclass: !function ttt_harness.TTTTask"


def _yaml_of(task: str) -> str:
    """The file of one of lm-eval's own tasks, in the form that an include takes anywhere."""
    root = Path(lm_eval.tasks.__file__).parent
    line = re.compile(rf"""^["']?task["']?\s*:\s*["']?{re.escape(task)}["']?\s*(#.*)?$""", re.MULTILINE)
    for path in sorted(root.rglob("*.yaml")):
        if line.search(path.read_text(encoding="utf-8", errors="replace")):
            return f"lm_eval/tasks/{path.relative_to(root).as_posix()}"
    return f"<the YAML of {task}>"
