"""Text2Grad against numpy and the plain model: KL over the vocabulary, GAE, whitening, the threshold, and PPO."""

# pyright: reportArgumentType=false
# pyright: reportCallIssue=false

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import dataclasses

import numpy as np
import pytest
import torch

from pertoken.core.advantage import GAE
from pertoken.core.credit import Credit
from pertoken.core.critic import KLControl
from pertoken.core.data import Example, Group
from pertoken.core.experience import Rollouts
from pertoken.core.policy_loss import PolicyLoss
from pertoken.core.protocols import Batch
from pertoken.core.rollout import Sampling
from pertoken.core.stats import Stats
from pertoken.train._policy_gradient import ValueLoss
from pertoken.train.ppo import PPO
from pertoken.train.text2grad import (
    Critiques,
    Text2Grad,
    advantages,
    full_kl,
    on_predictions,
    token_rewards,
    whitened,
)
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient, logps, make_step, states

COMPLETIONS = [[[5, 6, 7]], [[8, 9]], [[11, 12, 13, 14]]]
SPANS = [[1.0, 1.0, 0.0], [0.0, -1.0], [0.0, 1.0, -1.0, -1.0]]
ENDS = [[0.0, 0.0, 2.0], [0.0, -1.0], [0.0, 0.0, 0.0, -1.0]]
ONCE = Rollouts(generations=1, inner_epochs=1)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def release(rewards, values, mask, gamma=1.0, lam=0.95):
    """compute_advantages of the release, in numpy."""
    rewards, values = rewards * mask, values * mask
    adv, last = np.zeros_like(rewards), np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last) * mask[:, t]
        adv[:, t] = last
    n = mask.sum()
    mean = (adv * mask).sum() / n
    var = (((adv - mean) ** 2) * mask).sum() / n * n / (n - 1)
    return (adv - mean) / np.sqrt(var + 1e-8), adv + values


# ---- pure functions


def test_advantages_by_hand():
    """Two tokens, lam 0.5: A_2 = 3 - 1 = 2, A_1 = 1 + 1 - 2 + 0.5 * 2 = 1; returns 3 and 3."""
    found, returns = advantages(tensor([[1, 3]]), tensor([[2, 1]]), torch.ones(1, 2, dtype=torch.bool), lam=0.5)
    assert returns.tolist() == [[3, 3]]
    torch.testing.assert_close(found, tensor([[-1, 1]]) * (1 / (0.5 + 1e-8)) ** 0.5 * 0.5)


def test_advantages_are_the_releases():
    """Holes in the mask and what stands outside of it, too."""
    rng = np.random.default_rng(0)
    rewards, values, mask = rng.normal(size=(4, 7)), rng.normal(size=(4, 7)), rng.random((4, 7)) < 0.7
    wanted, returns = release(rewards, values, mask)
    found = advantages(tensor(rewards), tensor(values), torch.from_numpy(mask))
    np.testing.assert_allclose(found[0], wanted, atol=1e-12)
    np.testing.assert_allclose(found[1], returns, atol=1e-12)
    assert (found[0].numpy()[~mask] != 0).all()


def test_whitening():
    mask = torch.tensor([[True, True], [True, False]])
    found = whitened(tensor([[1, 2], [6, 50]]), mask)
    np.testing.assert_allclose(found, (np.array([[1, 2], [6, 50]]) - 3) / np.sqrt(7 + 1e-8))  # (4 + 1 + 9) / 2
    for equal in (0.0, 0.1, 1e6 / 3):  # zero variance gives zeros, however the mean is rounded
        assert not whitened(torch.full((3, 7), equal), torch.ones(3, 7, dtype=torch.bool)).any()
    assert not whitened(tensor([[5.0]]), torch.ones(1, 1, dtype=torch.bool)).any()
    assert not whitened(tensor([[float("nan"), 3.0]]), torch.tensor([[False, True]]))[0, 1].any()
    lost = whitened(tensor([[float("nan"), 3.0]]), torch.tensor([[True, True]]))
    assert lost.isnan().all()  # a fault is seen, not whitened away


def test_token_rewards_and_alignment():
    delta, kl = tensor([[1, -1, 1]]), tensor([[0.5, 1, 2]])
    found = token_rewards(delta, kl, torch.tensor([[True, True, False]]), 0.2)
    torch.testing.assert_close(found, tensor([[0.9, -1.2, -0.4]]))  # outside of the mask the KL term is left
    assert on_predictions(tensor([[9, 1, 2]])).tolist() == [[1, 2]]


def test_full_kl():
    p, q = tensor([0.5, 0.5, 0.0]), tensor([0.25, 0.5, 0.25])
    assert float(full_kl(p.log(), q.log())) == pytest.approx(0.5 * np.log(2))
    assert float(full_kl(p.log(), p.log())) == 0


# ---- the method


def by_hand(lm, reference, step, objective, coef):
    """Loss with gradient, mean over tokens, and the KL of each sequence."""
    rows, kls = [], []
    for group, (ids,), delta in zip(step.groups, COMPLETIONS, SPANS, strict=True):
        inputs = torch.tensor([[*group.prompt_ids, *ids]])
        at = slice(len(group.prompt_ids) - 1, -1)
        all_p, all_q = (m.causal(inputs).logits[0, at].log_softmax(-1).detach() for m in (lm, reference))
        kl = (all_p.exp() * (all_p - all_q)).sum(-1)
        v = states(lm, group.prompt_ids, ids) @ step.state.head.weight[0] + step.state.head.bias
        rows.append((logps(lm, group.prompt_ids, ids), v, tensor(delta) - coef * kl))
        kls.append(float(kl.sum()))
    longest = max(len(r[0]) for r in rows)
    pad = lambda x: np.pad(x.detach().numpy(), (0, longest - len(x)))
    mask = np.array([pad(torch.ones(len(r[0]))) for r in rows]) > 0
    a, returns = release(np.array([pad(r[2]) for r in rows]), np.array([pad(r[1]) for r in rows]), mask)
    p, v = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    a, returns = tensor(a[mask]), tensor(returns[mask])
    policy = -torch.exp(p - p.detach()) * a
    return (policy + 0.1 * 0.5 * (v - returns).square()).mean(), kls


def test_first_update_by_hand():
    lm, reference = exact_lm(0), exact_lm(3)
    objective = Text2Grad(rollouts=ONCE)
    step = make_step(objective, COMPLETIONS, SPANS, lm=lm, models={"reference": reference})
    coef = float(step.state.kl_coef)  # 0.2 as float32 has it
    result = step.run([0, 1, 2], train=True)
    head, found = step.state.head.weight.grad.clone() / result.count, gradient(lm) / result.count
    lm.model.zero_grad()
    step.state.zero_grad()
    wanted, kls = by_hand(lm, reference, step, objective, coef)
    wanted.backward()
    assert result.count == 9 and result.loss / result.count == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head, step.state.head.weight.grad, rtol=1e-6, atol=1e-9)
    # the controller, with the KL over the vocabulary: 0.2 (1 + e 3 / 10000)
    error = np.clip(np.mean(kls) / 6.0 - 1, -0.2, 0.2)
    assert float(step.state.kl_coef) == pytest.approx(0.2 * (1 + error * 3 / 10_000), rel=1e-6)
    assert result.metrics["policy/skipped"] == (0.0, 1.0)


def one_update(objective, rewards, reference=None):
    lm = exact_lm(0)
    step = make_step(objective, COMPLETIONS, rewards, lm=lm, models={"reference": reference or exact_lm(3)})
    torch.manual_seed(0)
    torch.nn.init.normal_(step.state.head.weight)
    result = step.run([0, 1, 2], train=True)
    return result.loss, gradient(lm), step


def test_scores_on_the_last_token_are_ordinary_ppo():
    """The same loss and gradient to the bit, without KL, and with PPO's estimate of it."""
    white = GAE(whitening="unbiased")
    for kl in (KLControl(kl_coef=0.0), KLControl(kl_coef=0.3, kl_target=2.0)):
        estimate = "full" if kl.kl_coef == 0 else "k1"
        mine, grads, step = one_update(Text2Grad(rollouts=ONCE, kl=kl, kl_estimate=estimate), ENDS)
        theirs, wanted, other = one_update(PPO(rollouts=ONCE, kl=kl, gae=white), ENDS)
        assert mine == pytest.approx(theirs, rel=1e-12)
        torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-13)
        assert float(step.state.kl_coef) == float(other.state.kl_coef)
    assert not torch.allclose(one_update(Text2Grad(rollouts=ONCE), SPANS)[1], grads)


def experience_of(objective, rewards, reference):
    lm = exact_lm(0)
    step = make_step(objective, COMPLETIONS, rewards, lm=lm, models={"reference": reference})
    kept = {}
    given = objective.rewards

    class Spy(Text2Grad):
        def rewards(self, experience, state):
            kept["experience"], kept["rewards"] = experience, given(experience, state)
            return kept["rewards"]

    step.objective = Spy(rollouts=objective.rollouts, kl=objective.kl)
    step.run([0, 1, 2], train=True)
    return kept


def test_no_spans_is_the_kl_alone_and_the_reference_itself_has_none():
    none = [[0.0] * len(r) for r in SPANS]
    found = experience_of(Text2Grad(rollouts=ONCE), none, exact_lm(3))
    kl = found["experience"].stats["policy"].extra["kl_reverse:reference"]
    mask = found["experience"].mask_NT
    torch.testing.assert_close(found["rewards"], torch.where(mask, -0.2 * kl, 0.0))
    assert (kl[mask] > 0).all()
    same = experience_of(Text2Grad(rollouts=ONCE), SPANS, exact_lm(0))
    torch.testing.assert_close(same["rewards"], same["experience"].reward_NT, rtol=0, atol=1e-12)


def test_all_zero_scores_have_no_advantages():
    lm = exact_lm(0)
    objective = Text2Grad(rollouts=ONCE, kl=KLControl(kl_coef=0.0), value=ValueLoss(vf_coef=0.0))
    step = make_step(objective, COMPLETIONS, [[0.0] * len(r) for r in SPANS], lm=lm)
    torch.nn.init.zeros_(step.state.head.weight)
    step.run([0, 1, 2], train=True)
    assert not gradient(lm).any()


def loss_of(objective, old, **batch):
    """A loss with gradient of two completions, whose log-probs are 0 and were `old`."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logp = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(2, 3, 32, dtype=torch.float64)
    stats = {"policy": Stats(mask, logp, mask, {"hidden": hidden})}
    ones = torch.ones(2, 3, dtype=torch.float64)
    columns = {"advantages": ones, "old_logps": tensor(old), "returns": ones, "old_values": 0 * ones}
    state = objective.init_state(exact_lm().causal.config).double()
    return objective.loss(stats, Batch(None, columns, **batch), state), logp


def test_ratio_threshold_is_of_the_whole_update():
    """Ratios 20.1 (e^3), 1, 1, 1: their mean is under 10, though one sequence alone is not; then 20.1 and 3 x 12.2."""
    loss, logp = loss_of(Text2Grad(), [[0, 0, 0], [-3, 0, 0]])
    (grad,) = torch.autograd.grad(loss.sum, logp)
    assert loss.metrics["policy/skipped"] == (0.0, 1.0) and grad.any() and float(loss.sum.detach()) != 0
    old = [[-2.5, -2.5, -2.5], [-3, 0, 0]]
    loss, logp = loss_of(Text2Grad(policy_loss=PolicyLoss(clip=100.0)), old)
    (grad,) = torch.autograd.grad(loss.sum, logp)
    assert loss.metrics["policy/skipped"] == (1.0, 1.0) and not grad.any()
    assert float(loss.sum.detach()) == 0 and float(loss.count) == 4
    loss, logp = loss_of(Text2Grad(policy_loss=PolicyLoss(clip=100.0), max_ratio=None), old)
    assert torch.autograd.grad(loss.sum, logp)[0].any() and "policy/skipped" not in loss.metrics
    assert not Text2Grad(max_ratio=None).batch_coupled and Text2Grad().batch_coupled


def test_options_are_refused():
    with pytest.raises(ValueError, match="give more than 1"):
        Text2Grad(max_ratio=0.5)
    for wrong in (lambda: Text2Grad(kl_estimate="k2"), lambda: Critiques(annotator="row")):
        with pytest.raises(ValueError, match="is not one of"):
            wrong()


# ---- the reward by name


@dataclasses.dataclass(frozen=True)
class Ones:
    """A scorer: 1 on every token."""

    def score(self, items):
        return [Credit(trace=t, values=np.ones(len(t))) for t in items]


@dataclasses.dataclass
class Asked:
    """What `prepare` may ask of a run."""

    policy: object
    given: dict = dataclasses.field(default_factory=dict)
    found: dict = dataclasses.field(default_factory=dict)

    def scorer(self, slug, **options):
        from pertoken import catalog

        return catalog.method(slug)(**options)

    def reward_by(self, scorers, weights=None):
        self.found = dict(scorers)


def test_prepare_names_the_reward():
    run = Asked(exact_lm())
    chosen = Critiques(occurrence="all", overlap="poor", length_target=48, fallback=0.1)
    Text2Grad(critiques=chosen).prepare(run)
    (scorer,) = run.found.values()
    assert (scorer.annotator, scorer.matching.occurrence, scorer.matching.overlap) == ("rule", "all", "poor")
    assert (scorer.length.target, scorer.fallback, scorer.matching.fuzzy) == (48, 0.1, 90.0)
    Text2Grad(critiques=Critiques(annotator="lm")).prepare(run)  # a copy of today's policy: it does not learn along
    (scorer,) = run.found.values()
    assert scorer.lm.model is not run.policy.model
    Text2Grad(scorer=Ones()).prepare(run)
    assert list(run.found) == ["ones"]
    run.found = {}
    Text2Grad(reward="vader").prepare(run)
    assert run.found == {}


def test_a_run_learns_from_the_rule(tmp_path):
    from pertoken import catalog
    from pertoken.core.loop import LoopConfig
    from pertoken.core.run import Run
    from tests import tiny

    lm = tiny.lm(dtype=torch.float32)
    groups = []
    for row in range(2):
        example = Example(prompt=f"film {row}?", kind="prompt", row=row)
        groups.append(Group(example=example, prompt_ids=lm.encode_prompt(example.prompt)))
    objective = Text2Grad(rollouts=Rollouts(generations=1, inner_epochs=2, sampling=Sampling(max_new_tokens=6)))
    run = Run(
        slug="text2grad",
        objective=objective,
        policy=lm,
        groups=groups,
        held_out=[],
        config=LoopConfig(steps=2, batch_size=2),
        out=tmp_path / "run",
        resolve=catalog.method,
        progress=False,
    )
    final = run.go()["final"]
    assert final["policy/skipped"] == 0 and np.isfinite(final["loss"])
