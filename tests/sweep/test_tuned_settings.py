"""`settings=` in a sweep: the cells that fit use it, the others do not see it."""

import pytest

from tests.tuned.files import candidate, tuned
from ttt_harness.errors import ConfigError
from ttt_harness.sweep.command import grid_of
from ttt_harness.sweep.lm_eval_call import Call
from ttt_harness.tuned import write_tuned

WIDE = candidate(3e-4, 3, lora_rank=128)


@pytest.fixture
def cells(tmp_path):
    def cells(*options: str, methods="icl,ttt", rights=(0, 1), **arguments):
        path = tmp_path / "tuned.json"
        write_tuned(tuned({"a": {"icl": [rights[0]] * 10, WIDE.name: [rights[1]] * 10}}, [WIDE]), path)
        given = {"pretrained": "x", "settings": str(path), **arguments}
        text = ",".join(f"{name}={value}" for name, value in given.items())
        tasks = ["--tasks", "bbh_ttt_navigate", "--output_path", str(tmp_path), "--model_args", text]
        return grid_of(methods=methods, seeds="42", grid=list(options) or None, file={}, options=tasks)[0]

    return cells


def arguments(call: Call) -> dict[str, object]:
    return {name: call["model_args"].get(name) for name in ("settings", "choose")}


def test_the_cells_that_fit_use_it(cells, tmp_path):
    icl, ttt = cells(choose="task")
    assert arguments(icl.call) == {"settings": None, "choose": None}
    assert arguments(ttt.call) == {"settings": str(tmp_path / "tuned.json"), "choose": "task"}
    assert ttt.lora_rank == 128  # the engine has to take it


@pytest.mark.parametrize(
    ("given", "telling"),
    [
        ({"methods": "e2e"}, "is for method=ttt, and not for method=e2e"),
        ({"settings": "auto"}, "settings=auto is not allowed here"),
        ({"settings": "/nowhere.json"}, "cannot be read"),
        ({"rights": (1, 0)}, "chooses in-context learning, with which ttt fits nothing; use --methods icl"),
    ],
)
def test_what_makes_no_sense_is_refused(cells, given, telling):
    with pytest.raises(ConfigError, match=telling):
        cells(**given)


def test_an_axis_that_the_file_sets_is_refused(cells):
    with pytest.raises(ConfigError, match=r"lr=.* is not allowed beside settings="):
        cells("lr=1e-3,1e-4")
    with pytest.raises(ConfigError, match="settings"):
        cells("settings=a,b")
