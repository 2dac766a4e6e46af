# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""The objective of the autoregressive reward model: by hand, DPO's with a reference of 0, and what is not counted."""

import math

import numpy as np
import pytest
import torch

from pertoken.core.packing import Cost, pack
from pertoken.core.protocols import Batch
from pertoken.core.stats import Needs, token_stats
from pertoken.train.arm import ARM, arm_loss
from pertoken.train.dpo import DPO, dpo_loss
from tests import tiny
from tests.methods.by_hand import gradient, mean, pairs, stats
from tests.methods.one_pass import exact_lm, pair_stats


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_by_hand():
    s = {"policy": stats([-1.0, -2.0, -3.0], [-4.0, -5.0])}  # sums -6 and -9
    loss = ARM(beta=0.5).loss(s, pairs())
    assert mean(loss) == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-14)
    assert mean(loss, "rewards/chosen") == -3 and mean(loss, "rewards/rejected") == -4.5
    assert mean(loss, "rewards/margins") == 1.5 and mean(loss, "rewards/accuracies") == 1
    assert mean(loss, "lengths/chosen") == 3 and mean(loss, "lengths/rejected") == 2
    assert not loss.metrics["rewards/chosen"][0].requires_grad
    weight = 0.5 * sigmoid(-1.5)  # of every token alike: a sum, not a mean
    torch.testing.assert_close(
        gradient(loss, s["policy"]), torch.tensor([[-weight] * 3, [weight, weight, 0]], dtype=torch.float64)
    )


def test_is_dpo_with_a_reference_of_log_prob_0():
    policy = stats([-1.0, -2.0], [-0.5], [-3.0], [-1.0, -0.1, -2.0])
    nothing = stats([0.0, 0.0], [0.0], [0.0], [0.0, 0.0, 0.0])
    for smoothing in (0.0, 0.2):
        ours = ARM(beta=0.3, label_smoothing=smoothing).loss({"policy": policy}, pairs(2))
        theirs = DPO(beta=0.3, label_smoothing=smoothing).loss({"policy": policy, "reference": nothing}, pairs(2))
        assert mean(ours) == pytest.approx(mean(theirs), rel=1e-15)
        torch.testing.assert_close(gradient(ours, policy), gradient(theirs, policy), rtol=1e-14, atol=0)
    c, r, zero = *(torch.randn(2, 5, generator=torch.Generator().manual_seed(0)) * 9), torch.zeros(5)
    torch.testing.assert_close(arm_loss(c, r, beta=0.3), dpo_loss(c, r, zero, zero, beta=0.3))


def test_options_of_the_releases_trainer():
    """Of z = (chosen - rejected) - gamma / beta: (1 - e), e parts of -log sigmoid(+-beta z); relu(1 - beta z)."""
    rng = np.random.default_rng(0)
    c, r = rng.normal(size=(2, 7)) * 20
    beta, gamma, e = 0.1, 0.6, 0.15
    z = (c - r) - gamma / beta
    smooth = (1 - e) * np.logaddexp(0, -beta * z) + e * np.logaddexp(0, beta * z)
    hinge = np.maximum(0, 1 - beta * z)
    two = torch.tensor(c), torch.tensor(r)
    found = arm_loss(*two, beta=beta, gamma=gamma, label_smoothing=e)
    np.testing.assert_allclose(found.numpy(), smooth, rtol=1e-12)
    np.testing.assert_allclose(arm_loss(*two, beta=beta, gamma=gamma, form="hinge").numpy(), hinge, atol=1e-12)
    rows = [[x] for pair in zip(c.tolist(), r.tolist(), strict=True) for x in pair]
    for objective, wanted in (
        (ARM(beta=beta, gamma=gamma, label_smoothing=e), smooth),
        (ARM(beta=beta, gamma=gamma, form="hinge"), hinge),
    ):
        assert mean(objective.loss({"policy": stats(*rows)}, pairs(7))) == pytest.approx(wanted.mean(), rel=1e-12)


def test_empty_responses():
    assert mean(ARM().loss({"policy": stats([], [])}, pairs())) == pytest.approx(math.log(2), rel=1e-14)
    loss = ARM(beta=0.5).loss({"policy": stats([], [-4.0])}, pairs())
    assert mean(loss) == pytest.approx(-math.log(sigmoid(2.0))) and mean(loss, "rewards/chosen") == 0
    for chosen, rejected in ((0.0, -1e5), (-1e5, 0.0)):
        s = {"policy": stats([chosen], [rejected])}
        found = ARM(beta=0.5).loss(s, pairs())
        assert math.isfinite(mean(found)) and torch.isfinite(gradient(found, s["policy"])).all()


def labelled_loss(lm, groups, beta, prompt_label=-100):
    """As trainers write it: labels are the shifted ids, -100 on the prompt; one plain forward a response."""
    sums = []
    for group in groups:
        for trace in group:
            ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])
            labels = ids.clone()
            labels[0, : len(trace.prompt_ids)] = prompt_label
            with torch.no_grad():
                logps = lm.causal(ids).logits[:, :-1].log_softmax(-1)
            kept = labels[:, 1:] != -100
            at = labels[:, 1:].where(kept, 0)
            sums.append((logps.gather(-1, at[..., None])[..., 0] * kept).sum().item())
    margins = beta * np.subtract(sums[::2], sums[1::2])
    return float(np.logaddexp(0, -margins).mean())


def test_a_real_model_and_its_labels():
    """Prompt tokens have no label: a prompt's own likelihood is no reward."""
    lm = exact_lm(3)
    groups = tiny.groups(lm, n=3)
    found = mean(ARM(beta=0.1).loss(*pair_stats(ARM(), {"policy": lm}, groups)))
    assert found == pytest.approx(labelled_loss(lm, groups, 0.1), rel=1e-10)
    # pairs of different prompts, where likelihood of the prompt would show: the same sums, other prompts' labels
    packed = [[t] for g in groups for t in g]
    (one,) = pack(packed, cost=Cost(linear=1, attention=1, launch=1e12), max_tokens=1 << 20)
    sums = token_stats({"policy": lm}, one, Needs(ARM().stats), None)["policy"]
    place = {g: i for i, (g, _) in enumerate(one.order)}
    crossed = Batch(torch.tensor([[place[0], place[2]], [place[4], place[1]]]))
    wanted = labelled_loss(lm, [[groups[0][0], groups[1][0]], [groups[2][0], groups[0][1]]], 0.1)
    assert mean(ARM(beta=0.1).loss({"policy": sums}, crossed)) == pytest.approx(wanted, rel=1e-10)


def test_the_terminator_is_a_token_of_the_response():
    lm = exact_lm(3)
    ended, cut = lm.trace("the film", "great"), lm.trace("the film", "great", ended=False)
    (s, batch) = pair_stats(ARM(), {"policy": lm}, [[ended, cut]])
    loss = ARM().loss(s, batch)
    assert mean(loss, "lengths/chosen") == mean(loss, "lengths/rejected") + 1
    assert mean(loss, "rewards/margins") < 0


def test_bad_options():
    for options, what in (
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"beta": math.nan}, "beta=nan"),
        ({"gamma": math.inf}, "gamma=inf"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"form": "ipo"}, "form='ipo' is not one of"),
        ({"form": "hinge", "label_smoothing": 0.1}, "no label smoothing"),
    ):
        with pytest.raises(ValueError, match=what):
            ARM(**options)
