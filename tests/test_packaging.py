"""Both kinds of install: what they bring, what plain lm-eval finds, what a start costs, what an uninstall leaves.

Each goes into an environment of its own, which sees this one's packages through path entries. Nothing is downloaded.
"""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOOK = "ttt_harness_startup.pth"
BUILD_FILES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", HOOK)
PIP_OPTIONS = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")


def files_in(folder: Path) -> set[str]:
    """The files below `folder`, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the packages of this one behind its own."""

    folder: Path

    @property
    def site(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(self.folder)}))

    def create(self) -> None:
        venv.create(self.folder)
        outer = [entry for entry in sys.path if Path(entry).name == "site-packages"]
        (self.site / "zz_outer.pth").write_text("\n".join(outer))

    def python(self, *arguments: str) -> str:
        """What the environment's Python prints, run away from the checkout."""
        command = [str(self.folder / "bin" / "python"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        return result.stdout

    def pip(self, *arguments: str) -> str:
        return self.python("-m", "pip", *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in BUILD_FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("ttt_harness", "task_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment in which ttt-harness is not installed."""
    environment = Environment(tmp_path_factory.mktemp("empty"))
    environment.create()
    return environment


@pytest.fixture(scope="module")
def wheel(empty: Environment, source: Path) -> Path:
    empty.pip("wheel", *PIP_OPTIONS, "--wheel-dir", str(empty.folder), str(source))
    (wheel,) = empty.folder.glob("ttt_harness-*.whl")
    return wheel


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, source: Path, wheel: Path
) -> Iterator[Environment]:
    """An environment with ttt-harness; when its tests are over, the uninstall must leave nothing behind."""
    environment = Environment(tmp_path_factory.mktemp(request.param))
    environment.create()
    before = files_in(environment.site)
    environment.pip(
        "install", *PIP_OPTIONS, *([str(wheel)] if request.param == "wheel" else ["--editable", str(source)])
    )
    yield environment
    environment.pip("uninstall", "--quiet", "--yes", "ttt-harness")
    assert files_in(environment.site) == before


def test_wheel_holds_every_file_that_is_used_and_the_hook(wheel: Path, source: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {f"ttt_harness/{name}" for name in files_in(source / "ttt_harness") if not name.endswith(".md")}
    tasks = {f"ttt_harness/task_configs/{name}" for name in files_in(source / "task_configs")}
    assert names == package | tasks | {HOOK}


def test_source_distribution_holds_the_task_files_and_the_hook(
    empty: Environment, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "copy")
    code = f"import os, setuptools.build_meta as build; os.chdir({str(tmp_path / 'copy')!r}); build.build_sdist('..')"
    empty.python("-c", code)
    (archive,) = tmp_path.glob("ttt_harness-*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {f"task_configs/{name}" for name in files_in(source / "task_configs")} | {HOOK} <= names


def test_start_imports_no_more_than_without(installed: Environment, empty: Environment) -> None:
    code = "import sys; print(sorted(sys.modules))"
    assert installed.python("-c", code) == empty.python("-c", code)


def test_tasks_are_a_package(installed: Environment) -> None:
    code = (
        "import importlib.resources, importlib.util, sys, ttt_harness.task_configs as tasks\n"
        "print(importlib.util.find_spec(tasks.__name__).submodule_search_locations == list(tasks.__path__))\n"
        "print(importlib.resources.files(tasks).joinpath('bbh_ttt').is_dir())\n"
        "print('torch' in sys.modules, 'lm_eval' in sys.modules)\n"
    )
    assert installed.python("-W", "error", "-c", code).split() == ["True", "True", "False", "False"]


def test_python_finds_model_and_tasks(installed: Environment) -> None:
    code = (
        "from pathlib import Path\n"
        "import ttt_harness.task_configs\n"
        "from lm_eval.api.registry import get_model, model_registry\n"
        "get_model('dummy'); print('ttt_vllm' in model_registry, 'hf' in model_registry)\n"
        "from lm_eval.tasks import TaskManager, _index\n"
        # Reading lm-eval's own ten thousand files takes 10 s and proves nothing here.
        "read, ours = _index.TaskIndex._iter_yaml_files, Path(ttt_harness.task_configs.__file__).parent.resolve()\n"
        "_index.TaskIndex._iter_yaml_files = staticmethod(lambda root: read(root) if root == ours else [])\n"
        "print('bbh_ttt' in TaskManager().all_groups, 'bbh_ttt' in TaskManager(include_defaults=False).all_groups)\n"
    )
    assert installed.python("-c", code).split() == ["True", "True", "True", "False"]


@pytest.mark.integration
def test_command_line_finds_tasks(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.create()
    environment.pip("install", *PIP_OPTIONS, str(wheel))
    tasks = "bbh_ttt,procedural_ttt,leaderboard_bbh_ttt,mmlu_ttt,mmlu_ttt_anatomy,arc_challenge_ttt,gsm8k_ttt"
    assert "All tasks found and valid" in environment.python("-m", "lm_eval", "validate", "--tasks", tasks)
