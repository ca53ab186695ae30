"""`settings=` and `choose=`: what they come to, and what they are refused with; no model is needed."""

import pytest

from tests.tuned.files import candidate, tuned
from ttt_harness.config import TTTConfig
from ttt_harness.errors import ConfigError
from ttt_harness.tuned import write_tuned
from ttt_harness.tuned.arguments import explicit_arguments, tuned_arguments, tuned_path

A, B = candidate(1e-4), candidate(3e-4, 3)
GOOD, BAD = [1] * 10, [0] * 10
GAINS = {"icl": BAD, A.name: BAD, B.name: GOOD}
LOSES = {"icl": GOOD, A.name: BAD, B.name: BAD}


@pytest.fixture
def write(tmp_path):
    def write(tasks=None, candidates=(A, B), **others):
        path = tmp_path / "tuned.json"
        write_tuned(tuned(tasks or {**dict.fromkeys("abcde", GAINS), "f": LOSES}, candidates, **others), path)
        return path

    return write


def test_one_setting_is_that_of_all_tasks(write):
    found = tuned_arguments({"settings": str(write()), "lora_rank": 8}, write())
    for task in ("a", "f", "not in the file"):
        assert found.config(task) == TTTConfig(lr=3e-4, epochs=3, lora_rank=8)
        assert found.said(task) == {"name": B.name, "model_args": dict(B.model_args), "chosen_for": "all tasks"}


def test_each_task_has_its_own_and_one_that_loses_is_answered_in_context(write):
    path = write()
    found = tuned_arguments({"settings": str(path), "choose": "task"}, path)
    assert (found.config("a").lr, found.config("f").fits, found.base) == (3e-4, False, found.pooled)
    assert found.said("f") == {"name": "icl", "model_args": {"method": "icl"}, "chosen_for": "task"}
    assert found.said("other")["chosen_for"] == "all tasks"
    assert found.config("other") == found.config("a")


def test_trainer_and_engine_are_made_for_fits_where_one_task_alone_has_one(write):
    tasks = {**dict.fromkeys("abcde", LOSES), "f": GAINS}
    path = write(tasks)
    found = tuned_arguments({"settings": str(path), "choose": "task"}, path)
    assert (found.pooled.name, found.of("f").name, found.base.name) == ("icl", B.name, B.name)
    assert not tuned_arguments({"settings": str(path)}, path).base.fits


def test_a_folder_stands_for_the_file_in_it(write, tmp_path):
    assert tuned_path(str(tmp_path)) == write() == tuned_path(str(write()))
    explicit = explicit_arguments({"settings": str(tmp_path), "pretrained": "x"})
    assert explicit == {"pretrained": "x", **B.model_args}
    assert explicit_arguments({"lr": 0.1}) == {"lr": 0.1}
    write({**dict.fromkeys("abcde", LOSES)})  # a file that changes is read again
    assert explicit_arguments({"settings": str(tmp_path)}) == {"method": "icl"}


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        ({"lr": 1e-3}, r"lr=0\.001 is not allowed beside settings="),
        ({"epochs": 3}, "epochs=3 is not allowed beside settings="),
        ({"method": "icl"}, "not for method=icl"),
        ({"method": "e2e"}, "not for method=e2e"),
        ({"k": 5}, "is for k=10, and not for k=5"),
        ({"adapter": "/an/adapter", "method": "ttt"}, "an adapter of your own"),
        ({"choose": "best"}, "choose='best' is not allowed"),
        ({"settings": 3}, "settings=3 is not allowed"),
        ({"settings": ""}, "settings='' is not allowed"),
        ({"settings": "auto"}, "settings=auto is not allowed here"),
        ({"settings": "/nowhere/tuned.json"}, "cannot be read"),
        ({"settings": "a\0b"}, "no tuned.json"),
        ({"settings": "x" * 5000}, "cannot be read"),
        ({"settings": None, "choose": "task"}, "choose=task needs settings="),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(write, arguments, telling):
    with pytest.raises(ConfigError, match=telling) as caught:
        explicit_arguments({"settings": str(write()), **arguments})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_settings_that_one_run_cannot_have_together_are_refused(write):
    wide = candidate(1e-3, lora_rank=32)
    other = {"icl": BAD, A.name: BAD, B.name: BAD, wide.name: GOOD}
    tasks = {**{task: {**GAINS, wide.name: BAD} for task in "abc"}, **dict.fromkeys("def", other)}
    path = write(tasks, (A, B, wide))
    with pytest.raises(ConfigError, match=r"choose=task is not allowed .* differ in lora_rank"):
        tuned_arguments({"settings": str(path), "choose": "task"}, path)
    assert tuned_arguments({"settings": str(path)}, path).pooled in (B, wide)


def test_a_task_with_other_demonstrations_than_in_the_search_is_refused(write):
    path = write()
    found = tuned_arguments({"settings": str(path)}, path)
    found.check_demonstrations("a", 10)
    found.check_demonstrations("not in the file", 3)
    with pytest.raises(ConfigError, match="found with 10 demonstrations of a, and here it has 5"):
        found.check_demonstrations("a", 5)
