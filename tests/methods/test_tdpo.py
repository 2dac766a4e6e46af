"""TDPO: by hand, every identity of its specification through a real pass, and the inputs of its pitfalls."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from pertoken.core.head import kl_divergence
from pertoken.core.lm import LM
from pertoken.core.protocols import Batch
from pertoken.core.stats import Stats
from pertoken.core.step import live_models
from pertoken.train.dpo import DPO
from pertoken.train.tdpo import KL, TDPO, tdpo_logits, tdpo_loss
from tests import tiny
from tests.methods.one_pass import exact_lm, gradient, means, pair_stats

MODELS = {"policy": exact_lm(0), "reference": exact_lm(1).reference()}
GROUPS = tiny.groups(MODELS["policy"], n=4)
VARIANTS = ("tdpo1", "tdpo2")


def one(x):
    return torch.tensor([float(x)], dtype=torch.float64)


def sides(**options):
    """A real pass: the objective's result, its statistics, and u and D of chosen and rejected."""
    objective = TDPO(**options)
    stats, batch = pair_stats(objective, MODELS, GROUPS)
    policy = stats["policy"]
    u = policy.sums() - stats["reference"].sums()
    d = (policy.extra[KL] * policy.mask_NT).sum(1)
    w, l = batch.chosen, batch.rejected
    return objective.loss(stats, batch), stats, batch, (u[w], u[l], d[w], d[l])


def test_by_hand():
    u_w, u_l, d_w, d_l = one(1.5), one(-0.5), one(2), one(3)
    assert tdpo_logits(u_w, u_l, d_w, d_l, 0.5, "tdpo1").item() == 2 - 1
    assert tdpo_logits(u_w, u_l, d_w, d_l, 0.5, "tdpo2").item() == 2 - 0.5
    assert tdpo_loss(u_w, u_l, d_w, d_l, 0.1, 0.5, "tdpo1").item() == pytest.approx(math.log1p(math.exp(-0.1)))
    assert tdpo_loss(u_w, u_l, d_w, d_l, 0.1, 0.5, "tdpo2").item() == pytest.approx(math.log1p(math.exp(-0.15)))


@pytest.mark.parametrize("side", [0, 1])
def test_an_infinite_kl_is_no_pair_without_loss(side):
    zeros = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    kl, mask = torch.zeros(2, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.bool)
    kl[side] = math.inf
    stats = {"policy": Stats(mask, zeros, mask, {KL: kl}), "reference": Stats(mask, zeros.detach(), mask)}
    for options in ({}, {"variant": "tdpo1"}):
        assert math.isnan(TDPO(**options).loss(stats, Batch(torch.tensor([[0, 1]]))).sum.item())
    plain = TDPO(alpha=0).loss(stats, Batch(torch.tensor([[0, 1]])))
    assert plain.sum.item() == pytest.approx(math.log(2))  # DPO has no KL
    with pytest.raises(ValueError, match="alpha=inf must be a finite number"):
        TDPO(alpha=math.inf)
    with pytest.raises(ValueError, match="beta=nan must be a finite number"):
        TDPO(beta=math.nan)


def test_where_gradients_stop():
    u_w, u_l, d_w, d_l = values = [one(x).requires_grad_() for x in (1.5, -0.5, 2, 3)]
    got = torch.autograd.grad(tdpo_logits(u_w, u_l, d_w, d_l, 0.5, "tdpo1"), values)
    assert [g.item() for g in got] == [1, -1, 1, -1]
    got = torch.autograd.grad(tdpo_logits(u_w, u_l, d_w, d_l, 0.5, "tdpo2"), values, allow_unused=True)
    assert got[2] is None and [g.item() for g in (got[0], got[1], got[3]) if g is not None] == [1, -1, -0.5]


def test_the_kl_is_forward_and_of_the_whole_vocabulary():
    _, stats, batch, _ = sides()
    policy = stats["policy"]
    for g, (chosen, _) in enumerate(GROUPS):
        ids = torch.tensor([[*chosen.prompt_ids, *chosen.completion_ids]])
        start = len(chosen.prompt_ids) - 1
        with torch.no_grad():
            logp, ref = (F.log_softmax(MODELS[n].model(ids).logits[0, start:-1], -1) for n in ("policy", "reference"))
        expected = (ref.exp() * (ref - logp)).sum(-1)
        n = batch.chosen[g]
        torch.testing.assert_close(policy.extra[KL][n, : len(chosen)], expected, atol=1e-10, rtol=0)
        assert not policy.extra[KL][n, len(chosen) :].any()


def test_kl_is_never_negative_and_reference_gets_no_gradient():
    _, stats, _, (_, _, d_w, d_l) = sides()
    assert (stats["policy"].extra[KL] >= 0).all() and d_w.min() > 0 and d_l.min() > 0
    assert not stats["reference"].logp_NT.requires_grad
    trainable = exact_lm(1)  # a reference that nobody froze
    stats, batch = pair_stats(TDPO(), {**MODELS, "reference": trainable}, GROUPS)
    assert not stats["reference"].logp_NT.requires_grad
    assert not gradient(TDPO().loss(stats, batch).sum, trainable).any()


def test_tdpo2_without_alpha_is_dpo():
    result, stats, batch, _ = sides(variant="tdpo2", alpha=0.0, beta=0.3)
    dpo = DPO(beta=0.3).loss(stats, batch)
    torch.testing.assert_close(result.sum, dpo.sum, atol=1e-12, rtol=0)
    policy = MODELS["policy"]
    torch.testing.assert_close(gradient(result.sum, policy), gradient(dpo.sum, policy), atol=1e-9, rtol=0)


def test_tdpo1_and_tdpo2_with_alpha_1_differ_only_through_the_chosen_kl():
    first, _, _, _ = sides(variant="tdpo1")
    second, _, _, (u_w, u_l, d_w, d_l) = sides(variant="tdpo2", alpha=1.0)
    torch.testing.assert_close(first.sum, second.sum, atol=1e-12, rtol=0)
    policy, beta = MODELS["policy"], 0.1
    slope = -beta * torch.sigmoid(-beta * tdpo_logits(u_w, u_l, d_w, d_l, 1.0, "tdpo1")).detach()
    difference = gradient(first.sum, policy) - gradient(second.sum, policy)
    assert difference.abs().max() > 1e-4
    torch.testing.assert_close(difference, gradient((slope * d_w).sum(), policy), atol=1e-9, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_that_is_the_reference(variant):
    objective = TDPO(variant=variant)
    same = {"policy": exact_lm(0), "reference": exact_lm(0).reference()}
    stats, batch = pair_stats(objective, same, GROUPS)
    loss = objective.loss(stats, batch)
    assert loss.sum.item() / float(loss.count) == pytest.approx(math.log(2), abs=1e-12)
    assert stats["policy"].extra[KL].abs().max() < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapping_the_sides_flips_the_logits_exactly(variant):
    _, _, _, (u_w, u_l, d_w, d_l) = sides()
    here = tdpo_logits(u_w, u_l, d_w, d_l, 0.5, variant)
    there = tdpo_logits(u_l, u_w, d_l, d_w, 0.5, variant)
    assert torch.equal(here, -there)
    policy = MODELS["policy"]
    summed = gradient(here.sum(), policy) + gradient(there.sum(), policy)
    if variant == "tdpo1":
        assert summed.abs().max() < 1e-9
    else:  # the detached side changes
        torch.testing.assert_close(summed, gradient(-0.5 * (d_w + d_l).sum(), policy), atol=1e-9, rtol=0)
        assert summed.abs().max() > 1e-3


def test_metrics_with_and_without_the_kl():
    result, _, _, (u_w, u_l, d_w, d_l) = sides(beta=0.2)
    shown = means(result)
    assert shown["rewards/chosen"] == pytest.approx(0.2 * (u_w + d_w).mean().item())
    assert shown["rewards/rejected"] == pytest.approx(0.2 * (u_l + d_l).mean().item())
    assert shown["rewards/accuracies"] == pytest.approx((u_w + d_w > u_l + d_l).double().mean().item())
    assert shown["accuracy_without_kl"] == pytest.approx((u_w > u_l).double().mean().item())
    assert (shown["kl/chosen"], shown["kl/rejected"]) == pytest.approx((d_w.mean().item(), d_l.mean().item()))
    assert {"rewards/margins", "logps/chosen", "logps/rejected"} <= set(shown)
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for pair in result.metrics.values() for x in pair)


def by_hand(logp, ref, kl, mask, present=None):
    mask, present = torch.tensor(mask), torch.tensor(mask if present is None else present)
    like = torch.tensor(logp, dtype=torch.float64)
    policy = Stats(mask, like, present, {KL: torch.tensor(kl, dtype=torch.float64)})
    reference = Stats(mask, torch.tensor(ref, dtype=torch.float64), present)
    return {"policy": policy, "reference": reference}, Batch(torch.tensor([[0, 1]]))


def test_the_reported_reward_can_win_where_the_policy_does_not():
    stats, batch = by_hand([[-1.0], [-1.0]], [[-1.0], [-1.5]], [[2.0], [0.1]], [[True], [True]])
    shown = means(TDPO().loss(stats, batch))
    assert (shown["rewards/accuracies"], shown["accuracy_without_kl"]) == (1, 0)


def test_mask_and_length_normalization():
    nan = float("nan")
    args = (
        [[-1.0, -2.0, nan], [-1.0, nan, nan]],
        [[-2.0, -2.5, nan], [-0.5, nan, nan]],
        [[0.4, 0.2, nan], [0.3, nan, nan]],
    )
    stats, batch = by_hand(*args, [[True, True, False], [True, False, False]])
    loss = TDPO(variant="tdpo1").loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-0.1 * ((1.5 + 0.5) - (0.3 - 0.6)))))
    loss = TDPO(variant="tdpo1", length_normalize=True).loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-0.1 * ((0.75 + 0.5) - (0.3 - 0.3)))))


def test_observation_tokens_count_neither_in_sums_nor_in_lengths():
    stats, batch = by_hand(
        [[-1.0, -9.0, -2.0], [-1.0, -8.0, -7.0]],
        [[-2.0, -1.0, -2.5], [-0.5, -2.0, -1.0]],
        [[0.4, 5.0, 0.2], [0.3, 6.0, 7.0]],
        mask=[[True, False, True], [True, False, False]],
        present=[[True, True, True], [True, True, True]],
    )
    loss = TDPO(variant="tdpo1").loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-0.1 * ((1.5 + 0.5) - (0.3 - 0.6)))))
    shown = means(loss)
    assert (shown["kl/chosen"], shown["kl/rejected"]) == pytest.approx((0.6, 0.3))
    loss = TDPO(variant="tdpo1", length_normalize=True).loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log1p(math.exp(-0.1 * ((0.75 + 0.5) - (0.3 - 0.3)))))


@pytest.mark.parametrize("normalize", [False, True])
def test_response_without_tokens(normalize):
    stats, batch = by_hand([[-1.0], [0.0]], [[-1.0], [0.0]], [[0.0], [0.0]], [[True], [False]])
    loss = TDPO(length_normalize=normalize).loss(stats, batch)
    assert loss.sum.item() == pytest.approx(math.log(2)) and means(loss)["kl/rejected"] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_identical_responses(variant):
    objective = TDPO(variant=variant)
    stats, batch = pair_stats(objective, MODELS, [[pair[0], pair[0]] for pair in GROUPS])
    loss = objective.loss(stats, batch)
    assert loss.sum.item() / 4 == pytest.approx(math.log(2), abs=1e-12)
    moved = gradient(loss.sum, MODELS["policy"]).abs().max()
    assert moved < 1e-9 if variant == "tdpo1" else moved > 1e-6  # TDPO2 still pulls the rejected KL down


def test_probabilities_that_underflow():
    ref = torch.log_softmax(torch.tensor([[0.0, -2000.0, 1.0]], dtype=torch.float32), -1)
    logits = torch.tensor([[0.0, 500.0, 1.0]], dtype=torch.float32, requires_grad=True)
    kl = kl_divergence(ref, torch.log_softmax(logits, -1))
    kl.sum().backward()
    assert torch.isfinite(kl).all() and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_chunks_do_not_matter_and_the_reference_runs_live():
    objective = TDPO()
    wholes, batch = pair_stats(objective, MODELS, GROUPS)
    parts, _ = pair_stats(objective, MODELS, GROUPS, chunk_tokens=3)
    whole, part = objective.loss(wholes, batch).sum, objective.loss(parts, batch).sum
    torch.testing.assert_close(whole, part, atol=1e-12, rtol=0)
    policy = MODELS["policy"]
    torch.testing.assert_close(gradient(whole, policy), gradient(part, policy), atol=1e-9, rtol=0)
    assert live_models(objective) == ("reference",)


def test_another_vocabulary_raises():
    padded = LM(tiny.llama(1, vocab=len(tiny.tokenizer()) + 64), tiny.tokenizer())
    with pytest.raises(ValueError, match="vocabularies of different sizes"):
        pair_stats(TDPO(), {**MODELS, "reference": padded.reference()}, GROUPS)


def test_options():
    assert dataclasses.asdict(TDPO()) == {"beta": 0.1, "alpha": 0.5, "variant": "tdpo2", "length_normalize": False}
    for wrong in ({"beta": 0.0}, {"alpha": -0.1}, {"variant": "tdpo3"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TDPO(**wrong)  # type: ignore[arg-type]
