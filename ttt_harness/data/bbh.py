"""BIG-Bench-Hard: the 27 task files, from wherever this machine has them.

A task YAML names `load_bbh` as its `custom_dataset`, and the task in its `dataset_kwargs`. The data set has one split,
`test`, with all examples in file order: which of them become the demonstrations is decided by `TTTTask`.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets

from ttt_harness.errors import DataError

ENVIRONMENT_VARIABLE = "TTT_BBH_DIR"
# Found in a git checkout only; an installed package has no such folder beside it.
SUBMODULE = Path(__file__).resolve().parents[2] / "external" / "BIG-Bench-Hard" / "bbh"
# The data set of lm-eval's own bbh tasks (lm_eval/tasks/bbh/zeroshot/_zeroshot_template_yaml).
HUB_DATASET = "SaylorTwift/bbh"


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
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if folder:
        examples = read_examples(_file_in(Path(folder).expanduser(), bbh_task))
    elif (path := SUBMODULE / f"{bbh_task}.json").is_file():
        examples = read_examples(path)
    else:
        examples = _fetch_from_hub(bbh_task)
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(examples)})


def read_examples(path: Path) -> list[dict[str, str]]:
    """Read the examples of a BBH file, `{"examples": [{"input": ..., "target": ...}, ...]}`, in file order.

    Raises:
        DataError: the file cannot be read or is damaged; the message says how.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        raise _damaged(path, problem) from None
    except UnicodeDecodeError:
        raise _damaged(path, "not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"The BBH file {path} cannot be read ({error.strerror}): check its permissions.") from None
    if not isinstance(content, dict) or "examples" not in content:
        raise _damaged(path, 'it has no "examples"')
    return _check_examples(content["examples"], path)


def _check_examples(examples: Any, source: Path | str) -> list[dict[str, str]]:
    """Keep `input` and `target` of each example, or say what is wrong with the first one that lacks them."""
    if not isinstance(examples, list) or not examples:
        raise _damaged(source, '"examples" must be a list of at least one example')
    for i, example in enumerate(examples):
        for key in ("input", "target"):
            if not isinstance(example, dict) or key not in example:
                raise _damaged(source, f'example {i} has no "{key}"')
            if not isinstance(example[key], str) or not example[key]:
                raise _damaged(source, f'"{key}" of example {i} must be a text that is not empty, not {example[key]!r}')
    return [{"input": example["input"], "target": example["target"]} for example in examples]


def _file_in(folder: Path, bbh_task: str) -> Path:
    # A wrong setting is an error rather than a reason to look elsewhere: the results would come from other data
    # than the user asked for.
    if not folder.is_dir():
        raise DataError(f"{ENVIRONMENT_VARIABLE} is '{folder}', which is not a folder: {_set_or_unset()}")
    path = folder / f"{bbh_task}.json"
    if not path.is_file():
        raise DataError(f"{ENVIRONMENT_VARIABLE} is '{folder}', which has no {path.name}: {_set_or_unset()}")
    return path


def _fetch_from_hub(bbh_task: str) -> list[dict[str, str]]:
    try:
        split = datasets.load_dataset(HUB_DATASET, bbh_task, split="test")
    # The hub client's failures share no base class: no network, offline mode, an unknown task, an HTTP error.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"The BBH task '{bbh_task}' was not found. There are three ways to provide it: set {ENVIRONMENT_VARIABLE} "
            f"to a folder with {bbh_task}.json; or run 'git submodule update --init' in a checkout, which fills "
            f"{SUBMODULE}; or connect to the Hugging Face hub, where '{HUB_DATASET}' could not be loaded ({reason})."
        ) from None
    return _check_examples(split.to_list(), f"'{HUB_DATASET}' ({bbh_task}) of the Hugging Face hub")


def _set_or_unset() -> str:
    return "set it to the folder with the BBH task files (<task>.json), or unset it to use the submodule or the hub."


def _damaged(source: Path | str, problem: str) -> DataError:
    return DataError(f"The BBH data in {source} is damaged: {problem}. Replace it with the original.")
