"""A store that is kept below a size."""

import pytest

from tests.adapters.stores import add_adapter
from ttt_harness.adapters.inventory import entries
from ttt_harness.adapters.prune import keep_below
from ttt_harness.adapters.store import AdapterStore
from ttt_harness.errors import StoreError


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "adapters")


def keys(found):
    return {one.key for one in found}


def test_those_go_first_that_were_used_longest_ago(store):
    made = [add_adapter(store, f"t{days}", days_unused=days) for days in range(4)]
    size = entries(store.root)[0].size
    assert keep_below(store, 4 * size + 100) == []
    assert keys(keep_below(store, 4 * size + 100, needed=size)) == {made[3].key}
    assert keys(entries(store.root)) == keys(made[:3])
    assert keys(keep_below(store, 2 * size + 100, needed=size, keep={made[2].key})) == keys(made[:2])
    assert keys(entries(store.root)) == {made[2].key}


def test_what_others_serve_stays(store):
    served, other = add_adapter(store, "a", days_unused=9), add_adapter(store, "b")
    size = entries(store.root)[0].size
    with store.using(served.key):
        assert keys(keep_below(store, size + 100)) == {other.key}
        with pytest.raises(StoreError, match="cannot be kept now: other processes use adapters"):
            keep_below(store, size + 100, needed=size)
    assert keys(keep_below(store, size + 100, needed=size)) == {served.key}


def test_a_limit_below_what_a_run_needs_is_refused_and_nothing_goes(store):
    made = add_adapter(store)
    with pytest.raises(StoreError, match="adapter_limit=5 kB is less than what this run's adapters take, 6 kB"):
        keep_below(store, 5000, needed=6000)
    with pytest.raises(StoreError, match="is less than what"):
        keep_below(store, 1000, keep={made.key})
    assert len(entries(store.root)) == 1


def test_a_store_that_is_not_there_is_empty(tmp_path):
    assert keep_below(AdapterStore(tmp_path / "nothing"), 100, needed=100) == []
