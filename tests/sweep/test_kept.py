"""Nothing is removed that a sweep did not leave half-written; what stands in the way or cannot be read is named."""

import errno
import json
import os
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from ttt_harness import cli
from ttt_harness.errors import ConfigError
from ttt_harness.report.results import find_runs
from ttt_harness.sweep import cells as cells_module
from ttt_harness.sweep import runner
from ttt_harness.sweep.cells import LOCK, PARTIAL, locked, written
from ttt_harness.sweep.found import MARK, RECORD
from ttt_harness.sweep.grid import Cell, cells_of
from ttt_harness.sweep.notes import FAILED, GRID, note_grid
from ttt_harness.sweep.runner import run_cells

CALL = {"tasks": ["t"], "model_args": {"pretrained": "m"}, "metadata": {}}
RESULTS = {"results": {"t": {"acc,none": 0.5}}, "config": {"limit": 4}}


def write_results(options: dict[str, Any]) -> None:
    folder = Path(options["output_path"]) / "m"
    folder.mkdir(exist_ok=True)
    (folder / "results_2026-11-23T12-00-00.000001.json").write_text(json.dumps(RESULTS))


def never(_: dict[str, Any]) -> None:
    pytest.fail("a cell was run")


def grid(*methods: str) -> list[Cell]:
    return cells_of(methods, [42], CALL)


def everything(root: Path) -> dict[str, str | bytes]:
    """All that is below a folder: links by their targets, files by their content, folders by nothing."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in root.rglob("*")
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sweep of which `icl` is done."""
    out = tmp_path / "out"
    out.mkdir()
    assert run_cells(grid("icl"), out, write_results) == 0
    return out


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every access to the file fail as on a disk that is broken now."""
    opened = Path.open

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)


class TestFinishedCells:
    def test_results_that_cannot_be_read_now_are_kept_and_the_other_cells_run(self, root, monkeypatch, capsys):
        (results,) = root.rglob("results_*.json")
        before = everything(root / "icl")
        with monkeypatch.context() as patch:
            unreadable(results, patch)
            assert run_cells(grid("icl", "ttt"), root, write_results) == 1
        said = capsys.readouterr().err
        assert f"{results} cannot be read: Input/output error" in said
        assert "1 of 2 cells are in" in said
        assert everything(root / "icl") == before
        assert run_cells(grid("icl", "ttt"), root, never) == 0

    @pytest.mark.parametrize("content", ["{", "", "[]", '{"results": {}}', '{"results": {"t": 3}}', "\x00\xff"])
    def test_results_that_are_damaged_are_kept(self, root, capsys, content):
        next(root.rglob("results_*.json")).write_text(content, encoding="latin-1")
        before = everything(root)
        assert run_cells(grid("icl"), root, never) == 1
        assert "is kept" in capsys.readouterr().err
        assert everything(root) == before

    def test_a_folder_in_the_place_of_the_results_is_kept(self, root, capsys):
        (results,) = root.rglob("results_*.json")
        results.unlink()
        results.mkdir()
        before = everything(root)
        assert run_cells(grid("icl"), root, never) == 1
        assert "is kept" in capsys.readouterr().err
        assert everything(root) == before

    def test_a_foreign_file_beside_the_results_does_not_undo_the_cell(self, root, capsys):
        (root / "icl/seed42/results_of_mine.json").write_text('{"mine": 1}')
        before = everything(root)
        assert run_cells(grid("icl"), root, never) == 0
        assert "results_of_mine.json is not a results file" in capsys.readouterr().err
        assert everything(root) == before

    def test_samples_are_kept_where_the_results_are_gone(self, root, capsys):
        (results,) = root.rglob("results_*.json")
        results.rename(results.with_name("samples_t_2026.jsonl"))
        before = everything(root)
        assert run_cells(grid("icl"), root, never) == 1
        assert "are gone, but not m/samples_t_2026.jsonl; the folder is kept" in capsys.readouterr().err
        assert everything(root) == before

    def test_a_folder_below_that_cannot_be_listed_is_not_taken_for_an_empty_one(self, root, capsys, monkeypatch):
        scandir = os.scandir

        def fail(path: Any = ".") -> Any:
            if Path(os.fspath(path)).name == "m":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return scandir(path)

        before = everything(root)
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", fail)
            assert run_cells(grid("icl"), root, never) == 1
        assert "icl/seed42/m cannot be read (Permission denied), and is kept" in capsys.readouterr().err
        assert everything(root) == before

    @pytest.mark.parametrize("content", ["{", "[]", '{"cell": 1}', "\x00"])
    def test_a_damaged_record_is_kept_with_its_folder(self, root, capsys, content):
        (root / "icl/seed42" / RECORD).write_text(content)
        before = everything(root)
        assert run_cells(grid("icl"), root, never) == 1
        assert "cell.json is damaged, and is kept" in capsys.readouterr().err
        assert everything(root) == before

    def test_a_link_to_a_disk_that_is_not_there(self, root, capsys, tmp_path):
        shutil.move(root / "icl/seed42", tmp_path / "disk")
        (root / "icl/seed42").symlink_to(tmp_path / "disk")
        assert run_cells(grid("icl"), root, never) == 0
        shutil.move(tmp_path / "disk", tmp_path / "away")
        before = everything(root)
        assert run_cells(grid("icl"), root, never) == 1
        assert "is a link to what is not there, and is kept" in capsys.readouterr().err
        assert everything(root) == before
        shutil.move(tmp_path / "away", tmp_path / "disk")
        assert run_cells(grid("icl"), root, never) == 0

    def test_results_of_fits_with_other_defaults_are_neither_skipped_nor_removed(self, tmp_path):
        def with_settings(options: dict[str, Any]) -> None:
            settings = {"method": "ttt", "num_permutations": 7, "lr": 1e-4}
            content = {**RESULTS, "config": {"ttt": {"settings": settings}}}
            (Path(options["output_path"]) / "results_x.json").write_text(json.dumps(content))

        assert run_cells(grid("ttt"), tmp_path, with_settings) == 0
        with pytest.raises(ConfigError, match=r"results of other options \(num_permutations 7, now 40\)"):
            run_cells(grid("ttt"), tmp_path, never)

    def test_a_file_where_the_folder_of_a_method_belongs(self, tmp_path):
        (tmp_path / "icl").write_text("mine")
        with pytest.raises(ConfigError, match="icl is no folder, and is kept"):
            run_cells(grid("icl"), tmp_path, never)
        (tmp_path / "icl").unlink()
        (tmp_path / "icl").mkdir()
        (tmp_path / "icl/seed42").write_text("mine")
        with pytest.raises(ConfigError, match="was not written by a sweep"):
            run_cells(grid("icl"), tmp_path, never)
        assert (tmp_path / "icl/seed42").read_text() == "mine"


class TestHalfWrittenCells:
    def killed(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """What is left of a cell whose process is killed while lm-eval writes, with no chance to clean up."""
        (cell,) = grid("ttt")
        with monkeypatch.context() as patch:
            patch.setattr(cells_module, "_leave_computed", lambda *_, **__: None)
            with suppress(KeyboardInterrupt), written(cell, root) as folder:
                (folder / "m").mkdir()
                (folder / "m/results_x.json").write_text('{"resu')
                raise KeyboardInterrupt
        return root / "ttt" / f"seed42{PARTIAL}"

    def test_what_a_killed_sweep_left_is_removed(self, root, monkeypatch):
        partial = self.killed(root, monkeypatch)
        assert (partial / "m/results_x.json").exists()
        assert run_cells(grid("ttt"), root, write_results) == 0
        assert not partial.exists()

    def test_results_that_were_complete_are_not_computed_again(self, root, monkeypatch):
        """Of a process that was killed between its last file and the folder's name."""
        (cell,) = grid("ttt")
        with monkeypatch.context() as patch:
            patch.setattr(cells_module, "_finish", lambda *_: None)
            with written(cell, root) as folder:
                write_results({"output_path": str(folder)})
        assert not (root / "ttt/seed42").exists()
        assert run_cells([cell], root, never) == 0
        assert (root / "ttt/seed42" / RECORD).exists()

    def test_a_partial_folder_of_another_program_is_kept(self, root):
        partial = root / "ttt" / f"seed42{PARTIAL}"
        partial.mkdir(parents=True)
        (partial / "thesis.tex").write_text("mine")
        before = everything(root)
        with pytest.raises(ConfigError, match="was not left by a sweep, and is kept"):
            run_cells(grid("ttt"), root, never)
        assert everything(root) == before

    def test_complete_results_in_an_unmarked_partial_folder_are_kept(self, root):
        partial = root / "ttt" / f"seed42{PARTIAL}"
        partial.mkdir(parents=True)
        write_results({"output_path": str(partial)})
        before = everything(root)
        with pytest.raises(ConfigError, match="was not left by a sweep, and is kept"):
            run_cells(grid("ttt"), root, never)
        assert everything(root) == before

    @pytest.mark.parametrize("kind", ["link to a folder", "dangling link", "file"])
    def test_what_is_no_folder_is_kept(self, root, tmp_path, kind):
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / MARK).write_text("")
        (mine / "thesis.tex").write_text("mine")
        (root / "ttt").mkdir()
        partial = root / "ttt" / f"seed42{PARTIAL}"
        if kind == "file":
            partial.write_text("mine")
        else:
            partial.symlink_to(mine if kind == "link to a folder" else tmp_path / "nowhere")
        before = everything(tmp_path)
        with pytest.raises(ConfigError, match="was not left by a sweep, and is kept"):
            run_cells(grid("ttt"), root, never)
        assert everything(tmp_path) == before

    def test_links_in_a_half_written_folder_are_not_followed(self, root, monkeypatch, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.tex").write_text("mine")
        partial = self.killed(root, monkeypatch)
        (partial / "link").symlink_to(tmp_path / "mine")
        assert run_cells(grid("ttt"), root, write_results) == 0
        assert (tmp_path / "mine/thesis.tex").read_text() == "mine"

    def test_results_are_kept_where_their_folder_cannot_get_its_name(self, root):
        def in_the_way(options: dict[str, Any]) -> None:
            write_results(options)
            (root / "ttt/seed42").mkdir()
            (root / "ttt/seed42/thesis.tex").write_text("mine")

        assert run_cells(grid("ttt"), root, in_the_way) == 1
        assert (root / "ttt/seed42/thesis.tex").read_text() == "mine"
        assert list((root / "ttt").glob(f"seed42{PARTIAL}/m/results_*.json"))
        shutil.rmtree(root / "ttt/seed42")
        assert run_cells(grid("ttt"), root, never) == 0


class TestFailedCells:
    """Of which something was computed."""

    def unscored(self, options: dict[str, Any]) -> None:
        write_results(options)
        (Path(options["output_path"]) / "m/answers_2026_1.jsonl").write_text("{}")
        raise ValueError("t cannot be scored")

    def test_answers_and_results_are_kept_until_the_cell_is_run_again(self, root, capsys):
        partial = root / "ttt" / f"seed42{PARTIAL}"
        assert run_cells(grid("icl", "ttt"), root, self.unscored) == 1
        said = f"ValueError: t cannot be scored; what was computed is in {partial}."
        assert f"failed: ttt, seed 42: {said}" in capsys.readouterr().err
        assert (partial / "m/answers_2026_1.jsonl").exists()
        assert len(find_runs(root)) == 1  # these are no results of a run
        for others in (nullcontext(), locked(root)):
            with others:
                assert cli.main(["sweep", "--status", "--output_path", str(root)]) == 0
                assert f"ttt, seed 42  failed       {said}" in capsys.readouterr().out.splitlines()
        assert run_cells(grid("icl", "ttt"), root, write_results) == 0
        assert not partial.exists()
        assert len(find_runs(root)) == 2

    def test_answers_are_kept_after_ctrl_c_too(self, root):
        def stopped(options: dict[str, Any]) -> None:
            with suppress(ValueError):
                self.unscored(options)
            raise KeyboardInterrupt

        assert run_cells(grid("ttt"), root, stopped) == 130
        assert (root / "ttt" / f"seed42{PARTIAL}" / "m/answers_2026_1.jsonl").exists()
        assert run_cells(grid("ttt"), root, write_results) == 0

    def test_a_cell_that_another_job_is_at_is_not_noted_as_failed(self, root, capsys):
        def meanwhile(_: dict[str, Any]) -> None:
            assert run_cells(grid("ttt"), root, never) == 1

        assert run_cells(grid("ttt"), root, lambda options: (meanwhile(options), write_results(options))) == 0  # type: ignore[func-returns-value]
        assert f"another job is writing {root / 'ttt/seed42'}" in capsys.readouterr().err
        assert not list(root.rglob(f"*{FAILED}"))


class TestNotes:
    def failing(self, _: dict[str, Any]) -> None:
        raise ValueError("no memory left")

    @pytest.mark.parametrize("content", [b"someone's notes\n", b"", b"\xff\xfe"])
    def test_a_file_that_is_called_failed_is_kept(self, tmp_path, content):
        note = tmp_path / "ttt" / f"seed42{FAILED}"
        note.parent.mkdir()
        note.write_bytes(content)
        assert run_cells(grid("ttt"), tmp_path, self.failing) == 1
        assert run_cells(grid("ttt"), tmp_path, write_results) == 0
        assert note.read_bytes() == content

    def test_a_folder_or_a_link_that_is_called_failed_is_kept(self, tmp_path):
        for method in ("ttt", "icl"):
            (tmp_path / method).mkdir()
        (tmp_path / "mine").write_text("mine")
        (tmp_path / f"ttt/seed42{FAILED}").mkdir()
        (tmp_path / f"icl/seed42{FAILED}").symlink_to(tmp_path / "mine")
        assert run_cells(grid("ttt", "icl"), tmp_path, self.failing) == 1
        assert run_cells(grid("ttt", "icl"), tmp_path, write_results) == 0
        assert (tmp_path / f"ttt/seed42{FAILED}").is_dir()
        assert (tmp_path / f"icl/seed42{FAILED}").is_symlink()
        assert (tmp_path / "mine").read_text() == "mine"

    @pytest.mark.parametrize("content", ['{"my": "grid"}', "[1, 2]", "", '[["icl"]]', '[["../..", 1]]', "[[1, 2]]"])
    def test_a_grid_json_of_the_user_is_kept(self, tmp_path, content):
        (tmp_path / GRID).write_text(content)
        assert "grid.json was not written by a sweep, and is kept" in note_grid(grid("icl"), tmp_path)
        assert (tmp_path / GRID).read_text() == content

    def test_a_file_in_the_lock_s_place_is_kept(self, tmp_path, capsys):
        (tmp_path / LOCK).write_text("mine")
        command = ["sweep", "--methods", "random", "--seeds", "1", "--tasks", "t", "--output_path", str(tmp_path)]
        assert cli.main(command) == 1
        assert "is not the lock file of a sweep, and is kept" in capsys.readouterr().err
        assert (tmp_path / LOCK).read_text() == "mine"

    def test_foreign_files_among_slurm_s_are_passed_over(self, root, capsys):
        (root / "slurm").mkdir()
        for name, content in {"a": "{", "b": "[1]", "c": '{"1": [["icl", "x"]]}', "d": '{"1": 3}'}.items():
            (root / "slurm" / f"{name}.json").write_text(content)
        (root / "slurm/e.json").symlink_to("nowhere")
        assert cli.main(["sweep", "--status", "--output_path", str(root)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "1 done"


def test_status_tells_what_cannot_be_read(root, capsys):
    next(root.rglob("results_*.json")).write_text("{")
    assert cli.main(["sweep", "--status", "--output_path", str(root)]) == 0
    assert "icl, seed 42  unreadable" in capsys.readouterr().out


class TestFailingCells:
    """A sweep goes on after whatever a cell ends with."""

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("x"),
            SystemExit(3),
            MemoryError(),
            RecursionError("deep"),
            RuntimeError("CUDA"),
            OSError(28, "full"),
        ],
    )
    def test_the_next_cell_runs(self, tmp_path, error, capsys):
        ran = []

        def execute(options: dict[str, Any]) -> None:
            ran.append(options["model_args"]["method"])
            if len(ran) == 1:
                raise error
            write_results(options)

        assert run_cells(grid("icl", "ttt"), tmp_path, execute) == 1
        assert ran == ["icl", "ttt"]
        assert "1 of 2 cells are in" in capsys.readouterr().err

    def test_reasons_do_not_reach_the_terminal_as_commands(self, tmp_path, capsys):
        def execute(_: dict[str, Any]) -> None:
            raise ValueError("\x1b]0;title\x07 [/b] \x9b31m\nsecond line")

        assert run_cells(grid("icl"), tmp_path, execute) == 1
        assert cli.main(["sweep", "--status", "--output_path", str(tmp_path)]) == 0
        shown = "".join(capsys.readouterr())
        assert "second line" in shown
        assert not set(shown) & {"\x1b", "\x07", "\x9b"}

    def test_folder_names_do_not_reach_the_terminal_as_commands(self, tmp_path, capsys):
        (tmp_path / "a\x1b[31m[b]" / f"seed1{PARTIAL}").mkdir(parents=True)
        assert cli.main(["sweep", "--status", "--output_path", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "a[U+001B][31m[b], seed 1" in shown
        assert "\x1b" not in shown

    def test_ctrl_c_before_the_first_cell_is_one_line(self, tmp_path, capsys, monkeypatch):
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(runner, "make_model", interrupted)
        command = [
            "sweep",
            "--methods",
            "random",
            "--seeds",
            "1",
            "--tasks",
            "t",
            "--output_path",
            str(tmp_path / "out"),
        ]
        assert cli.main(command) == 130
        assert capsys.readouterr().err == "Stopped before the first cell.\n"
        assert not (tmp_path / "out").exists()
