# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
"""Dynamic tokenization: merging against a fresh count each time, embeddings, scoring, the large vocabulary."""

from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from pertoken.core.bytes import byte_view
from pertoken.tokenize.dynamic_tokenization import (
    Draw,
    DynamicTokenization,
    Embeddings,
    Hypernetwork,
    Index,
    Symbols,
    Vocabulary,
    distill,
    generate,
    grow,
    merge,
    merges_for,
    replay,
    reproduce,
)
from pertoken.tokenize.dynamic_tokenization.merging import random_split
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


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.sentencepiece, tiny.wordpiece])
def test_pieces_are_those_of_the_batch(make):
    """What `pertoken tokenize` shows: each text in the tokens it has as a part of this batch, to the byte."""
    tokenizer, texts = make(), ["the great plots were great", "", "a great plot", "great"]
    assert DynamicTokenization(merges=0).pieces(texts, tokenizer) == [
        [*byte_view(tokenizer).pieces_of_text(text)[1]] for text in texts
    ]
    found = DynamicTokenization(reduction=1.0).pieces(texts, tokenizer)
    assert [b"".join(some).decode() for some in found] == texts and found[1] == []
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    rows = merge(ids, DynamicTokenization().rule(Symbols(tokenizer))).rows
    assert [len(some) for some in found] == [len(row) for row in rows] and len(found[0]) < len(ids[0])


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


def reader(dtype=torch.float64, tied=False, **options):
    model = tiny.llama(dtype=dtype)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return DynamicTokenization(**options).on(model, tiny.tokenizer())


def test_fvt_by_hand():
    """The mean of the parts' rows; a base token's own row; bytes that are no text; the unknown token."""
    read = reader()
    symbols, table = read.symbols, read.model.model.embed_tokens.weight.detach()
    head = read.model.lm_head.weight.detach()
    one = lambda text: symbols.known(text)
    new = [symbols.of(b" plotfilm"), symbols.of(b"\xe3\x81")]
    spelled = tiny.tokenizer().encode(" plotfilm", add_special_tokens=False)
    inputs, outputs, bias = read.embeddings.rows([*new, 70, 300])
    for got, source in ((inputs, table), (outputs, head)):
        torch.testing.assert_close(got[0], sum(source[i] for i in spelled) / len(spelled))
        torch.testing.assert_close(got[1], (source[one(b"\xe3")] + source[one(b"\x81")]) / 2)
        assert torch.equal(got[2], source[70]) and torch.equal(got[3], source[300])
    assert not bias.any()
    odd = Symbols(tiny.wordpiece())
    assert Embeddings(tiny.llama(vocab=200), odd).parts(odd.of("日".encode())) == (1,)


def test_no_merge_leaves_the_logits_to_the_bit():
    read = reader(merges=0)
    rows = batch(7, 4, specials=True)
    got = read.merge(rows)
    assert got.rows == rows
    hidden, mask = read.hidden(got.rows)
    ids = torch.zeros_like(mask)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    wanted = read.model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(read.model.lm_head(hidden)[mask == 1], wanted[mask == 1])


def test_inputs_are_rows_in_their_places():
    """Merged rows, padded left or right after merging; special tokens keep their rows even where all are predicted."""
    net = Hypernetwork.fresh(tiny.llama(), seed=1, width=16)
    torch.nn.init.normal_(net.leave.weight)
    for predict_base in (False, True):
        read = reader(hypernetwork=net, predict_base=predict_base, reduction=0.7)
        rows = batch(9, 3, specials=True)
        merged = read.merge(rows)
        table = read.model.model.embed_tokens.weight.detach()
        with torch.no_grad():
            for left in (False, True):
                embedded, mask = read.embeddings.inputs(merged.rows, left)
                for n, row in enumerate(merged.rows):
                    own = embedded[n, -len(row) :] if left else embedded[n, : len(row)]
                    assert mask[n].sum() == len(row) and mask[n, -1 if left else 0] == 1
                    for x, s in zip(own, row):
                        plain = read.symbols.special(s) or (s < read.symbols.base and not predict_base)
                        wanted = table[s] if plain else read.embeddings.predict([read.embeddings.parts(s)])[0][0]
                        torch.testing.assert_close(x, wanted.double(), atol=1e-5, rtol=1e-4)


def test_an_untrained_hypernetwork_is_fvt():
    model = tiny.llama()
    symbols = Symbols(tiny.tokenizer())
    new = [(40, 41, 42), (300,), tuple(range(60, 75))]
    plain, net = Embeddings(model, symbols), Embeddings(model, symbols, Hypernetwork.fresh(model, width=16))
    for a, b in zip(plain.predict(new), net.predict(new)):
        assert torch.equal(a, b)


def test_prediction_does_not_depend_on_the_batch():
    """Padding of the parts changes nothing, nor do parts beyond the sixth, but for the mean."""
    model = tiny.llama()
    net = Hypernetwork.fresh(model, seed=2, width=16)
    torch.nn.init.normal_(net.leave.weight)
    torch.nn.init.normal_(net.place)  # an untrained one knows no order
    made = Embeddings(model, Symbols(tiny.tokenizer()), net)
    some = [(40, 41), (50, 51, 52, 53, 54, 55, 56, 57), (60,)]
    together, means = made.predict(some), made.fvt(some)
    for n, parts in enumerate(some):
        for a, b in zip(together, made.predict([parts])):
            torch.testing.assert_close(a[n], b[0], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(together[0][n], means[0][n])
    other = made.predict([(50, 51, 52, 53, 54, 55, 99, 98)])[0][0] - made.fvt([(50, 51, 52, 53, 54, 55, 99, 98)])[0][0]
    torch.testing.assert_close(together[0][1] - means[0][1], other, atol=1e-5, rtol=1e-4)
    swapped = made.predict([(41, 40)])[0][0]
    assert not torch.allclose(together[0][0], swapped)  # order matters


def test_the_cache_keeps_the_last_used_and_the_current_batch():
    read = reader(cache=3)
    new = [read.symbols.of(f" new{i}".encode()) for i in range(6)]
    made = read.embeddings
    wanted = made.predict([made.parts(s) for s in new])[0]
    with torch.no_grad():
        assert torch.equal(made.rows(new[:5])[0], wanted[:5]) and set(made.kept) == set(new[:5])
        assert torch.equal(made.rows([new[0], new[5]])[0], wanted[[0, 5]])
        assert list(made.kept) == [new[4], new[0], new[5]]
        calls = []
        made.predict = lambda parts: calls.append(parts) or wanted
        made.rows([new[0], new[4]])
        assert not calls


def test_random_splits_spell_the_token():
    symbols, rng = Symbols(tiny.tokenizer()), np.random.default_rng(0)
    seen = set()
    for i in range(256, symbols.base):
        piece = symbols.piece(i)
        if len(piece) > 1:
            for _ in range(5):
                parts = random_split(piece, symbols, rng)
                if parts is not None:
                    assert b"".join(map(symbols.piece, parts)) == piece and 2 <= len(parts) <= 6
                    seen.add(len(parts))
    assert seen >= {2, 3, 4}


def test_training_lowers_both_losses_and_is_saved(tmp_path):
    """Both stages, seeded; the model stays as it was; what is saved and loaded says the same."""
    model = tiny.llama(dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    net = Hypernetwork.fresh(model, width=32)
    method = DynamicTokenization(hypernetwork=net, reduction=1.0)
    read = method.on(model, tiny.tokenizer())
    rows = [tiny.tokenizer().encode(text, add_special_tokens=False) for text in tiny.TEXTS[:4]]
    first = reproduce(read.embeddings, steps=30, batch=64, lr=3e-3)
    assert np.mean(first[-5:]) < 0.9 * np.mean(first[:2])
    fresh = DynamicTokenization(hypernetwork=Hypernetwork.fresh(model, width=32), reduction=1.0).on(
        model, tiny.tokenizer()
    )

    def divergence(one):
        """Mean KL at the limit, by hand."""
        merged, base = one.merge(rows), merge(rows, one.boundary, 0)
        out = []
        for n in range(len(rows)):
            p = model.lm_head(one.hidden([base.rows[n]])[0][0]).double().log_softmax(-1)
            q = model.lm_head(one.hidden([merged.rows[n]])[0][0]).double().log_softmax(-1)
            out += [(p[e].exp() * (p[e] - q[k])).sum().item() for k, e in enumerate(merged.ends(n, len(rows[n])))]
        return np.mean(out)

    start = divergence(fresh)
    losses = distill(fresh.embeddings, rows, fresh.boundary, steps=25, batch=4, lr=3e-3, places=30)
    assert len(losses) == 25 and divergence(fresh) < 0.8 * start
    again = DynamicTokenization(hypernetwork=Hypernetwork.fresh(model, width=32)).on(model, tiny.tokenizer())
    assert distill(again.embeddings, rows, again.boundary, steps=2, batch=4, lr=3e-3, places=30) == losses[:2]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(state, torch.random.get_rng_state())
    path = fresh.embeddings.hypernetwork.save(tmp_path / "net.safetensors")
    loaded = DynamicTokenization(hypernetwork=path, reduction=1.0).on(model, tiny.tokenizer())
    torch.testing.assert_close(loaded.hidden(loaded.merge(rows).rows)[0], fresh.hidden(fresh.merge(rows).rows)[0])


def test_nats_are_those_of_the_next_base_token():
    """By hand, one row at a time, at the boundaries that both ways of reading have."""
    read = reader(reduction=0.8)
    rows = batch(13, 3, specials=True)
    merged, base = read.merge(rows), merge(rows, read.boundary, 0)
    for how in (merged, base):
        nats = size = 0
        for n, row in enumerate(rows):
            logp = read.model.lm_head(read.hidden([how.rows[n]])[0][0]).log_softmax(-1)
            place = {e: k for k, e in enumerate(how.ends(n, len(row)))}
            for end in merged.ends(n, len(row))[:-1]:
                if row[end + 1] != 1:
                    nats -= logp[place[end], row[end + 1]].item()
                    size += len(read.symbols.piece(row[end + 1]))
        got, counted = read.nats(rows, how, merged)
        assert counted == size and got == pytest.approx(nats, rel=1e-9)
    with pytest.raises(ValueError, match="score at fewer boundaries"):
        read.nats(rows, merged, base)
    assert read.nats([[0], []], merge([[0], []], read.boundary, 0)) == (0.0, 0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_adaptation_trains_on_what_is_scored(share):
    """The first loss by hand (the adapter begins at nothing): at share 0 of the base tokens, at 1 of merged ones."""
    read = reader(dtype=torch.float32)
    rows = [[0, *tiny.tokenizer().encode(text, add_special_tokens=False), 1] for text in tiny.TEXTS[:3]]
    merged, wanted = merge(rows, read.boundary, None if share else 0), []
    for n, row in enumerate(rows):
        logp = read.model.lm_head(read.hidden([merged.rows[n]])[0][0]).log_softmax(-1)
        wanted += [-logp[k, row[e + 1]].item() for k, e in enumerate(merged.ends(n, len(row))[:-1]) if row[e + 1] != 1]
    before = {k: v.clone() for k, v in read.model.state_dict().items()}
    state = torch.random.get_rng_state()
    other, losses = read.adapt(rows, reduction=share, steps=12, batch=3, lr=3e-3)
    assert losses[0] == pytest.approx(np.mean(wanted), rel=1e-4) and losses[-1] < 0.9 * losses[0]
    own = other.nats(rows, DynamicTokenization(merges=len(merged.steps)).merge(rows, other.boundary))
    first = read.nats(rows, merged)
    assert own[0] < 0.9 * first[0] and own[1] == first[1] and first[0] == pytest.approx(sum(wanted), rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in read.model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert [k for k, _ in other.model.named_parameters()] == [k for k, _ in read.model.named_parameters()]  # merged


def test_adaptation_draws_m_and_refuses_nothing_to_predict():
    """M of the batch is drawn from 0 to the limit, by the seed; a hypernetwork's rows are read and not trained."""
    net = Hypernetwork.fresh(tiny.llama(), seed=1, width=16)
    torch.nn.init.normal_(net.leave.weight)
    read = reader(dtype=torch.float32, hypernetwork=net)
    rows = [tiny.tokenizer().encode(text, add_special_tokens=False) for text in tiny.TEXTS[:1]]
    limit, possible = merge(rows, read.boundary), set()
    for merges in range(len(limit.steps) + 1):
        how = merge(rows, read.boundary, merges)
        possible.add(read.nats(rows, how)[0] / (len(how.rows[0]) - 1))
    losses = read.adapt(rows, steps=6, batch=2, lr=1e-12)[1]
    assert all(min(abs(x - y) for y in possible) < 1e-4 for x in losses) and len({round(x, 3) for x in losses}) > 2
    assert losses == read.adapt(rows, steps=6, batch=2, lr=1e-12)[1]
    assert all(p.grad is None for p in net.parameters())
    for bad in ([[0]], [[], [5, 1]]):
        with pytest.raises(ValueError, match="0 texts"):
            read.adapt(bad)
    with pytest.raises(ValueError, match=r"reduction=1\.5"):
        read.adapt(rows, reduction=1.5)


def test_prefill_goes_on_where_the_merged_prompt_ends():
    """Rows of unequal length, left-padded, say what each says alone."""
    read = reader(reduction=0.9)
    rows = batch(17, 3, specials=True)
    merged = read.merge(rows)
    cache, mask, hidden = read.prefill(merged.rows)
    assert cache.get_seq_length() == mask.shape[1] == max(map(len, merged.rows))
    for n, row in enumerate(merged.rows):
        alone = read.hidden([row])[0][0, -1]
        torch.testing.assert_close(hidden[n], alone)


def test_an_encoder_reads_merged_tokens():
    tokenizer = tiny.wordpiece()
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng():
        model = BertModel(config).eval()
    read = DynamicTokenization(merges=0).on(model, tokenizer)
    rows = DynamicTokenization().encode(["the great plots were great", "a friend"], read.symbols)
    rows = [[2, *row, 3] for row in rows]
    hidden, mask = read.hidden(read.merge(rows).rows)
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    wanted = model(**padded).last_hidden_state
    torch.testing.assert_close(hidden[mask == 1], wanted[padded["attention_mask"] == 1])
    short = DynamicTokenization(reduction=1.0).on(model, tokenizer)
    merged = short.merge(rows)
    assert short.hidden(merged.rows)[0].shape == (2, max(map(len, merged.rows)), 32)
    assert all(row[0] == 2 and row[-1] == 3 for row in merged.rows)  # [CLS], [SEP]


def large(read, size=600):
    texts = [" ".join(tiny.TEXTS), "unbelievable friendships in wonderful films", "日本語 日本 naïve"]
    return Vocabulary(grow(texts, read.boundary, size), read.embeddings, batch=100)


def test_growing_goes_on_with_bpe():
    """All base tokens first; new ones in the order of a recount over words, each as often as it occurs."""
    read = reader()
    symbols, tokenizer = read.symbols, tiny.tokenizer()
    text = "plotting plotting plotting zebras zebra plotted"
    words = [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    rows = [[t.value for t in tokenizer.backend_tokenizer.model.tokenize(word)] for word in words]
    _, steps = by_recounting(rows, "pretokens", tokenizer, None)
    wanted = [raw(a + b) for a, b in steps if a + b not in tokenizer.get_vocab()]
    got = grow([text], read.boundary, 10**6)
    assert got[: symbols.base] == list(range(symbols.base))
    once = list(dict.fromkeys(wanted))
    made = [symbols.piece(s) for s in got[symbols.base :]]
    assert sorted(made) == sorted(once) and made[:3] == once[:3]
    assert len(grow([text], read.boundary, symbols.base + 4)) == symbols.base + 4
    assert len(grow([text], read.boundary, 10**6, least=3)) < len(got)


def test_rows_of_a_vocabulary_and_reading_by_longest_match():
    read = reader()
    words = large(read)
    base = read.symbols.base
    assert torch.equal(words.inputs[:base], read.model.model.embed_tokens.weight[:base])
    assert torch.equal(words.outputs[:base], read.model.lm_head.weight[:base])
    some = words.ids[base + 5]
    torch.testing.assert_close(words.inputs[base + 5], read.embeddings.fvt([read.embeddings.parts(some)])[0][0])
    known = {read.symbols.piece(s) for s in words.ids}
    text = "The plot of wonderful friendships, naïve 日本 zebra!"
    ids = [0, *tiny.tokenizer().encode(text, add_special_tokens=False), 1]
    got = words.encode(ids)
    assert got[0] == 0 and got[-1] == 1
    pieces = [read.symbols.piece(s) for s in got[1:-1]]
    assert b"".join(pieces) == text.encode() and len(got) < len(ids)
    wanted = []
    for word, _ in tiny.tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
        rest = raw(word)
        while rest:
            longest = max((k for k in known if k and rest.startswith(k)), key=len)
            wanted.append(longest)
            rest = rest[len(longest) :]
    assert pieces == wanted


def test_the_exhaustive_index_is_the_exact_product():
    rng = np.random.default_rng(0)
    outputs, bias = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((500, 16), (500,)))
    states = torch.from_numpy(rng.normal(size=(40, 16)).astype(np.float32))
    exact = states.double() @ outputs.double().T + bias.double()
    best, logits = Index(outputs, bias).search(states, 20)
    wanted = exact.topk(20)
    assert (best[:, 0] == exact.argmax(1).numpy()).all() and (best == wanted.indices.numpy()).all()
    np.testing.assert_allclose(logits, wanted.values.numpy(), rtol=1e-4)
    assert Index(outputs[:5], bias[:5]).search(states, 20)[0].shape == (40, 5)
    with pytest.raises(ValueError, match="give exhaustive"):
        Index(outputs, bias, "tree")  # type: ignore[arg-type]


def test_indices_find_long_vectors_too():
    """Recall by norm: the dot product finds the long rows that the cosine misses; logits are exact, holes are -inf."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(1)
    outputs = rng.normal(size=(2000, 16)) * np.where(np.arange(2000) % 4 == 0, 3.0, 1.0)[:, None]
    outputs, bias = torch.from_numpy(outputs.astype(np.float32)), torch.zeros(2000)
    states = torch.from_numpy(rng.normal(size=(100, 16)).astype(np.float32))
    exact = Index(outputs, bias).search(states, 1)
    long = exact[0][:, 0] % 4 == 0
    assert long.mean() > 0.9
    for kind, options in (("ivf", {"lists": 20, "probes": 10}), ("hnsw", {})):
        places, logits = Index(outputs, bias, kind, **options).search(states, 5)
        assert (places[:, 0] == exact[0][:, 0])[long].mean() >= 0.95
        np.testing.assert_allclose(logits, np.take_along_axis((states @ outputs.T).numpy(), places, 1), rtol=1e-4)
    cosine = Index(outputs, bias, "ivf", lists=20, probes=20, metric="cosine")
    few = (cosine.search(states, 1)[0] == exact[0])[long].mean()
    more = (cosine.search(states, 1, candidates=200)[0] == exact[0])[long].mean()
    assert few < 0.7 and more > few + 0.2  # more candidates to rank again repair it
    sparse = Index(outputs, bias, "ivf", lists=200, probes=1).search(states, 50)
    assert ((sparse[0] == -1) == np.isinf(sparse[1])).all() and (sparse[0] == -1).any()


def test_an_index_scaled_by_states_finds_more():
    """States in 3 of 24 directions, rows that differ in all: without them lists part the rows in vain. All lists give
    the exact order either way, of states that the sample does not know, too."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(2)
    few = rng.normal(size=(3, 24))
    make = lambda n: torch.from_numpy((rng.normal(size=(n, 3)) @ few + 0.01 * rng.normal(size=(n, 24))).astype("f4"))
    outputs, bias = (torch.from_numpy(rng.normal(size=s).astype(np.float32)) for s in ((4000, 24), (4000,)))
    sample, asked = make(300), make(100)
    exact = Index(outputs, bias).search(asked, 5)
    hits = {}
    for name, states in (("plain", None), ("scaled", sample)):
        index = Index(outputs, bias, "ivf", lists=60, probes=2, states=states)
        places, logits = index.search(asked, 5)
        wanted = (asked @ outputs.T + bias).gather(1, torch.from_numpy(places)).numpy()
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
        hits[name] = (places[:, 0] == exact[0][:, 0]).mean()
        index.probes(60)
        assert (index.search(asked, 5)[0] == exact[0]).mean() > 0.99
        other = torch.from_numpy(rng.normal(size=(20, 24)).astype(np.float32))
        assert (index.search(other, 1)[0] == Index(outputs, bias).search(other, 1)[0]).all()
    assert hits["scaled"] > hits["plain"] + 0.2, hits


def test_draws_by_hand():
    logits, no = np.array([2.0, 1.0, -1.0, 0.0]), np.zeros(4, bool)
    plain = Draw(repetition=1.0, min_p=0.0, top_k=0)
    soft = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(plain.probabilities(logits, no, no), soft)
    used = np.array([True, False, True, False])  # only used tokens are punished, on both sides of 0
    changed = np.exp([1.0, 1.0, -2.0, 0.0])
    got = Draw(repetition=2.0, min_p=0.0, top_k=0).probabilities(logits, used, no)
    np.testing.assert_allclose(got, changed / changed.sum())
    two = Draw(repetition=1.0, min_p=0.0, top_k=2).probabilities(logits, no, no)
    np.testing.assert_allclose(two, [soft[0] / (soft[0] + soft[1]), soft[1] / (soft[0] + soft[1]), 0, 0])
    np.testing.assert_allclose(Draw(repetition=1.0, min_p=0.4, top_k=0).probabilities(logits, no, no)[0], 1.0)
    kept = Draw(repetition=1.0, min_p=0.36, top_k=0).probabilities(logits, no, no)
    assert (kept > 0).tolist() == [True, True, False, False]  # e^-1 = 0.368 of the likeliest
    end = Draw(repetition=1.0, temperature=0, eos_bias=9.0).probabilities(logits, no, np.arange(4) == 3)
    assert end.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "wrong", [{"min_p": 1.5}, {"repetition": 0.0}, {"temperature": -1.0}, {"top_k": -1}, {"neighbours": 0}]
)
def test_draws_out_of_range(wrong):
    with pytest.raises(ValueError, match="min_p lie between 0 and 1"):
        Draw(**wrong)


def test_generation_is_greedy_decoding_when_nothing_is_new():
    """Over the base vocabulary, exhaustive and greedy: the model's own argmax, token by token."""
    read = reader()
    words = Vocabulary(list(range(read.symbols.base)), read.embeddings)
    prompts = [tiny.tokenizer().encode(t, add_special_tokens=False) for t in ("The plot", "I loved every minute")]
    draw = Draw(temperature=0, repetition=1.0)
    got = generate(read, words, Index(words.outputs, words.bias), prompts, stop=[1], most=12, draw=draw)
    for prompt, (some, text) in zip(prompts, got):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 1:
            ids.append(int(read.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert some == ids[len(prompt) :]
        said = b"".join(map(read.symbols.piece, some))
        assert said.decode("utf-8", "replace").startswith(text) and len(text) >= len(said.decode("utf-8", "ignore"))


@pytest.mark.parametrize("config", [{"logits_scaling": 0.1}, {"final_logit_softcapping": 0.05}])
def test_candidates_have_the_logits_of_the_model(config):
    """An architecture that scales or caps its logits after the head: the one drawn is as likely as the model says."""
    kind = (GraniteConfig, GraniteForCausalLM) if "logits_scaling" in config else (Gemma2Config, Gemma2ForCausalLM)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind[1](kind[0](vocab_size=len(tiny.tokenizer()), **size, **heads, **config)).double().eval()
    read = DynamicTokenization().on(model, tiny.tokenizer())
    words, seen = Vocabulary(list(range(read.symbols.base)), read.embeddings), []

    class Spy(Draw):
        def probabilities(self, logits, used, eos):
            seen.append(super().probabilities(logits, used, eos))
            return seen[-1]

    whole = Spy(neighbours=read.symbols.base, repetition=1.0, top_k=0, min_p=0.0)
    generate(read, words, Index(words.outputs, words.bias), [[0, 70]], stop=[1], most=1, draw=whole)
    wanted = model(torch.tensor([[0, 70]])).logits[0, -1].softmax(-1)
    np.testing.assert_allclose(sorted(seen[0]), sorted(wanted.tolist()), rtol=1e-4)


def test_generation_ends():
    """EOS is a candidate even where the index does not find it; rows that ended stay as they are."""
    read = reader()
    words = large(read)
    index = Index(words.outputs, words.bias)
    how = {"stop": [1], "most": 5}
    got = generate(read, words, index, [[0, 70], [0]], draw=Draw(eos_bias=1e9, neighbours=2), **how)
    assert got == [([1], ""), ([1], "")]
    long = generate(read, words, index, [[0, 70]], draw=Draw(eos_bias=-1e9), **how)
    assert len(long[0][0]) == 5 and 1 not in long[0][0]
    with pytest.raises(ValueError, match="begin it with BOS"):
        generate(read, words, index, [[0], []], **how)


def test_longest_match_keeps_what_is_no_text_and_spaces_of_a_prefix():
    read = reader()
    half = [0, *(read.symbols.known(x) for x in (b"a", b"\xe3", b"\x81")), 1]
    assert large(read).encode(half) == half
    tokenizer = tiny.sentencepiece("unigram")
    symbols = Symbols(tokenizer)
    words = Vocabulary([*range(symbols.base)], Embeddings(tiny.llama(vocab=symbols.base), symbols))
    ids = [1, *tokenizer.encode("the great plot", add_special_tokens=False)]
    got = words.encode(ids)
    assert got[0] == 1 and b"".join(map(symbols.piece, got)) == b" the great plot"


def test_generation_over_a_large_vocabulary():
    """The next input is the predicted row; text comes in whole characters; draws are those of the seed and the row."""
    net = Hypernetwork.fresh(tiny.llama(), seed=1, width=16)
    torch.nn.init.normal_(net.leave.weight)  # so that new tokens are as likely as old ones
    read = reader(dtype=torch.float32, hypernetwork=net)
    words = large(read)
    index = Index(words.outputs, words.bias)
    prompts = [words.encode([0, *tiny.tokenizer().encode("The plot", add_special_tokens=False)]), [0]]
    shown: list[tuple[int, str]] = []
    draw = Draw(temperature=1.5)
    stream = lambda row, text: shown.append((row, text))
    got = generate(read, words, index, prompts, stop=[1], most=20, draw=draw, seed=3, stream=stream)
    assert any(s >= read.symbols.base for some, _ in got for s in some)
    for n, (some, text) in enumerate(got):
        assert "".join(t for row, t in shown if row == n) == text and len(some) <= 20
        assert b"".join(map(read.symbols.piece, some)).decode("utf-8", "replace").startswith(text)
    assert generate(read, words, index, prompts, stop=[1], most=20, draw=draw, seed=3) == got
    alone = generate(read, words, index, prompts[:1], stop=[1], most=20, draw=draw, seed=3)
    assert alone[0] == got[0]
    greedy = generate(read, words, index, prompts[:1], stop=[1], most=6, draw=Draw(temperature=0, repetition=1.0))
    row = list(prompts[0])
    for s in greedy[0][0]:
        h = read.hidden([row])[0][0, -1]
        assert words.ids[int((words.outputs @ h + words.bias).argmax())] == s
        row.append(s)
