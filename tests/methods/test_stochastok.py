# pyright: reportArgumentType=false
"""StochasTok: the table of splits, what expansion keeps, and how it goes into traces and training data."""

import copy

import numpy as np
import pytest
import torch

from pertoken.core.bytes import byte_view
from pertoken.core.data import encode
from pertoken.core.examples import Example
from pertoken.core.loop import LoopConfig, fit
from pertoken.core.step import ObjectiveStep
from pertoken.tokenize.stochastok import StochasTok, expand, expansions
from pertoken.train.sft import SFT
from tests import tiny

PIECES = {0: b"a", 1: b"b", 2: b"c", 3: b"ab", 4: b"bc", 5: b"abc", 6: b"xyz", 7: b"abcab"}
PAIRS = expansions(PIECES)
TOKENIZERS = [tiny.tokenizer(), tiny.sentencepiece("bpe"), tiny.sentencepiece("unigram"), tiny.wordpiece()]
# the third knows hardly a word of its texts, so it spells them in letters, which are never split
names = ["byte-level", "sp-bpe", "sp-unigram", "wordpiece"]
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=names)
TEXT = "I loved every minute; my naïve friend did not."


def bytes_of(ids):
    return b"".join(PIECES[i] for i in ids)


def test_the_table_by_hand():
    """Every split point, shortest left part first; a token of one byte or without a split has none."""
    assert PAIRS == {3: ((0, 1),), 4: ((1, 2),), 5: ((0, 4), (3, 2)), 7: ((5, 3),)}
    again = expansions(dict(reversed(PIECES.items())))
    assert again == PAIRS


@pytest.mark.parametrize("proportion", [0.0, 0.3, 1.0, 7.5])
def test_bytes_never_change(proportion):
    ids = [7, 5, 6, 3, 0, 5, 4] * 4
    for seed in range(50):
        out, origins = expand(ids, PAIRS, proportion, np.random.default_rng(seed))
        assert bytes_of(out) == bytes_of(ids) and set(out) <= set(PIECES)
        assert len(out) - len(ids) <= int(len(ids) * proportion)
        assert origins == sorted(origins) and set(origins) == set(range(len(ids)))
        for place in range(len(ids)):
            assert bytes_of(o for o, k in zip(out, origins, strict=True) if k == place) == PIECES[ids[place]]
    assert expand(ids, PAIRS, 0.0, np.random.default_rng(0))[0] == ids


def test_each_success_adds_one_and_the_cap_holds():
    ids = [5] * 20
    for cap in (0, 1, 7):
        assert len(expand(ids, PAIRS, 3.0, np.random.default_rng(1), cap)[0]) == 20 + cap
    assert expand([0, 1, 2, 6], PAIRS, 9.0, np.random.default_rng(0))[0] == [0, 1, 2, 6]
    assert expand([], PAIRS, 1.0, np.random.default_rng(0)) == ([], [])
    assert expand([3], PAIRS, 0.9, np.random.default_rng(0))[0] == [3]  # int() rounds the tries to zero
    assert expand([3], PAIRS, 1.0, np.random.default_rng(0))[0] == [0, 1]


def test_pieces_are_split_again_and_everything_ends_in_bytes():
    out, _ = expand([7] * 3, PAIRS, 40.0, np.random.default_rng(0))
    assert out == [0, 1, 2, 0, 1] * 3


def test_splits_are_uniform_over_the_sequence_as_it_is_then():
    """Two tries on [abc, a]: the first hits abc in half of the draws, and splits it in either way. 8,000 runs, five
    standard errors (false alarm below 1e-5 a check)."""
    counts: dict[tuple, int] = {}
    for seed in range(8000):
        out = tuple(expand([5, 0], PAIRS, 1.0, np.random.default_rng(seed))[0])
        counts[out] = counts.get(out, 0) + 1
    # first try: abc (1/2) -> a|bc or ab|c; second: one of three tokens; else a, then the same with one try
    wanted = {
        (5, 0): 1 / 2 * 1 / 2,
        (0, 4, 0): 1 / 2 * 1 / 2 * (2 / 3) + 1 / 2 * 1 / 4,
        (3, 2, 0): 1 / 2 * 1 / 2 * (2 / 3) + 1 / 2 * 1 / 4,
        (0, 1, 2, 0): 1 / 2 * (1 / 3),
    }
    assert set(counts) == set(wanted) and sum(wanted.values()) == pytest.approx(1)
    for out, p in wanted.items():
        assert abs(counts[out] / 8000 - p) < 5 * (p * (1 - p) / 8000) ** 0.5, out


@every_tokenizer
def test_real_tokenizers(tokenizer):
    view, method = byte_view(tokenizer), StochasTok(proportion=2.0)
    ids, pieces = view.pieces_of_text(TEXT)
    for seed in range(10):
        out, _ = method.expand(ids, tokenizer, seed)
        assert len(out) >= len(ids) + (tokenizer is not TOKENIZERS[2]) and not set(out) & view.special_ids - set(ids)
        assert b"".join(map(view.piece, out)) == b"".join(map(view.piece, ids))
    assert method.expand(ids, tokenizer, 3) == method.expand(ids, tokenizer, 3)


def test_sentencepiece_splits_into_pieces_not_raw_bytes():
    tokenizer = tiny.sentencepiece("bpe")
    ids = byte_view(tokenizer).pieces_of_text("the great plot")[0]
    out, _ = StochasTok(proportion=50.0).expand(ids, tokenizer)
    assert not any(str(tokenizer.convert_ids_to_tokens(i)).startswith("<0x") for i in out)


def test_specials_are_never_split_or_made():
    tokenizer = tiny.tokenizer()
    out, _ = StochasTok(proportion=30.0).expand([0, 1, 2, 0], tokenizer)
    assert out == [0, 1, 2, 0]


def test_added_tokens_are_never_split_or_made():
    """A chat's markers are often added tokens that are not special; a long ordinary one must not become two of them."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["<plot", "ting>", "<plotting>"])
    added = tokenizer.convert_tokens_to_ids(["<plot", "ting>", "<plotting>"])
    method = StochasTok(proportion=30.0)
    assert method.expand(added, tokenizer)[0] == added
    ids = byte_view(tokenizer).pieces_of_text(TEXT)[0]
    assert not set(method.expand(ids, tokenizer)[0]) & set(added)


def test_pieces_of_a_first_word_without_its_space():
    """The id of "▁the" that begins a text says "the"; its parts say what is left of their own bytes."""
    from pertoken.core.lm import LM

    tokenizer = tiny.sentencepiece("bpe")
    lm = LM(tiny.llama(), tokenizer, template="plain")
    was = int(tokenizer.get_vocab()["▁was"])
    trace = lm.trace_of_ids((1,), (was, was), (b"was", b" was"))
    seen = set()
    for seed in range(20):
        out = StochasTok(proportion=2.0).trace(trace, tokenizer, seed)
        own = [byte_view(tokenizer).piece(i) for i in out.completion_ids]
        assert list(out.completion_pieces) == [own[0][1:], *own[1:]] and out.text == "was was"
        seen.add(out.completion_pieces[:2])
    assert {(b"", b"w"), (b"w", b"as")} <= seen


def test_report_counts_what_has_no_split():
    found = StochasTok().report(tiny.tokenizer())
    assert found["tokens"] > 20 and found["without_split"] == 0 and found["splits"] >= 1


@every_tokenizer
def test_traces_keep_text_and_masks(tokenizer):
    from pertoken.core.lm import LM

    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    lm = LM(tiny.llama(), tokenizer, template="plain")
    trace = lm.trace(TEXT, "A dull, lifeless film")
    emitted = tuple(k % 3 != 1 for k in range(len(trace)))
    trace = lm.trace_of_ids(
        trace.prompt_ids, trace.completion_ids, trace.completion_pieces, emitted=emitted, ended=True
    )
    out = StochasTok(proportion=3.0).trace(trace, tokenizer, 5)
    assert out.text == trace.text and len(out) >= len(trace) + (tokenizer is not TOKENIZERS[2]) and out.ended
    assert out.prompt_ids == trace.prompt_ids and out.sampled_logps is None
    assert out.completion_ids[-1] == trace.completion_ids[-1]
    said = lambda t: b"".join(p for p, e in zip(t.completion_pieces, t.emitted, strict=True) if e)
    assert said(out) == said(trace)
    with pytest.raises(ValueError, match="of tokenizer"):
        StochasTok().trace(trace, tiny.tokenizer(vocab=300))


def test_groups_train_like_any_others():
    lm = tiny.lm(dtype=torch.float32)
    lm.context = 256
    groups = encode(
        [Example(prompt="how was the film", responses=(f"great plot {i}",), kind="sft", row=i) for i in range(4)], lm
    )[0]
    method = StochasTok(proportion=2.0)
    out = method.groups(groups, lm.tokenizer)
    assert [g.traces[0].text for g in out] == [g.traces[0].text for g in groups]
    assert all(
        g.traces[0].prompt_ids == g.prompt_ids and len(g.prompt_ids) > len(o.prompt_ids) for g, o in zip(out, groups)
    )
    assert out[0].prompt_ids != out[1].prompt_ids  # each row has splits of its own
    again = method.groups(groups, lm.tokenizer, epoch=1)
    assert again[0].traces[0].completion_ids != out[0].traces[0].completion_ids
    plain = StochasTok(proportion=2.0, prompts=False).groups(groups, lm.tokenizer)
    assert plain[0].prompt_ids == groups[0].prompt_ids
    config = LoopConfig(lr=1e-3, batch_size=2, steps=2, seed=0)
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        fit(ObjectiveStep(SFT(), lm, out), config, Path(folder), progress=False)
    out[0].add_column("x", [np.zeros(len(out[0].traces[0]))])
    with pytest.raises(ValueError, match="expand data before preparation"):
        method.groups(out, lm.tokenizer)


def test_growth_is_about_p_times_what_can_be_split():
    """2,000 tokens at p = 0.05: within five standard errors of the expected number of splits."""
    ids = [5, 0] * 1000
    grown = len(expand(ids, PAIRS, 0.05, np.random.default_rng(3))[0]) - len(ids)
    assert abs(grown - 50) < 5 * (100 * 0.25) ** 0.5


def test_bad_options():
    for bad in ({"proportion": -0.1}, {"proportion": float("nan")}, {"cap": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="0 or more"):
            StochasTok(**bad)
    with pytest.raises(ValueError, match="proportion"):
        expand([1], PAIRS, -1.0, np.random.default_rng(0))
