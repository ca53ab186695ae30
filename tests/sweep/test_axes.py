"""Axes of a grid: how they are written, which cells they make, what they are called, and what is refused."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import CHECKPOINTS
from ttt_harness import cli
from ttt_harness.config import TaskSettings, TTTConfig
from ttt_harness.errors import ConfigError
from ttt_harness.methods import SETTINGS
from ttt_harness.sweep.axes import AXES, NOT_AXES, matters, parse_points, point_text, value_text
from ttt_harness.sweep.grid import Cell, cells_of
from ttt_harness.sweep.notes import note_grid
from ttt_harness.sweep.runner import run_cells, shared_engine_args


def cells(methods: str, grid: Any = None, *options: str, seeds: tuple[int, ...] = (42,), **call: Any) -> list[Cell]:
    given = {"tasks": ["t"], "model_args": {"pretrained": "m"}, "metadata": {}, **call}
    return cells_of(methods.split(","), list(seeds), given, parse_points(options, grid))


def folders(found: list[Cell]) -> list[str]:
    return [str(cell.folder(Path("."))) for cell in found]


def test_every_setting_is_an_axis_or_there_is_a_reason():
    assert {*TTTConfig.names(), *TaskSettings.names()} <= {*AXES, *NOT_AXES}
    assert not set(AXES) & set(NOT_AXES)


def test_every_axis_matters_to_some_setting():
    assert [axis for axis in AXES if not any(matters(axis, setting) for setting in SETTINGS.values())] == []


class TestWriting:
    def test_options_make_every_combination(self):
        assert folders(cells("ttt", None, "lr=1e-4,3e-4", "epochs=1,3")) == [
            f"ttt/lr={lr},epochs={epochs}/seed42" for lr, epochs in product(["1e-4", "3e-4"], [1, 3])
        ]

    def test_a_file_says_the_same(self):
        options = cells("ttt", None, "epochs=1, 3", "lr=0.0001,3E-4")
        assert options == cells("ttt", {"lr": ["1e-4", 3e-4], "epochs": [1, 3]})
        assert options == cells("ttt", {"lr": "1e-4,3e-4", "epochs": "1,3"})

    def test_a_list_of_mappings_makes_pairs(self):
        found = cells("ttt", [{"lora_rank": 64, "lora_alpha": 64}, {"lora_rank": 128, "lora_alpha": [128, 256]}])
        assert folders(found) == [
            "ttt/lora_rank=64,lora_alpha=64/seed42",
            "ttt/lora_rank=128,lora_alpha=128/seed42",
            "ttt/lora_rank=128,lora_alpha=256/seed42",
        ]

    def test_the_command_line_wins_over_the_file(self):
        assert folders(cells("ttt", {"lr": [1e-3]}, "epochs=2")) == ["ttt/epochs=2/seed42"]

    def test_what_is_written_twice_is_run_once(self):
        assert len(cells("ttt", None, "lr=1e-4,0.0001,1E-4")) == 1
        assert len(cells("ttt", [{"lr": 1e-4}, {"lr": "1e-4"}])) == 1

    def test_without_axes_cells_are_where_they_always_were(self):
        assert folders(cells("icl,ttt", None)) == ["icl/seed42", "ttt/seed42"]

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            *[(1e-4, "1e-4"), (3e-4, "3e-4"), (5e-05, "5e-5"), (0.00015, "1.5e-4"), (0.001, "1e-3"), (0.01, "0.01")],
            *[(0.05, "0.05"), (0.1, "0.1"), (1.0, "1"), (64.0, "64"), (1234.5, "1234.5"), (0.0, "0"), (-0.0, "0")],
            *[(1e-300, "1e-300"), (1e22, "1e22"), (0.1 + 0.2, "0.30000000000000004"), (True, "true"), (40, "40")],
        ],
    )
    def test_values_are_written_short_and_read_back_the_same(self, value, text):
        assert value_text(value) == text
        if isinstance(value, float):
            assert float(text) == value

    def test_the_text_of_a_point_does_not_depend_on_the_order_it_was_written_in(self):
        assert point_text({"epochs": 3, "lr": 1e-4}) == point_text({"lr": 1e-4, "epochs": 3}) == "lr=1e-4,epochs=3"


class TestCells:
    @pytest.mark.parametrize(
        ("axis", "by_axis"),
        [
            ("lr=1e-4,1e-3", {"ttt", "shared_ttt", "e2e"}),
            ("num_permutations=10,20", {"ttt", "shared_ttt"}),
            ("k=5,10", {"random", "zero_shot", "icl", "icl_vote", "ttt", "shared_ttt", "e2e"}),
            ("vote_permutations=3,5", {"icl_vote"}),
            ("leave_one_out=true,false", {"icl", "icl_vote", "ttt", "shared_ttt"}),
            ("generation_budget=full,published", {"zero_shot", "icl", "icl_vote", "ttt", "shared_ttt", "e2e"}),
        ],
    )
    def test_a_method_has_one_cell_for_all_values_of_an_axis_that_does_not_matter_to_it(self, axis, by_axis):
        methods = "random,zero_shot,icl,icl_vote,ttt,shared_ttt,e2e"
        found = cells(methods, None, axis)
        assert {cell.method for cell in found if cell.point} == by_axis
        for method in methods.split(","):
            assert sum(cell.method == method for cell in found) == (2 if method in by_axis else 1)

    def test_a_point_is_in_the_call(self):
        (cell,) = cells("ttt", None, "lr=1e-3", "k=5", "leave_one_out=True", "generation_budget=published")
        point = {"lr": 1e-3, "k": 5, "leave_one_out": True, "generation_budget": "published"}
        assert cell.call["model_args"] == {"pretrained": "m", "method": "ttt", "seed": 42, **point}

    def test_each_seed_has_the_whole_grid(self):
        found = cells("icl,ttt", None, "lr=1e-4,1e-3", seeds=(1, 2))
        assert [cell.name for cell in found] == [
            *("icl, seed 1", "ttt, lr=1e-4, seed 1", "ttt, lr=1e-3, seed 1"),
            *("icl, seed 2", "ttt, lr=1e-4, seed 2", "ttt, lr=1e-3, seed 2"),
        ]

    @pytest.mark.parametrize("option", ["model_args", "metadata"])
    def test_the_number_of_votes_is_that_of_methods_that_vote(self, option):
        given: dict[str, dict[str, Any]] = {"model_args": {"pretrained": "m"}, "metadata": {}}
        given[option] = {**given[option], "vote_permutations": 7}
        found = cells("icl,icl_vote,ttt_vote", None, **given)
        votes = {cell.method: cell.call["model_args"].get("vote_permutations") for cell in found}
        assert votes == {"icl": None, "icl_vote": 7, "ttt_vote": 7}
        assert all("vote_permutations" not in cell.call["metadata"] for cell in found)

    def test_all_cells_share_an_engine_for_the_largest_rank(self, tiny_model):
        found = cells("icl,ttt", None, "lora_rank=8,20", model_args={"pretrained": str(tiny_model)})
        assert {cell.lora_rank for cell in found} == {20}
        assert shared_engine_args(found[0]) == {"enable_lora": True, "max_lora_rank": 32}

    @pytest.fixture
    def phi3(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(CHECKPOINTS["phi3"]))
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    def test_phi3_s_adapters_are_written_with_twice_the_rank(self, phi3):
        found = cells("icl,ttt", None, model_args={"pretrained": str(phi3)})
        assert shared_engine_args(found[0]) == {"enable_lora": True, "max_lora_rank": 128}

    def test_a_rank_beyond_vllm_s_is_refused_for_the_family(self, phi3):
        (cell,) = cells("ttt", None, "lora_rank=512", model_args={"pretrained": str(phi3)})
        with pytest.raises(ConfigError, match="lora_rank=512 is not allowed for Phi3ForCausalLM"):
            shared_engine_args(cell)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "lrr=1"], "lrr is no axis of a grid: choose from lr, .* Did you mean 'lr'"),
        (["--grid", "lr"], "--grid lr is not allowed: write an axis and its values"),
        (["--grid", "lr="], "the axis lr has no values"),
        (["--grid", "=1"], " is no axis of a grid"),
        (["--grid", ""], "is not allowed: write an axis"),
        (["--grid", "lr=fast"], "lr='fast' is not allowed"),
        (["--grid", "lr=1e-4,7"], "lr='?7'? is not allowed"),
        (["--grid", "lr=nan"], "lr='nan' is not allowed"),
        (["--grid", f"lr={'9' * 5000}"], "lr=9{40} is not allowed"),
        (["--grid", "epochs=1.5"], "epochs='1.5' is not allowed"),
        (["--grid", "shuffle=maybe"], "shuffle='maybe' is not allowed"),
        (["--grid", "loss_on=words"], "loss_on='words' is not allowed"),
        (["--grid", "k=0,5"], "k=0 is not allowed with method=ttt"),
        (["--grid", "lr=1e-4", "--grid", "lr=3e-4"], "--grid lr is given twice"),
        (["--grid", "seed=1,2"], "seed cannot be an axis of a grid: --seeds chooses the seeds"),
        (["--grid", "num_fewshot=1,2"], "num_fewshot cannot be an axis of a grid: k is the number of demonstrations"),
        (["--grid", "adapter_dir=a,b"], "adapter_dir cannot be an axis"),
        (["--grid", "dtype=float32"], "dtype is no axis of a grid"),
        (["--grid", "lr=1e-4", "--model_args", "pretrained=m,lr=1e-3"], "lr stands in --model_args and is an axis"),
        (["--grid", "k=5", "--metadata", "k=3"], "k stands in --metadata and is an axis"),
        (["--grid", "vote_permutations=3"], "the axis vote_permutations changes nothing in ttt; leave it out"),
        (["--methods", "icl", "--grid", "lr=1e-3"], "the axis lr changes nothing in icl"),
        (["--methods", "e2e", "--grid", "num_permutations=3"], "the axis num_permutations changes nothing in e2e"),
        (
            ["--methods", "ttt_vote", "--grid", "vote_permutations=1,3"],
            "vote_permutations=1 is not allowed",
        ),
        (["--model_args", "pretrained=m,vote_permutations=3"], "vote_permutations changes nothing in ttt"),
        (
            ["--methods", "ttt,ttt_loss_all", "--grid", "loss_on=all,last"],
            "ttt_loss_all asks for the same as ttt",
        ),
        (["--grid", f"num_permutations={','.join(map(str, range(1, 1002)))}"], "the grid has 1001 points"),
        (["--grid", f"num_permutations={','.join(map(str, range(1, 501)))}", "--seeds", "1-50"], "has 25000 cells"),
        (["--grid", "leave_one_out=true", "--grid", "k=1,2"], "k=1 is not allowed with ttt, k=1,leave_one_out=true"),
    ],
)
def test_a_grid_that_is_none_is_refused_in_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = {"--methods": "ttt", "--seeds": "1", "--tasks": "t", "--model_args": "pretrained=m", "--output_path": "out"}
    given = [word for pair in grid.items() if pair[0] not in arguments for word in pair]
    assert cli.main(["sweep", *given, *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 600
    assert re.search(said, error), error
    assert not list(tmp_path.iterdir())


class TestFolders:
    def write_results(self, options: dict[str, Any]) -> None:
        score = options["model_args"].get("lr", 0.5)
        (Path(options["output_path"]) / "results_x.json").write_text(
            json.dumps({"results": {"t": {"acc,none": score}}})
        )

    def test_an_old_sweep_resumes_and_its_cells_are_shared(self, tmp_path):
        ran = []

        def execute(options: dict[str, Any]) -> None:
            ran.append((options["model_args"]["method"], options["model_args"].get("lr")))
            self.write_results(options)

        assert run_cells(cells("icl,ttt"), tmp_path, execute) == 0
        assert run_cells(cells("icl,ttt", None, "lr=1e-4,1e-3"), tmp_path, execute) == 0
        assert ran == [("icl", None), ("ttt", None), ("ttt", 1e-4), ("ttt", 1e-3)]
        assert run_cells(cells("icl,ttt", [{"lr": 1e-3}]), tmp_path, execute) == 0
        assert len(ran) == 4

    def test_status_lists_the_cells_of_a_grid(self, tmp_path, capsys):
        def execute(options: dict[str, Any]) -> None:
            if options["model_args"].get("lr") == 1e-3:
                raise ValueError("diverged")
            self.write_results(options)

        found = cells("icl,ttt", None, "lr=1e-4,1e-3,2e-3")
        note_grid(found, tmp_path)
        assert run_cells(found[:3], tmp_path, execute) == 1
        capsys.readouterr()
        assert cli.main(["sweep", "--status", "--output_path", str(tmp_path)]) == 0
        assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
            f"icl, seed 42 done {tmp_path}/icl/seed42",
            f"ttt, lr=1e-4, seed 42 done {tmp_path}/ttt/lr=1e-4/seed42",
            "ttt, lr=1e-3, seed 42 failed ValueError: diverged",
            "ttt, lr=2e-3, seed 42 not started",
            "2 done, 1 failed, 1 not started",
        ]

    def test_status_finds_the_cells_of_a_grid_by_their_folders(self, tmp_path, capsys):
        assert run_cells(cells("ttt", None, "lr=1e-4"), tmp_path, self.write_results) == 0
        (tmp_path / "ttt/notes/seed1").mkdir(parents=True)
        capsys.readouterr()
        assert cli.main(["sweep", "--status", "--output_path", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "1 done"
