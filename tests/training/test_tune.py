"""torchtune is imported in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import ttt_harness
from ttt_harness.training import tune


def test_one_module_imports_torchtune_and_takes_no_more_than_is_used():
    package = Path(ttt_harness.__file__).parent
    importing, used = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(module.split(".")[0] == "torchtune" for module in modules):
                importing.add(path.relative_to(package).as_posix())
            if isinstance(node, ast.ImportFrom) and modules == ["ttt_harness.training.tune"]:
                used |= {alias.name for alias in node.names}
    assert importing == {"training/tune.py"}
    assert used == set(tune.__all__)


def test_counting_memory_imports_no_torchtune():
    code = "import sys, ttt_harness.run.memory, ttt_harness.training.shape; assert 'torchtune' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
