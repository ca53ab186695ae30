"""The environment is prepared wherever this process may run."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("cache", ["a file/cache", "folder"])
def test_what_is_compiled_is_kept_in_the_cache_where_there_can_be_one(cache, tmp_path):
    (tmp_path / "a file").touch()
    code = (
        "from ttt_harness.serving.environment import prepare_environment; prepare_environment(); "
        "import os, torch._dynamo; print(os.environ.get('TORCHINDUCTOR_CACHE_DIR'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment["TTT_CACHE_DIR"] = str(tmp_path / cache)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    kept = done.stdout.strip().startswith(str(tmp_path))
    assert kept == (cache == "folder")
