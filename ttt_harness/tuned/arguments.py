"""Turns the model arguments `settings=` and `choose=` into explicit arguments for each task.

    settings=PATH    a tuned.json, or a folder that holds one
    choose=all       one setting for all tasks, the best over them; the default
    choose=task      each task's own setting, which may be in-context learning

A task that the file does not hold gets the setting for all tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ttt_harness.config import TTTConfig, quoted
from ttt_harness.errors import ConfigError
from ttt_harness.tuned.choice import Choice, choose
from ttt_harness.tuned.file import Candidate, Tuned, read_tuned

# What a trainer is made with, once for all tasks.
_OF_ALL_TASKS = ("method", "lora_rank", "lora_alpha", "lora_dropout")

FILE_NAME = "tuned.json"


@dataclass(frozen=True)
class TunedArguments:
    """The arguments of a run with tuned settings.

    path: of the file.
    tuned: its content.
    given: the user's model arguments without `settings` and `choose`.
    pooled: the setting of all tasks.
    by_task: task -> its own; empty without choose=task.
    """

    path: Path
    tuned: Tuned
    given: Mapping[str, Any]
    pooled: Candidate
    by_task: Mapping[str, Candidate]

    def of(self, task: str) -> Candidate:
        """The setting of a task."""
        return self.by_task.get(task, self.pooled)

    @property
    def base(self) -> Candidate:
        """The setting that trainer and engine are made for: one that fits, where a task has one."""
        return next((one for one in (self.pooled, *self.by_task.values()) if one.fits), self.pooled)

    def model_args(self, candidate: Candidate) -> dict[str, Any]:
        """The explicit model arguments that a setting stands for."""
        return {**self.given, **candidate.model_args}

    def config(self, task: str) -> TTTConfig:
        """The settings of a task's fit."""
        return TTTConfig.from_mapping(self.model_args(self.of(task)))

    def said(self, task: str) -> dict[str, Any]:
        """What results state of a task's setting."""
        one = self.of(task)
        source = "task" if task in self.by_task else "all tasks"
        return {"name": one.name, "model_args": dict(one.model_args), "chosen_for": source}

    def check_demonstrations(self, task: str, count: int) -> None:
        """Refuse a task that has another number of demonstrations here than in the search.

        Raises:
            ConfigError: it has.
        """
        if task not in self.tuned.tasks:
            return
        searched = {asked.demonstration for asked in self.tuned.tasks[task][self.tuned.in_context.name]}
        if count != len(searched):
            raise ConfigError(
                f"settings={self.path} was found with {len(searched)} demonstrations of {task}, and here it has "
                f"{count}; run ttt-harness tune with as many, or give lr=, epochs= and others in place of settings=."
            )


def tuned_path(given: str) -> Path:
    """The file that `settings=PATH` names: PATH, or the one in that folder."""
    path = Path(given).expanduser()
    try:
        return path / FILE_NAME if path.is_dir() else path
    except (OSError, ValueError):  # a name that is too long, or a null character: reading it says so
        return path


def tuned_arguments(model_args: Mapping[str, Any], path: Path) -> TunedArguments:
    """What model arguments with `settings=` come to, with the file at `path`; the base model is not compared.

    Raises:
        ConfigError: the file cannot be read, is for another method or k, or does not go with the other arguments.
    """
    config = TTTConfig.from_mapping(model_args)
    where = f"settings={quoted(str(path)).strip(chr(39))}"
    if config.adapter is not None:
        raise ConfigError(f"{where} is not allowed beside an adapter of your own, for which nothing is fitted.")
    tuned, choice = _read(path)
    if config.method != tuned.method:
        raise ConfigError(
            f"{where} is for method={tuned.method}, and not for method={config.method}; leave settings out, or run "
            "ttt-harness tune for this method."
        )
    if config.k != tuned.k:
        raise ConfigError(f"{where} is for k={tuned.k}, and not for k={config.k}; run ttt-harness tune for this k.")
    given = {name: value for name, value in model_args.items() if name not in ("settings", "choose")}
    stated = {name for candidate in tuned.candidates for name in candidate.model_args} - {"method"}
    if both := [name for name in given if name in stated]:
        raise ConfigError(
            f"{both[0]}={quoted(given[both[0]])} is not allowed beside {where}, which sets {both[0]} as well; leave "
            "one of them out."
        )
    by_task = choice.by_task if config.choose == "task" else {}
    found = TunedArguments(path, tuned, given, choice.pooled, by_task)
    _check_together(found, config, where)
    return found


def explicit_arguments(model_args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Model arguments in which `settings=PATH`, where it is given, is replaced with what it stands for.

    With choose=task, that is what trainer and engine are made for.

    Raises:
        ConfigError: as `tuned_arguments`; or the file is not named.
    """
    config = TTTConfig.from_mapping(model_args)
    if config.settings is None:
        return model_args
    if config.settings == "auto":
        raise ConfigError("settings=auto is not allowed here, where no model is loaded yet; name the tuned.json.")
    found = tuned_arguments(model_args, tuned_path(config.settings))
    return found.model_args(found.base)


def _read(path: Path) -> tuple[Tuned, Choice]:
    try:
        changed = path.stat().st_mtime_ns
    except (OSError, ValueError):
        changed = 0
    return _read_once(path, changed)


@lru_cache(maxsize=16)
def _read_once(path: Path, changed: int) -> tuple[Tuned, Choice]:  # noqa: ARG001 - of a file that changes, anew
    tuned = read_tuned(path)
    return tuned, choose(tuned)


def _check_together(found: TunedArguments, config: TTTConfig, where: str) -> None:
    """Refuse settings that one run cannot use."""
    used = [found.pooled, *found.by_task.values()]
    if found.by_task and config.how.shared:
        raise ConfigError(
            f"choose=task is not allowed with method={config.method}, which fits one adapter for all tasks; leave "
            "choose out."
        )
    if not config.how.prompts_hold_demonstrations and not all(one.fits for one in used):
        raise ConfigError(
            f"{where} chooses in-context learning, and prompts of method={config.method} hold no demonstrations; use "
            "method=icl."
        )
    fitting = [TTTConfig.from_mapping(found.model_args(one)) for one in used if one.fits]
    for name in _OF_ALL_TASKS:
        if len({getattr(one, name) for one in fitting}) > 1:
            raise ConfigError(
                f"choose=task is not allowed with {where}: its tasks' settings differ in {name}, of which a run has "
                "one; leave choose out."
            )
