"""The cells of a grid: which there are, what each asks for, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.sweep.calls import call, cell_of
from ttt_harness.config import TaskSettings, TTTConfig
from ttt_harness.errors import ConfigError
from ttt_harness.methods import METHODS as FIT_METHODS
from ttt_harness.methods import SETTINGS
from ttt_harness.sweep.grid import cells_of, parse_methods, parse_seeds
from ttt_harness.sweep.runner import shared_engine_args


class TestMethods:
    def test_every_method_of_the_model_is_reached(self):
        assert {method.model_args.get("method") for method in SETTINGS.values()} == {None, *FIT_METHODS}

    @pytest.mark.parametrize("name", SETTINGS)
    def test_every_argument_is_one_that_model_or_tasks_know(self, name):
        assert set(SETTINGS[name].model_args) <= {*TTTConfig.names(), *TaskSettings.names()}

    def test_no_two_ask_for_the_same(self):
        asked = [json.dumps([m.model, dict(m.model_args), dict(m.options)], sort_keys=True) for m in SETTINGS.values()]
        assert len(set(asked)) == len(asked)

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("zero_shot", {"method": "icl"}),
            ("icl", {"method": "icl"}),
            ("icl_vote", {"method": "icl", "vote_permutations": 5}),
            ("ttt", {"method": "ttt"}),
            ("ttt_vote", {"method": "ttt", "vote_permutations": 5}),
            ("ttt_loss_all", {"method": "ttt", "loss_on": "all"}),
            ("ttt_loss_last", {"method": "ttt", "loss_on": "last"}),
            ("ttt_no_shuffle", {"method": "ttt", "shuffle": False}),
            ("ttt_no_shuffle_vote", {"method": "ttt", "shuffle": False, "vote_permutations": 5}),
            ("ttt_leave_one_out", {"method": "ttt", "leave_one_out": True}),
            ("shared_ttt", {"method": "shared_ttt"}),
            ("e2e", {"method": "e2e"}),
            ("shared_e2e", {"method": "shared_e2e"}),
            ("random", {}),
        ],
    )
    def test_ask_for_what_the_table_of_settings_says(self, name, arguments):
        cell = cell_of(name, 43)
        assert cell.call["model_args"] == {"pretrained": "m", "seed": 43, **arguments}
        assert cell.call["model"] == ("ttt_random" if name == "random" else "ttt_vllm")
        assert cell.call.get("num_fewshot") == (0 if name == "zero_shot" else None)

    def test_published_rates_are_the_defaults_and_an_explicit_one_wins(self):
        rates = {name: TTTConfig.from_mapping(cell_of(name).call["model_args"]).lr for name in ("ttt", "shared_ttt")}
        assert rates == {"ttt": 1e-4, "shared_ttt": 5e-5}
        cell = cell_of("shared_ttt", model_args={"pretrained": "m", "lr": 1e-3})
        assert TTTConfig.from_mapping(cell.call["model_args"]).lr == 1e-3


class TestGrid:
    def test_has_every_method_with_every_seed_once_seed_by_seed(self):
        cells = cells_of(["icl", "ttt"], [42, 43], call())
        assert [(cell.method, cell.seed) for cell in cells] == [("icl", 42), ("ttt", 42), ("icl", 43), ("ttt", 43)]
        assert len({cell.folder(Path("out")) for cell in cells}) == 4

    def test_all_is_every_method_and_nothing_is_run_twice(self):
        assert parse_methods("all") == list(SETTINGS)
        assert parse_methods("ttt, icl,ttt") == ["ttt", "icl"]
        assert parse_methods(["ttt", "icl,e2e"]) == ["ttt", "icl", "e2e"]

    def test_cells_of_one_grid_share_the_arguments_of_the_engine(self, tiny_model):
        args = {"pretrained": str(tiny_model), "lora_rank": 20}
        engines = {
            cell.method: shared_engine_args(cell)
            for cell in cells_of(["icl", "ttt", "random"], [1, 2], call(model_args=args))
        }
        assert engines["icl"] == engines["ttt"] == {"enable_lora": True, "max_lora_rank": 32}
        assert engines["random"] == {}
        assert shared_engine_args(cells_of(["icl", "zero_shot"], [1], call(model_args=args))[0]) == {}

    @pytest.mark.parametrize(
        ("given", "seeds"),
        [
            ("42-46", [42, 43, 44, 45, 46]),
            ("42,43", [42, 43]),
            ("7", [7]),
            (7, [7]),
            (" 3 , 1-2,2 ", [3, 1, 2]),
            ([5, "6-7"], [5, 6, 7]),
        ],
    )
    def test_seeds(self, given, seeds):
        assert parse_seeds(given) == seeds

    @pytest.mark.parametrize("given", ["x", "42-", "-3", "4.5", "1e3", "46-42", "0-4294967296", "42-9999", [None], 1.5])
    def test_seeds_that_are_none(self, given):
        with pytest.raises(ConfigError, match=r"^seeds=.*\.$"):
            parse_seeds(given)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"model_args": {"pretrained": "m", "seed": 1}}, "seed must not stand in --model_args"),
            ({"metadata": {"shuffle": False}}, "shuffle must not stand in --metadata"),
            ({"metadata": {"vote_permutations": 1}}, "vote_permutations=1 is not allowed with icl_vote"),
            ({"num_fewshot": 0}, "--num_fewshot is not an option of a sweep"),
            ({"model": "hf"}, "--model is not an option of a sweep"),
            ({"model_args": {"pretrained": "m", "lr": 7}}, "lr=7 is not allowed"),
            ({"metadata": {"k": -1}}, "k=-1 is not allowed"),
            ({"model_args": {"pretrained": "m", "k": 1}}, "k=1 is not allowed with ttt_leave_one_out"),
        ],
    )
    def test_what_does_not_fit_into_a_grid_is_refused(self, change, said):
        with pytest.raises(ConfigError, match=said):
            cells_of(list(SETTINGS), [42], call(**change))
