"""VADER as token credit: cases by hand, and the identity that the shares sum to the compound score."""

import gzip
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pertoken.core.trace import Trace
from pertoken.score import vader

pytest.importorskip("vaderSentiment", reason="pip install 'pertoken[sentiment]'")

GOOD, BAD = 1.9, -2.5  # valences of the lexicon


def cut(*pieces, **given: Any):
    """A trace whose completion is cut by hand; a piece is text or bytes."""
    data = tuple(p.encode() if isinstance(p, str) else p for p in pieces)
    options: dict[str, Any] = {"tokenizer": "toy"} | given
    return Trace(
        prompt_ids=(), prompt_pieces=(), completion_ids=tuple(range(len(data))), completion_pieces=data, **options
    )


def squash(s):
    return s / math.sqrt(s * s + 15)


def values(*pieces, **options):
    return vader.Vader(**options.pop("vader", {})).score([cut(*pieces, **options)])[0].values


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("", 0.0),
        ("the table", 0.0),
        ("good", GOOD),
        ("not good", -0.74 * GOOD),
        ("very good", GOOD + 0.293),
        ("good!!!", GOOD + 3 * 0.292),
        ("bad!", BAD - 0.292),
        ("good?", GOOD),
        ("good??", GOOD + 2 * 0.18),
        ("GOOD day", GOOD + 0.733),
        ("GOOD", GOOD),  # capitals count only beside small letters
        ("good but bad", 0.5 * GOOD + 1.5 * BAD),
        ("it was kind of good", GOOD - 0.293),
    ],
)
def test_compound_by_hand(text, total):
    assert vader.compound(text) == pytest.approx(squash(total), abs=1e-12)


def test_negation_stays_on_the_word_it_negates():
    assert values("not", " good") == pytest.approx([0, squash(-0.74 * GOOD)])


def test_emphasis_stands_on_its_marks():
    s = GOOD + 3 * 0.292
    size = math.sqrt(s * s + 15)
    assert values("good", "!", "!", "!", " End") == pytest.approx([GOOD / size, *[0.292 / size] * 3, 0])
    assert values("the", "!!") == pytest.approx([0, 0])


def test_opposite_words_that_cancel_keep_their_credit():
    got = values("good", " and", " bad")
    size = math.sqrt((GOOD + BAD) ** 2 + 15)
    assert got == pytest.approx([GOOD / size, 0, BAD / size])
    assert abs(got.sum()) < 0.16 and got[0] > 0.48


def test_tokens_that_split_a_word_share_by_bytes():
    whole = values(" good")[0]
    assert values(" g", "ood") == pytest.approx([whole / 4, whole * 3 / 4])


def test_emoji_and_text_of_several_bytes():
    text = "Café 😊 naïve 💘"
    data = text.encode()
    assert values(*[data[i : i + 1] for i in range(len(data))]).sum() == pytest.approx(vader.compound(text))
    spans = vader.lexicon_labels(text)
    assert [(data[a:b].decode(), sign) for a, b, sign in spans] == [("😊", 1), ("💘", 1)]


def test_bytes_that_are_no_character_do_not_shift_the_words():
    got = values("oh ", b"\xf0\x9f", " good ", b"\x98")
    assert got == pytest.approx([0, 0, squash(GOOD), 0])


def test_labels_keep_the_raw_sign():
    assert vader.lexicon_labels("not good, very BAD") == [(4, 8, 1), (15, 18, -1)]
    assert vader.lexicon_labels("the table") == []
    assert values("not", " go", "od", " bad", vader={"label_only": True}) == pytest.approx([0, 1, 1, -1])


def test_sequence_level_and_meta():
    trace = cut("good", "!", b"", ended=True)
    token, sequence = (vader.Vader(level=level).score([trace])[0] for level in ("token", "sequence"))
    assert token.reduce() == pytest.approx(sequence.reduce()) == pytest.approx(token.meta["compound"])
    assert sequence.values[:2] == pytest.approx([0, 0]) and sequence.level == "sequence"
    assert sum(token.meta["parts"].values()) == pytest.approx(token.meta["compound"])
    assert (token.kind, token.method) == ("reward", "vader")


def test_tokens_the_policy_did_not_emit_earn_nothing():
    got = values("good", " bad", emitted=(True, False))
    assert got[0] > 0 and got[1] == 0


def test_empty_completion_and_bad_options():
    assert values().shape == (0,)
    with pytest.raises(ValueError, match="level="):
        vader.Vader(level="span")
    with pytest.raises(ValueError, match="label_only"):
        vader.Vader(level="sequence", label_only=True)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    vader._package.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pertoken\[sentiment\]"):
            vader._package()
    finally:
        vader._package.cache_clear()


def test_sum_identity_on_real_sentences():
    folder = os.environ.get("PERTOKEN_DATA")
    path = Path(folder or ".") / "sentiment" / "sentences.jsonl.gz"
    if not folder or not path.exists():
        pytest.skip("PERTOKEN_DATA names no folder with sentiment/sentences.jsonl.gz")
    tokenizers = pytest.importorskip("tokenizers")
    with gzip.open(path, "rt", encoding="utf8") as lines:
        texts = [json.loads(line)["text"] for line in lines][::3]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts[:300], vocab_size=600, show_progress=False)
    analyzer, moved = vader._analyzer(), 0
    for text in texts:
        offsets = [end for _, end in bpe.encode(text).offsets]
        ends = [len(text[:end].encode()) for end in offsets]
        data = text.encode()
        pieces = [data[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        credit = vader.Vader().score([cut(*pieces)])[0]
        assert credit.trace.text == text
        assert credit.reduce() == pytest.approx(vader.compound(text), abs=1e-12)
        assert credit.reduce() == pytest.approx(analyzer.polarity_scores(text)["compound"], abs=5.001e-5)
        moved += bool(np.any(credit.values))
    assert moved > len(texts) / 2
