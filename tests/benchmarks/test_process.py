"""A stage's process is timed, watched and, where it has to be, ended with all that it started."""

import sys
import time

import psutil
import pytest

from benchmarks.process import StageError, run


def script(code):
    return [sys.executable, "-c", code]


def test_marks_memory_and_time(tmp_path):
    code = "import time; print('one', flush=True); x = bytearray(200 << 20); time.sleep(1.5); print('two')"
    done = run("a stage", script(code), log=tmp_path / "log", limit=60, marks={"a": "on.", "b": "two", "c": "three"})
    assert done.marks["a"] + 1.4 < done.marks["b"] <= done.seconds
    assert "c" not in done.marks
    assert done.peak_bytes > 200 << 20
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_failure_names_the_last_line_and_the_log(tmp_path):
    with pytest.raises(StageError, match=r"a stage: ended with status 3: no luck \(all of it: .*log\)"):
        run("a stage", script("print('no luck'); raise SystemExit(3)"), log=tmp_path / "log", limit=60)


def test_the_limit_ends_the_children_too(tmp_path):
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']);"
        "print(child.pid, flush=True); time.sleep(100)"
    )
    start = time.monotonic()
    with pytest.raises(StageError, match="not done after 2 s"):
        run("a stage", script(code), log=tmp_path / "log", limit=2)
    assert time.monotonic() - start < 30
    child = int((tmp_path / "log").read_text())
    time.sleep(0.5)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_variables_are_set_and_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.process.ENVIRONMENT", {"PATH": "/usr/bin", "GONE": "1"})
    code = "import os; print(os.environ.get('GONE'), os.environ.get('NEW'))"
    run("a stage", script(code), log=tmp_path / "log", limit=60, env={"GONE": None, "NEW": "here"})
    assert (tmp_path / "log").read_text() == "None here\n"
