"""Segmenters by hand: each rule, tokens that were not emitted, bytes that are no characters, trees that do not fit."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.parsing import Unparsed, clauses, of_nltk, of_spacy, real_parser, sentences
from pertoken.core.segment import Fixed, Parsed, Perplexity, Randomized, checked, cut, macro_ids, with_tail
from pertoken.core.trace import Trace


def trace(pieces, emitted=None, prompt=(1,)):
    """Completion tokens of these bytes; ids count up."""
    pieces = [p.encode() if isinstance(p, str) else p for p in pieces]
    return Trace(
        prompt_ids=prompt,
        prompt_pieces=[b"x"] * len(prompt),
        completion_ids=range(len(pieces)),
        completion_pieces=pieces,
        tokenizer="t",
        emitted=emitted,
    )


def of(n, **options):
    return trace(["a"] * n, **options)


def test_fixed_and_its_tail():
    assert Fixed(n=5)(of(12)) == [0, 5, 10]
    assert with_tail([0, 5, 10], of(12)) == [0, 5, 10, 11]
    assert with_tail(Fixed(n=5)(of(11)), of(11)) == [0, 5, 10], "the grid falls on the last index: once"
    assert with_tail(Fixed(n=1)(of(4)), of(4)) == [0, 1, 2, 3]
    assert with_tail(Fixed(n=99)(of(4)), of(4)) == [0, 3], "one macro and the tail: two decisions"
    assert with_tail(Fixed(n=5)(of(1)), of(1)) == [0]
    assert Fixed(n=5)(of(0)) == [] == with_tail([], of(0))


def test_tokens_that_were_not_emitted_are_not_counted():
    tool = of(8, emitted=(True, False, False, True, True, True, True, False))
    assert Fixed(n=2)(tool) == [0, 4, 6] and with_tail([0, 4], tool) == [0, 4, 6]
    assert Fixed(n=1)(tool) == [0, 3, 4, 5, 6]
    late = of(4, emitted=(False, False, True, True))
    assert Fixed(n=1)(late) == [0, 3]
    assert with_tail(Fixed(n=2)(of(3, emitted=(False,) * 3)), of(3, emitted=(False,) * 3)) == [0]


def test_random_lengths_are_the_multiset_then_the_rest():
    long = of(60)
    starts = Randomized(repeat_times=2)(long)
    lengths = np.diff([*starts, 60]).tolist()
    assert sorted(lengths[:10]) == sorted([1, 2, 3, 5, 10] * 2) and lengths[10:] == [60 - 42]
    assert Randomized(repeat_times=2)(long) == starts
    others = [Randomized(repeat_times=2, seed=1)(long), Randomized(repeat_times=2)(of(60, prompt=(2,)))]
    assert starts not in others
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    Randomized()(long)
    assert (np.random.get_state()[1] == before[0]).all() and (torch.get_rng_state() == before[1]).all()  # type: ignore[index]


def test_perplexity_both_readings():
    perplexity = np.array([4.0, 3.0, 5.0, 5.0, 6.0, 2.0])  # rises: 1 to 2, and 3 to 4
    logps = -np.log(perplexity)
    assert Perplexity()(of(6), logps) == [0, 1, 3]
    assert Perplexity(cut="after")(of(6), logps) == [0, 2, 4]
    assert Perplexity()(of(2), np.array([-1.0, -2.0])) == [0], "a rise at the first token starts what started already"
    gap = of(4, emitted=(True, False, True, True))
    assert Perplexity(cut="after")(gap, np.array([-1.0, 9.0, -2.0, -3.0])) == [0, 2, 3]
    with pytest.raises(ValueError, match="give logps"):
        Perplexity()(of(2))


WORDS = ["The", " cat", " sat", " on", " the", " old", " mat", ".", " Go", "!"]


def tree(text):
    """By hand: ((The cat) (sat (on (the old mat))) .) and, of two words, one node."""
    if text == "Go!":
        return (0, 3, ((0, 2, ()), (2, 3, ())))
    assert text == "The cat sat on the old mat."
    np_, mat = (0, 7, ((0, 3, ()), (4, 7, ()))), (15, 26, ((15, 18, ()), (19, 22, ()), (23, 26, ())))
    return (0, 27, (np_, (8, 26, ((8, 11, ()), (12, 26, ((12, 14, ()), mat)))), (26, 27, ())))


def test_constituents_depth_first():
    """Of 8 tokens, 4 and 3 in `on the old mat` and `the old mat`; "sat", "on" and "." are words of their own."""
    assert Parsed(parser=tree, cutoff=5)(trace(WORDS)) == [0, 3, 8]  # (The cat, sat) (on the old mat .) (Go !)
    assert Parsed(parser=tree, cutoff=4)(trace(WORDS)) == [0, 4, 8]  # (The cat, sat on) (the old mat .) (Go !)
    assert Parsed(parser=tree, cutoff=2)(trace(WORDS)) == [0, 8], "no subtree of one token that is no word"
    assert Parsed(parser=tree, cutoff=9)(trace(WORDS)) == [0, 8]
    halves = ["The", " c", "at", " sat", " on", " the", " old", " m", "at", ".", " Go", "!"]
    assert Parsed(parser=tree, cutoff=5)(trace(halves)) == [0, 5, 10]  # 5 tokens in `on the old mat` now


def test_a_single_word_opens_its_sentence():
    def parser(text):
        return (0, 12, ((0, 2, ()), (3, 12, ((3, 5, ()), (6, 8, ()), (9, 12, ())))))

    assert Parsed(parser=parser, cutoff=4)(trace(["So", " we", " do", " go."])) == [0, 1]


def test_what_does_not_fit_falls_back_and_is_counted():
    def beyond(text):
        return (0, 999, ())

    def crossing(text):
        return (0, 10, ((0, 6, ()), (4, 10, ())))

    for parser in (beyond, crossing):
        with pytest.raises(Unparsed):
            Parsed(parser=parser)(trace(WORDS))
        some = [trace(WORDS), of(3)]
        assert cut(some, Parsed(parser=parser), [None, None], Fixed(n=4)) == ([[0, 4, 8, 9], [0, 2]], 2)
    assert cut([trace(WORDS)], Parsed(parser=tree), [None], Fixed(n=4)) == ([[0, 3, 8, 9]], 0)
    two_words = trace(["Thecat", " sat"])  # one token over two of the parser's words
    with pytest.raises(Unparsed, match="no token of its own"):
        Parsed(parser=lambda text: (0, 10, ((0, 3, ()), (3, 6, ()), (7, 10, ()))), cutoff=2)(two_words)


def test_bytes_and_white_space():
    split = trace(["é".encode()[:1], "é".encode()[1:], " ", " b"])
    assert Parsed()(split) == [0]
    with pytest.raises(Unparsed, match="bytes"):
        Parsed()(trace(["é".encode()[:1], b"a"]))  # half a character
    assert Parsed()(of(0)) == []
    assert Parsed()(trace([" ", "\n"])) == [0]
    assert Parsed()(trace(["One", "\n", "two"])) == [0, 2]
    assert Parsed()(trace(["é.", " Z"])) == [0, 1], "characters are counted as characters, tokens as bytes"


def test_sentences():
    text = " Hi there.  Is 3.5 ok?\n\nYes! "
    assert [text[a:b] for a, b in sentences(text)] == ["Hi there.", "Is 3.5 ok?", "Yes!"]


def words(text, tree):
    start, end, parts = tree
    return [words(text, part) for part in parts] if parts else text[start:end]


def test_clauses():
    text = "The film is long, and we left because of the noise."
    assert words(text, clauses(text)) == [
        [["The", "film"], ["is", "long", ","]],
        ["and", "we", "left"],
        ["because", "of", "the", "noise", "."],
    ]
    assert clauses("go") == (0, 2, ())
    assert clauses("...")[2] == ((0, 1, ()), (1, 2, ()), (2, 3, ()))


def test_trees_of_packages():
    text = 'He (my "dad") left.'
    found = [["He"], ["-LRB-"], ["my", "``", "dad", "''"], ["-RRB-"], [["left"]], ["."]]  # as an nltk.Tree iterates
    assert words(text, of_nltk(text, found)) == ["He", "(", ["my", '"', "dad", '"'], ")", "left", "."]
    with pytest.raises(Unparsed, match="'dog'"):
        of_nltk("the cat", [["the"], ["dog"]])
    # a spaCy-like sentence: the <- cat <- sat
    the, cat, sat = (
        SimpleNamespace(idx=i, text=t, i=k) for k, (i, t) in enumerate([(0, "the"), (4, "cat"), (8, "sat")])
    )
    for token, lefts, head in ((the, [], cat), (cat, [the], sat), (sat, [cat], sat)):
        token.lefts, token.rights, token.head = lefts, [], head
    assert of_spacy([the, cat, sat]) == (0, 11, ((0, 7, ((0, 3, ()), (4, 7, ()))), (8, 11, ())))


def test_a_parser_that_is_not_there_says_how_to_get_it(monkeypatch):
    real_parser.cache_clear()
    monkeypatch.setitem(sys.modules, "benepar", None)
    with pytest.raises(ImportError, match=r"pip install benepar.*parser=clauses"):
        real_parser("benepar")
    with pytest.raises(ValueError, match="not one of clauses, benepar"):
        real_parser("stanford")


def test_a_real_parser_that_fails_on_a_sentence_falls_back(monkeypatch):
    """benepar refuses sentences that are too long, constituent-treelib what is no sentence."""

    def parse(text):
        if "Go" in text:
            raise IndexError("no sentence")
        return [["The", "cat"], ["sat", "on", "the", "old", "mat"], "."]

    real_parser.cache_clear()
    package = SimpleNamespace(Parser=lambda model: SimpleNamespace(parse=parse))
    monkeypatch.setitem(sys.modules, "benepar", package)
    some = [trace(WORDS[:8]), trace(WORDS)]
    segmenter = Parsed(parser=real_parser("benepar"))
    assert cut(some, segmenter, [None, None], Fixed(n=4)) == ([[0, 7], [0, 4, 8, 9]], 1)
    with pytest.raises(Unparsed, match=r"benepar does not parse 'Go!': IndexError: no sentence"):
        segmenter(trace(WORDS))
    real_parser.cache_clear()


RULES = [Fixed(n=1), Fixed(n=3), Randomized(repeat_times=1), Perplexity(), Perplexity(cut="after"), Parsed(cutoff=3)]


@pytest.mark.parametrize("rule", RULES, ids=[f"{type(rule).__name__}-{k}" for k, rule in enumerate(RULES)])
def test_every_rule_cuts_all_of_a_response_in_order(rule):
    """Starts strictly increase from 0, lengths add up to the response's, its last token is one alone; holes or not."""
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 7, 40):
        for share in (1.0, 0.6):
            emitted = rng.random(length) < share
            one = trace(rng.choice([" the", " cat", " sat", ".", ",", " and", "\n"], length).tolist(), emitted=emitted)
            (starts,), failed = cut([one], rule, [rng.normal(size=length)], Fixed(n=5))
            assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < length and not failed
            mask = torch.from_numpy(emitted)[None]
            sizes = torch.bincount(macro_ids([starts], mask)[mask], minlength=len(starts))
            assert int(sizes.sum()) == emitted.sum() == one.mask.sum()
            if emitted.any():
                assert sizes[-1] == 1 and starts[-1] == np.flatnonzero(emitted)[-1]
            if rule == Fixed(n=1):
                assert sizes[1:].eq(1).all()


@pytest.mark.parametrize("starts", [[], [1], [0, 0], [0, 2, 1], [0, 3]])
def test_starts_that_are_none(starts):
    with pytest.raises(ValueError, match="strictly increasing"):
        checked(starts, of(3))
    with pytest.raises(ValueError):
        checked([0], of(0))


def test_macro_ids():
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert macro_ids([[0, 2, 4], [0, 1]], mask).tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]
    assert macro_ids([[0], []], mask).tolist() == [[0] * 5] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(n=0),
        lambda: Randomized(repeat_times=0),
        lambda: Perplexity(cut="before"),  # pyright: ignore[reportArgumentType]
        lambda: Parsed(cutoff=1),
    ],
)
def test_bad_options(make):
    with pytest.raises(ValueError):
        make()
