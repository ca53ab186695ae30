"""What is in the folder of a cell: complete results of the same call, of another one, or something that is kept.

A finished cell holds lm-eval's results, and `cell.json` with the call that they are of. Nothing here changes a folder.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_harness.config import TTTConfig
from ttt_harness.errors import ConfigError, ReportError, TTTError
from ttt_harness.methods import SETTINGS
from ttt_harness.report.results import Run, find_runs, read_run
from ttt_harness.sweep.axes import FIT_AXES
from ttt_harness.sweep.grid import Cell
from ttt_harness.tuned.arguments import explicit_arguments

RECORD = "cell.json"
# A file in a folder that a sweep is writing, or has written, that says so.
MARK = ".ttt-harness-sweep"

# Options that change no result. Those of the loggers may also hold passwords, which have no place in a record.
_NOT_RECORDED = {
    *("output_path", "verbosity", "show_config", "write_out", "device", "batch_size", "max_batch_size"),
    *("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args", "trust_remote_code"),
    *("confirm_run_unsafe_code", "check_integrity", "cache_requests"),
}


class KeptError(TTTError):
    """What is in a cell's place cannot be read, or is not a sweep's. It is kept, and the cell is not run."""


@dataclass(frozen=True)
class Found:
    """What is in a cell's folder.

    done: results that can be read, and the record of the call.
    remark: on what else is there, for people; empty where there is nothing to say.
    run: the newest of the results.
    record: what `cell.json` holds.
    """

    done: bool
    remark: str = ""
    run: Run | None = None
    record: Any = None


def settings_of(cell: Cell) -> dict[str, Any]:
    """What a cell's results depend on, as it is written in its record."""
    call = {key: value for key, value in cell.call.items() if key not in _NOT_RECORDED and value not in (None, {}, [])}
    call.pop("config", None)
    return json.loads(json.dumps(call, default=str))


def found(cell: Cell, root: Path) -> Found:
    """What is in the cell's folder, after a check that it is of this cell.

    Raises:
        ConfigError: the folder holds something else: results of other options, or no cell's at all. Nothing there is
            overwritten; hours of work may be in it.
        KeptError: what is there cannot be read now.
    """
    folder = cell.folder(root)
    there = look(folder)
    if there.record is not None:
        changed = _changed(there.record, settings_of(cell)) or (there.run and _other_defaults(cell, there.run))
        if changed:
            raise ConfigError(
                f"{folder} holds results of other options ({changed}); choose another --output_path, or move the "
                "folder away."
            )
    return there


def look(folder: Path) -> Found:
    """What is in the folder of a cell. Changes nothing.

    Raises:
        ConfigError: something that no sweep has written.
        KeptError: something that cannot be read now.
    """
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return Found(done=False)
    except OSError as error:
        raise _unreadable(folder, error) from None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))["call"]
    except (FileNotFoundError, NotADirectoryError):
        if not folder.exists():
            raise KeptError(f"{folder} is a link to what is not there, and is kept; restore it or remove it.") from None
        raise ConfigError(
            f"{folder} was not written by a sweep; move it away, or choose another --output_path."
        ) from None
    except OSError as error:
        raise _unreadable(folder / RECORD, error) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise KeptError(
            f"{folder / RECORD} is damaged, and is kept; move {folder} away to run the cell again."
        ) from None
    return _look_at_results(folder, record)


def _look_at_results(folder: Path, record: Any) -> Found:
    runs, wrong = runs_in(folder)
    if runs:
        return Found(done=True, remark=wrong[0] if wrong else "", run=runs[-1], record=record)
    if wrong:
        raise KeptError(f"{wrong[0].rstrip('.')}; {folder} is kept, so move it away to run the cell again.")
    others = [file for file in files_in(folder) if file.name not in (RECORD, MARK)]
    if others:
        raise KeptError(
            f"the results of {folder} are gone, but not {others[0].relative_to(folder)}; the folder is kept, so move "
            "it away to run the cell again."
        )
    return Found(done=False, record=record)  # somebody deleted the results


def runs_in(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder, oldest first, and what is wrong with files that are named like one.

    Raises:
        KeptError: the folder cannot be read.
    """
    files = [file for file in files_in(folder) if file.name.startswith("results") and file.suffix == ".json"]
    try:
        return find_runs(folder), []
    except (ReportError, OSError):
        pass
    runs, wrong = [], []
    for file in sorted(files):
        try:
            runs.append(read_run(file))
        except ReportError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{file} cannot be read: {error.strerror}")
    return runs, wrong


def files_in(folder: Path) -> list[Path]:
    """The files in the folder to any depth; links to folders, and folders that are named like a file, among them.

    Raises:
        KeptError: not all of it can be read.
    """

    def fail(error: OSError) -> None:
        raise _unreadable(Path(error.filename or folder), error)

    found = []
    for where, folders, files in os.walk(folder, onerror=fail):
        found += [Path(where, name) for name in files]
        found += [
            path for name in folders if (path := Path(where, name)).is_symlink() or path.suffix in (".json", ".jsonl")
        ]
    return found


def _unreadable(path: Path, error: OSError) -> KeptError:
    return KeptError(f"{path} cannot be read ({error.strerror}), and is kept; try again when it can.")


def _changed(old: Any, new: dict[str, Any]) -> str:
    """The options that differ, for people: "limit 40, now 80"."""
    if not isinstance(old, dict):
        return "unknown"
    flat = [_flat(old), _flat(new)]
    names = [name for name in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(name) != flat[1].get(name)]
    return _differences(names, *flat)


def _other_defaults(cell: Cell, run: Run) -> str:
    """The settings of the fits that a version with other defaults has run the cell with, for people."""
    if not SETTINGS[cell.method].fits:
        return ""
    now = TTTConfig.from_mapping(explicit_arguments(cell.call["model_args"]))
    new = {name: getattr(now, name) for name in FIT_AXES}
    return _differences([name for name in new if run.settings.get(name, new[name]) != new[name]], run.settings, new)


def _differences(names: Sequence[str], old: Any, new: Any) -> str:
    values = [{name: str(one.get(name, "not given")).removesuffix(".0") for name in names} for one in (old, new)]
    shown = [f"{name} {values[0][name]}, now {values[1][name]}" for name in names[:3]]
    return "; ".join(shown + (["..."] if len(names) > 3 else []))


def _flat(call: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in call.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def check_complete(folder: Path, *, samples: bool) -> Run:
    """The run that lm-eval has written into the folder.

    Raises:
        TTTError: there is none, or it has no samples where it should.
    """
    try:
        run = find_runs(folder)[-1]
    except ReportError:
        raise TTTError(f"lm-eval could not write its results to {folder}; is the disk full?") from None
    missing: Sequence[str] = [task for task in run.tasks if samples and not run.has_samples(task)]
    if missing:
        raise TTTError(f"lm-eval could not write the samples of {missing[0]} to {folder}; is the disk full?")
    return run
