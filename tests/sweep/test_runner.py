"""The run of a grid without an engine: what is skipped, what fails, what is left."""

import json
from pathlib import Path

import pytest

from tests.sweep.calls import call, cell_of
from ttt_harness.errors import ConfigError
from ttt_harness.sweep import runner
from ttt_harness.sweep.grid import cells_of
from ttt_harness.sweep.runner import run_cells


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
