"""Dynamic tokenization: merging against a fresh count each time, embeddings, scoring, the large vocabulary."""

from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from tokenizers.pre_tokenizers import WhitespaceSplit

from pertoken.tokenize.dynamic_tokenization import DynamicTokenization, Symbols, merge, merges_for, replay
from tests import tiny

RULES = ("pretokens", "word", "word_hyphen", "sentence")
SPECIALS = ("<|start|>", "<|end|>", "<|pad|>")
CHARACTERS = "éïë😀👩\u200d👧日本مرحباﬁ"
PUNCTUATION = ".,!?;:()-\"'\\/`$%&*+<=>@[]^_{|}~"


def tokens_of(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(ids))


def raw(token):
    """Bytes of a token in GPT-2's alphabet, written out from its definition."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    table |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    return bytes(table[c] for c in token)


@cache
def marks_of(tokenizer):
    vocabulary = tokenizer.get_vocab()
    return {t for t in vocabulary if any(c in t for c in PUNCTUATION) and not any(c.isdigit() for c in t)}


@cache
def allowed(a, b, rule, tokenizer, reference):
    """The three rules of the specification, on token strings."""
    if a in SPECIALS or b in SPECIALS:
        return False
    joined = a + b
    if any(c in "ĠĊĉ" for c in joined[1:]) and (joined == "ĊĊ" or any(c not in "ĠĊĉ" for c in joined)):
        return False
    if rule == "sentence":
        return True
    try:
        text = raw(joined).decode()
    except UnicodeDecodeError:
        if reference:
            return True
        return any(raw(joined) in c.encode() for c in CHARACTERS)
    if rule == "pretokens":
        return len(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1
    if len(WhitespaceSplit().pre_tokenize_str(text)) != 1:
        return False
    marks = marks_of(tokenizer)
    return b == "-" if rule == "word_hyphen" and b in marks and a not in marks else True


def by_recounting(rows, rule, tokenizer, merges, reference=False):
    """All pairs are counted again after each merge."""
    rows, steps = [list(row) for row in rows], []
    while merges is None or len(steps) < merges:
        counts = Counter(pair for row in rows for pair in pairwise(row) if allowed(*pair, rule, tokenizer, reference))
        if not counts:
            break
        best = max(counts, key=counts.get)  # of equals, the first that went in
        steps.append(best)
        out = []
        for row in rows:
            new, i = [], 0
            while i < len(row):
                hit = tuple(row[i : i + 2]) == best
                new.append("".join(best) if hit else row[i])
                i += 1 + hit
            out.append(new)
        rows = out
    return rows, steps


def batch(seed, n=6, specials=False):
    rng, tokenizer = np.random.default_rng(seed), tiny.tokenizer()
    texts = [
        tiny.random_text(rng, 15) + " well-known aaaa a-b (it's) #tag!! 12 " * int(rng.integers(2)) for _ in range(n)
    ]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [[0, *row, 1] if specials else row for row in rows]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reference", [False, True])
def test_merging_is_that_of_the_recount(rule, reference):
    """Rows, steps and lengths, after any number of merges, with special tokens inside rows and an empty row."""
    tokenizer = tiny.tokenizer()
    symbols = Symbols(tokenizer)
    method = DynamicTokenization(boundary=rule, compat="reference" if reference else "paper")
    boundary = method.rule(symbols)
    for seed in range(2):
        rows = [*batch(seed, 3, specials=seed % 2 == 1), []]
        named = [tokens_of(tokenizer, row) for row in rows]
        for merges in (0, 7, None):
            wanted, steps = by_recounting(named, rule, tokenizer, merges, reference)
            got = merge(rows, boundary, merges)
            text = lambda symbol: (
                tokens_of(tokenizer, [symbol])[0] if symbols.special(symbol) else symbols.piece(symbol)
            )
            strings = [[t if t in SPECIALS else raw(t) for t in row] for row in wanted]
            assert [[text(s) for s in row] for row in got.rows] == strings
            assert got.steps == tuple((raw(a), raw(b)) for a, b in steps)
            assert got.lengths[-1] == sum(map(len, wanted)) and len(got.lengths) == len(steps) + 1


def test_by_hand():
    """Overlaps count each, ties go to the first met, occurrences are replaced greedily from the left."""
    tokenizer = tiny.tokenizer()
    symbols = Symbols(tokenizer)
    boundary = DynamicTokenization().rule(symbols)
    a, b, c = (tokenizer.convert_tokens_to_ids(x) for x in "xzq")
    got = merge([[c, b], [a, a, a, c]], boundary, 1)
    assert got.steps == ((b"x", b"x"),)  # two overlapping ones beat one
    assert [symbols.piece(s) for s in got.rows[1]] == [b"xx", b"x", b"q"] and got.starts == [[0, 1], [0, 2, 3]]
    assert got.lengths == (6, 5) and got.ends(1, 4) == [1, 2, 3]
    assert merge([[c, b], [a, c]], boundary, 1).steps == ((b"q", b"z"),)  # a tie
    assert merge([[a, c], [c, b]], boundary, 1).steps == ((b"x", b"q"),)
    twice = merge([[a, a, a, a, a]], boundary)
    assert [symbols.piece(s) for s in merge([[a] * 5], boundary, 1).rows[0]] == [b"xx", b"xx", b"x"]
    assert twice.lengths == (5, 3, 2, 1)


@pytest.mark.parametrize("rule", RULES)
def test_what_never_changes(rule):
    """Bytes of a row; M = 0; lengths that fall by what was replaced; a string of the base vocabulary is its token."""
    symbols = Symbols(tiny.tokenizer())
    boundary = DynamicTokenization(boundary=rule).rule(symbols)
    rows = batch(11, 8, specials=True)
    said = lambda some: [b"".join(symbols.piece(s) for s in row) for row in some]
    limit = merge(rows, boundary)
    assert merge(rows, boundary, 0).rows == rows
    for merges in range(0, len(limit.steps) + 1, 5):
        got = merge(rows, boundary, merges)
        assert said(got.rows) == said(rows) and got.lengths == limit.lengths[: merges + 1]
        assert sum(map(len, got.rows)) == limit.lengths[merges]
        for row, starts in zip(got.rows, got.starts):
            assert all(symbols.known(symbols.piece(s)) == s for s in row if not symbols.special(s))
            assert starts == sorted(set(starts))
    assert all(x > y for x, y in zip(limit.lengths, limit.lengths[1:]))


def test_the_limit_is_one_token_a_pretoken():
    """On texts without consecutive line breaks, parts of characters included."""
    tokenizer = tiny.tokenizer()
    symbols = Symbols(tokenizer)
    boundary = DynamicTokenization().rule(symbols)
    texts = [
        "日本語のテキスト、です。 テスト",
        "Ein Überfluß an  Wörtern; 😀 it's 12 o'clock!",
        "a\nb\tc",
        "👩‍👧 x",
        " ",
    ]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    pieces = [[p for p, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] for text in texts]
    assert [len(row) for row in merge(rows, boundary).rows] == [len(some) for some in pieces]
    loose = DynamicTokenization(compat="reference").rule(symbols)
    assert len(merge(rows[:1], loose).rows[0]) < len(pieces[0])  # the loophole
    breaks = tokenizer.encode("a\n\nb", add_special_tokens=False)
    assert [symbols.piece(s) for s in merge([breaks], boundary).rows[0]].count(b"\n") == 2


def test_boundaries_by_hand():
    tokenizer = tiny.tokenizer()
    symbols = Symbols(tokenizer)
    one = lambda text: symbols.of(text)
    asks = {
        (b"well", b"-"): (False, True, True, True),
        (b"well", b"!"): (False, True, False, True),
        (b"well", b"#"): (False, True, True, True),  # not in the reference's list
        (b" (", b"it"): (False, True, True, True),
        (b" well-", b"!"): (False, True, False, True),  # a merged token is never punctuation
        (b"-", b"!"): (True, True, True, True),
        (b" ", b" "): (True, False, False, True),
        (b"\n", b"\n"): (False, False, False, False),
        (b"\n", b"\n\n"): (True, False, False, True),
        (b"a", b" b"): (False, False, False, False),
        (b" a", b"b"): (True, True, True, True),
        (b"a", b"\xe3"): (False, False, False, True),
        (b"\xe3", b"\x81"): (True, True, True, True),
        (b"\x81", b"\xe3"): (False, False, False, True),
        (b"\xe3\x81", b"\x82\xe3"): (False, False, False, True),
    }
    for number, rule in enumerate(RULES):
        boundary = DynamicTokenization(boundary=rule).rule(symbols)
        for (a, b), wanted in asks.items():
            assert boundary(one(a), one(b)) == wanted[number], (rule, a, b)
        start = tokenizer.bos_token_id
        assert not boundary(start, one(b"a")) and not boundary(one(b"a"), start) and not boundary(start, start)


def test_bad_input_is_left_alone():
    symbols = Symbols(tiny.tokenizer())
    boundary = DynamicTokenization().rule(symbols)
    for rows in ([], [[]], [[0, 1, 0]], [[50]], [[], [50], [0]]):
        got = merge(rows, boundary)
        assert got.rows == rows and got.steps == () and DynamicTokenization().merge(rows, boundary).rows == rows
    for wrong in ({"merges": -1}, {"reduction": 1.5}):
        with pytest.raises(ValueError, match="merges must be"):
            DynamicTokenization(**wrong)
    with pytest.raises(ValueError, match="merges=-2"):
        merge([[50]], boundary, -2)


def test_one_row_alone_is_the_per_example_mode():
    symbols = Symbols(tiny.tokenizer())
    rows = batch(5, 5)
    for options in ({"merges": 4}, {"reduction": 0.6}):
        together = DynamicTokenization(per_example=True, **options)
        boundary = together.rule(symbols)
        alone = [DynamicTokenization(**options).merge([row], boundary) for row in rows]
        got = together.merge(rows, boundary)
        assert got.rows == [one.rows[0] for one in alone] and got.starts == [one.starts[0] for one in alone]
        assert got.lengths == (sum(map(len, rows)), sum(map(len, got.rows)))


def test_the_order_of_rows_changes_only_ties():
    """Where no two pairs tie, rows in another order are merged alike."""
    symbols = Symbols(tiny.tokenizer())
    boundary = DynamicTokenization().rule(symbols)
    word = lambda text: [symbols.of(bytes([c])) for c in text]
    rows = [word(w) for w in (b"xq", b"xqk", b"qk", b"zj", b"xq", b"xq", b"xq", b"qk", b"qkw")]
    found = merge(rows, boundary, 2)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(rows))
        other = merge([rows[i] for i in order], boundary, 2)
        assert other.steps == found.steps and other.rows == [found.rows[i] for i in order]


def test_replay():
    """The same batch again; and other rows by the merges of this one."""
    tokenizer = tiny.tokenizer()
    symbols = Symbols(tokenizer)
    rows = batch(3, 6)
    got = merge(rows, DynamicTokenization().rule(symbols), 20)
    fresh = Symbols(tokenizer)
    again = replay(rows, fresh, got.steps)
    pieces = lambda table, some: [[table.piece(s) for s in row] for row in some]
    assert pieces(fresh, again.rows) == pieces(symbols, got.rows)
    assert (again.starts, again.lengths) == (got.starts, got.lengths)
    alone = replay(rows[2:3], symbols, got.steps)
    assert alone.rows[0] == got.rows[2]  # a row does not depend on the others once the merges are given


def test_m_of_a_target():
    assert merges_for([[100, 90, 85, 80]], 0.0) == 0
    assert merges_for([[100, 90, 85, 80]], 0.5) == 1
    assert merges_for([[100, 90, 85, 80]], 0.51) == 2
    assert merges_for([[100, 90, 85, 80], [50, 40]], 1.0) == 3  # a batch at its limit stays there
    with pytest.raises(ValueError, match="give one curve"):
        merges_for([], 0.5)
    symbols = Symbols(tiny.tokenizer())
    batches = [batch(1), batch(2)]
    boundary = DynamicTokenization().rule(symbols)
    method = DynamicTokenization(reduction=0.5).calibrated(batches, boundary)
    limits = [merge(rows, boundary).lengths for rows in batches]
    at = lambda m: sum(curve[min(m, len(curve) - 1)] for curve in limits)
    assert at(0) - at(method.merges) >= 0.5 * (at(0) - at(10**6)) > at(0) - at(method.merges - 1)


def test_other_families():
    """SentencePiece and WordPiece: the bytes stay, specials stay."""
    for tokenizer in (tiny.sentencepiece("bpe"), tiny.sentencepiece("unigram"), tiny.wordpiece()):
        symbols = Symbols(tokenizer)
        method = DynamicTokenization(reduction=1.0)
        rows = method.encode(["the great plots were unbelievable", "a naïve friendship"], symbols)
        got = method.merge(rows, method.rule(symbols))
        assert sum(map(len, got.rows)) < sum(map(len, rows))
        for new, old, words in zip(got.rows, rows, (5, 3)):
            assert b"".join(map(symbols.piece, new)) == b"".join(map(symbols.piece, old))
            assert [s for s in new if symbols.special(s)] == [s for s in old if symbols.special(s)]
            if tokenizer.backend_tokenizer.pre_tokenizer is not None:  # else base tokens cross words
                assert sum(not symbols.special(s) for s in new) <= words  # some words are unknown, so special
