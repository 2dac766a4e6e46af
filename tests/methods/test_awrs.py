# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false
"""AWRS as a sampler of particles and as a decoder: targets by enumeration, counts, deaths, bad input. Estimators and
constraints have files of their own (test_awrs_estimators, test_awrs_constraints)."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pertoken.core.decode import LMGuide
from pertoken.core.lm import LM
from pertoken.core.particles import Particles, smc
from pertoken.core.rollout import Sampling
from pertoken.generate._constrained import ConstrainedSampler
from pertoken.generate._constraints import Grammar, Predicate
from pertoken.generate.awrs import AWRS
from tests import tiny

EOS = 4
PIECES = (b"a", b"b", b"ab", b"a", b"", b"")  # two ids of the same bytes, a terminator, a special token
NEXT = np.array(  # of the last token; row 4 is the prompt's
    [
        [0.15, 0.30, 0.10, 0.05, 0.25, 0.15],
        [0.25, 0.05, 0.20, 0.10, 0.30, 0.10],
        [0.10, 0.40, 0.05, 0.05, 0.20, 0.20],
        [0.05, 0.75, 0.05, 0.05, 0.05, 0.05],
        [0.35, 0.15, 0.20, 0.10, 0.05, 0.15],
    ]
)
TEXTS = (b"ab", b"aab", b"ba", b"bab")
LANGUAGE = Predicate(prefix=lambda b: any(t.startswith(b) for t in TEXTS), complete=lambda b: b in TEXTS)

WORDS = [
    bytes(w) + end
    for n in (2, 3, 4)
    for w in itertools.product(b"abcdef", repeat=n)
    for end in (b"", b" ", *(bytes([32, c]) for c in range(97, 123)))
]


class Chain:
    """A guide: the next token depends on the last one."""

    vocabulary = 6

    def __init__(self, next_token=NEXT):
        self.logp = torch.from_numpy(np.log(next_token))

    def start(self, prompts):
        return SimpleNamespace(last=torch.full((len(prompts),), 4))

    def step(self, state, last):
        state.last = state.last if last is None else last
        return self.logp[state.last]

    def reorder(self, state, index):
        state.last = state.last[index]


def exact(longest=3, shape=lambda p: p):
    """Weight of every token sequence of the language."""
    out = {}
    for n in range(longest + 1):
        for y in itertools.product(range(4), repeat=n):
            if b"".join(PIECES[t] for t in y) in TEXTS:
                pairs = zip((4, *y), (*y, EOS), strict=True)
                out[y] = math.prod(float(shape(NEXT[a])[b]) for a, b in pairs)
    return out


def particles(runs, options=None, guide=None, **more):
    """Mean weight of each sequence over runs, and of all."""
    options, mean, total, sampler = options or Particles(particles=5, max_tokens=3), {}, 0.0, None
    for seed in range(runs):
        sampler = ConstrainedSampler(constraint=LANGUAGE, piece=PIECES.__getitem__, stops=(EOS,), **more)
        found = smc(guide or Chain(), 0, sampler, options, stops=(EOS,), seed=seed)
        total += math.exp(found.log_marginal) / runs
        for y, w in zip(found.tokens, found.logw, strict=True):
            if w > -math.inf:
                mean[tuple(y)] = mean.get(tuple(y), 0.0) + math.exp(w) / options.particles / runs
    return mean, total, sampler


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"estimator": "two-round"},
        {"estimator": "geometric", "max_accepts": 4},
        {"max_rejects": 2},
        {"prune": False},
        {"proposal": Chain(0.5 * NEXT + 0.5 / 6)},
        {"proposal": Chain(0.5 * NEXT + 0.5 / 6), "prune": False, "estimator": "geometric"},
    ],
)
def test_particles_stand_for_the_texts_of_the_language(how):
    """Mean weights are the model's probabilities of each sequence, and their sum Z: 200 runs of 5 particles, five
    standard errors (weights are at most 1, so a variance is at most its mean)."""
    wanted, runs = exact(), 200
    mean, total, _ = particles(runs, **how)
    assert set(mean) <= set(wanted)
    for y, w in wanted.items():
        assert abs(mean.get(y, 0.0) - w) < 5 * math.sqrt(w / runs), (y, w)
    assert abs(total - sum(wanted.values())) < 5 * math.sqrt(sum(wanted.values()) / runs)


def test_temperature_comes_first():
    def cold(p):
        return p**2 / (p**2).sum()

    wanted = exact(shape=cold)
    mean, total, _ = particles(200, sampling=Sampling(temperature=0.5))
    assert abs(total - sum(wanted.values())) < 5 * math.sqrt(sum(wanted.values()) / 200)
    top = max(wanted, key=wanted.get)
    assert abs(mean[top] - wanted[top]) < 5 * math.sqrt(wanted[top] / 200)


def test_locally_constrained_decoding_has_another_distribution():
    """Every finished particle weighs 1; the first token is drawn from what may follow, whatever comes after."""
    mean, _, _ = particles(400, Particles(particles=1, max_tokens=4), proper_weights=False)
    wanted, first = exact(), NEXT[4][:4] / NEXT[4][:4].sum()
    assert sum(mean.values()) == pytest.approx(1)
    starts = [sum(w for y, w in mean.items() if y[0] == t) for t in range(4)]
    np.testing.assert_allclose(starts, first, atol=5 * 0.5 / 20)
    target = [sum(w for y, w in wanted.items() if y[0] == t) / sum(wanted.values()) for t in range(4)]
    assert np.abs(first - target).sum() / 2 > 0.1


def test_the_longest_text_is_ended_by_force():
    """No token: the empty text is not of the language. Two tokens: its weight has the terminator's."""
    mean, total, _ = particles(3, Particles(particles=3, max_tokens=0))
    assert mean == {} and total == 0
    mean, total, _ = particles(200, Particles(particles=5, max_tokens=2))
    wanted = exact(2)
    assert set(mean) == set(wanted)
    assert abs(total - sum(wanted.values())) < 5 * math.sqrt(sum(wanted.values()) / 200)


def test_particles_of_one_text_share_what_was_checked():
    """Five particles begin with the same text: the first step asks no token twice."""
    sampler = ConstrainedSampler(constraint=LANGUAGE, piece=PIECES.__getitem__, stops=(EOS,))
    state, guide = sampler.start(5), Chain()
    rngs = [np.random.default_rng(i) for i in range(5)]
    sampler.step(state, guide.step(guide.start([0] * 5), None), rngs)
    assert sampler.counts["calls"] <= 5 < sampler.counts["looks"] and sampler.counts["steps"] == 5


@pytest.mark.parametrize("back_end", ["parser", "predicate"])
def test_what_a_token_begins_with_is_refused_once(back_end):
    """All of a vocabulary in any order, at texts of four lengths: every answer is the constraint's own, and the calls
    are the terminator's, one a token that may follow, and at most one (two, where only yes or no is said) for each
    first byte that is refused, and for each longer beginning."""
    lm = tiny.lm()
    piece, pattern = lm.view.piece, re.compile(rb"[a-f]{2,4}( [a-z]?)?")
    starts = {w[:k] for w in WORDS for k in range(len(w) + 1)}
    predicate = Predicate(prefix=starts.__contains__, complete=lambda b: bool(pattern.fullmatch(b)))
    parser, tokens = Grammar.regex("[a-f]{2,4}( [a-z]?)?"), [v for v in range(lm.view.size) if v not in lm.stop_ids]
    for text in (b"", b"a", b"abc", b"abcd "):
        sampler = ConstrainedSampler(
            constraint=parser if back_end == "parser" else predicate, piece=piece, stops=sorted(lm.stop_ids)
        )
        node, fresh = sampler.start(1).nodes[0], parser.start()
        node.state, fresh = node.state.after(text) if text else node.state, fresh.after(text) if text else fresh
        ask, answers = sampler.check(node), {}
        for v in np.random.default_rng(0).permutation(tokens).tolist():
            answers[v] = ask(v)
            assert answers[v] == (bool(piece(v)) and fresh.allows(piece(v))), piece(v)
        may = sum(answers.values())
        refused = {p[: fresh.matcher.validate_tokens(p) + 1] for v in tokens if (p := piece(v)) and not answers[v]}
        assert sampler.counts["looks"] == len(tokens)
        assert sampler.counts["calls"] <= may + len(refused) * (1 if back_end == "parser" else 2) + 5

    names = [b"z" + bytes([97 + k // 10, 97 + k % 10]) for k in range(100)]  # a hundred tokens that begin alike
    language = (
        Grammar.regex("[a-y]+") if back_end == "parser" else Predicate(prefix=lambda b: b"z" not in b, complete=bool)
    )
    sampler = ConstrainedSampler(constraint=language, piece=names.__getitem__, stops=(100,))
    ask = sampler.check(sampler.start(1).nodes[0])
    assert not any(ask(v) for v in range(100))
    assert sampler.counts == {"calls": 1 if back_end == "parser" else 18, "looks": 100, "steps": 0}


def test_debug_asks_about_what_begins_with_a_refused_piece():
    """Else it could not find what is not monotone: a length of one is refused, b"xa" is accepted after many."""
    odd = Predicate(prefix=lambda b: len(b) != 1, complete=lambda b: True, debug=True)
    names = [b"x", *(bytes([c]) for c in b"abcdefghijklmnopqrst"), b"xa", b""]
    sampler = ConstrainedSampler(constraint=odd, piece=names.__getitem__, stops=(22,))
    ask = sampler.check(sampler.start(1).nodes[0])
    assert not any(ask(v) for v in range(21))
    with pytest.raises(ValueError, match="accepts b'xa' but rejects b'x'"):
        ask(21)


def test_tokens_of_no_bytes_are_never_candidates():
    """Token 5 says nothing: pruned, the checks do not see it; else it is rejected without a call."""
    for prune in (True, False):
        asked: list[bytes] = []
        language = Predicate(prefix=lambda b, seen=asked: seen.append(b) or True, complete=lambda b: False)
        sampler = ConstrainedSampler(constraint=language, piece=PIECES.__getitem__, stops=(EOS,), prune=prune)
        state, logw = sampler.start(50), torch.log(torch.tensor([[1e-6, 0, 0, 0, 0, 1 - 1e-6]], dtype=torch.float64))
        asked.clear()
        tokens, w = sampler.step(state, logw.expand(50, -1), [np.random.default_rng(i) for i in range(50)])
        assert set(tokens) == {0} and asked == [b"a"]
        if prune:
            np.testing.assert_allclose(w, math.log(1e-6), rtol=1e-6)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5}, {"temperature": 0}, {"top_p": 0.5}, {"min_new_tokens": 2}])
def test_particles_die_where_no_token_has_mass(how):
    """Whatever shapes the weights; with an end that may not come yet, too."""
    language = Predicate(prefix=lambda b: True, complete=lambda b: True)
    for only in ((), (EOS,)) if "min_new_tokens" in how else ((),):
        p = np.zeros(6)
        p[list(only)] = 1
        with np.errstate(divide="ignore"):
            guide = Chain(np.tile(p, (6, 1)))
        sampler = ConstrainedSampler(
            constraint=language, piece=PIECES.__getitem__, stops=(EOS,), sampling=Sampling(**how)
        )
        found = smc(guide, 0, sampler, Particles(particles=2, max_tokens=3), stops=(EOS,))
        assert found.tokens == [[], []] and found.log_marginal == -math.inf


# ---- the decoder


def generate(constraint, prompt="the plot", n=3, lm=None, sampling=None, seed=0, stream=None, **options):
    options.setdefault("particles", Particles(particles=4, max_tokens=12))
    return AWRS(constraint=constraint, **options).generate(
        lm or tiny.lm(), [prompt], n=n, sampling=sampling, seed=seed, stream=stream
    )[0]


def test_draws_satisfy_the_constraint_and_say_how_they_came():
    lm, seen = tiny.lm(), []
    draws = generate("regex:(é|ü){1,2}[0-9]?", lm=lm, stream=seen.append)
    assert len(draws) == 3
    for k, drawn in enumerate(draws):
        trace, shares = drawn.trace, {row["text"]: row["share"] for row in drawn.meta["posterior"]}
        assert trace.ended and trace.completion_ids[-1] in lm.stop_ids and trace.text in shares
        assert sum(shares.values()) == pytest.approx(1) and drawn.logw == 0
        assert trace.meta["prompt"] == "the plot" and "temperature 1" in drawn.meta["target"]
        ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
        with torch.no_grad():
            logp = lm.causal(ids).logits[0].log_softmax(-1)
        asked = logp[len(trace.prompt_ids) - 1 : -1].gather(1, torch.tensor(trace.completion_ids)[:, None])[:, 0]
        np.testing.assert_allclose(trace.policy_logps, asked, atol=1e-5)
        assert drawn.credit.values.shape == (len(trace),) and (drawn.credit.values < 1e-9).all()
        assert [s.token for s in seen if s.sample == k] == list(trace.completion_ids)
        assert 0 < drawn.meta["calls"] <= drawn.meta["looks"]


def test_the_marginal_is_the_models_probability_of_the_language():
    """One printable byte, then an end: a sum over tokens. 400 particles, 0.4 is about five standard errors."""
    lm = tiny.lm()
    one = [v for v in range(lm.view.size) if len(lm.view.piece(v)) == 1 and 32 <= lm.view.piece(v)[0] < 127]
    ids, ends = lm.encode_prompt("the plot"), sorted(lm.stop_ids)
    with torch.no_grad():
        first = lm.causal(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[one]
        after = lm.causal(torch.tensor([[*ids, v] for v in one])).logits[:, -1].log_softmax(-1)[:, ends]
    wanted = float((first[:, None] + after).exp().sum())
    draws = generate("regex:[ -~]", lm=lm, n=1, particles=Particles(particles=400, max_tokens=3, ess=0))
    assert math.exp(draws[0].meta["log_marginal"]) == pytest.approx(wanted, rel=0.4)


def test_draws_do_not_depend_on_the_batch():
    lm = tiny.lm()
    method = AWRS(constraint="regex:[a-f]{3}", particles=Particles(particles=3, max_tokens=5))
    two = method.generate(lm, ["the plot", "a film"], n=2, seed=3)
    again = method.generate(lm, ["the plot"], n=2, seed=3)
    assert [d.trace.completion_ids for d in two[0]] == [d.trace.completion_ids for d in again[0]]
    other = method.generate(lm, ["the plot"], n=2, seed=4)[0][0].meta["log_marginal"]
    assert other != again[0][0].meta["log_marginal"]


def test_when_all_die_nothing_is_drawn_and_it_is_said():
    """Twelve letters do not fit into three tokens of one byte each."""
    draws = generate("regex:(~#){6}", particles=Particles(particles=3, max_tokens=3))
    for drawn in draws:
        assert drawn.logw == -math.inf and len(drawn.trace) == 0 and drawn.credit is None and not drawn.trace.ended
        assert drawn.meta["dead"] == 3 and drawn.meta["log_marginal"] is None and drawn.meta["posterior"] == []


def test_no_tokens_at_all():
    """The weight is that of all terminators together."""
    lm = tiny.lm()
    draws = generate("regex:a?", lm=lm, particles=Particles(particles=2, max_tokens=0), n=1)
    assert draws[0].trace.text == "" and len(draws[0].trace) == 1 and draws[0].trace.ended
    with torch.no_grad():
        logp = lm.causal(torch.tensor([draws[0].trace.prompt_ids])).logits[0, -1].log_softmax(-1)
    wanted = float(logp[sorted(lm.stop_ids)].logsumexp(0))
    assert draws[0].meta["log_marginal"] == pytest.approx(wanted, abs=1e-6)


def test_sampling_shortens_and_shapes():
    draws = generate("regex:~*", sampling=Sampling(max_new_tokens=3, min_new_tokens=2), n=5)
    assert {len(d.trace) for d in draws} <= {3}
    assert "top_p 0.5" in generate("regex:.*", sampling=Sampling(max_new_tokens=3, top_p=0.5))[0].meta["target"]


def test_what_the_posterior_is_about_is_said():
    """Improper weights stand for no target and estimate no marginal; a critic is part of it; so is the longest text."""
    meta = generate("regex:[a-z]{2}")[0].meta
    assert meta["log_marginal"] < 0 and "at most 12 tokens" in meta["target"] and "no target" not in meta["target"]
    meta = generate("regex:[a-z]{2}", proper_weights=False)[0].meta
    assert meta["log_marginal"] is None and meta["target"].startswith("no target")
    assert "times the critic" in generate("regex:[a-z]{2}", critic=lambda t, e: [0.0] * len(t))[0].meta["target"]


def test_a_prompt_may_end_inside_a_character():
    """Its other half begins with a byte that a pattern of whole characters refuses, and a check of bytes may allow."""
    lm = tiny.lm()
    first, second = ([v for v in range(lm.view.size) if lm.view.piece(v) == b] for b in (b"\xc3", b"\xa9"))
    prompt = (*lm.encode_prompt("the plot "), first[0])
    assert all(d.trace.text.isalpha() for d in generate("regex:[a-z]{2}", prompt=prompt, lm=lm))
    finishes = Predicate(prefix=lambda b: b"\xa9".startswith(b), complete=lambda b: b == b"\xa9")
    (drawn,) = generate(finishes, prompt=prompt, lm=lm, n=1, particles=Particles(particles=20, max_tokens=1))
    assert drawn.trace.completion_ids[:-1] == (second[0],)


def test_proposals_and_critics():
    lm, other = tiny.lm(), tiny.lm(1)
    for proposal in (other, LMGuide(lm=lm, temperature=2.0)):
        draws = generate("regex:[a-z]{2}", lm=lm, proposal=proposal)
        assert all(d.trace.text.isalpha() and len(d.trace.text) == 2 for d in draws)
    only_b = lambda texts, ended: [0.0 if b"a" not in t else -math.inf for t in texts]
    draws = generate("regex:[ab]", lm=lm, critic=only_b, n=8, particles=Particles(particles=30, max_tokens=3))
    assert {d.trace.text for d in draws} == {"b"}


def test_bad_input():
    for bad, message in (
        ({"max_accepts": 1}, "2 or more"),
        ({"max_rejects": 1}, "2 or more"),
        ({"max_accepts": 0, "proper_weights": False}, "2 or more"),
        ({"estimator": "x"}, "is not one of"),
        ({"estimator": "two-round", "max_rejects": 5}, "no budget"),
    ):
        with pytest.raises(ValueError, match=message):
            AWRS(constraint="regex:a", **bad)
    AWRS(constraint="regex:a", max_accepts=1, max_rejects=1, proper_weights=False)
    lm = tiny.lm()
    with pytest.raises(ValueError, match="no constraint"):
        AWRS().generate(lm, ["x"])
    with pytest.raises(ValueError, match="n=0"):
        generate("regex:a", n=0)
    with pytest.raises(ValueError, match="no exact bytes"):
        words = tiny.wordpiece()
        words.eos_token = "[SEP]"
        generate("regex:a", lm=LM(lm.model, words))
    with pytest.raises(ValueError, match="different tokenizers"):
        generate("regex:a", lm=lm, proposal=LM(lm.model, tiny.tokenizer(vocab=310)))
    with pytest.raises(ValueError, match="give a model"):
        generate("regex:a", proposal=3)
    with pytest.raises(ValueError, match="prefix of the constraint raised ZeroDivisionError at b"):
        generate(Predicate(prefix=lambda b: b == b"" or 1 / 0, complete=lambda b: True))
    broken = Chain(np.full_like(NEXT, np.nan))
    with pytest.raises(ValueError, match="NaN"):
        particles(1, guide=broken)
