"""What a task YAML declares, checked before any data or model is loaded.

lm-eval takes a YAML as it is and fails later, far from the file; these checks name the file and the remedy. They also
find the three lines that make a TTT task of a task that is none.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ALL_OUTPUT_TYPES
from lm_eval.config.task import FewshotConfig, TaskConfig

from ttt_harness.config import nearest
from ttt_harness.errors import ConfigError

# Besides the fields of TaskConfig: what lm-eval itself takes out of a YAML.
STRUCTURE_KEYS = ("class", "group", "include", "tag", "task_list")
SAMPLERS = ("default", "first_n")


def where(config: Mapping[str, Any]) -> str:
    """A task as messages name it: with its YAML, where lm-eval has told it."""
    name = config.get("task") or "this task"
    source = (config.get("metadata") or {}).get("config_source")
    return f"{name} ({source})" if source and source != "inline" else name


def folder_of(config: Mapping[str, Any]) -> Path | None:
    """The folder of a task's YAML, where there is one."""
    source = (config.get("metadata") or {}).get("config_source")
    return Path(source).parent if source and source != "inline" else None


def check(config: Mapping[str, Any]) -> None:
    """Refuse a declaration that no demonstrations could be drawn, asked or fitted with.

    Raises:
        ConfigError: an unknown key, a kind of task without demonstrations, or no targets.
    """
    task = where(config)
    _check_keys(task, config, {f.name for f in fields(TaskConfig)}, STRUCTURE_KEYS, "")
    fewshot = config.get("fewshot_config") or {}
    _check_keys(task, fewshot, {f.name for f in fields(FewshotConfig)}, (), "fewshot_config.")
    kind = config.get("output_type", "generate_until")
    if kind == "loglikelihood_rolling":
        raise ConfigError(
            f"{task} cannot be a TTT task: output_type loglikelihood_rolling scores whole texts, and there is no "
            "answer to fit on; evaluate it with method=icl and without the line 'class: ...'."
        )
    if kind not in ALL_OUTPUT_TYPES:
        raise ConfigError(
            f"{task}: output_type {kind!r} is not allowed; use one of generate_until, loglikelihood, multiple_choice."
        )
    if senses := [key for key in ("doc_to_image", "doc_to_audio") if config.get(key)]:
        raise ConfigError(
            f"{task} cannot be a TTT task: {senses[0]} asks about {senses[0].removeprefix('doc_to_')}, "
            "and only text can be fitted and served; take out that key, or evaluate the task with a multimodal model."
        )
    prompted = config.get("use_prompt") is not None
    if config.get("doc_to_text") is None and not prompted:
        raise ConfigError(f'{task} has no doc_to_text; add it, e.g. doc_to_text: "Q: {{{{question}}}}\\nA:".')
    target = config.get("doc_to_target")
    # A number without choices is how lm-eval's tasks say that there is no right answer to compare with (ifeval).
    constant = isinstance(target, int) and config.get("doc_to_choice") is None
    if (target in (None, "") or constant) and not prompted:
        raise ConfigError(
            f"{task} has no targets to fit on and to score with; add doc_to_target, e.g. the name of the column that "
            "holds the right answer."
        )
    if kind == "multiple_choice" and config.get("doc_to_choice") is None and not prompted:
        raise ConfigError(f"{task} is a multiple_choice task without choices; add doc_to_choice.")
    sampler = fewshot.get("sampler", "default")
    if sampler not in SAMPLERS:
        raise ConfigError(
            f"{task}: fewshot_config.sampler {sampler!r} is not allowed, since a TTT task has one set of "
            f"demonstrations for all questions; use one of {', '.join(SAMPLERS)}."
        )


def _check_keys(task: str, given: Mapping[str, Any], known: set[str], also: tuple[str, ...], path: str) -> None:
    for key in given:
        if key not in known and key not in also:
            raise ConfigError(
                f"{task}: {path}{key} is not a key of a task YAML; correct it or take it out.{nearest(key, known)}"
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
