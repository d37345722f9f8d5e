"""What cache backends share."""

import pytest

from kdframe.api import cache_tools


@pytest.mark.parametrize(
    "line", [b"", b"\xff", b"[]", b"1", b"{}", b'{"a": 1}', b'{"a": 1, "sum": "00"}', b"[" * 9999]
)
def test_what_was_not_sealed_is_not_believed(line):
    assert cache_tools.opened(line) is None


def test_what_was_sealed_opens_and_a_flipped_bit_keeps_it_shut():
    import json

    text = json.dumps(cache_tools.sealed({"a": [1, "b"]})).encode()
    assert cache_tools.opened(text) == {"a": [1, "b"]}
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        assert cache_tools.opened(bytes(flipped)) is None
