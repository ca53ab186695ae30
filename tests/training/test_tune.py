"""torchtune is imported in one place."""

import ast
from pathlib import Path

import ttt_harness
from ttt_harness.training import tune


def test_one_module_imports_torchtune_and_takes_no_more_than_is_used():
    package = Path(ttt_harness.__file__).parent
    importing, used = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchtune") or (
                isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "torchtune" for alias in node.names)
            ):
                importing.add(path.relative_to(package).as_posix())
            elif isinstance(node, ast.ImportFrom) and node.module == "ttt_harness.training.tune":
                used |= {alias.name for alias in node.names}
    assert importing == {"training/tune.py"}
    assert used == set(tune.__all__)


def test_counting_memory_imports_no_torchtune():
    import subprocess
    import sys

    code = "import sys, ttt_harness.run.memory, ttt_harness.training.shape; assert 'torchtune' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
