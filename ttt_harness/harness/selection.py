"""Which of a task's rows are evaluated: `--limit` and `--samples`, checked.

lm-eval takes a limit of 0 for no limit and a negative one from the end, an empty list of samples for all of them, and
gives answers to samples that are not in ascending order the wrong numbers.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ttt_harness.config import nearest
from ttt_harness.errors import ConfigError
from ttt_harness.harness.user_code import shown


def check(tasks: Mapping[str, Any], limit: Any, samples: Any) -> None:
    """Check a run's `--limit` and `--samples` as they were given, if TTT tasks are among `tasks`.

    Raises:
        ConfigError: one of them selects nothing of a TTT task.
    """
    ours = {name: task for name, task in tasks.items() if hasattr(task, "check_samples")}
    if not ours:
        return
    check_limit(limit)
    if samples is None:
        return
    if not isinstance(samples, Mapping) or not samples:
        raise ConfigError(
            f"--samples is {shown(samples)}, where a mapping of tasks to numbers of examples belongs, or the path of a "
            'JSON file that holds one: {"task": [0, 5]}.'
        )
    for name in samples:
        if name not in tasks:
            raise ConfigError(
                f"--samples names {shown(name)}, which is none of the tasks that are run ({', '.join(tasks)}); correct "
                f"it, or take it out.{nearest(str(name), tasks)}"
            )
    for name, task in ours.items():
        if name in samples:
            task.check_samples(samples[name])


def check_limit(limit: Any) -> None:
    """Refuse a limit that is neither a number of examples nor a share of them.

    Raises:
        ConfigError: it is 0, negative, infinite or no number.
    """
    if limit is None:
        return
    number = float(limit) if type(limit) in (int, float) and abs(limit) < sys.maxsize else -1.0
    if not (0 < number < 1 or (number >= 1 and number.is_integer())):
        given = shown(limit).removesuffix(".0")
        raise ConfigError(
            f"--limit {given} is not allowed: it is a number of examples, at least 1, or a share of them, above 0 and "
            "below 1; leave it out to evaluate all."
        )


def check_samples(samples: Any, count: int, where: str) -> None:
    """Refuse a list of samples that does not name rows of the task.

    Args:
        samples: what `--samples` lists for the task.
        count: the number of the task's evaluated examples.
        where: the task, as messages name it.

    Raises:
        ConfigError: it is empty or no list, or a number in it is none of the task's, or stands there twice.
    """
    if not isinstance(samples, Sequence) or isinstance(samples, str) or not samples:
        raise ConfigError(
            f"--samples has {shown(samples)} for {where}: list the numbers of examples, at least one, or leave the "
            "task out of --tasks."
        )
    seen = set()
    for sample in samples:
        if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < count:
            raise ConfigError(
                f"--samples has {shown(sample)} for {where}, which is the number of no example: it has {count} to "
                f"evaluate, numbered from 0 to {count - 1}."
            )
        if sample in seen:
            raise ConfigError(f"--samples has {sample} twice for {where}; list each number once.")
        seen.add(sample)
