"""Settings that a search on demonstrations has compared: `tuned.json`, and what is chosen from it.

    file.py        the shape of the file: whether each candidate answered each held-out demonstration
    choice.py      the setting for all tasks, and the one of each task, with what they are predicted to gain
    arguments.py   what settings= and choose= among the model arguments come to

Runs, reports and the search itself use it; nothing here loads torch.
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
