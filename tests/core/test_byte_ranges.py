# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Ids in the order of their bytes."""

import numpy as np
import pytest

from pertoken.core.byte_ranges import ByteRanges, Node, byte_ranges
from pertoken.core.bytes import byte_view
from tests import tiny

PIECES = [b"", b"ab", b"a", b"\xff\x00", b"abc", b"a", b"b", b"\xff"]


def test_every_prefix_is_a_range():
    ranges = ByteRanges(PIECES)
    assert [PIECES[i] for i in ranges.order] == sorted(p for p in PIECES if p)
    for prefix in {p[:k] for p in PIECES for k in range(len(p) + 1)}:
        node = ranges.find(prefix)
        assert sorted(ranges.order[node.lo : node.hi].tolist()) == [
            i for i, p in enumerate(PIECES) if p and p.startswith(prefix)
        ]
        ends = [i for i, p in enumerate(PIECES) if p and p == prefix]
        assert sorted(ranges.ending(node).tolist()) == ends
        for byte in range(256):
            child = ranges.child(node, byte)
            assert child == ranges.find(prefix + bytes([byte]))
    assert ranges.find(b"b\x00") is None and ranges.child(ranges.root, 0) is None
    assert [n.depth for n in ranges.along(b"abq")] == [1, 2] and ranges.root == Node(0, 7, 0)


def test_masses_are_sums_over_children_even_where_they_are_tiny():
    ranges = ByteRanges(PIECES)
    p = np.array([0.0, 0.5, 0.25, 1e-30, 0.1, 0.05, 0.1, 2e-30])  # by id
    weights = p[ranges.order]
    out = ranges.masses(ranges.root, weights)
    assert out[ord("a")] == pytest.approx(0.9) and out[ord("b")] == pytest.approx(0.1)
    assert out[0xFF] == pytest.approx(3e-30, rel=1e-12)  # a difference of cumulative sums would be 0
    assert np.diff(np.cumsum(weights))[-1] == 0
    node = ranges.find(b"a")
    inner = ranges.masses(node, weights[node.lo : node.hi])
    assert inner[ord("b")] == pytest.approx(0.6) and inner.sum() == pytest.approx(0.6)


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.sentencepiece])
def test_of_a_tokenizer(make):
    view = byte_view(make())
    inside, first = byte_ranges(view), byte_ranges(view, at_start=True)
    assert byte_ranges(view) is inside
    ids = set(range(view.size)) - set(view.special_ids)
    assert set(inside.order.tolist()) == {i for i in ids if view.piece(i)}
    assert set(first.order.tolist()) == {i for i in ids if view.pieces([i], at_start=True)[0]}


def test_word_pieces_are_refused():
    with pytest.raises(ValueError, match="do not say which bytes"):
        byte_ranges(byte_view(tiny.wordpiece()))
