"""Loads the tasks of a call with the demonstrations that a run would fit on, and without any evaluated row."""

from ttt_harness.errors import DataError
from ttt_harness.sweep.grid import Call
from ttt_harness.sweep.loading import Loaded, load


def load_demonstrations(call: Call) -> Loaded:
    """The tasks of a call, with the demonstrations that it draws, and its model class; no engine is started.

    The tasks hold their demonstrations in the place of what they evaluate: no evaluated question can be rendered.

    Raises:
        TTTError: lm-eval or a task refuses the options, or a task is no TTT task.
    """
    from ttt_harness.harness.declaration import three_lines
    from ttt_harness.harness.drawing import demonstrations_alone
    from ttt_harness.harness.task import TTTTask

    with demonstrations_alone():
        loaded = load(call)
    for name, task in loaded.tasks.items():
        if not isinstance(task, TTTTask):
            raise DataError(
                f"{name} is not a TTT task and has no demonstrations to tune with; write these three lines into a "
                f"YAML, name its folder with --include_path, and tune {name}_ttt:\n{three_lines(name)}"
            )
    return loaded
