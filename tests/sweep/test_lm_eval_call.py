"""Options of a sweep: lm-eval's own, its command line and its file, and what is refused before the first fit."""

import subprocess
import sys

import pytest

from ttt_harness import cli
from ttt_harness.errors import ConfigError
from ttt_harness.sweep import command
from ttt_harness.sweep.cells import locked
from ttt_harness.sweep.grid import parse_methods, parse_seeds
from ttt_harness.sweep.grid_file import read_grid_file
from ttt_harness.sweep.lm_eval_call import one_task_index, parse_call

OPTIONS = ["--model_args", "pretrained=m", "--tasks", "procedural_ttt", "--output_path", "out"]


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
