"""The index from keys to places."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdframe_mmap_cache.index import KeyIndex

# Some keys come often, some agree with another in the half that is looked at first.
KEYS = (
    st.binary(min_size=16, max_size=16)
    | st.sampled_from([bytes([i]) * 16 for i in range(4)])
    | st.sampled_from([bytes(8) + bytes([i]) * 8 for i in range(4)])
)


@given(
    st.lists(st.lists(st.lists(KEYS, max_size=30), max_size=4), max_size=6),
    st.lists(KEYS, max_size=4),
)
def test_every_place_of_a_key_is_found_in_order_however_the_table_grew(additions, strangers):
    index = KeyIndex()
    places: dict[bytes, list[tuple[int, int]]] = {}
    number = 0
    for shards in additions:
        index.add([b"".join(keys) for keys in shards])
        for keys in shards:
            for row, key in enumerate(keys):
                places.setdefault(key, []).append((number, row))
            number += 1
    for key in [*places, *strangers]:
        assert index.find(key) == places.get(key, [])


def test_a_row_costs_at_most_22_bytes():
    rng = np.random.default_rng(0)
    for rows in (5000, 100_000):
        index = KeyIndex()
        index.add([rng.bytes(16 * rows)])
        assert index._table.nbytes <= 22 * rows
