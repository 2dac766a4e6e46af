# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
"""Guides, their caches and their products; sampling from them equals `rollout.sample`."""

import math

import numpy as np
import pytest
import torch

from pertoken.core.decode import LMGuide, Product, decode, generators, guidance, weighted
from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling, sample
from tests import tiny


def full(lm, ids):
    with torch.no_grad():
        return lm.causal(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_steps_equal_the_whole_forward_through_reordering():
    lm = tiny.lm()
    prompts = [
        lm.encode_prompt("the plot"),
        lm.encode_prompt("a film, a score and an acting"),
        lm.encode_prompt("the plot"),
    ]
    guide = LMGuide(lm=lm)
    state = guide.start(prompts)
    rows = [list(p) for p in prompts]
    logw = guide.step(state, None)
    rng = np.random.default_rng(0)
    for index in ([2, 0, 1], [1, 1], [0, 1, 0, 1]):
        for row, ids in enumerate(rows):
            torch.testing.assert_close(logw[row], full(lm, ids), atol=1e-5, rtol=0)
        guide.reorder(state, torch.tensor(index))
        rows = [list(rows[i]) for i in index]
        last = torch.from_numpy(rng.integers(3, 300, len(rows)))
        for ids, token in zip(rows, last.tolist(), strict=True):
            ids.append(token)
        logw = guide.step(state, last)
    torch.testing.assert_close(logw[3], full(lm, rows[3]), atol=1e-5, rtol=0)


def test_a_guide_alone_draws_what_sample_draws():
    lm, how = tiny.lm(), Sampling(max_new_tokens=7, temperature=0.8, top_p=0.9, min_new_tokens=2)
    prompts = ["the plot", "a film and a friend"]
    ours, theirs = decode(lm, LMGuide(lm=lm), prompts, n=3, sampling=how, seed=5), sample(lm, prompts, 3, how, seed=5)
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        assert a.completion_ids == b.completion_ids and a.meta["prompt"] == b.meta["prompt"] and a.ended == b.ended
        np.testing.assert_allclose(a.sampled_logps, b.sampled_logps, atol=1e-4)
        np.testing.assert_allclose(a.policy_logps, b.policy_logps, atol=1e-4)
    assert (
        decode(lm, LMGuide(lm=lm), prompts, n=3, sampling=how, seed=5, batch=1)[1][2].completion_ids
        == ours[1][2].completion_ids
    )


def test_streaming_tells_every_token_once():
    lm, seen = tiny.lm(), []
    (traces,) = decode(lm, LMGuide(lm=lm), ["the plot"], n=2, sampling=Sampling(max_new_tokens=5), stream=seen.append)
    for k, trace in enumerate(traces):
        mine = [s for s in seen if s.sample == k]
        assert tuple(s.token for s in mine) == trace.completion_ids
        assert [s.ended for s in mine] == [False] * (len(mine) - 1) + [True]


def test_products_add_log_weights():
    a, b = tiny.lm(0), tiny.lm(1)
    prompt = [a.encode_prompt("the plot")]
    parts = [LMGuide(lm=a), LMGuide(lm=b, temperature=2.0)]
    logw = Product(parts, (1.0, -0.5)).step(Product(parts, (1.0, -0.5)).start(prompt), None)
    wanted = full(a, prompt[0]) - 0.5 * (b.causal(torch.tensor([prompt[0]])).logits[0, -1] / 2).log_softmax(-1)
    torch.testing.assert_close(logw[0], wanted.detach(), atol=1e-5, rtol=0)


def test_power_zero_leaves_a_guide_out_bit_for_bit():
    a, b = tiny.lm(0), tiny.lm(1)
    both, alone = Product([LMGuide(lm=a), LMGuide(lm=b)], (1.0, 0.0)), LMGuide(lm=a)
    prompt = ["the plot"]
    assert torch.equal(both.step(both.start(prompt), None), alone.step(alone.start(prompt), None))


class Table:
    """A guide of fixed log-weights."""

    def __init__(self, logw):
        self.logw, self.vocabulary = torch.tensor(logw), len(logw)

    def start(self, prompts):
        return len(prompts)

    def step(self, state, last):
        return self.logw.expand(state if last is None else len(last), -1)

    def reorder(self, state, index):
        pass


def test_what_one_guide_forbids_stays_forbidden():
    inf = math.inf
    for power in (2.0, -1.0):
        product = Product([Table([-1.0, -inf, -2.0]), Table([-1.0, -1.0, -inf])], (1.0, power))
        assert product.step(product.start([0]), None).tolist() == [[-1.0 - power, -inf, -inf]]


def test_a_prompt_of_its_own_and_the_guidance():
    lm = tiny.lm()
    own = LMGuide(lm=lm, prompt=lambda p: "a film")
    assert own.ids("the plot") == lm.encode_prompt("a film")
    pair = Product([LMGuide(lm=lm), own], (1.0, 1.0))
    ((trace,),) = decode(lm, pair, ["the plot"], sampling=Sampling(max_new_tokens=4))
    base = [full(lm, trace.prompt_ids + trace.completion_ids[:k])[t].item() for k, t in enumerate(trace.completion_ids)]
    np.testing.assert_allclose(trace.policy_logps, base, atol=1e-5)
    np.testing.assert_allclose(guidance(trace, "x").values, trace.sampled_logps - base, atol=1e-5)


def test_argmax():
    lm = tiny.lm()
    ((trace,),) = decode(lm, LMGuide(lm=lm), ["the plot"], sampling=Sampling(max_new_tokens=4, temperature=0))
    for k, token in enumerate(trace.completion_ids):
        assert token == full(lm, trace.prompt_ids + trace.completion_ids[:k]).argmax()


def test_a_branch_leaves_its_state_as_it_was():
    lm = tiny.lm()
    prompts = [lm.encode_prompt("the plot"), lm.encode_prompt("a film, a score")]
    guide = LMGuide(lm=lm)
    state = guide.start(prompts)
    guide.step(state, None)
    ahead = guide.branch(state, torch.tensor([1, 1, 0]))
    for last in ([7, 8, 9], [10, 11, 12]):
        logw = guide.step(ahead, torch.tensor(last))
    rows = [(*prompts[1], 7, 10), (*prompts[1], 8, 11), (*prompts[0], 9, 12)]
    for row, ids in enumerate(rows):
        torch.testing.assert_close(logw[row], full(lm, ids), atol=1e-5, rtol=0)
    logw = guide.step(state, torch.tensor([20, 21]))
    for row, ids in enumerate([(*prompts[0], 20), (*prompts[1], 21)]):
        torch.testing.assert_close(logw[row], full(lm, ids), atol=1e-5, rtol=0)


class Told(Table):
    """Remembers the places that it is told."""

    def placed(self, state, places, seed):
        self.seen = [*getattr(self, "seen", []), (seed, *places)]


def test_a_guide_that_draws_is_told_its_places():
    lm, guide = tiny.lm(), Told([0.0] * 320)
    prompts = ["a film and a friend and a score", "the plot"]
    decode(lm, guide, prompts, n=2, sampling=Sampling(max_new_tokens=1), seed=3, batch=2)
    assert guide.seen == [(3, (1, 0), (1, 1)), (3, (0, 0), (0, 1))]  # the shorter prompt first


def test_bad_input():
    lm = tiny.lm()
    with pytest.raises(ValueError, match="temperature=0"):
        LMGuide(lm=lm, temperature=0)
    with pytest.raises(ValueError, match="finite number"):
        Product([LMGuide(lm=lm)], (math.nan,))
    with pytest.raises(ValueError, match="different tokenizers"):
        Product([LMGuide(lm=lm), LMGuide(lm=LM(lm.model, tiny.tokenizer(vocab=300)))], (1.0, 1.0))
    with pytest.raises(ValueError, match="give 1 or more"):
        decode(lm, LMGuide(lm=lm), ["x"], n=0)
    with pytest.raises(ValueError, match="no next token has a finite weight"):
        decode(lm, Table([-math.inf] * 320), ["x"])
    with pytest.raises(ValueError, match="seed=-1"):
        generators(-1, 0, 1)
    zero = Product([LMGuide(lm=lm)], (0.0,))
    with pytest.raises(ValueError, match="all powers are 0"):
        zero.step(zero.start(["x"]), None)
    with pytest.raises(ValueError, match="positions"):
        LMGuide(lm=lm).ids(tuple(range(3, 3 + lm.context)))


def test_a_power_a_row_and_a_power_of_0():
    inf = math.inf
    said = [torch.tensor([[-1.0, -inf, -2.0]] * 3), torch.tensor([[-inf, -1.0, -3.0]] * 3)]
    found = weighted(said, (1.0, torch.tensor([0.0, 2.0, -2.0])))
    assert found.tolist() == [[-1.0, -inf, -2.0], [-inf, -inf, -8.0], [-inf, -inf, 4.0]]
    assert weighted([x.bfloat16() for x in said], (1.0, 0.5)).dtype == torch.float32


class Asked(Table):
    """A guide that starts from more than prompts."""

    def start(self, prompts):
        assert all(isinstance(p, str) and isinstance(a, int) for p, a in prompts)
        return [a for _, a in prompts]


def test_requests_and_what_each_step_tells():
    lm, seen = tiny.lm(), {}

    def each(state, ids, places):
        for place, token in zip(places, ids.tolist(), strict=True):
            seen.setdefault(place, []).append(token)

    guide, prompts = Asked(torch.randn(320, generator=torch.Generator().manual_seed(0)).tolist()), ["the plot", "so?"]
    guide.step = lambda state, last: guide.logw.expand(len(state) if last is None else len(last), -1)
    drawn = decode(
        lm, guide, prompts, n=2, sampling=Sampling(max_new_tokens=40), requests=[("x", 1), ("y", 2)], each=each
    )
    assert {place: tuple(ids) for place, ids in seen.items()} == {
        (i, j): t.completion_ids for i, some in enumerate(drawn) for j, t in enumerate(some)
    }
    assert drawn[1][0].meta["prompt"] == "so?"
