# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportReturnType=false
"""Byte-exact against enumeration: every token sequence of a tiny vocabulary is written out and asked of the model."""

import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.core.byte_ranges import byte_ranges
from pertoken.core.bytes import byte_view
from pertoken.core.lm import LM, load
from pertoken.core.rollout import Sampling
from pertoken.core.token_tree import TokenTree
from pertoken.generate.byte_exact import (
    EOS,
    ByteExact,
    ByteModel,
    Continue,
    MeanState,
    Search,
    canonical,
    draw,
    fim,
    reading,
    spelling,
    tempered,
)
from tests import tiny

CHARS = "ab \né"


def stand_in(text: str) -> str:
    """GPT-2's characters for bytes."""
    ((word, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return word


def wrapped(core, **special) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@lru_cache(maxsize=8)
def bpe(regex: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level, the alphabet of `CHARS` and è, merges that overlap; runs of newlines and spaces are tokens."""
    merges = ["a b", "Ġ a", "Ġ b", "Ċ Ċ", "Ġ Ġ", "Ã ©", "Ġa b", "ab a", "b Ã©", "Ċ ĊĊ"]
    single = [stand_in(c) for c in "ab \n"] + list(stand_in("é")) + [stand_in("è")[1]]
    tokens = ["<s>", "</s>", "<x>", *single, *(m.replace(" ", "") for m in merges)]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<x>"])
    return wrapped(core, eos_token="</s>", **({"bos_token": "<s>"} if bos else {}))


@lru_cache(maxsize=1)
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's normaliser and byte fallback; 'a' is a piece and <0x61> too."""
    merges = ["a b", "▁ a", "▁a b", "▁ ▁", "b é"]
    tokens = ["<unk>", "<s>", "</s>", "<0x61>", "<0x0A>", "<0xC3>", "<0xA9>", "<0xA8>", "a", "b", "é", "▁"]
    vocab = {t: i for i, t in enumerate([*tokens, *(m.replace(" ", "") for m in merges)])}
    core = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(undo)
    return wrapped(core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MADE = {"regex": bpe, "merges": lambda: bpe(False), "sentencepiece": sentencepiece}
every = pytest.mark.parametrize("name", MADE)


def make(name: str = "regex", seed: int = 0) -> LM:
    tokenizer = MADE[name]()
    model = tiny.llama(seed, vocab=len(tokenizer) + 3)  # a head that is longer than the vocabulary
    model.generation_config.eos_token_id = None
    return LM(model, tokenizer, name=name, template="plain")


class Enumeration:
    """The definitions, written out."""

    def __init__(self, lm: LM, valid=None):
        self.lm, self.view, self.known = lm, lm.view, {}
        self.bos = lm.tokenizer.bos_token_id
        self.tokens = [i for i in range(len(lm.tokenizer)) if i not in lm.view.special_ids]
        self.end = lm.tokenizer.eos_token_id
        self.valid = valid or (lambda t: True)
        self.seen: dict[tuple[int, ...], bool] = {}

    def next(self, t: tuple[int, ...]) -> np.ndarray:
        """Of text tokens and the end, renormalised; asked of the whole model, without a cache."""
        if t not in self.known:
            with torch.no_grad():
                p = self.lm.causal(torch.tensor([[self.bos, *t]])).logits[0, -1].double().softmax(-1).numpy()
            keep = np.zeros_like(p)
            keep[[*self.tokens, self.end]] = p[[*self.tokens, self.end]]
            self.known[t] = keep / keep.sum()
        return self.known[t]

    def prob(self, t: tuple[int, ...]) -> float:
        return math.prod(self.next(t[:k])[v] for k, v in enumerate(t))

    def bytes(self, t: tuple[int, ...]) -> bytes:
        return b"".join(self.view.pieces(t, at_start=True))

    def cover(self, x: bytes):
        """Every t with x a prefix of decode(t), but not of decode of t without its last token."""
        if not x:
            return [()]
        found, open_ = [], [()]
        while open_:
            t = open_.pop()
            for v in self.tokens:
                longer = (*t, v)
                data = self.bytes(longer)
                if data.startswith(x):
                    found.append(longer)
                elif x.startswith(data) and (len(data) > len(self.bytes(t)) or not t):
                    open_.append(longer)
        return found

    def ok(self, t):
        if t not in self.seen:
            self.seen[t] = self.valid(t)
        return self.seen[t]

    def of(self, x: bytes) -> float:
        return sum(self.prob(t) for t in self.cover(x) if self.ok(t))

    def ending(self, x: bytes, whole=None) -> float:
        exact = [t for t in self.cover(x) if self.bytes(t) == x]
        exact += [(i,) for i in self.tokens if not x and not self.bytes((i,))]
        return sum(self.prob(t) * self.next(t)[self.end] for t in exact if (whole or self.ok)(t))


def canonical_as_prefix(tokenizer, longest=2):
    """By search: some text over `CHARS` that begins with the bytes has an encoding that begins with the ids."""
    view = byte_view(tokenizer)
    chars = CHARS + "è"
    more = [b"".join(c) for k in range(longest + 1) for c in itertools.product([c.encode() for c in CHARS], repeat=k)]

    def valid(t):
        data = b"".join(view.pieces(t, at_start=True))
        rest = b"\xc3" if data.endswith(b"\xc3") else b""
        if _text(data[: len(data) - len(rest)]) is None:
            return False
        ends = [c.encode()[len(rest) :] for c in chars if c.encode().startswith(rest)] if rest else [b""]
        texts = [data + end + tail for end in ends for tail in more]
        for text, one in zip(texts, tokenizer.backend_tokenizer.encode_batch([t.decode() for t in texts], False)):
            if tuple(one.ids[: len(t)]) == t and b"".join(view.pieces(one.ids, at_start=True)) == text:
                return True
        return False

    return valid


def _text(data: bytes):
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def walk(lm: LM, x: bytes, **search):
    """States after each prefix of x."""
    model = ByteModel(lm, (lm.tokenizer.bos_token_id,), Search(**search))
    states = [model.start()]
    for byte in x:
        states.append(states[-1].advance(byte))
    return states


def check(enumeration, states, x, whole=None):
    for k, state in enumerate(states):
        assert math.exp(state.logp) == pytest.approx(enumeration.of(x[:k]), abs=1e-9, rel=1e-9)
        ours = np.exp(state.joint())
        wanted = [enumeration.of(x[:k] + bytes([b])) if b in b"ab \n\xc3\xa9\xa8" else 0.0 for b in range(256)]
        wanted.append(enumeration.ending(x[:k], whole))
        np.testing.assert_allclose(ours, wanted, atol=1e-12, rtol=1e-9)
        np.testing.assert_allclose(np.exp(state.logps()), np.array(wanted) / sum(wanted), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("x", [b"ab aba", b"a\n\nb", b"b\xc3\xa9  a"])
@every
def test_all_equals_enumeration(name, x):
    lm = make(name)
    check(Enumeration(lm), walk(lm, x, mode="all"), x)


@pytest.mark.parametrize("x", [b"ab abab", b"a\n\nb\xc3", b"b\xc3\xa9  a", b"\n\n\na  b"])
@every
def test_canonical_equals_enumeration(name, x):
    lm = make(name)
    tokenizer = lm.tokenizer
    enumeration = Enumeration(lm, canonical_as_prefix(tokenizer))

    def whole(t):
        text = _text(enumeration.bytes(t))
        return text is not None and tokenizer.encode(text, add_special_tokens=False) == list(t)

    check(enumeration, walk(lm, x, mode="canonical", fast=False), x, whole=whole)


def test_sums_and_monotony_of_all():
    """sum_b P(x b) + P(x, EOS) = P(x), and P(x) does not grow; canonical mass is at most all mass."""
    lm, x = make(), b"ab  a\n\nb"
    every_, own = walk(lm, x, mode="all"), walk(lm, x, mode="canonical", fast=False)
    for a, c in zip(every_, own, strict=True):
        assert np.exp(a.joint()).sum() == pytest.approx(math.exp(a.logp), abs=1e-12)
        assert np.exp(c.joint()).sum() <= math.exp(c.logp) + 1e-12
        assert c.logp <= a.logp + 1e-12
    for states in (every_, own):
        logps = [s.logp for s in states]
        assert logps[0] == 0 and all(b <= a + 1e-12 for a, b in itertools.pairwise(logps))


def test_conditionals_times_the_end_are_the_sum_over_tokenisations():
    lm, x = make(), b"abab a"
    logps = ByteExact(mode="all", search="text").logps(lm, x[:2], x[2:], end=True)
    enumeration = Enumeration(lm)
    assert logps.sum() == pytest.approx(math.log(enumeration.ending(x) / enumeration.of(x[:2])), abs=1e-9)


def test_single_bytes_alone_give_the_tokens_probabilities():
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", *(stand_in(c) for c in "ab "), *stand_in("é")])}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    lm = LM(tiny.llama(vocab=7), wrapped(core, bos_token="<s>", eos_token="</s>"), template="plain")
    lm.model.generation_config.eos_token_id = None
    lm = LM(lm.model, lm.tokenizer, template="plain")
    x = "ab é".encode()
    byte = {i: lm.view.piece(i)[0] if lm.view.piece(i) else EOS for i in range(1, 7)}
    for mode in ("canonical", "all"):
        for k, state in enumerate(walk(lm, x, mode=mode)):
            ids = [0, *(next(i for i in byte if byte[i] == b) for b in x[:k])]
            with torch.no_grad():
                p = lm.causal(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ours = np.exp(state.logps())
            may = set(byte)
            if mode == "canonical":  # a text consists of whole characters
                inside = x[:k].endswith(b"\xc3")
                may = {i for i, b in byte.items() if (b == 0xA9) == inside}
            total = sum(float(p[i]) for i in may)
            for i, b in byte.items():
                assert ours[b] == pytest.approx(float(p[i]) / total if i in may else 0, abs=1e-9)


def forbid(lm: LM) -> LM:
    """Its logits after a history, -inf for tokens after which the sequence is not canonical as a prefix, and for an end
    where the text is encoded otherwise."""
    tokenizer, enumeration = lm.tokenizer, Enumeration(lm, canonical_as_prefix(lm.tokenizer))
    inner, said = Enumeration(lm), {}

    def logps(self, histories):
        for h in histories:
            if h not in said:
                p = np.zeros(len(tokenizer) + 3)
                p[: len(inner.next(h))] = inner.next(h)
                for v in enumeration.tokens:
                    p[v] = p[v] if enumeration.ok((*h, v)) else 0.0
                text = _text(enumeration.bytes(h))
                if text is None or tuple(tokenizer.encode(text, add_special_tokens=False)) != h:
                    p[enumeration.end] = 0.0
                with np.errstate(divide="ignore"):
                    said[h] = np.log(p / p.sum())
        return [said[h] for h in histories]

    lm.forbidden = logps
    return lm


@every
def test_modes_agree_on_a_model_of_canonical_text(name, monkeypatch):
    lm = forbid(make(name))
    monkeypatch.setattr(TokenTree, "logps", lm.forbidden)
    for x in (b"a\n\nb", b"b\xc3\xa9  a"):
        walks = [walk(lm, x, mode="all"), walk(lm, x, mode="canonical", fast=False), walk(lm, x, mode="canonical")]
        for states in zip(*walks, strict=True):
            for other in states[1:]:
                assert other.logp == pytest.approx(states[0].logp, abs=1e-9)
                np.testing.assert_allclose(np.exp(other.logps()), np.exp(states[0].logps()), atol=1e-9)


def test_prefix_closure_fails_for_encodings_and_holds_for_the_rules():
    r"""The pitfall: \n | \n | b is canonical though \n\n is one token."""
    tokenizer = bpe()
    encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
    rules, split = canonical(byte_view(tokenizer)), encode("\n\nb")
    assert len(split) == 3 and len(encode("\n\n")) == 1
    assert not rules.whole(split[:2]) and rules.prefix(split[:2]) and rules.whole(split)
    lm = make()
    with_it = walk(lm, b"\n\nb", mode="canonical", fast=False)[-1].logp
    enumeration = Enumeration(lm)
    missed = sum(enumeration.prob(t) for t in enumeration.cover(b"\n\nb") if t[:2] == split[:2])
    assert math.exp(with_it) >= missed > 0  # a search over encode(x_1..x_i) has none of it


def test_byte_fallback_twins_and_specials():
    """'a' as a piece is canonical, <0x61> is not; specials cover no byte."""
    view = byte_view(sentencepiece())
    rules, vocab = canonical(view), view.tokenizer.get_vocab()
    assert rules.prefix((vocab["▁"], vocab["b"], vocab["a"])) and not rules.prefix(
        (vocab["▁"], vocab["b"], vocab["<0x61>"])
    )
    assert rules.prefix((vocab["▁"],)) and rules.whole((vocab["▁a"],)) and not rules.prefix((vocab["ab"],))
    ranges = byte_ranges(view)
    assert not set(ranges.order.tolist()) & set(view.special_ids)
    assert sorted(ranges.ending(ranges.find(b"a")).tolist()) == sorted([vocab["a"], vocab["<0x61>"]])


def test_inside_a_character():
    """Only continuation bytes go on, and a first byte alone is not spelt where the whole character is a token."""
    lm = make("merges")
    state = walk(lm, b"a\xc3", mode="canonical", fast=False)[-1]
    possible = np.flatnonzero(np.exp(state.logps()) > 0)
    assert possible.tolist() == [0xA8, 0xA9]  # è has no token of its own, é may be one
    view = lm.view
    c3, a9, a8 = (byte_ranges(view).ending(byte_ranges(view).find(bytes([b])))[0] for b in (0xC3, 0xA9, 0xA8))
    rules = canonical(view)
    assert rules.prefix((c3,)) and rules.prefix((c3, a8)) and not rules.prefix((c3, a9))
    assert not rules.prefix((a8,)) and not rules.prefix((c3, c3)) and not rules.whole((c3,))


def test_prompts_may_end_inside_tokens_and_characters():
    lm = make()
    for prompt in ("ab ab", b"a b\xc3", "b", b"a b\xc3"):
        for mode in ("canonical", "all"):
            method = ByteExact(mode=mode, fast=False, search="text")
            data = prompt.encode() if isinstance(prompt, str) else prompt
            found, wanted = method.state(lm, prompt), walk(lm, data, mode=mode, fast=False)[-1]
            np.testing.assert_allclose(found.logps(), wanted.logps(), atol=1e-9)


def test_what_stands_before_the_last_boundary_is_shared():
    """Word and whole-text search give the same canonical distributions; all sequences are more."""
    lm = make()
    for prompt in ("ab a", "ab ab\n\n", "ab b  a", "a\n ab"):
        context, data = reading(lm, prompt)
        assert b"".join(lm.view.pieces(context, at_start=True)) + data == prompt.encode()
        word, text = (ByteExact(fast=False, search=s).state(lm, prompt) for s in ("word", "text"))
        np.testing.assert_allclose(np.exp(word.logps()), np.exp(text.logps()), atol=1e-9)
    assert reading(lm, "ab a") == ((0, lm.tokenizer.get_vocab()["ab"]), b" a")
    assert reading(lm, "ab a", whole=True) == ((0,), b"ab a")


def test_cached_and_recomputed_steps_agree():
    lm, x = make(), b"ab ab\xc3\xa9 a"
    method = ByteExact(fast=False, search="text")
    state = method.state(lm, b"")
    for k in range(len(x)):
        np.testing.assert_allclose(np.exp(state.logps()), np.exp(method.state(lm, x[:k]).logps()), atol=1e-10)
        state = state.advance(x[k])
        state.model.tree.keep(state.histories())


def test_prefetching_leaves_nothing_to_compute():
    lm, x = make(), b"ab ab\n\nab"
    model = ByteModel(lm, (0,), Search())
    model.prefetch(x)
    cost, state = model.tree.forwards, model.start()
    for byte in x:
        state = state.advance(byte)
    state.logps()
    assert model.tree.forwards == cost == 2


def test_ensembles():
    lm, other = make("regex"), make("sentencepiece", seed=1)
    alone = ByteExact().logps(lm, "ab", b" a", end=True)
    np.testing.assert_allclose(ByteExact(models=(lm,)).logps(lm, "ab", b" a", end=True), alone, atol=1e-12)
    mean = ByteExact(models=(other,)).states(lm, "ab a")
    parts = [np.exp(ByteExact().state(m, "ab a").logps()) for m in (lm, other)]
    np.testing.assert_allclose(np.exp(mean.logps()), (parts[0] + parts[1]) / 2, atol=1e-12)
    state = MeanState(mean.states).advance(ord("b"))
    assert state.dropped == 0 and state.logp == pytest.approx(mean.logps()[ord("b")])


def test_a_model_that_cannot_go_on_drops_out():
    a, b = make("regex"), make("merges", seed=1)
    states = [walk(a, b"\xc3", mode="all")[-1], walk(b, b"\xc3", mode="canonical", fast=False)[-1]]
    mean = MeanState(states)  # after 0xC3 only the first can say "a"
    assert np.exp(mean.logps()[ord("a")]) == pytest.approx(np.exp(states[0].logps()[ord("a")]) / 2)
    after = mean.advance(ord("a"))
    assert after.dropped == 1 and len(after.states) == 1
    with pytest.raises(ValueError, match="0x7A"):
        mean.advance(ord("z"))


def test_pruning_is_an_approximation_that_says_so():
    lm, x = make(), b"ab abab"
    exact = walk(lm, x, mode="all")
    wide, cut = walk(lm, x, mode="all", beam=10_000), walk(lm, x, mode="all", beam=2, threshold=1e-6)
    np.testing.assert_allclose(wide[-1].logps(), exact[-1].logps(), atol=1e-12)
    assert exact[-1].lost == 0 and max(len(s.branches()) for s in cut) <= 2
    assert cut[-1].logp < exact[-1].logp and len(exact[-1].branches()) > 2
    thin = walk(lm, x, mode="all", threshold=0.05)
    assert 0 < thin[-1].lost < 0.5


def test_temperature_acts_on_bytes():
    p = np.array([0.5, 0.3, 0.2] + [0.0] * 254)
    with np.errstate(divide="ignore"):
        logp = np.log(p)
    want = (p[:3] + 1e-7) ** (1 / 0.6)
    np.testing.assert_allclose(np.exp(tempered(logp, Sampling(temperature=0.6)))[:3], want / want.sum(), rtol=1e-12)
    assert np.exp(tempered(logp, Sampling(temperature=0.6)))[3:].sum() == 0
    np.testing.assert_allclose(np.exp(tempered(logp, Sampling())), p, atol=1e-12)
    np.testing.assert_allclose(np.exp(tempered(logp, Sampling(temperature=0.05))), [1, *[0] * 256])
    np.testing.assert_allclose(np.exp(tempered(logp, Sampling(top_p=0.6)))[:3], [0.625, 0.375, 0], atol=1e-12)
    np.testing.assert_allclose(np.exp(tempered(logp, Sampling(top_k=1)))[:3], [1, 0, 0], atol=1e-12)
    ends = np.log(np.where(np.arange(257) == EOS, 0.6, 0.4 / 256))
    assert tempered(ends, Sampling(), may_end=False)[EOS] == -np.inf


def test_draws_follow_the_distribution():
    """The first byte of 2000 draws against P: total variation below 0.05 (its expectation is about 0.02 for the five
    symbols there are, its standard deviation below 0.01: a false alarm in about a thousand seeds)."""
    lm = make()
    start = MeanState([ByteExact(mode="all", search="text").state(lm, b"a")])
    rng, n = np.random.default_rng(0), 2000
    drawn = [draw(start, Sampling(max_new_tokens=1), rng) for _ in range(n)]
    counts = np.bincount([d[0][0] if d[0] else EOS for d in drawn], minlength=257) / n
    assert 0.5 * np.abs(counts - np.exp(start.logps())).sum() < 0.05


def test_generated_traces_say_what_was_drawn():
    lm = make()
    how = Sampling(max_new_tokens=12)
    for prompt in ("ab a", b"a b\xc3", (0, 5, 9)):
        for one in ByteExact().generate(lm, [prompt], n=3, sampling=how, seed=1)[0]:
            trace = one.trace
            drawn = b"".join(trace.completion_pieces)
            assert len(drawn) == one.meta["bytes"] <= 12 and trace.ended == (len(drawn) < 12)
            assert [lm.view.piece(i) for i in trace.completion_ids] == list(trace.completion_pieces)
            wanted = ByteExact().logps(lm, prompt, drawn, end=trace.ended)
            assert trace.policy_logps.sum() == pytest.approx(wanted.sum(), abs=1e-9)
    ((best,),) = ByteExact().generate(lm, ["ab a"], sampling=Sampling(max_new_tokens=4, temperature=0))
    assert best.trace.sampled_logps.sum() == 0


def test_continued_contexts_and_fill_in_the_middle():
    lm = make()
    given = Continue((0, 5, 9), "ab a")
    assert reading(lm, given, whole=True) == ((0, 5, 9), b"ab a")
    tokens = ("<s>", "</s>", "<x>")
    made = fim(lm, "b", "ab", tokens)
    assert made.context[:2] == (0, 1) and made.context[-1] == 2 and made.text == "b"
    with pytest.raises(ValueError, match="<fim_prefix>"):
        fim(lm, "b", "ab")
    chat = tiny.lm()
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "the pl"}]
    context, data = reading(chat, turns)
    assert context[: len(chat.encode_prompt("How?"))] == chat.encode_prompt("How?")
    assert b"".join(lm_pieces(chat, context, "How?")) + data == b"the pl"


def lm_pieces(lm, context, prompt):
    return lm.view.pieces(context[len(lm.encode_prompt(prompt)) :])


def test_spelling_takes_few_tokens():
    ranges = byte_ranges(byte_view(bpe()))
    assert len(spelling(ranges, b" ab\xc3")) == 2 and spelling(ranges, b"z") is None and spelling(ranges, b"") == []


def test_bad_input():
    lm = make()
    with pytest.raises(ValueError, match=r"0x7A .b'z'. is impossible"):
        ByteExact().state(lm, "abz")
    with pytest.raises(ValueError, match="no byte"):
        ByteExact().state(lm, "ab").advance(256)
    assert ByteExact().logps(lm, "ab", b"az ").tolist()[1:] == [-np.inf] * 2  # probability 0, no error
    mute = LM(tiny.llama(vocab=len(bpe(bos=False))), bpe(bos=False), template="plain")
    with pytest.raises(ValueError, match="has no BOS"):
        ByteExact().state(mute, "")
    ByteExact().state(mute, "ab ab a")  # but a first word is enough
    words = tiny.wordpiece()
    words.eos_token = "[SEP]"
    with pytest.raises(ValueError, match="lost case and white space"):
        ByteExact().state(LM(tiny.llama(vocab=len(words)), words, template="plain"), "the")
    for options in ({"mode": "some"}, {"beam": -1}, {"threshold": 1.0}, {"search": "line"}):
        with pytest.raises(ValueError):
            ByteExact(**options)
    with pytest.raises(ValueError, match="no models"):
        MeanState([])


@pytest.mark.parametrize("make", [tiny.tokenizer, tiny.sentencepiece, lambda: tiny.sentencepiece("unigram", "first")])
def test_every_prefix_of_an_encoding_is_canonical_as_a_prefix(make):
    """Texts with runs of white space, emoji and scripts of several bytes, none of it in the brute force above."""
    tokenizer, rng = make(), np.random.default_rng(0)
    rules, view = canonical(byte_view(tokenizer)), byte_view(tokenizer)
    texts = ["a\n\n\ny  \t\n x   é\n  😀 12345", *(tiny.random_text(rng, 20) for _ in range(8))]
    for text in texts:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        assert b"".join(view.pieces(ids, at_start=True)) == text.encode()
        assert rules.whole(ids) and all(rules.prefix(ids[:k]) for k in range(len(ids) + 1))


@pytest.mark.slow
def test_smollm2():
    """A prompt cut inside a word; 21 bytes that are no token, of probability 0; what its regular expression splits."""
    lm = load("smollm2", template="plain")
    cut = "The committee decided that the new building would be constructed near the railway sta"
    exact = -ByteExact().logps(lm, cut, b"tion").sum() / math.log(2)
    naive = -ByteExact(mode="all").logps(lm, lm.encode_prompt(cut), b"tion").sum() / math.log(2)
    assert exact < 0.1 and naive > 5 * exact
    ranges = byte_ranges(lm.view)
    nodes = [ranges.find(bytes([b])) for b in range(256)]
    assert sum(node is None or not len(ranges.ending(node)) for node in nodes) == 21
    assert ByteExact().logps(lm, "a word ", b"\xc0").tolist() == [-math.inf]
    encode = lambda text: tuple(lm.tokenizer.encode(text, add_special_tokens=False))
    rules, split = canonical(lm.view), encode("\n\ny")
    assert len(split) == 3 and len(encode("\n\n")) == 1 and rules.prefix(split[:2]) and not rules.whole(split[:2])
