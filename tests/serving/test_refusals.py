"""What vLLM says where it refuses something is quoted as one whole sentence."""

import pytest

from ttt_harness.serving.engine import _reason

# of multiprocessing, where a script without `if __name__ == "__main__":` starts an engine in a process of its own
SPAWN = """
        An attempt has been made to start a new process before the
        current process has finished its bootstrapping phase.

        This probably means that you are not using fork to start your
        child processes.
"""


@pytest.mark.parametrize(
    ("message", "quoted"),
    [
        (
            SPAWN,
            "An attempt has been made to start a new process before the current process has finished its "
            "bootstrapping phase",
        ),
        ("max_model_len is too large.", "max_model_len is too large"),
        ("", "ValueError"),
    ],
)
def test_the_first_sentence_is_whole(message, quoted):
    assert _reason(ValueError(message)) == quoted


def test_a_long_message_is_cut_between_words():
    reason = _reason(ValueError("word " * 200))
    assert len(reason) <= 300
    assert reason.endswith(" word [...]")
