"""The one progress display of a sweep, and the time left that it tells."""

from types import SimpleNamespace

import pytest

from ttt_harness.run.progress import Display, RunProgress, showing
from ttt_harness.sweep import display
from ttt_harness.sweep.display import SweepDisplay, seconds_left


def test_time_left_goes_by_what_each_method_took():
    fits = {"icl": False, "ttt": True, "e2e": True}
    assert seconds_left({}, ["icl"], fits) is None
    assert seconds_left({"icl": [2.0, 4.0]}, ["icl", "icl"], fits) == 6.0
    assert seconds_left({"ttt": [10.0]}, ["e2e", "icl"], fits) == 12.0
    assert seconds_left({"ttt": [10.0]}, [], fits) == 0.0


@pytest.mark.parametrize(("seconds", "told"), [(30.0, "cell 3/4, about 60 s left"), (0.1, "cell 3/4")])
def test_the_time_left_is_said_of_the_whole_sweep_where_there_is_any(monkeypatch, capsys, seconds, told):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with SweepDisplay(["icl"] * 3, {"icl": False}, skipped=1) as shown:
        shown.begin("icl, seed 42")
        clock.now = seconds
        shown.end("done", measured=True)
        shown.begin("icl, seed 43")
    assert capsys.readouterr().err.splitlines()[-1] == f"[{told}] icl, seed 43: preparing (0% of this cell)"


class Recorded(Display):
    def __init__(self):
        super().__init__()
        self.shown = []

    def show(self, share, what, *, line=False):  # noqa: ARG002
        self.shown.append((share, what))


def test_a_run_shows_its_progress_in_the_display_that_is_named(capsys):
    display = Recorded()
    with showing(display), RunProgress(8) as progress:
        progress.say("fitting")
        progress.advance(2, "step 1")
        progress.advance(60, "step 2")
    assert display.shown == [(0.0, "fitting"), (0.25, "step 1"), (1.0, "step 2")]
    assert capsys.readouterr().err == ""
    with RunProgress(8) as progress:
        progress.say("alone")
    assert len(display.shown) == 3
    assert "alone (0% done)" in capsys.readouterr().err
