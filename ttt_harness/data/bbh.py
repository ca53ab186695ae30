"""BIG-Bench-Hard: the 27 task files, from wherever this machine has them.

A task YAML names `load_bbh` as its `custom_dataset`, and the task in its `dataset_kwargs`. The data set has one split,
`test`, with all examples in file order: which of them become the demonstrations is decided by `TTTTask`.
"""

from pathlib import Path
from typing import Any

import datasets

from ttt_harness.data.example_files import ExampleFiles

# Found in a git checkout only; an installed package has no such folder beside it.
SUBMODULE = Path(__file__).resolve().parents[2] / "external" / "BIG-Bench-Hard" / "bbh"
# The hub's data set is that of lm-eval's own bbh tasks (lm_eval/tasks/bbh/zeroshot/_zeroshot_template_yaml).
BBH = ExampleFiles("BBH", "TTT_BBH_DIR", files=("{}.json",), hub="SaylorTwift/bbh", split="test")


def load_bbh(*, bbh_task: str, **metadata: Any) -> datasets.DatasetDict:  # noqa: ARG001
    """Load one BBH task from `TTT_BBH_DIR`, else from the git submodule, else from the Hugging Face hub.

    Args:
        bbh_task: name of the task file without `.json`, such as `boolean_expressions`.
        metadata: what lm-eval passes to every custom data set; the examples do not depend on it.

    Returns:
        One split, `test`: every example in file order, with the string columns `input` and `target`.

    Raises:
        DataError: `TTT_BBH_DIR` is set but does not hold the task, a file is damaged, or no source has the task.
    """
    return BBH.load(bbh_task, SUBMODULE)
