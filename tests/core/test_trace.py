"""A trace: ids are the truth, everything else is a view of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pertoken.core.bytes import byte_view
from pertoken.core.trace import Trace
from tests import tiny


def a_trace(**changes) -> Trace:
    """é over two ids, an emoji over two, a terminator."""
    fields = {
        "prompt_ids": (0, 5, 6),
        "prompt_pieces": (b"", b"Hi", b" you"),
        "completion_ids": (7, 8, 9, 10, 11, 1),
        "completion_pieces": (b"caf\xc3", b"\xa9 ", b"\xf0\x9f", b"\x98\x80", b"!", b""),
        "tokenizer": "t",
        "ended": True,
    }
    return Trace(**(fields | changes))


def test_text_and_views():
    trace = a_trace()
    assert len(trace) == 6
    assert (trace.prompt_text, trace.text) == ("Hi you", "café 😀!")
    assert trace.ids() == trace.completion_ids and trace.ids("prompt") == (0, 5, 6)
    assert trace.ids("all") == (0, 5, 6, 7, 8, 9, 10, 11, 1)
    assert trace.pieces("all") == trace.prompt_pieces + trace.completion_pieces
    with pytest.raises(ValueError, match="over='answer' is not one of completion, prompt, all"):
        trace.ids("answer")


def test_text_that_was_cut_inside_a_character():
    assert a_trace(completion_ids=(7,), completion_pieces=(b"caf\xc3",), ended=False).text == "caf\ufffd"


def test_spans_tile_the_bytes():
    for over in ("completion", "prompt", "all"):
        trace = a_trace()
        spans, data = trace.spans(over), b"".join(trace.pieces(over))
        assert spans.dtype == np.int64 and spans.shape == (len(trace.ids(over)), 2)
        assert [data[a:b] for a, b in spans] == list(trace.pieces(over))
        assert spans[0, 0] == 0 and spans[-1, 1] == len(data)
    assert a_trace(completion_ids=(), completion_pieces=()).spans().shape == (0, 2)


def test_tokens_between():
    trace = a_trace()
    every = [(a, b, set(trace.tokens_between(a, b))) for a in range(10) for b in range(a + 1, 12)]
    for a, b, found in every:
        assert found == {i for i, (s, e) in enumerate(trace.spans()) if len(set(range(s, e)) & set(range(a, b)))}
    assert 5 not in set().union(*(found for *_, found in every))  # the terminator has no byte
    assert trace.tokens_between(0, 2, "prompt").tolist() == [1]
    for a, b in ((3, 3), (4, 3), (-1, 2), (0, 12)):
        with pytest.raises(ValueError, match="11 bytes of the completion"):
            trace.tokens_between(a, b)
    with pytest.raises(ValueError, match="0 bytes"):
        a_trace(completion_ids=(), completion_pieces=()).tokens_between(0, 1)


def test_mask():
    assert a_trace().mask.tolist() == [True] * 6
    emitted = (True, True, False, False, True, True)
    assert a_trace(emitted=emitted).mask.tolist() == list(emitted) and a_trace(emitted=emitted).mask.dtype == bool


def test_with_prompt():
    lm = tiny.lm()
    trace = lm.trace("How was it?", "naïve 😀", source="x")
    recorded = np.linspace(-1, 0, len(trace))
    trace = Trace(**(vars(trace) | {"sampled_logps": recorded, "policy_logps": recorded, "sampling": {"seed": 1}}))
    other = trace.with_prompt(lm.encode_prompt("Be rude. How was it?"), lm.view)
    assert other.completion_ids == trace.completion_ids and other.completion_pieces == trace.completion_pieces
    assert "Be rude." in other.prompt_text and len(other.prompt_ids) == len(other.prompt_pieces)
    assert other.sampled_logps is None and other.policy_logps is None  # they were of the old prompt
    assert other.meta == trace.meta and other.ended
    assert trace.policy_logps is not None  # a new trace was made
    with pytest.raises(ValueError, match="is not the trace's"):
        trace.with_prompt((5, 6), byte_view(tiny.sentencepiece()))


def test_json_round_trip_is_exact():
    rng = np.random.default_rng(0)
    trace = a_trace(
        emitted=(True, False, True, True, False, True),
        sampled_logps=-rng.exponential(size=6),
        policy_logps=np.array([-1e-300, -np.pi, -0.1, -(2.0**-60), -123456.789, -np.inf]),
        sampling={"temperature": 0.7, "seed": 3},
        meta={"row": 4, "note": "ünï", "nested": {"a": [1, None]}},
    )
    again = Trace.from_json(json.loads(json.dumps(trace.to_json())))
    for name, value in vars(trace).items():
        other = getattr(again, name)
        assert type(other) is type(value)
        assert np.array_equal(other, value) if isinstance(value, np.ndarray) else other == value, name
    plain = Trace.from_json(json.loads(json.dumps(a_trace().to_json())))
    assert (plain.emitted, plain.sampled_logps, plain.policy_logps) == (None, None, None)
    assert (plain.sampling, plain.meta) == ({}, {})


def test_json_of_every_byte():
    pieces = tuple(bytes([b]) for b in range(256))
    trace = a_trace(completion_ids=range(256), completion_pieces=pieces)
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))).completion_pieces == pieces


def test_json_of_a_newer_version_is_read():
    assert Trace.from_json(a_trace().to_json() | {"invented_later": 1}).completion_ids == a_trace().completion_ids


def test_arrays_and_lists_become_plain_tuples():
    trace = a_trace(
        prompt_ids=[0, 5, 6],
        completion_ids=np.array([7, 8, 9, 10, 11, 1]),
        emitted=np.array([True, False, True, True, True, True]),
        policy_logps=[-1, -2, -3, -4, -5, -6],
    )
    assert trace.prompt_ids == a_trace().prompt_ids and trace.completion_ids == a_trace().completion_ids
    assert trace.emitted == (True, False, True, True, True, True) and set(map(type, trace.emitted or ())) == {bool}
    assert trace.policy_logps is not None and trace.policy_logps.dtype == np.float64
    json.dumps(trace.to_json())
    shared = (1, 2, 3)
    assert a_trace(prompt_ids=shared).prompt_ids is shared  # completions of one prompt share its ids


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt_pieces": (b"a",)}, "3 prompt ids, 1 pieces"),
        ({"completion_pieces": (b"a",)}, "completion_pieces has 1 entries for 6"),
        ({"emitted": (True,)}, "emitted has 1 entries"),
        ({"sampled_logps": np.zeros(5)}, "sampled_logps has 5 entries"),
        ({"policy_logps": np.zeros(7)}, "policy_logps has 7 entries"),
    ],
)
def test_lengths_that_disagree(changes, message):
    with pytest.raises(ValueError, match=message):
        a_trace(**changes)
