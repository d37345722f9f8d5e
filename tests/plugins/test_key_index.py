"""The index from keys to places."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdframe_mmap_cache.index import KeyIndex

KEYS = st.binary(min_size=16, max_size=16) | st.sampled_from([bytes([i]) * 16 for i in range(4)])


@given(st.lists(st.lists(KEYS, min_size=1, max_size=8), max_size=8), st.lists(KEYS, max_size=4))
def test_every_place_of_a_key_is_found(shards, strangers):
    index = KeyIndex()
    places: dict[bytes, list[tuple[int, int]]] = {}
    for number, keys in enumerate(shards):
        index.add(number, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16))
        for row, key in enumerate(keys):
            places.setdefault(key[:8], []).append((number, row))
    asked = [*(key for keys in shards for key in keys), *strangers]
    for key, found in zip(asked, index.find(asked), strict=True):
        assert sorted(found) == places.get(key[:8], [])


def test_there_are_few_runs_however_many_shards():
    index = KeyIndex()
    rng = np.random.default_rng(0)
    for number in range(500):
        index.add(number, rng.integers(0, 256, (3, 16), np.uint8))
    assert len(index._runs) <= 12
