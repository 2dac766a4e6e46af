# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
"""Word-pooled: the codec to the byte, what each part of the model may see, probabilities that sum to one, metrics."""

import itertools
import math

import numpy as np
import pytest
import torch

from pertoken.tokenize import _pooled_training as training
from pertoken.tokenize.word_pooled import Spelling, WordPooled
from pertoken.tokenize.word_pooled import measure as m
from pertoken.tokenize.word_pooled.codec import END, MORE, PAD, Codec, characters, normalise
from pertoken.tokenize.word_pooled.model import GPT, WordPooledLM

TEXTS = [
    "",
    " ",
    "one",
    "I said: don't!  Two\n\n spaces\t. ",
    "naïve 中文没有空格的很长的一句话 x",
    "https://a.b/" + "c" * 40,
    "_a_ 😀😀",
]
TINY = WordPooled(
    prefix=2, width=16, layers=2, heads=2, spelling=Spelling(layers=1, heads=2), dropout=0.0, block=12, longest=5
)


def sharp(model, seed=0):
    """Random weights large enough that everything matters, in float64."""
    model = model.double().eval()
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=drawn, dtype=p.dtype))
    return model


CODEC = TINY.codec()
MODEL = sharp(TINY.build(CODEC))
IDS = CODEC.encode(CODEC.words("the cat sat on extraordinary mats"))[None]


# --- codec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 3, 16])
@pytest.mark.parametrize("alphabet", [(), characters(TEXTS), (b"th", b"the", b" s", b"ab")])
def test_round_trip_to_the_byte(longest, alphabet):
    codec = Codec(longest=longest, alphabet=alphabet)
    for text in [*TEXTS, "the theabth sab"]:
        words = codec.words(text)
        assert b"".join(words) == text.encode()
        rows = codec.encode(words)
        assert rows.shape[1] == longest + 1 and codec.decode(rows) == words
        assert all((row == END).sum() + (row == MORE).sum() == 1 for row in rows)


def test_rows_by_hand():
    """ByT5's ids (byte + 3), BOS first, a long word in chunks with the flag, an END in every row."""
    codec = Codec(longest=2)
    a, b, c = (3 + ord(x) for x in "abc")
    assert codec.encode([b"abcab", b"a"]).tolist() == [
        [END, PAD, PAD],
        [a, b, MORE],
        [c, a, MORE],
        [b, END, PAD],
        [a, END, PAD],
    ]
    assert codec.encode([b"ab"]).tolist()[1] == [a, b, END]  # as long as a chunk, and still has its END
    assert codec.decode([[a, b, c], [a, END, PAD]]) == [b"abca"]  # a spelling that found no end goes on
    assert codec.encode([]).tolist() == [[END, PAD, PAD]]


def test_units_are_greedy_with_bytes_for_the_unseen():
    codec = Codec(alphabet=(b"th", b"the", "ï".encode()))
    assert codec.units(b"thex") == [3 + 256 + 1, 3 + ord("x")]
    assert codec.units("ïé".encode()) == [3 + 256 + 2, *(3 + x for x in "é".encode())]
    assert codec.vocabulary == 3 + 256 + 3
    assert characters(["aï", "中"]) == ("ï".encode(), "中".encode())


def test_share_of_cut_words():
    assert Codec(longest=4).report("abc abcdefgh") == {"words": 2.0, "chunks": 4.0, "cut": 0.5}
    assert Codec().report("")["cut"] == 0.0


def test_the_lossy_mode():
    assert normalise("Hi,\nyou<br> there!") == "Hi , you there !"
    codec = Codec(longest=4, mode="reference")
    assert codec.words("Hi,\nyou") == [b"Hi", b",", b"you"]
    assert codec.encode([b"Hi", b"four"]).tolist() == [[75, 108, 0, 0], [105, 114, 120, 117]]  # no BOS, no room for END
    assert codec.decode(codec.encode([b"Hi", b"four"])) == [b"Hi", b"four"]
    with pytest.raises(ValueError, match="no chunks"):
        codec.encode([b"fives"])


def test_pieces_are_the_words():
    found = WordPooled(longest=4).pieces(["a cat, extraordinary", ""], None)
    assert found == [[b"a", b" cat", b",", b" ext", b"raor", b"dina", b"ry"], []]
    assert WordPooled(unit="char", longest=2).pieces(["中文字"], None) == [["中文".encode(), "字".encode()]]


# --- model ---------------------------------------------------------------------------------------------------------


def test_no_word_sees_later_words_and_no_unit_later_units():
    """Change one unit of word w: what is said up to that unit of word w stays to the bit, what is said after it does
    not, in the same word and in all later ones."""
    with torch.no_grad():
        before = MODEL(IDS)
    for word, unit in itertools.product(range(1, IDS.shape[1]), range(3)):
        changed = IDS.clone()
        if IDS[0, word, unit] <= MORE:
            continue
        changed[0, word, unit] = 3 + ord("z")
        with torch.no_grad():
            after = MODEL(changed)
        same = (before == after).all(-1)[0]  # (word predicted from the left, unit)
        assert same[: word - 1].all() and same[word - 1, : unit + 1].all()
        assert not same[word - 1, unit + 1 :].any() and not same[word:].any()


def test_words_are_pooled_alone():
    """A word's vectors do not depend on its neighbours: p of them, in the text's order."""
    vectors = MODEL.encode(IDS)
    assert vectors.shape == (1, IDS.shape[1], 2, 16)
    for w in range(IDS.shape[1]):
        torch.testing.assert_close(MODEL.encode(IDS[:, w : w + 1])[0, 0], vectors[0, w])
    one = WordPooled(prefix=1, width=16, layers=1, heads=2, block=4, longest=5)
    assert one.build(one.codec()).encode(IDS[:, :3]).shape == (1, 3, 1, 16)


def test_all_vectors_of_a_word_are_used():
    vectors = MODEL.encode(IDS)
    assert not torch.allclose(vectors[:, :, 0], vectors[:, :, 1])
    context = MODEL.context(IDS).detach().requires_grad_()
    said = MODEL.spell(context[0], IDS[0, :, :2])[..., 5].sum()
    assert (torch.autograd.grad(said, context)[0].abs().sum(-1) > 0).all()


def test_a_wider_row_changes_nothing():
    """Padding is seen by none: the same words in rows of 9 by a model with the same weights and more places."""
    wide = WordPooledLM(**{**MODEL.config, "row": 9}).double().eval()
    weights = MODEL.state_dict()
    weights["places.weight"] = torch.cat([weights["places.weight"], torch.randn(3, 16, dtype=torch.float64)])
    wide.load_state_dict(weights)
    ids = torch.nn.functional.pad(IDS, (0, 3))
    with torch.no_grad():
        a, b = MODEL(IDS), wide(ids)
    real = (IDS[:, 1:] != PAD)[..., None].expand_as(a)
    torch.testing.assert_close(a[real], b[:, :, :6][real], rtol=0, atol=1e-12)
    torch.testing.assert_close(MODEL.loss(IDS), wide.loss(ids))
    torch.testing.assert_close(MODEL.word_logps(IDS), wide.word_logps(ids))


def test_padding_rows_change_nothing():
    ids = torch.cat([IDS[:, :4], torch.full((1, 3, 6), PAD)], 1)
    torch.testing.assert_close(MODEL.word_logps(ids)[:, :3], MODEL.word_logps(IDS[:, :4]))
    assert (MODEL.word_logps(ids)[:, 3:] == 0).all()
    torch.testing.assert_close(MODEL.loss(ids), MODEL.loss(IDS[:, :4]))


def test_spellings_sum_to_one():
    """Two letters: all rows of up to 3 letters with either end, and the mass of those that find none in 4 units. The
    probability of each comes from its own forward pass."""
    a, b = 3, 4
    model = sharp(
        WordPooledLM(vocabulary=5, row=4, words=4, prefix=2, width=16, layers=1, heads=2, spelling_heads=2, dropout=0)
    )
    words = [[*w, end] for n in range(4) for w in itertools.product((a, b), repeat=n) for end in (END, MORE)]
    overflow = [list(w) for w in itertools.product((a, b), repeat=4)]
    logp = []
    for row in words + overflow:
        ids = torch.tensor([[[END, PAD, PAD, PAD], [a, b, END, PAD], row + [PAD] * (4 - len(row))]])
        logp.append(float(model.word_logps(ids)[0, 1]))
    p = np.exp(logp)
    assert p.sum() == pytest.approx(1, abs=1e-9) and p[: len(words)].sum() > 0.1 and p[len(words) :].sum() > 1e-4


def test_padding_is_never_predicted():
    assert (MODEL(IDS)[..., PAD] == -torch.inf).all()
    assert torch.isfinite(MODEL(IDS)[..., 1:]).all()


def test_loss_is_the_mean_over_units_and_one_end():
    logp, total, n = MODEL(IDS)[0].detach(), 0.0, 0
    for w, row in enumerate(IDS[0, 1:].tolist()):
        for i, unit in enumerate(row):
            total -= float(logp[w, i, unit])
            n += 1
            if unit in (END, MORE):
                break
    assert float(MODEL.loss(IDS).detach()) == pytest.approx(total / n, abs=1e-12)
    assert n == len(b"the cat sat on extraordinary mats") + IDS.shape[1] - 1


def test_reference_compat():
    """Id 0 is END and padding, all c0 places count, and a word may have no END at all."""
    options = WordPooled(
        prefix=2, width=16, layers=1, heads=2, spelling=Spelling(layers=1, heads=2), dropout=0.0, block=8, longest=4,
        compat="reference",
    )  # fmt: skip
    codec = options.codec()
    model = sharp(options.build(codec))
    ids = codec.encode([b"the", b"four", b"a"])[None]
    logp = model(ids)[0]
    assert torch.isfinite(logp).all()
    wanted = -np.mean(
        [float(logp[w, i, unit]) for w, row in enumerate(ids[0, 1:].tolist()) for i, unit in enumerate(row)]
    )
    assert float(model.loss(ids)) == pytest.approx(wanted, abs=1e-12)
    longer = codec.encode([b"a", b"the"])[None]
    with torch.no_grad():  # the mended mask: padding of a word is not seen by its vectors
        model.units.weight[0] += 5
        changed = model.encode(longer)
        model.units.weight[0] -= 5
    torch.testing.assert_close(changed, model.encode(longer))


def test_nothing_to_predict_is_none():
    assert MODEL.loss(CODEC.encode([])[None]) is None
    assert float(MODEL.loss(CODEC.encode([b"a"])[None])) > 0  # a single word is predicted from BOS
    gpt = GPT(vocabulary=5, places=4, width=8, layers=1, heads=1)
    assert gpt.loss(torch.tensor([[1]])) is None
    empty = m.Measured((), np.array([], bool), np.array([]), (0, 0))
    assert empty.word_accuracy is None and empty.unit_accuracy is None and empty.bits_per_byte is None


def test_greedy_generation_is_the_best_spelling_step_by_step():
    out = MODEL.generate(IDS[0, :2], 3)
    assert out.shape == (5, 6) and (out[:2] == IDS[0, :2]).all()
    logp = MODEL(out[None])[0]
    for w, row in enumerate(out[2:].tolist(), start=1):
        size = next((i + 1 for i, u in enumerate(row) if u in (END, MORE)), 6)
        assert logp[w, :size].argmax(-1).tolist() == row[:size] and set(row[size:]) <= {PAD}
    with pytest.raises(ValueError, match="generator"):
        MODEL.generate(IDS[0, :1], 1, temperature=1.0)
    long = MODEL.generate(IDS[0], 10)  # the window slides
    assert len(long) == IDS.shape[1] + 10


def test_sampled_words_follow_their_probabilities():
    """Of a two-letter model, 150 draws of one word against its exact probability: five standard errors."""
    model = WordPooledLM(vocabulary=5, row=2, words=2, prefix=1, width=8, layers=1, heads=1, spelling_heads=1)
    model = sharp(model)
    start, drawn = torch.tensor([[END, PAD]]), torch.Generator().manual_seed(0)
    found = [tuple(model.generate(start, 1, temperature=1.0, generator=drawn)[1].tolist()) for _ in range(150)]
    for row in {*found}:
        p = math.exp(float(model.word_logps(torch.tensor([[[END, PAD], list(row)]]))[0, 0]))
        assert abs(found.count(row) / 150 - p) < 5 * (p * (1 - p) / 150) ** 0.5 + 1e-9


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match="give the last ones"):
        MODEL.context(IDS.repeat(1, 3, 1))


def test_save_and_load(tmp_path):
    MODEL.save(tmp_path / "m.safetensors", {"note": "x"})
    torch.testing.assert_close(
        WordPooledLM.load(tmp_path / "m.safetensors").double().word_logps(IDS), MODEL.word_logps(IDS)
    )
    with pytest.raises(ValueError, match="its own class"):
        GPT.load(tmp_path / "m.safetensors")


# --- arms and metrics ----------------------------------------------------------------------------------------------

WORDS = [f" {w}".encode() for w in "the cat sat on the mat , extraordinary".split()]


class Table(torch.nn.Module):
    """Stands for a GPT: the next id is a function of the bytes so far."""

    def __init__(self, pieces, rule):
        super().__init__()
        self.pieces, self.rule, self.places = [b"", b"", *pieces], rule, torch.nn.Embedding(64, 1)

    def forward(self, ids_BT):
        out = torch.full((*ids_BT.shape, len(self.pieces)), -20.0)
        for b, row in enumerate(ids_BT.tolist()):
            for t in range(len(row)):
                guess = self.rule(b"".join(self.pieces[i] for i in row[: t + 1]))
                out[b, t, self.pieces.index(guess, 2)] = 0.0
        return out


def test_a_word_is_a_hit_however_it_is_spelled():
    """The text says `the` in one piece, the model spells t, he: the string counts. Its end must be said, too."""
    pieces = [b" t", b"he", b" the", b" a", b"n"]
    cut = {b" the": [2], b" a": [3], b" an": [3, 4]}.__getitem__
    best = {b"": b" t", b" t": b"he", b" the": b" a", b" the a": b"n", b" the an": b" a"}
    judge = m.GPTArm(Table(pieces, lambda said: best.get(said, b" a")), pieces, cut).judge
    assert judge([[b" the", b" a"]], 0)[0] == [True, False]  # of the second, the model says that it goes on: an
    assert judge([[b" the", b" an"]], 0)[0] == [True, True]
    assert judge([[b" the", b" an"]], 1)[0] == [True]
    # the first piece is the best of those that begin with a space
    odd = m.GPTArm(Table(pieces, lambda said: best.get(said, b"n")), pieces, cut)
    assert odd.judge([[b" the"]], 0)[2] == (0, 1)


def test_pooled_hits_are_greedy_spellings():
    """What the model spells by itself after a given space is a hit if it ends there; any other string is a miss."""
    ended = 0
    for seed in range(12):
        model = sharp(TINY.build(CODEC), seed)
        with torch.no_grad():
            model.head.weight[END] += 0.05 * seed * model.head.weight[END]
            context, row = model.context(CODEC.encode(WORDS[:2])[None])[:, -1], [3 + 32]
            while len(row) < 6 and row[-1] not in (END, MORE):
                row.append(int(model.spell(context, torch.tensor([row]))[0, -1].argmax()))
        word = CODEC.bytes_of(row)
        if len(word) > 5:
            continue
        judge = m.PooledArm(model, CODEC).judge
        hits, nats, units = judge([[*WORDS[:2], word]], 2)
        assert hits == [row[-1] == END] and units[1] == len(word) - 1
        rows = CODEC.encode([*WORDS[:2], word])[None]
        assert nats == pytest.approx([-float(model.word_logps(rows)[0, 2:].sum())])
        assert judge([[*WORDS[:2], word[:-1] + b"~"]], 2)[0] == [False]
        ended += row[-1] == END
    assert ended


def test_all_chunks_of_a_word_must_be_right():
    """`extraordinary` is three rows here: nats are those of all rows, and one wrong row is a miss."""
    word, arm = WORDS[-1], m.PooledArm(MODEL, CODEC)
    rows = CODEC.encode(WORDS)[None]
    chunks = len(CODEC.chunks(word))
    _, nats, units = arm.judge([WORDS], 7)
    assert chunks == 3 and nats == pytest.approx([-float(MODEL.word_logps(rows)[0, -chunks:].sum())])
    assert units[1] == len(word) - 1


def test_every_word_is_measured_once():
    arm = m.GPTArm(GPT(vocabulary=258, places=80, width=8, layers=1, heads=1).eval(), *m.byte_pieces())
    for n in range(1, 9):
        found = m.measure(arm, WORDS[:n], window=4)
        assert len(found.hits) == n == len(found.nats) and found.words == tuple(WORDS[:n])
        assert found.units[1] == sum(len(w) - 1 for w in WORDS[:n])
    alone = m.measure(arm, WORDS[2:6], window=4)  # the last two of window 2..5 are judged in that window
    assert found.nats[4:6] == pytest.approx(alone.nats[2:4], rel=1e-4)
    assert found.bits_per_byte == pytest.approx(found.nats.sum() / math.log(2) / len(b"".join(WORDS)))


@pytest.mark.parametrize("pooled", [False, True])
def test_windows_of_one_word_and_no_words(pooled):
    """A window of one word begins anew at each; no words are no figures."""
    gpt = GPT(vocabulary=258, places=80, width=8, layers=1, heads=1).eval()
    arm = m.PooledArm(MODEL, CODEC) if pooled else m.GPTArm(gpt, *m.byte_pieces())
    found = m.measure(arm, WORDS, window=1)
    alone = [arm.judge([[word]], 0)[1][0] for word in WORDS]
    assert found.words == tuple(WORDS) and found.nats == pytest.approx(alone, rel=1e-4)
    none = m.measure(arm, [], window=4)
    assert none.words == () and none.word_accuracy is None and none.unit_accuracy is None


def test_bytes_of_a_word_add_up():
    gpt = GPT(vocabulary=258, places=80, width=8, layers=1, heads=1).eval()
    arm = m.GPTArm(gpt, *m.byte_pieces())
    row = [1, *(2 + b for b in b" the cat")]
    logp = gpt(torch.tensor([row]))[0]
    wanted = -sum(float(logp[t, row[t + 1]]) for t in range(4, 8))
    assert arm.judge([[b" the", b" cat"]], 1)[1] == pytest.approx([wanted], rel=1e-5)


def test_pieces_of_the_baselines():
    text = "".join(w.decode() for w in WORDS) * 3 + " naïve"
    for pieces, cut in (m.byte_pieces(), m.subword_pieces(text, 280)):
        for word in [*WORDS, " naïve".encode(), b" unseen"]:
            assert b"".join(pieces[i] for i in cut(word)) == word
        assert not any(b" " in piece[1:] for piece in pieces)
    pieces, cut = m.word_pieces([*WORDS, WORDS[0]], 3)
    assert [pieces[i] for i in cut(WORDS[0])] == [b" the"] and cut(b" unseen") == [0]
    unknown = m.GPTArm(Table(pieces, lambda said: b" \xff"), pieces, cut)
    assert unknown.judge([[b" unseen"]], 0)[0] == [False]  # an unknown word is never right


def test_buckets_by_hand():
    found = m.Measured((b"a", b"b", b"b", b"c", b"d"), np.array([1, 1, 0, 1, 0], bool), np.zeros(5), (0, 0))
    assert found.buckets({b"a": 100, b"b": 9, b"c": 10}) == {
        (0, 1): (0, 1), (1, 10): (1, 2), (10, 100): (1, 1), (100, None): (1, 1)
    }  # fmt: skip
    assert found.word_accuracy == 0.6


def test_training_learns_and_leaves_global_chance_alone():
    words = [b" ab", b" cd"] * 20
    arm = m.PooledArm(TINY.build(CODEC, seed=1), CODEC)
    before = float(arm.model.loss(arm.batch([words[:6]])))
    state = torch.get_rng_state()
    steps = training.train(arm, words, seconds=0.3, window=6, batch=4, lr=1e-2, seed=0)
    assert steps > 3 and torch.equal(state, torch.get_rng_state())
    assert float(arm.model.loss(arm.batch([words[:6]]))) < 0.8 * before and not arm.model.training


def test_training_takes_so_many_steps():
    words = [b" ab", b" cd"] * 20
    arm = m.PooledArm(TINY.build(CODEC, seed=1), CODEC)
    assert training.train(arm, words, steps=3, window=6, batch=4, lr=1e-2, seed=0) == 3
    for wrong in ({}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": 0.0}):
        with pytest.raises(ValueError, match="either seconds or steps"):
            training.train(arm, words, window=6, batch=4, lr=1e-2, seed=0, **wrong)


def test_seconds_of_a_step():
    words = [b" ab", b" cd"] * 20
    arms = {"a": m.PooledArm(TINY.build(CODEC, seed=1), CODEC), "b": m.PooledArm(TINY.build(CODEC, seed=2), CODEC)}
    found = training.step_seconds(arms, words, window=3, batch=1, seed=0)
    assert found.keys() == arms.keys() and all(0 < value < 10 for value in found.values())


def test_forward_operations_by_hand():
    """Two words of two bytes: 1 + 6 ids with their spaces, of which the model reads the first 6."""
    pieces, cut = m.byte_pieces()
    width, layers, T, B = 16, 2, 6, 3
    model = GPT(vocabulary=258, places=8, width=width, layers=layers, heads=2, dropout=0.0)
    products = layers * 12 * width * width + width * 258  # weights of a position: q, k, v, out, up, down; the head
    attention = layers * 2 * T * width  # of a position: scores, and their sum over values
    found = training.forward_flops(
        m.GPTArm(model, pieces, cut), [b" ab", b" cd"] * 9, window=2, batch=B, seed=0, batches=2
    )
    assert found == 2 * B * T * (products + attention)


def test_bad_options():
    no_heads, no_layers = Spelling(heads=0), Spelling(layers=0)
    for bad in (
        {"prefix": 0}, {"width": 30}, {"dropout": 1.0}, {"longest": 0}, {"spelling": no_heads}, {"spelling": no_layers}
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            WordPooled(**bad)
    with pytest.raises(ValueError, match="alphabet"):
        Codec(alphabet=(b"a",))
    with pytest.raises(ValueError, match="longest"):
        Codec(longest=0)
