"""`ExampleFiles`: a benchmark of which each task is a JSON file, in a folder of the user's or on the hub.

A file is `{"examples": [{"input": ..., "target": ...}, ...]}`, as those of BIG-Bench Hard and Extra Hard are.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ttt_harness.errors import DataError


@dataclass(frozen=True)
class ExampleFiles:
    """Where a benchmark's tasks are found.

    benchmark: its name, for messages.
    variable: the environment variable that names the folder of its files.
    files: the paths in that folder that a task may have, with `{}` for its name; the first that exists is read.
    hub, split: the data set on the Hugging Face hub, with a subset for each task, and the split to take.
    """

    benchmark: str
    variable: str
    files: Sequence[str]
    hub: str
    split: str

    def load(self, task: str, checkout: Path | None = None) -> datasets.DatasetDict:
        """Load a task from the user's folder, else from a checkout of the benchmark, else from the hub.

        Returns:
            One split, `test`: every example in file order, with the string columns `input` and `target`.

        Raises:
            DataError: the variable is set but its folder does not hold the task, a file is damaged, or no source has
                the task.
        """
        folder = os.environ.get(self.variable)
        if folder:
            examples = self.read(self._file_in(Path(folder).expanduser(), task))
        elif checkout is not None and (path := self._find(checkout, task)):
            examples = self.read(path)
        else:
            examples = self._fetch(task, checkout)
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(examples)})

    def read(self, path: Path) -> list[dict[str, str]]:
        """The examples of a file, in its order.

        Raises:
            DataError: the file cannot be read or is damaged; the message says how.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
            raise self._damaged(path, problem) from error
        except (UnicodeDecodeError, RecursionError, ValueError) as error:
            problem = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error}"
            raise self._damaged(path, problem) from error
        except OSError as error:
            raise DataError(
                f"The {self.benchmark} file {path} cannot be read ({error.strerror}): check its permissions."
            ) from error
        if not isinstance(content, dict) or "examples" not in content:
            raise self._damaged(path, 'it has no "examples"')
        return self._check(content["examples"], path)

    def _check(self, examples: Any, source: Path | str) -> list[dict[str, str]]:
        """Keep `input` and `target` of each example, or say what is wrong with the first one that lacks them."""
        if not isinstance(examples, list) or not examples:
            raise self._damaged(source, '"examples" must be a list of at least one example')
        for i, example in enumerate(examples):
            for key in ("input", "target"):
                if not isinstance(example, dict) or key not in example:
                    raise self._damaged(source, f'example {i} has no "{key}"')
                value = example[key]
                if not isinstance(value, str) or not value:
                    raise self._damaged(
                        source, f'"{key}" of example {i} must be a text that is not empty, not {value!r}'
                    )
        return [{"input": example["input"], "target": example["target"]} for example in examples]

    def _find(self, folder: Path, task: str) -> Path | None:
        return next((path for file in self.files if (path := folder / file.format(task)).is_file()), None)

    def _file_in(self, folder: Path, task: str) -> Path:
        # A wrong setting is an error rather than a reason to look elsewhere: the results would come from other data
        # than the user asked for.
        if not folder.is_dir():
            raise DataError(f"{self.variable} is '{folder}', which is not a folder: {self._set_or_unset()}")
        path = self._find(folder, task)
        if path is None:
            file = self.files[0].format(task)
            raise DataError(f"{self.variable} is '{folder}', which has no {file}: {self._set_or_unset()}")
        return path

    def _set_or_unset(self) -> str:
        file = self.files[0].format("<task>")
        return f"set it to the folder with the {self.benchmark} task files ({file}), or unset it to look elsewhere."

    def _fetch(self, task: str, checkout: Path | None) -> list[dict[str, str]]:
        try:
            split = datasets.load_dataset(self.hub, task, split=self.split)
        # The hub client's failures share no base class: no network, offline mode, an unknown task, an HTTP error.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            submodule = (
                f"or run 'git submodule update --init' in a checkout, which fills {checkout}; " if checkout else ""
            )
            raise DataError(
                f"The {self.benchmark} task '{task}' was not found. Set {self.variable} to a folder with "
                f"{self.files[0].format(task)}; {submodule}or connect to the Hugging Face hub, where '{self.hub}' "
                f"could not be loaded ({reason})."
            ) from error
        return self._check(split.to_list(), f"'{self.hub}' ({task}) of the Hugging Face hub")

    def _damaged(self, source: Path | str, problem: str) -> DataError:
        return DataError(f"The {self.benchmark} data in {source} is damaged: {problem}. Replace it with the original.")
