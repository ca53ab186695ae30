"""What is refused of the engine's arguments is said in one sentence, vLLM's own words among them."""

import pytest

from ttt_harness.errors import ConfigError
from ttt_harness.run.model_arguments import gpu_share, positive_int
from ttt_harness.serving.engine import reason_of

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
    assert reason_of(ValueError(message)) == quoted


def test_a_long_message_is_cut_between_words():
    reason = reason_of(ValueError("word " * 200))
    assert len(reason) <= 300
    assert reason.endswith(" word [...]")


@pytest.mark.parametrize("given", ["much", "", 0, -0.5, 1.5, float("nan"), [0.5]])
def test_a_share_of_the_gpu_is_refused(given):
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=.* above 0 and at most 1\.$"):
        gpu_share(given)


@pytest.mark.parametrize("given", ["8k", 0, -1, 2.5, True])
def test_a_number_of_tokens_is_refused(given):
    with pytest.raises(ConfigError, match=r"max_model_len=.* whole number of tokens, at least 1\.$"):
        positive_int({"max_model_len": given}, "max_model_len", "tokens")


def test_what_is_allowed_is_taken():
    assert [gpu_share(given) for given in (None, 1, "0.3")] == [0.9, 1.0, 0.3]
    assert [positive_int({"max_model_len": given}, "max_model_len", "tokens") for given in (None, 8192, "8192")] == [
        None,
        8192,
        8192,
    ]
