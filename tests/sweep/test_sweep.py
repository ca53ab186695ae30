"""The sweep without an engine: what the cells ask for, what is skipped, and what is refused before the first fit."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ttt_harness import cli
from ttt_harness.config import TaskSettings, TTTConfig
from ttt_harness.errors import ConfigError
from ttt_harness.methods import METHODS as FIT_METHODS
from ttt_harness.methods import SETTINGS
from ttt_harness.run.progress import Display, RunProgress, showing
from ttt_harness.sweep import command, display, runner
from ttt_harness.sweep.cells import locked
from ttt_harness.sweep.display import SweepDisplay, seconds_left
from ttt_harness.sweep.grid import cells_of, parse_methods, parse_seeds
from ttt_harness.sweep.grid_file import read_grid_file
from ttt_harness.sweep.lm_eval_call import one_task_index, parse_call
from ttt_harness.sweep.runner import run_cells, shared_engine_args

OPTIONS = ["--model_args", "pretrained=m", "--tasks", "procedural_ttt", "--output_path", "out"]


def call(**options):
    return {"tasks": ["procedural_ttt"], "model_args": {"pretrained": "m"}, "metadata": {}, **options}


def cell_of(method, seed=42, **options):
    (cell,) = cells_of([method], [seed], call(**options))
    return cell


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


class TestOptions:
    def test_are_those_of_lm_eval(self):
        found = parse_call({}, [*OPTIONS, "-L", "40", "--log_samples", "--gen_kwargs", "max_gen_toks=3"])
        assert found["limit"] == 40
        assert found["log_samples"] is True
        assert found["gen_kwargs"] == {"max_gen_toks": 3}
        assert found["tasks"] == ["procedural_ttt"]
        assert "batch_size" not in found

    @pytest.mark.parametrize("limit", ["1", "0.5", "0.001"])
    def test_a_share_of_the_questions_is_a_limit(self, limit):
        assert parse_call({}, [*OPTIONS, "--limit", limit])["limit"] == float(limit)

    def test_a_file_describes_the_same_grid_and_the_command_line_wins(self, tmp_path):
        file = tmp_path / "grid.yaml"
        file.write_text(
            "methods: [icl, ttt]\nseeds: 42-43\ntasks: a,b\nlimit: 40\noutput_path: out\nmodel_args:\n  pretrained: m\n"
        )
        content = read_grid_file(file)
        assert parse_methods(content["methods"]) == ["icl", "ttt"]
        assert parse_seeds(content["seeds"]) == [42, 43]
        found = parse_call(content, ["--limit", "8"])
        assert found == {
            **{"tasks": ["a", "b"], "limit": 8, "output_path": "out", "model_args": {"pretrained": "m"}},
            "metadata": {},
        }

    @pytest.mark.parametrize("text", ["- icl", "a: [", "\x00", "1: 2"])
    def test_a_file_that_is_no_grid(self, tmp_path, text):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"grid\.yaml (is not YAML|must hold keys)"):
            read_grid_file(tmp_path / "grid.yaml")

    def test_reach_lm_eval_in_the_order_given(self, monkeypatch):
        seen = {}
        monkeypatch.setattr(command, "sweep", lambda **given: seen.update(given) or 0)
        options = ["--model_args", "pretrained=m", "lr=1e-3", "--seed", "1", "-L", "4", "--tasks", "a", "b", "-s"]
        assert cli.main(["sweep", *options[:3], "--methods", "icl", *options[3:], "--seeds", "42-43"]) == 0
        assert seen == {
            **{"methods": "icl", "seeds": "42-43", "grid": None, "config": None, "options": options},
            "resources": None,
        }

    def test_unknown_ones_of_other_commands_stay_errors(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["summary", "DIR", "--limit", "3"])
        assert "unrecognized arguments: --limit 3" in capsys.readouterr().err


def refused(capsys, *arguments):
    """The one sentence that a sweep is refused with."""
    status = cli.main(["sweep", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_an_argument_that_is_given_twice_is_said():
    """In a process of its own, where nothing has silenced lm-eval yet."""
    grid = ["--methods", "icl", "--seeds", "1", "--tasks", "t", "--output_path", "out", "--limit", "0"]
    command = [sys.executable, "-m", "ttt_harness.cli", "sweep", *grid, "--model_args", "k=3,k=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Overwriting key 'k': 3 -> 5" in done.stderr


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--methods", "icll", "--seeds", "42", *OPTIONS], "Did you mean 'icl'?"),
            (["--methods", ",", "--seeds", "42", *OPTIONS], "the grid has no methods"),
            (["--seeds", "42", *OPTIONS], "the grid has no methods"),
            (["--methods", "icl", *OPTIONS], "the grid has no seeds"),
            (["--methods", "icl", "--seeds", "forty-two", *OPTIONS], "seeds=forty-two is not allowed"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS[:4]], "output_path is missing"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS[2:], "--limit", "4", "--samples", "{}"], "must be None"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS[:2], *OPTIONS[4:]], "tasks is missing"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS, "--use_cache", "x"], "--use_cache is not allowed"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS, "--limit", "0"], "--limit 0 is not allowed"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS, "--limit=-3"], "--limit -3 is not allowed"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS, "--limit", "nan"], "--limit nan is not allowed"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS, "--limit", "1.5"], "--limit 1.5 is not allowed"),
            (["--methods", "icl", "--seeds", "42", *OPTIONS, "--limit", "inf"], "--limit inf is not allowed"),
            (["--config", "/nowhere.yaml"], "--config /nowhere.yaml cannot be read"),
        ],
    )
    def test_is_refused_in_one_sentence(self, capsys, monkeypatch, tmp_path, arguments, said):
        monkeypatch.chdir(tmp_path)
        if "--samples" in arguments:
            arguments[-1] = '{"a": [1]}'
        assert said in refused(capsys, *arguments)
        assert not list(tmp_path.iterdir())

    def test_a_key_of_a_file_that_lm_eval_does_not_know(self, capsys, tmp_path):
        (tmp_path / "grid.yaml").write_text("methods: icl\nseeds: 42\nlimits: 3\n")
        assert "Did you mean 'limit'?" in refused(capsys, "--config", tmp_path / "grid.yaml")

    def test_a_limit_of_a_file_that_is_no_number(self, capsys, tmp_path):
        (tmp_path / "grid.yaml").write_text("methods: icl\nseeds: 42\ntasks: t\noutput_path: out\nlimit: ten\n")
        assert "--limit 'ten' is not allowed" in refused(capsys, "--config", tmp_path / "grid.yaml")

    def test_an_option_that_lm_eval_does_not_know(self, capsys):
        said = refused(capsys, "--methods", "icl", "--seeds", "42", *OPTIONS, "--limmit", "3")
        assert "--limmit 3 is no option of this command or of lm_eval run" in said

    def test_a_folder_that_cannot_be_written(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        said = refused(capsys, "--methods", "icl", "--seeds", "1", *OPTIONS[:4], "--output_path", tmp_path / "file/out")
        assert "cannot be written: Not a directory" in said

    def test_a_folder_that_another_sweep_is_writing_to(self, tmp_path):
        with locked(tmp_path), pytest.raises(ConfigError, match="another sweep"), locked(tmp_path):
            pass

    def test_a_refused_sweep_leaves_everything_as_it_was(self, capsys, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "there/mine").write_text("")
        grid = ["--methods", "random", "--seeds", "1", "--tasks", "no_such_task"]
        assert "no_such_task is not a task" in refused(capsys, *grid, "--output_path", tmp_path / "there")
        with pytest.raises(ConfigError), locked(tmp_path / "new"):
            raise ConfigError("refused")
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "there"]


def write_results(options):
    """Stands for lm-eval: one results file, of the seed as score."""
    folder = Path(options["output_path"]) / "m"
    folder.mkdir()
    content = {"results": {"t": {"acc,none": options["model_args"]["seed"] / 100}}, "config": {"limit": 4}}
    (folder / "results_2026-11-23T12-00-00.000001.json").write_text(json.dumps(content))


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestRun:
    @pytest.fixture
    def cells(self):
        return cells_of(["icl", "ttt"], [42, 43], call())

    def test_a_cell_that_is_done_is_not_run_again(self, cells, tmp_path, capsys):
        ran = []

        def execute(options):
            ran.append((options["model_args"]["method"], options["model_args"]["seed"]))
            write_results(options)

        assert run_cells(cells[:2], tmp_path, execute) == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert run_cells(cells, tmp_path, execute) == 0
        assert ran == [("icl", 42), ("ttt", 42), ("icl", 43), ("ttt", 43)]
        assert before.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items()
        assert "2 of 4 cells are done already: skipped." in capsys.readouterr().err
        assert run_cells(cells, tmp_path, execute) == 0
        assert len(ran) == 4

    def test_engine_arguments_reach_lm_eval(self, tiny_model, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr(runner, "make_model", seen.append)
        monkeypatch.setattr(runner, "load_tasks", lambda _: {"t": None})
        monkeypatch.setattr(runner, "run_lm_eval", lambda options: (seen.append(options), write_results(options)))
        cells = cells_of(["icl", "ttt"], [42], call(model_args={"pretrained": str(tiny_model)}))
        assert run_cells(cells, tmp_path) == 0
        own = {"enable_lora": True, "max_lora_rank": 64, "pretrained": str(tiny_model), "seed": 42}
        assert [options["model_args"] for options in seen] == [
            {**own, "method": method} for method in ("ttt", "icl", "ttt")
        ]

    def test_a_failing_cell_is_reported_and_the_others_run(self, cells, tmp_path, capsys):
        def execute(options):
            if options["model_args"] == {**options["model_args"], "method": "ttt", "seed": 42}:
                raise ValueError("two\nlines")
            write_results(options)

        assert run_cells(cells, tmp_path, execute) == 1
        assert "failed: ttt, seed 42: ValueError: two lines" in capsys.readouterr().err.splitlines()
        assert {path.parts[0] + path.parts[1] for path in map(Path, files_in(tmp_path))} == {
            *("iclseed42", "iclseed43", "tttseed43", "tttseed42.failed")
        }
        assert run_cells(cells, tmp_path, write_results) == 0
        assert not list(tmp_path.rglob("*.failed"))

    def test_where_no_cell_is_finished_nothing_is_said_to_be_shown(self, cells, tmp_path, capsys):
        assert run_cells(cells, tmp_path, lambda _: None) == 1
        assert capsys.readouterr().err.splitlines()[-1] == "No cell was finished."

    def test_a_cell_without_results_has_failed(self, cells, tmp_path, capsys):
        assert run_cells(cells[:1], tmp_path, lambda _: None) == 1
        assert "lm-eval could not write its results" in capsys.readouterr().err
        assert files_in(tmp_path) == {"icl/seed42.failed"}

    def test_samples_that_were_asked_for_and_are_not_there(self, tmp_path, capsys):
        assert run_cells([cell_of("icl", log_samples=True)], tmp_path, write_results) == 1
        assert "could not write the samples of t" in capsys.readouterr().err

    def test_ctrl_c_leaves_what_is_done(self, cells, tmp_path, capsys):
        def execute(options):
            write_results(options)
            if options["model_args"]["method"] == "ttt":
                raise KeyboardInterrupt

        assert run_cells(cells, tmp_path, execute) == 130
        assert {Path(name).parts[:2] for name in files_in(tmp_path)} == {("icl", "seed42")}
        assert "Stopped at ttt, seed 42" in capsys.readouterr().err

    def test_what_a_killed_sweep_left_is_removed(self, cells, tmp_path):
        left = tmp_path / "icl" / "seed42.partial" / "m"
        left.mkdir(parents=True)
        (left / "results_x.json").write_text('{"resu')
        assert run_cells(cells[:1], tmp_path, write_results) == 0
        assert {Path(name).parts[1] for name in files_in(tmp_path)} == {"seed42"}

    def test_results_of_other_options_are_neither_skipped_nor_overwritten(self, cells, tmp_path):
        run_cells(cells[:1], tmp_path, write_results)
        before = files_in(tmp_path)
        with pytest.raises(ConfigError, match=r"icl/seed42 holds results of other options \(limit not given, now 40\)"):
            run_cells([cell_of("icl", limit=40.0)], tmp_path, write_results)
        with pytest.raises(ConfigError, match=r"\(lr not given, now 0.5\)"):
            run_cells([cell_of("icl", model_args={"pretrained": "m", "lr": 0.5})], tmp_path, write_results)
        assert files_in(tmp_path) == before

    def test_options_that_change_no_result_may_change(self, cells, tmp_path):
        run_cells(cells[:1], tmp_path, write_results)
        alone = cell_of("icl", verbosity="DEBUG", wandb_args={"api_key": "secret"})
        assert run_cells([alone], tmp_path, lambda _: pytest.fail("run again")) == 0

    def test_no_password_is_recorded(self, tmp_path):
        run_cells([cell_of("icl", hf_hub_log_args={"token": "secret"})], tmp_path, write_results)
        assert "secret" not in (tmp_path / "icl/seed42/cell.json").read_text()

    def test_a_folder_of_someone_else_is_left_alone(self, cells, tmp_path):
        (tmp_path / "icl/seed42").mkdir(parents=True)
        with pytest.raises(ConfigError, match="was not written by a sweep"):
            run_cells(cells[:1], tmp_path, write_results)

    def test_a_cell_whose_results_were_deleted_is_run_again(self, cells, tmp_path):
        run_cells(cells[:1], tmp_path, write_results)
        next(tmp_path.rglob("results_*.json")).unlink()
        assert run_cells(cells[:1], tmp_path, write_results) == 0
        assert len(list(tmp_path.rglob("results_*.json"))) == 1


def test_the_index_of_tasks_is_built_once(monkeypatch):
    from lm_eval.tasks import TaskManager, _index

    built = []
    monkeypatch.setattr(_index.TaskIndex, "build", staticmethod(lambda paths: built.append(list(paths)) or {}))
    with one_task_index():
        TaskManager()
        TaskManager(metadata={"seed": 43})
        assert len(built) == 1
        TaskManager(include_path="elsewhere")
        assert len(built) == 2
    TaskManager()
    assert len(built) == 3


def test_time_left_goes_by_what_each_method_took():
    fits = {"icl": False, "ttt": True, "e2e": True}
    assert seconds_left({}, ["icl"], fits) is None
    assert seconds_left({"icl": [2.0, 4.0]}, ["icl", "icl"], fits) == 6.0
    assert seconds_left({"ttt": [10.0]}, ["e2e", "icl"], fits) == 12.0
    assert seconds_left({"ttt": [10.0]}, [], fits) == 0.0


@pytest.mark.parametrize(("seconds", "told"), [(30.0, "cell 3/4, about 60 s left"), (0.1, "cell 3/4")])
def test_the_time_left_is_said_of_the_whole_sweep_where_there_is_any(monkeypatch, capsys, seconds, told):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with SweepDisplay(["icl"] * 3, {"icl": False}, skipped=1) as shown:
        shown.begin("icl, seed 42")
        clock.now = seconds
        shown.end("done", measured=True)
        shown.begin("icl, seed 43")
    assert capsys.readouterr().err.splitlines()[-1] == f"[{told}] icl, seed 43: preparing (0% of this cell)"


class Recorded(Display):
    def __init__(self):
        super().__init__()
        self.shown = []

    def show(self, share, what, *, line=False):  # noqa: ARG002
        self.shown.append((share, what))


def test_a_run_shows_its_progress_in_the_display_that_is_named(capsys):
    display = Recorded()
    with showing(display), RunProgress(8) as progress:
        progress.say("fitting")
        progress.advance(2, "step 1")
        progress.advance(60, "step 2")
    assert display.shown == [(0.0, "fitting"), (0.25, "step 1"), (1.0, "step 2")]
    assert capsys.readouterr().err == ""
    with RunProgress(8) as progress:
        progress.say("alone")
    assert len(display.shown) == 3
    assert "alone (0% done)" in capsys.readouterr().err
