"""Settings that a search on demonstrations has compared: `tuned.json`, and what is chosen from it.

`file` is the shape of the file, and all that is kept: whether each candidate answered each held-out demonstration.
"""

from ttt_harness.tuned.file import Asked, BaseModel, Candidate, Tuned, newest, read_tuned, write_tuned

__all__ = ["Asked", "BaseModel", "Candidate", "Tuned", "newest", "read_tuned", "write_tuned"]
