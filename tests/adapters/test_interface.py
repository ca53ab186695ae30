"""The public interface of `ttt_harness.adapters`: what it names, and the example in its docstring."""

import doctest

import ttt_harness.adapters


def test_the_example_runs():
    results = doctest.testmod(ttt_harness.adapters)
    assert results.attempted > 10
    assert results.failed == 0


def test_every_name_has_a_docstring():
    for name in ttt_harness.adapters.__all__:
        assert getattr(ttt_harness.adapters, name).__doc__
