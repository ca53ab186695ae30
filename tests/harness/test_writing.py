"""Adapters go to the store beside the next fit, one at a time."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from ttt_harness.harness.model import TTTVLLM, Group


def test_a_slow_store_has_the_fit_after_next_wait():
    fitted, may_write = [], threading.Event()
    model = SimpleNamespace(
        _stored=lambda *_: None,
        _fit=lambda group, *_: fitted.append(group.key),
        _keep=lambda *_: may_write.wait(),
        _writing=None,
        store=SimpleNamespace(fitting=lambda *_: contextlib.nullcontext()),
    )

    def fit(key, writer):
        return TTTVLLM.fit_group(model, Group("task", None, [], key=key), None, "here", writer)

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as fits:
        try:
            written = [fits.submit(fit, key, writer) for key in "abc"]
            first = written[0].result(timeout=10)
            assert not first.done()
            assert not written[1].done()  # it is fitted while the first is written, and waits for that
            assert "c" not in fitted
        finally:
            may_write.set()
        assert [future.result(timeout=10).result(timeout=10) for future in written] == [True, True, True]
    assert fitted == ["a", "b", "c"]
