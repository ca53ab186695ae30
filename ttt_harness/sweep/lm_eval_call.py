"""A call of lm-eval: its options, from the command line and a file, their checks, the tasks, and the run itself.

A call is a dict with the names of `lm_eval run`'s own options, as lm-eval's parser makes it of a command line.
"""

import argparse
import contextlib
import copy
import functools
import inspect
import io
import logging
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ttt_harness import patches
from ttt_harness.config import nearest, quoted
from ttt_harness.errors import ConfigError, TTTError
from ttt_harness.sweep.grid import Call
from ttt_harness.sweep.grid_file import refuse_unknown_keys

GRID_KEYS = ("methods", "seeds", "grid")

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "keys with values",
    list: "a list",
}
# What lm-eval takes beside the type that its config states: `key=value` texts, and `batch_size: auto`.
_ALSO_TEXTS = (
    *("model_args", "metadata", "gen_kwargs", "wandb_args", "wandb_config_args", "hf_hub_log_args", "trackio_args"),
    "batch_size",
)


class _Parser(argparse.ArgumentParser):
    """lm-eval's parser, whose errors are one sentence instead of its usage."""

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch(r"argument (\S+?)(?:/\S+)?: invalid .* value: (.*)", message, re.DOTALL):
            message = f"{found[1]} {found[2][:60]} is not allowed; lm_eval run --help tells what is"
        raise ConfigError(f"{message.removesuffix('.')}.")


def parse_call(file: Mapping[str, Any], options: Sequence[str]) -> Call:
    """The options of `lm_eval run`: those of the command line, and of `file` where the command line gives none.

    Raises:
        ConfigError: an option is missing or has a value that lm-eval or a sweep cannot take.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import simple_parse_args_string

    given = _parse_options(options)
    kinds = typing.get_type_hints(EvaluatorConfig)
    known = set(kinds) - {"config"}
    call = {key: value for key, value in file.items() if key not in GRID_KEYS and value is not None}
    refuse_unknown_keys(call, known)
    for key, value in call.items():
        _check_kind(key, value, kinds[key])
    call |= {key: value for key, value in given.items() if key in known and value is not None}
    for key in ("model_args", "metadata"):
        value = call.get(key, {})
        try:
            call[key] = simple_parse_args_string(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ConfigError(f"{key} in --config is not allowed: {error}.") from None
    tasks = call.get("tasks", [])
    call["tasks"] = tasks.split(",") if isinstance(tasks, str) else tasks
    if not all(isinstance(task, str) for task in call["tasks"]):
        raise ConfigError(f"tasks={call['tasks']!r} is not allowed: write names of tasks.")
    call["tasks"] = list(dict.fromkeys(task.strip() for task in call["tasks"] if task.strip()))
    _check_values(call)
    try:
        EvaluatorConfig.from_cli(argparse.Namespace(**copy.deepcopy(call)))
        _check_tracker(call.get("hf_hub_log_args") or {})
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"lm-eval refuses these options: {sentence(error)}.") from None
    return call


def _parse_options(options: Sequence[str]) -> dict[str, Any]:
    """What lm-eval's own parser makes of a command line."""
    from lm_eval._cli.run import Run
    from lm_eval.utils import setup_logging

    parser = _Parser(prog="ttt-harness sweep")
    Run.create(parser.add_subparsers())
    try:
        parsed, unknown = parser.parse_known_args(["run", *options])
    except (ValueError, AssertionError, RecursionError) as error:
        raise ConfigError(f"lm-eval cannot read these options: {sentence(error)}.") from None
    # One display; LMEVAL_LOG_LEVEL, which lm-eval reads here, brings the rest back. Not before lm-eval has parsed the
    # options: it warns of one that is given twice.
    setup_logging(logging.ERROR)
    if unknown:
        raise ConfigError(f"{' '.join(unknown)} is no option of this command or of lm_eval run; see --help of both.")
    return vars(parsed)


def _check_kind(key: str, value: Any, kind: Any) -> None:
    """Check the type of a file's value, which lm-eval takes as it is.

    Raises:
        ConfigError: it is of another one.
    """
    kinds = set(typing.get_args(kind) or (kind,)) - {type(None)}
    kinds = {typing.get_origin(one) or one for one in kinds}
    if key in _ALSO_TEXTS:
        kinds.add(str)
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds:
        shown = str(value) if isinstance(value, bool) else quoted(value)
        if float in kinds:
            kinds.remove(int)  # that is one, too
        rule = " or ".join(words for one, words in _KINDS.items() if one in kinds)
        raise ConfigError(f"--{key} {shown[:60]} is not allowed: in --config it must be {rule}.")


def _check_values(call: Call) -> None:
    for key, example in {"tasks": "bbh_ttt", "output_path": "results"}.items():
        if not call.get(key):
            raise ConfigError(f"{key} is missing: give one with --{key}, e.g. --{key} {example}.")
    limit = call.get("limit")
    if limit is not None and not (0 < limit < math.inf and (limit < 1 or float(limit).is_integer())):
        raise ConfigError(
            f"--limit {quoted(limit)} is not allowed: it must be a number of questions, at least 1, or a share of "
            "them between 0 and 1; leave it out for all of them."
        )
    if call.get("include_path") and not Path(call["include_path"]).is_dir():
        raise ConfigError(f"--include_path {call['include_path']} is no folder; give the one that holds your YAMLs.")
    if call.get("use_cache"):
        raise ConfigError(
            "--use_cache is not allowed in a sweep: lm-eval's cache knows an answer by its prompt, not by the method "
            "that gave it; leave it out (cells that are done, and fitted adapters, are kept without it)."
        )


def _check_tracker(arguments: Mapping[str, Any]) -> None:
    """Raises TypeError where lm-eval, which does so after minutes, will refuse --hf_hub_log_args."""
    from lm_eval.loggers import EvaluationTracker

    inspect.signature(EvaluationTracker).bind(**{"output_path": "", **arguments})


def evaluator_config(call: Call) -> Any:
    """lm-eval's `EvaluatorConfig` of a call."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    return EvaluatorConfig.from_cli(argparse.Namespace(**copy.deepcopy(call)))


def run_lm_eval(call: Call) -> None:
    """What `lm_eval run` does with these options. Its tables are not printed, unless there is more to see in them."""
    from lm_eval._cli.run import Run

    seen = call.get("write_out") or call.get("show_config")
    with contextlib.nullcontext() if seen else contextlib.redirect_stdout(io.StringIO()):
        Run._execute(argparse.Namespace(**call))


def make_model(call: Call) -> None:
    """Make the model of a call, which checks its arguments; an engine that it starts is kept for the cells.

    Raises:
        TTTError: the model or one of its arguments is refused.
    """
    import lm_eval.models  # noqa: F401 - fills the registry
    from lm_eval.api.registry import get_model

    config = evaluator_config(call)
    others = {name: getattr(config, name) for name in ("batch_size", "max_batch_size", "device")}
    try:
        get_model(config.model).create_from_arg_obj(config.model_args, others)
    except TTTError:
        raise
    except Exception as error:
        raise ConfigError(f"lm-eval refuses this model: {sentence(error)}.") from error


def load_tasks(call: Call) -> dict[str, Any]:
    """The tasks of a call by their names.

    Raises:
        TTTError: a task is unknown or has no data.
    """
    # lm-eval wants a folder where samples are to be logged; nothing is written here.
    config = evaluator_config({**call, "output_path": "."})
    try:
        manager = config.process_tasks(config.metadata)
    except ValueError as error:
        raise ConfigError(_unknown_task(str(error))) from None
    try:
        return manager.load(config.tasks)["tasks"]
    except TTTError:
        raise
    except Exception as error:
        raise ConfigError(f"lm-eval refuses these tasks: {sentence(error)}.") from error


def _unknown_task(message: str) -> str:
    """lm-eval's message, and the nearest name to the first task that it names."""
    from lm_eval.tasks import TaskManager

    name = message.partition(":")[2].split(",")[0].strip()
    return f"{name or message} is not a task of lm-eval or of this project.{nearest(name, TaskManager().all_tasks)}"


@contextlib.contextmanager
def one_task_index() -> Iterator[None]:
    """Build lm-eval's index of all tasks once, instead of 12 s for each cell."""
    from lm_eval.tasks import _index

    build, kept = _index.TaskIndex.build, {}

    def build_once(paths: Any, **options: Any) -> Any:
        key = (*map(str, paths := list(paths)), str(options))
        if key not in kept:
            kept[key] = build(paths, **options)
        return dict(kept[key])  # a group adds names to it

    with patches.applied("lm_eval: index of tasks, kept", staticmethod(build_once), needed=False):
        yield


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Leave out lm-eval's own progress bars, one for each task of each cell."""
    import tqdm

    silent = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    with patches.applied("tqdm: progress bars", silent, needed=False):
        yield


def sentence(error: BaseException) -> str:
    """The reason of a failure, in one line without a full stop of its own where the error is of another's."""
    text = " ".join(str(error).split())
    if isinstance(error, TTTError):
        return text
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or ''}: {error.strerror}".lstrip(": ")
    short = text if len(text) <= 300 else text[:300] + " ..."
    return f"{type(error).__name__}: {short.rstrip('.')}" if short else type(error).__name__
