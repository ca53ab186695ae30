"""The results file: machine, versions, settings, the stages of each run, and the medians that are quoted.

It is written anew after every stage, beside its place and then renamed into it, so that a run that is cut off keeps
what it has.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from ttt_harness.errors import ConfigError

Figures = Callable[[dict[str, Any]], dict[str, float]]


class ResultsFile:
    """What is in `path`, or will be.

    Args:
        path: the file; its folder is made.
        settings: what is measured.
        figures: turns the stages of one run into the figures that are quoted.
        append: add to the runs that the file holds already, instead of replacing them.

    Raises:
        ConfigError: with `append`, the file is damaged or holds runs with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], figures: Figures, *, append: bool = False) -> None:
        self.path = path
        self._figures = figures
        settings = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": ["python", "-m", "benchmarks", *sys.argv[1:]],
            "machine": machine.describe(),
            "versions": machine.versions(),
            "settings": settings,
            "runs": [],
        }
        if append and path.exists():
            try:
                old = json.loads(path.read_text())
                same = old["settings"] == settings and old["machine"] == self.content["machine"]
                self.content["runs"] = old["runs"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path} is not a results file of this benchmark: leave out --append.") from None
            if not same:
                raise ConfigError(
                    f"{path} holds runs with other settings or of another machine: leave out --append, or choose "
                    "another --output."
                )

    def start_run(self) -> dict[str, Any]:
        """A new run: a dictionary to put the stages into."""
        run: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stages": {}}
        self.content["runs"].append(run)
        return run

    def save(self) -> None:
        """Work out the figures of each run and their medians, and write the file."""
        for run in self.content["runs"]:
            run["figures"] = self._figures(run["stages"])
        names = dict.fromkeys(name for run in self.content["runs"] for name in run["figures"])
        self.medians = {
            name: statistics.median(run["figures"][name] for run in self.content["runs"] if name in run["figures"])
            for name in names
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        work = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        work.write_text(json.dumps({**self.medians, **self.content}, indent=1) + "\n")
        work.rename(self.path)
