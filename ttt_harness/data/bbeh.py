"""BIG-Bench Extra Hard: the 23 task files, from a folder or from the hub.

Kazemi et al., arXiv 2502.19187; the data are Google DeepMind's (CC BY 4.0). A task YAML names `load_bbeh` as its
`custom_dataset`, and the task in its `dataset_kwargs`. The data set has one split, `test`, with all examples in file
order: which of them become the demonstrations is decided by `TTTTask`.
"""

from typing import Any

import datasets

from ttt_harness.data.example_files import ExampleFiles

# A folder of files, or the authors' repository (its folder bbeh/benchmark_tasks). The hub's data set is lighteval's.
BBEH = ExampleFiles(
    "BBEH", "TTT_BBEH_DIR", files=("bbeh_{}.json", "bbeh_{}/task.json"), hub="jgyasu/bbeh", split="train"
)


def load_bbeh(*, bbeh_task: str, **metadata: Any) -> datasets.DatasetDict:  # noqa: ARG001
    """Load one BBEH task from `TTT_BBEH_DIR`, else from the Hugging Face hub.

    Args:
        bbeh_task: name of the task as in its file, without `bbeh_`, such as `boardgame_qa`.
        metadata: what lm-eval passes to every custom data set; the examples do not depend on it.

    Returns:
        One split, `test`: every example in file order, with the string columns `input` and `target`.

    Raises:
        DataError: `TTT_BBEH_DIR` is set but does not hold the task, a file is damaged, or no source has the task.
    """
    return BBEH.load(bbeh_task)
