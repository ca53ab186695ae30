"""Adapters go to the store beside the next fit, one at a time; settings that matter name them."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.run.fakes import SETTINGS, FakeTrainer, Log
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.run.fitter import Fitter
from ttt_harness.run.orders import FitOrder

SEQUENCES = [TrainingSequence((1, 2, 3), (False, True, True))]


def test_a_slow_store_has_the_fit_after_next_wait(tmp_path, monkeypatch):
    store, log, may_write = AdapterStore(tmp_path), Log(), threading.Event()
    save = store.save

    def slow_save(*args, **options):
        may_write.wait()
        return save(*args, **options)

    monkeypatch.setattr(store, "save", slow_save)
    trainer = FakeTrainer(log, 0.01)
    fitter = Fitter(store, lambda: trainer, base_model=tmp_path)
    with ThreadPoolExecutor(1) as fits:
        try:
            done = [
                fits.submit(fitter.fit, FitOrder(key, key, key, SEQUENCES, SETTINGS), lambda *_: None) for key in "abc"
            ]
            assert done[0].result(timeout=10).fit_seconds is not None  # while it is being written
            with pytest.raises(TimeoutError):
                done[1].result(timeout=0.3)  # it is fitted while the first is written, and waits for that
            assert len(log.spans) == 2
        finally:
            may_write.set()
        assert [future.result(timeout=10).adapter for future in done] == [str(tmp_path / key) for key in "abc"]
    assert all(fitter.stored(key) for key in "abc")


def test_the_key_depends_on_every_setting_the_model_and_the_sequences():
    other = {"dtype": "bfloat16", "device": "cuda", "lr": 2e-3, "alpha": 2.0, "dropout": 0.1}
    changed = [
        dataclasses.replace(SETTINGS, **{f.name: other.get(f.name, getattr(SETTINGS, f.name) * 2)})
        for f in dataclasses.fields(SETTINGS)
    ]
    keys = [one.key("model", SEQUENCES) for one in [SETTINGS, *changed]]
    keys += [SETTINGS.key("other", SEQUENCES), SETTINGS.key("model", SEQUENCES * 2)]
    assert len(set(keys)) == len(keys)
    assert SETTINGS.key("model", SEQUENCES) == keys[0]


def test_keys_of_stored_adapters_are_as_ever():
    """Made by version 4 of the fits, before the run core: whoever has adapters keeps them."""
    assert SETTINGS.key("m", SEQUENCES) == "b1f1deaded4a0575ad8f11f350879aa1"
