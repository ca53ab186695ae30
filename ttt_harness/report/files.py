"""Finds the files that lm-eval wrote, and reads JSON that anybody may have written.

Everything that can be wrong with a path or a file ends in a `ReportError` of one sentence: it does not exist, may not
be read, is cut off, is no JSON, is nested too deeply, holds numbers of thousands of digits.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttt_harness.errors import ReportError

DATE = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?")
# lm-eval's own files have about ten levels; what is deeper overflows the stack of whatever walks through it
DEEPEST = 100
_UNFINISHED = ".partial"  # the end of the names of folders that a sweep still writes to


def results_files(given: str | Path) -> tuple[list[Path], list[str]]:
    """The files under a path that are called as lm-eval calls results, oldest first, and remarks for the reader.

    given: a file, which is taken as it is, or a folder, which is searched to any depth: not through symbolic links to
    folders, which may lead back, and not in what a sweep is still writing (`*.partial`). The age is the date in the
    name, else the file's time. A remark names a folder that may not be read.

    Raises ReportError where there is none.
    """
    path = Path(given)
    try:
        path.lstat()
        if not path.is_dir():
            path.stat()
            return [path], []
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReportError(
            f"{path} does not exist; give a results file of lm-eval, or the folder it was written to."
        ) from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # a null character
        raise ReportError(f"{path} is no path; give a results file of lm-eval, or the folder it is in.") from error

    refused: list[OSError] = []
    found: list[tuple[str, float, str, Path]] = []
    for folder, below, names in os.walk(path, onerror=refused.append):
        below[:] = [name for name in below if not name.endswith(_UNFINISHED)]
        for name in names:
            dated = DATE.search(name)
            if not name.endswith(".json") or not (name.startswith("results") or dated):
                continue
            file = Path(folder, name)
            try:
                if file.is_file():  # neither a pipe, which would be waited for, nor a link to nothing
                    found.append((dated.group() if dated else "", file.stat().st_mtime, str(file), file))
            except OSError as error:
                refused.append(error)
    remarks = [f"{error.filename or path} cannot be read: {error.strerror}; left out." for error in refused]
    if found:
        return [file for *_, file in sorted(found)], remarks
    if refused:
        raise ReportError(f"{refused[0].filename or path} cannot be read: {refused[0].strerror}.")
    raise ReportError(f"{path} holds no results file (results_<date>.json); run lm_eval with --output_path {path}.")


def samples_files(results: Path, tasks: list[str]) -> dict[str, Path]:
    """Task -> the samples file that belongs to this results file, for the tasks that have one.

    They share the date in their names. A results file that was renamed takes the only samples file of that task beside
    it; whether it fits is seen from the scores (compare.py). Names are looked up in the folder's own list: a task may
    be called "../x", or by three hundred letters.
    """
    try:
        beside = {
            entry.name: Path(entry.path)
            for entry in os.scandir(results.parent)
            if entry.name.startswith("samples_") and entry.name.endswith(".jsonl") and entry.is_file()
        }
    except OSError:  # the results could be read all the same: they are compared without samples
        return {}
    dated = DATE.search(results.name)
    found = {}
    for task in tasks:
        if dated:
            names = [f"samples_{task}_{dated.group()}.jsonl"]
        else:
            names = [name for name in beside if _names_samples_of(name, task)]
        if len(names) == 1 and names[0] in beside:
            found[task] = beside[names[0]]
    return found


def _names_samples_of(name: str, task: str) -> bool:
    date = name.removeprefix(f"samples_{task}_").removesuffix(".jsonl")
    return name == f"samples_{task}.jsonl" or bool(DATE.fullmatch(date))


def read_json(path: Path) -> Any:
    """The content of a JSON file; see `parse` for what becomes of its numbers."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if path.name.startswith("samples_") and path.suffix == ".jsonl":
            raise ReportError(f"{path} holds samples; give the results_ file beside it.") from error
        raise ReportError(
            f"{path} is not complete JSON (line {error.lineno}: {error.msg}); it was cut off, or is no results file."
        ) from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not a results file of lm-eval: it is not JSON text.") from error
    except RecursionError as error:
        raise ReportError(f"{path} is not a results file of lm-eval: it is nested too deeply.") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error


def read_json_lines(path: Path) -> Iterator[Any]:
    """The content of each line of a JSON Lines file."""
    # split at "\n" only: str.splitlines would also split inside answers, at U+2028 and its like
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield parse(line)
                except json.JSONDecodeError as error:
                    raise ReportError(
                        f"{path}, line {number}: not complete JSON; the file was cut off, so run it again or "
                        f"delete it to compare without samples."
                    ) from error
                except RecursionError as error:
                    raise ReportError(f"{path}, line {number}: not a sample of lm-eval (nested too deeply).") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is not UTF-8 text; it was damaged, so run it again.") from error
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}.") from error


def parse(text: str) -> Any:
    """JSON text as Python objects of at most `DEEPEST` levels. Whole numbers of many digits become floats, or infinite.

    Raises json.JSONDecodeError, or RecursionError where it is deeper.
    """
    value = json.loads(text, parse_int=_whole_number)
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > DEEPEST:
            raise RecursionError
        if isinstance(one, dict):
            waiting += [(child, depth + 1) for child in one.values() if isinstance(child, dict | list)]
        elif isinstance(one, list):
            waiting += [(child, depth + 1) for child in one if isinstance(child, dict | list)]
    return value


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)
