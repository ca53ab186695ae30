"""What becomes of a run's answers and results: nothing that was computed is lost, and no loss is silent.

- Before anything is fitted, `keep_answers` tries whether lm-eval's results can be written where `--output_path` says.
- Answers are kept on disk (`AnswerLog`) until lm-eval has written its results.
- lm-eval's tracker turns an error of writing into a warning. `saving_results` and `saving_samples` put a check around
  it: what cannot be written goes to the cache folder, and the command ends with status 1.
- A task that cannot be scored is told by `tell_at_the_end`; the other tasks are scored and written first.

`ttt_harness.plugin` puts `watching_run` around lm-eval's command; the checks of writing begin with `keep_answers`, so
that a run of another model class stays as lm-eval has it.
"""

import contextlib
import errno
import functools
import inspect
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker

from ttt_harness import patches
from ttt_harness.config import cache_dir
from ttt_harness.errors import ResultsError, TTTError
from ttt_harness.harness.answer_log import AnswerLog
from ttt_harness.terminal import trace_if_asked

# The model classes whose results are watched; a baseline by another one is lm-eval's own affair.
OURS = ("ttt_random", "ttt_vllm")
# What a results file takes besides the samples, in bytes.
RESULTS_BYTES = 2**18
# As long as the date in the names of lm-eval's files.
DATE = "0000-00-00T00-00-00.000000"
OTHER_FOLDER = "make room there, or name another folder with --output_path"
OTHER_TASK = "lm-eval names the file after the task: give the task a shorter name, without '/'"
# What most file systems take, in bytes.
LONGEST_NAME = 255
OTHER_CACHE = "make room there, or name another folder with TTT_CACHE_DIR"

_log = logging.getLogger(__name__)


@dataclass
class _Command:
    """A call of lm-eval's command `run`.

    errors: what the command is to end with, once everything else is done.
    """

    errors: list[TTTError] = field(default_factory=list)


_command: _Command | None = None
_answers: AnswerLog | None = None


# Before and while answers are given


def keep_answers(requests: Sequence[Instance]) -> Callable[[Sequence[Instance], Sequence[Any]], None]:
    """Try whether the results of the run can be written, and keep its answers until they are.

    Args:
        requests: what is about to be answered.

    Returns:
        A function that is given requests and their answers, as soon as these are there. It does nothing outside
        lm-eval's `simple_evaluate`: whoever calls a model has its answers.

    Raises:
        ResultsError: the results, or the answers, cannot be written.
    """
    global _answers
    patches.apply("lm_eval: saving of results", saving_results)
    patches.apply("lm_eval: saving of samples", saving_samples)
    if (evaluation := _evaluation()) is None:
        return lambda *_: None
    tracker: EvaluationTracker | None = evaluation.get("evaluation_tracker")
    folder = None if tracker is None else _folder(tracker)
    if tracker is not None and folder is not None:
        _try_results(tracker, folder)
        if evaluation.get("log_samples"):
            _try_samples(folder, requests)
    else:
        folder = cache_dir() / "answers"
        size = sum(_sizes(requests).values())
        _try_writing(folder, f"answers_{DATE}.jsonl", size, what="the answers of this run", remedy=OTHER_CACHE)
    if _answers is None or _answers.path.parent != folder:
        _answers = AnswerLog(folder)
    return _answers.add


def answers_are_scored() -> None:
    """lm-eval has scored all answers. They are kept until the results are written, where a command does that."""
    if _command is None:
        _drop_answers()


def _evaluation() -> Mapping[str, Any] | None:
    """The arguments of lm-eval's `simple_evaluate` that calls us; None where something else does."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is inspect.unwrap(simple_evaluate).__code__:
            return dict(frame.f_locals)
        frame = frame.f_back
    return None


def _folder(tracker: EvaluationTracker) -> Path | None:
    """Where lm-eval writes the files of a run; None where it writes none."""
    if not tracker.output_path:
        return None
    path = Path(tracker.output_path)
    return path.parent if path.suffix == ".json" else path / str(tracker.general_config_tracker.model_name_sanitized)


def _try_results(tracker: EvaluationTracker, folder: Path) -> None:
    given = Path(str(tracker.output_path))
    stem = given.stem if given.suffix == ".json" else "results"
    _try_writing(folder, f"{stem}_{DATE}.json", RESULTS_BYTES, what="the results", remedy=OTHER_FOLDER)


def _try_samples(folder: Path, requests: Sequence[Instance]) -> None:
    sizes = _sizes(requests)
    for task in sizes:
        what = f"the samples of {task}"
        name = f"samples_{task}_{DATE}.jsonl"
        is_name = "/" not in name and len(os.fsencode(name)) <= LONGEST_NAME
        _try_writing(folder, name, 0, what=what, remedy=OTHER_FOLDER if is_name else OTHER_TASK)
    what = "the samples of all tasks"
    _try_writing(folder, f"samples_{DATE}.jsonl", sum(sizes.values()), what=what, remedy=OTHER_FOLDER)


def _sizes(requests: Sequence[Instance]) -> Mapping[str, int]:
    """Of each task's prompts, in bytes."""
    sizes: dict[str, int] = defaultdict(int)
    for request in requests:
        sizes[str(request.task_name)] += sum(len(text) for text in request.args if isinstance(text, str))
    return sizes


def _try_writing(folder: Path, name: str, size: int, *, what: str, remedy: str) -> None:
    """Make `folder`, and see that it takes a file of this name and size, in bytes.

    Raises:
        ResultsError: it does not.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            try:
                _reserve(file.fileno(), size)
            finally:
                path.unlink()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise ResultsError(f"{what} cannot be written to {folder} ({reason}); {remedy}.") from error


def _reserve(file: int, size: int) -> None:
    if not size:
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that reserves nothing
            raise


# While lm-eval writes


@contextmanager
def watching_run() -> Iterator[None]:
    """Around lm-eval's command: what `tell_at_the_end` was given ends it, after everything that could be done.

    Raises:
        ResultsError, or the only error that was told: something was not scored or not written.
    """
    global _command
    before, _command = _command, _Command()
    errors = _command.errors
    try:
        yield
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ResultsError(" ".join(str(error) for error in errors))
    except BaseException as error:
        _keep_for_good(error)
        raise
    finally:
        _command = before
    _drop_answers()


def tell_at_the_end(error: TTTError) -> None:
    """End lm-eval's command with `error`, after the other tasks are scored and the results are written.

    Raises:
        TTTError: `error` itself, where no command of lm-eval's is running and nobody would hear of it at the end.
    """
    if _command is None:
        raise error
    trace_if_asked(error)
    _command.errors.append(error)


def saving_results(save: Callable[..., None]) -> Callable[..., None]:
    """Check what lm-eval's `EvaluationTracker.save_results_aggregated` has written."""

    def save_results_aggregated(
        self: EvaluationTracker, results: dict[str, Any], samples: dict[str, Any] | None = None
    ) -> None:
        _save(self, "the results", "results", "json", functools.partial(save, self, results, samples))

    return save_results_aggregated


def saving_samples(save: Callable[..., None]) -> Callable[..., None]:
    """Check what lm-eval's `EvaluationTracker.save_results_samples` has written."""

    def save_results_samples(self: EvaluationTracker, task_name: str, samples: Sequence[dict[str, Any]]) -> None:
        def save_copies() -> None:
            save(self, task_name, [dict(sample) for sample in samples])  # lm-eval changes them while it writes

        _save(self, f"the samples of {task_name}", f"samples_{task_name}", "jsonl", save_copies)

    return save_results_samples


def _save(tracker: EvaluationTracker, what: str, name: str, suffix: str, save: Callable[[], None]) -> None:
    """Have lm-eval save `what`, and in the cache folder where it cannot where it should."""
    folder = _folder(tracker) if tracker.general_config_tracker.model_source in OURS else None
    if folder is None:
        save()
        return
    if (error := _attempt(tracker, folder, name, suffix, save)) is None:
        return
    problem = f"{what} could not be written to {folder} ({getattr(error, 'strerror', None) or error})"
    tracker.output_path = str(cache_dir() / "unwritten")
    instead = _folder(tracker)
    assert instead is not None
    if _attempt(tracker, instead, name, suffix, save) is None:
        tell_at_the_end(ResultsError(f"{problem}; they are in {instead}."))
    else:
        tell_at_the_end(ResultsError(f"{problem}, nor to {instead}; make room, and run again."))


def _attempt(
    tracker: EvaluationTracker, folder: Path, name: str, suffix: str, save: Callable[[], None]
) -> Exception | None:
    """Call `save`; returns the error that lm-eval only warns of. What it has half written is removed."""
    before, path = getattr(tracker, "date_id", None), Path(str(tracker.output_path))
    with _heard() as errors:
        save()
    if not errors:
        return None
    date = getattr(tracker, "date_id", None)
    if date is not None and (date != before or suffix == "jsonl"):
        stem = path.stem if path.suffix == ".json" and suffix == "json" else name
        with contextlib.suppress(OSError):
            (folder / f"{stem}_{date}.{suffix}").unlink(missing_ok=True)
    return errors[0]


@contextmanager
def _heard() -> Iterator[list[Exception]]:
    """The exceptions that lm-eval's tracker catches within the block, in place of its warnings."""
    logger, around = logging.getLogger(EvaluationTracker.__module__), sys.exc_info()[1]
    errors: list[Exception] = []
    level, shown = logger.level, logger.getEffectiveLevel()

    def hear(record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        if error is around or not isinstance(error, Exception):
            return record.levelno >= shown
        if error not in errors:
            errors.append(error)
            trace_if_asked(error)
        return False

    logger.setLevel(logging.INFO if shown > logging.INFO else shown)
    logger.addFilter(hear)
    try:
        yield errors
    finally:
        logger.removeFilter(hear)
        logger.setLevel(level)


def _keep_for_good(error: BaseException) -> None:
    """Have `error` say where the answers are that nobody has scored; the next run begins a new file."""
    global _answers
    kept, _answers = _answers, None
    if kept is not None and kept.answers:
        kept.close()
        error.add_note(f"the {kept.answers} answers of this run are in {kept.path}")


def _drop_answers() -> None:
    global _answers
    done, _answers = _answers, None
    if done is not None:
        done.remove()
