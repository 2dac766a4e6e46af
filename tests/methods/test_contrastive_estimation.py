"""Contrastive estimation: by hand, against the full logits, its identities, and bad input."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.core.protocols import Scorer
from pertoken.core.trace import Trace
from pertoken.score.contrastive_estimation import ContrastiveEstimation, contrastive_logps, contrastive_probability
from tests import tiny
from tests.methods.one_pass import exact_lm

P, Q = exact_lm(0), exact_lm(1)
TRACES = [trace for group in tiny.groups(P, n=3) for trace in group]
INF = float("inf")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def score(traces=TRACES, **options):
    given: dict[str, Any] = {"policy": P, "reference": Q} | options
    return ContrastiveEstimation(**given).score(traces)


def flat_logits(lm, trace):
    """(T, V) of one plain forward."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])
    with torch.no_grad():
        return lm.model(ids).logits[0, len(trace.prompt_ids) - 1 : -1].numpy()


# ---- arithmetic


def test_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): p^2 / q = (1, 1/4, 1/8), of sum 11/8."""
    z_p, z_q = tensor(0.5, 0.25, 0.25).log() + 3.0, tensor(0.25, 0.25, 0.5).log() - 1.0  # a constant does not matter
    s = contrastive_logps(z_p, z_q).exp()
    assert s.tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 11], abs=1e-14)
    ids = torch.tensor([2, 0])
    both = contrastive_probability(z_p.expand(2, 3), z_q.expand(2, 3), ids)
    assert both.tolist() == pytest.approx([1 / 11, 8 / 11], abs=1e-14)
    half = [math.sqrt(0.5**3 / 0.25), math.sqrt(0.25**3 / 0.25), math.sqrt(0.25**3 / 0.5)]  # p^1.5 / q^0.5
    assert contrastive_logps(z_p, z_q, 0.5).exp().tolist() == pytest.approx([h / sum(half) for h in half], abs=1e-14)


def test_the_sum_over_the_vocabulary_is_1():
    rng = np.random.default_rng(0)
    z_p, z_q = (torch.from_numpy(rng.normal(0, 4, (5, 17))) for _ in range(2))
    for b in (0.0, 0.3, 1.0, 4.0):
        ids = torch.arange(17).expand(5, 17)
        s = contrastive_probability(z_p[:, None].expand(5, 17, 17), z_q[:, None].expand(5, 17, 17), ids, b)
        np.testing.assert_allclose(s.sum(-1), np.ones(5), atol=1e-12)
        assert (s >= 0).all()


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0, 7.0])
def test_equal_models_give_softmax_for_every_b(b):
    z = tensor(2.0, -1.0, 0.5, 7.0)
    expected = np.exp(z.numpy()) / np.exp(z.numpy()).sum()
    np.testing.assert_allclose(contrastive_logps(z, z.clone(), b).exp(), expected, atol=1e-13)


def test_b_0_ignores_q():
    z_p = tensor(2.0, -1.0, 0.5)
    expected = np.exp(z_p.numpy()) / np.exp(z_p.numpy()).sum()
    for z_q in (tensor(9.0, 1.0, -4.0), tensor(-INF, -INF, 0.0), tensor(-INF, -INF, -INF)):
        np.testing.assert_allclose(contrastive_logps(z_p, z_q, 0.0).exp(), expected, atol=1e-15)


def test_minus_infinity_is_outside_of_both_supports():
    """Where q has -inf the difference would be +inf and take all; the softmax is over the intersection instead."""
    z_p, z_q = tensor(0.5, 0.2, 0.3, 0.0).log(), tensor(0.25, 0.0, 0.25, 0.5).log()
    s = contrastive_logps(z_p, z_q).exp()  # left: tokens 0 and 2 with 1 and .36
    assert s.tolist() == pytest.approx([1 / 1.36, 0.0, 0.36 / 1.36, 0.0], abs=1e-14)
    assert contrastive_probability(z_p, z_q, torch.tensor(1)).item() == 0.0
    with pytest.raises(ValueError, match="no token has a finite logit in both"):
        contrastive_logps(tensor(0.0, -INF), tensor(-INF, 0.0))


def test_a_broken_models_logits_are_not_taken_for_missing_support():
    for z_p, z_q in ((tensor(math.nan, 1.0, 2.0), tensor(0.0, 1.0, 2.0)), (tensor(0.0, 1.0), tensor(math.nan, 1.0))):
        assert contrastive_logps(z_p, z_q).isnan().all()


def test_half_precision_is_subtracted_in_float32():
    z_p, z_q = torch.tensor([60.0, 59.75]).bfloat16(), torch.tensor([-20.0, -20.25]).bfloat16()
    s = contrastive_logps(z_p, z_q)
    assert s.dtype == torch.float32
    assert s.exp().tolist() == pytest.approx([1 / (1 + math.exp(-0.25)), 1 / (1 + math.exp(0.25))], rel=1e-6)


def test_vocabularies_of_two_sizes():
    with pytest.raises(ValueError, match="over 3 and 4 tokens cannot be subtracted"):
        contrastive_logps(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="over 3 and 1 tokens"):  # which would broadcast
        contrastive_logps(torch.zeros(2, 3), torch.zeros(2, 1))
    larger = tiny.LM(tiny.llama(vocab=len(tiny.tokenizer()) + 8), tiny.tokenizer(), name="padded")
    with pytest.raises(ValueError, match="vocabularies of different sizes"):
        score(reference=larger)


# ---- two models


@pytest.mark.parametrize("b", [0.5, 1.0])
def test_against_plain_forwards(b):
    for trace, credit in zip(TRACES, score(contrast=b), strict=True):
        z = (1 + b) * flat_logits(P, trace) - b * flat_logits(Q, trace)
        s = np.exp(z - z.max(1, keepdims=True))
        s /= s.sum(1, keepdims=True)
        np.testing.assert_allclose(credit.values, s[np.arange(len(trace)), trace.completion_ids], atol=1e-10)
        assert credit.trace is trace
        assert (credit.kind, credit.over, credit.level) == ("probability", "completion", "token")
        assert (credit.method, credit.meta["contrast"]) == ("contrastive-estimation", b)
    assert isinstance(ContrastiveEstimation(), Scorer)


def test_the_same_model_twice_gives_its_own_probability():
    for trace, credit in zip(TRACES, score(reference=P, contrast=3.0), strict=True):
        z = flat_logits(P, trace)
        p = np.exp(z - z.max(1, keepdims=True))
        expected = (p / p.sum(1, keepdims=True))[np.arange(len(trace)), trace.completion_ids]
        np.testing.assert_allclose(credit.values, expected, atol=1e-10)


def test_order_and_company_do_not_matter():
    for trace, credit in zip(TRACES, score(), strict=True):
        np.testing.assert_allclose(score([trace])[0].values, credit.values, atol=1e-10)
    many = score(TRACES[:1] * 40)  # more of one prompt than share a forward
    assert len(many) == 40
    np.testing.assert_allclose(many[39].values, score(TRACES[:1])[0].values, atol=1e-10)


def test_what_was_not_emitted_and_what_is_empty():
    emitted = P.trace_of_ids([5, 6], [7, 8, 9], emitted=(True, False, True))
    first, second, third = score([P.trace_of_ids([5, 6], []), emitted, P.trace_of_ids([5, 6], [])])
    assert first.values.shape == third.values.shape == (0,)
    assert second.values[1] == 0 and second.values[0] > 0 < second.values[2]
    assert score([]) == []


def test_bad_input():
    cases: list[tuple[dict[str, Any], str]] = [({}, "policy and reference"), ({"policy": P}, "reference")]
    for given, missing in cases:
        with pytest.raises(ValueError, match=rf"ContrastiveEstimation\({missing}=\.\.\.\)"):
            ContrastiveEstimation(**given).score(TRACES)
    with pytest.raises(ValueError, match="contrast=-1"):
        ContrastiveEstimation(contrast=-1.0)
    for b in ("nan", "inf"):
        with pytest.raises(ValueError, match=f"contrast={b}"):
            ContrastiveEstimation(contrast=float(b))
        with pytest.raises(ValueError, match=f"b={b}"):
            contrastive_logps(torch.zeros(2), torch.zeros(2), float(b))
    stranger = tiny.LM(tiny.llama(vocab=300), tiny.tokenizer(vocab=300), name="stranger")
    with pytest.raises(ValueError, match="different tokenizers"):
        score(reference=stranger)
    foreign = Trace(**{**vars(TRACES[0]), "tokenizer": "another", "meta": {"row": 12}})
    with pytest.raises(ValueError, match=r"row 12 is of tokenizer another"):
        score([TRACES[1], foreign])
