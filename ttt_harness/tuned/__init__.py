"""Tuned settings: the file `tuned.json` that a search writes, and the choice of a setting from it.

    file.py        `Tuned`, the content of the file: right or wrong for each candidate and held-out demonstration
    choice.py      chooses one setting for all tasks, and one for each task with its predicted gain
    arguments.py   turns the model arguments settings= and choose= into explicit ones

Used by runs, by reports and by the search (`ttt_harness.tune`). Nothing here loads torch.
"""

from ttt_harness.tuned.file import (
    Asked,
    BaseModel,
    Candidate,
    Tuned,
    is_tuned,
    newest,
    read_tuned,
    tuned_folder,
    write_tuned,
)

__all__ = [
    "Asked",
    "BaseModel",
    "Candidate",
    "Tuned",
    "is_tuned",
    "newest",
    "read_tuned",
    "tuned_folder",
    "write_tuned",
]
