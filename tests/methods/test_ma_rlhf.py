"""MA-PPO: by hand, against PPO at n=1 (to the bit), its limits, and what the authors' code gets wrong."""

# pyright: reportArgumentType=false
# pyright: reportAttributeAccessIssue=false
# pyright: reportCallIssue=false
# pyright: reportIndexIssue=false
# pyright: reportOperatorIssue=false
# pyright: reportOptionalSubscript=false

# pyright: reportOptionalMemberAccess=false

import dataclasses

import numpy as np
import pytest
import torch

from pertoken.core.advantage import GAE, gae, macro_gae, macro_weights
from pertoken.core.critic import KLControl
from pertoken.core.experience import Rollouts
from pertoken.core.policy_loss import PolicyLoss, policy_losses
from pertoken.train.ma_rlhf import MARLHF, Macros
from pertoken.train.ppo import PPO
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import gradient, logps, make_step, states

COMPLETIONS = [[[5, 6, 7, 8, 9, 10, 11]], [[8, 9]], [[12]]]
REWARDS = [[0.0] * 6 + [1.5], [0.5, -1.0], [3.0]]
ONCE = Rollouts(generations=1, inner_epochs=1)


def tensors(seed=0, n=4, t=12, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    mask = torch.tensor([[k < length for k in range(t)] for length in [t, 1, 7, 0][:n]])
    rewards, values = (torch.from_numpy(rng.normal(size=(n, t))).to(dtype) for _ in range(2))
    return rewards, values, mask


def ids(*starts, t=12):
    out = torch.zeros(len(starts), t, dtype=torch.long)
    for n, some in enumerate(starts):
        out[n] = torch.tensor([sum(s <= k for s in some) - 1 for k in range(t)]).clamp(min=0)
    return out


def by_loop(rewards, values, starts, gamma, lam, sigma, per="macro"):
    """Macros one by one, as lists: advantages and returns of one response without padding."""
    spans = [range(a, b) for a, b in zip(starts, [*starts[1:], len(rewards)], strict=True)]
    weigh = {
        "equal": lambda m: [1 / m] * m,
        "unit": lambda m: [0.0] * (m - 1) + [1.0],
        "position": lambda m: [(1 / i) / sum(1 / j for j in range(1, m + 1)) for i in range(1, m + 1)],
    }[sigma]
    total = lambda x, span: sum(w * x[i] for w, i in zip(weigh(len(span)), span, strict=True))
    advantages, returns, later, after = [0.0] * len(rewards), [0.0] * len(rewards), 0.0, 0.0
    for span in reversed(spans):
        g = gamma ** len(span) if per == "token" else gamma
        value = total(values, span)
        later = total(rewards, span) + g * after - value + g * lam * later
        after = value
        for i in span:
            advantages[i], returns[i] = later, later + value
    return advantages, returns


def test_by_hand():
    """Macros (1 2 3)(4 5)(6), values 0 and rewards 3, 0, 0 | 1, 3 | 5; lam 1/2: A = 5, 2 + 5/2, 1 + 9/4."""
    r = torch.tensor([[3.0, 0, 0, 1, 3, 5]])
    macros, mask = torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.ones(1, 6, dtype=torch.bool)
    found = macro_gae(r, torch.zeros(1, 6), macros, mask, 1.0, 0.5)
    assert found.advantage_NT.tolist() == [[3.25, 3.25, 3.25, 4.5, 4.5, 5.0]]
    assert found.return_NT.tolist() == found.advantage_NT.tolist()
    half = macro_gae(r, torch.zeros(1, 6), macros, mask, 0.5, 1.0, per="token")  # 2 + 5/4; 1 + 3.25/8
    assert half.advantage_NT.tolist() == [[1.40625] * 3 + [3.25] * 2 + [5.0]]
    weights = {how: macro_weights(macros, mask, how)[0, :3].tolist() for how in ("equal", "unit", "position")}
    assert weights["equal"] == pytest.approx([1 / 3] * 3) and weights["unit"] == [0, 0, 1]
    assert weights["position"] == pytest.approx([6 / 11, 3 / 11, 2 / 11])


@pytest.mark.parametrize("sigma", ["equal", "unit", "position"])
@pytest.mark.parametrize("per", ["macro", "token"])
def test_gae_over_macros_is_its_definition(sigma, per):
    rewards, values, mask = tensors()
    starts = [[0, 3, 4, 9, 11], [0], [0, 5, 6], []]
    hidden = [torch.where(mask, x, torch.nan) for x in (rewards, values)]
    found = macro_gae(*hidden, ids(*starts), mask, 0.9, 0.8, sigma=sigma, per=per)
    for n, some in enumerate(starts[:3]):
        k = int(mask[n].sum())
        a, ret = by_loop(rewards[n, :k].tolist(), values[n, :k].tolist(), some, 0.9, 0.8, sigma, per)
        assert found.advantage_NT[n, :k].tolist() == pytest.approx(a)
        assert found.return_NT[n, :k].tolist() == pytest.approx(ret)
    assert not found.advantage_NT[~mask].any() and not found.return_NT[~mask].any()


@pytest.mark.parametrize("sigma", ["equal", "unit", "position"])
@pytest.mark.parametrize("per", ["macro", "token"])
def test_single_tokens_are_gae_to_the_bit(sigma, per):
    rewards, values, mask = tensors(dtype=torch.float32)
    mask[0, 3:5] = False  # a tool's answer
    one = torch.where(mask, mask.long().cumsum(1) - 1, 0)
    found, plain = (
        macro_gae(rewards, values, one, mask, 0.97, 0.95, sigma=sigma, per=per),
        gae(rewards, values, mask, 0.97),
    )
    assert torch.equal(found.advantage_NT, plain.advantage_NT) and torch.equal(found.return_NT, plain.return_NT)


def test_a_macro_that_nothing_was_emitted_in_is_passed_over():
    """The release's empty macro enters with value 0; a piece of tool output must not."""
    rewards, values, _ = tensors(2, n=1, t=6)
    mask = torch.tensor([[True, True, False, False, True, True]])
    found = macro_gae(rewards, values, torch.tensor([[0, 0, 1, 1, 2, 3]]), mask, 0.9, 0.8)
    packed = macro_gae(
        rewards[mask][None], values[mask][None], torch.tensor([[0, 0, 1, 2]]), mask[:, [0, 1, 4, 5]], 0.9, 0.8
    )
    torch.testing.assert_close(found.advantage_NT[mask], packed.advantage_NT[0])


def test_identities():
    rewards, _, mask = tensors(1, n=1)
    macros = ids([0, 5, 10, 11])
    sigma = macro_weights(macros, mask, "equal", rewards.dtype)
    length = torch.bincount(macros[0])
    assert int(length.sum()) == 12 and length.tolist() == [5, 5, 1, 1]
    of_macro = torch.zeros(4, dtype=rewards.dtype).scatter_add(0, macros[0], (sigma * rewards)[0])
    assert float((of_macro * length).sum()) == pytest.approx(float(rewards.sum()))
    # the terminal reward's weight in the first advantage: lam^(M-1), with a critic that says 0
    for n, decisions in ((5, 11), (1, 48)):
        starts = sorted({*range(0, 48, n), 47})
        assert len(starts) == decisions
        r = torch.zeros(1, 48, dtype=torch.float64)
        r[0, -1] = 1
        a = macro_gae(r, torch.zeros_like(r), ids(starts, t=48), r >= 0).advantage_NT[0, 0]
        assert float(a) == pytest.approx(0.95 ** (decisions - 1))


def one_update(objective, rewards=REWARDS, epochs=1):
    """Loss, count, metrics and gradients of each update; the policy moves between them."""
    torch.manual_seed(5)
    lm, out = exact_lm(0), []
    step = make_step(objective, COMPLETIONS, rewards, lm=lm, models={"reference": exact_lm(3)})
    for _ in range(epochs):
        result = step.run([0, 1, 2], train=True)
        out.append((result.loss, result.count, gradient(lm), step.state.head.weight.grad.clone(), result.metrics))
        with torch.no_grad():
            for p in lm.model.parameters():
                p.sub_(0.02 * p.grad)
        lm.model.zero_grad()
        step.state.zero_grad()
    return out


@pytest.mark.parametrize("ratio", ["token", "macro"])
@pytest.mark.parametrize("whitening", ["none", "biased"])
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_n_of_1_is_ppo_to_the_bit(ratio, whitening, level):
    """Losses of policy and critic, both gradients; a second update too, where ratios and values are clipped."""
    shared = {
        "gae": GAE(whitening=whitening, gamma=0.98),
        "rollouts": Rollouts(generations=1, inner_epochs=2),
        "kl": KLControl(kl_coef=0.25),
    }
    rewards = REWARDS if level == "token" else [[0.0] * (len(r) - 1) + [sum(r)] for r in REWARDS]
    plain = one_update(PPO(**shared, policy_loss=PolicyLoss(clip=0.01)), rewards, epochs=2)
    options = {**shared, "policy_loss": PolicyLoss(clip=0.01, ratio=ratio), "reward_clip": None, "reward_level": level}
    for macros in (Macros(n=1), Macros(segmenter=lambda trace, logps=None: range(len(trace)))):
        found = one_update(MARLHF(**options, macros=macros), rewards, epochs=2)
        for a, b in zip(found, plain, strict=True):
            assert a[:2] == b[:2] and torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])
            assert all(a[4][k] == b[4][k] for k in b[4] if not k.startswith("seconds"))
    assert one_update(MARLHF(**options, macros=Macros(n=3)), rewards)[0][0] != plain[0][0]


@pytest.mark.parametrize("n, level", [(2, "sequence"), (5, "sequence"), (2, "token")])
def test_first_update_by_hand(n, level):
    """The plain model and plain loops: token ratios, each token's value against its macro's return."""
    lm, reference = exact_lm(0), exact_lm(3)
    objective = MARLHF(rollouts=ONCE, kl=KLControl(kl_coef=0.25), macros=Macros(n=n), reward_level=level)
    step = make_step(objective, COMPLETIONS, REWARDS, lm=lm, models={"reference": reference})
    result = step.run([0, 1, 2], train=True)
    found, head = gradient(lm) / result.count, step.state.head.weight.grad.clone() / result.count
    lm.model.zero_grad()
    step.state.zero_grad()
    rows, kl, macros = [], 0.0, 0
    for group, (ids_,), reward in zip(step.groups, COMPLETIONS, REWARDS, strict=True):
        p, q = logps(lm, group.prompt_ids, ids_), logps(reference, group.prompt_ids, ids_).detach()
        v = states(lm, group.prompt_ids, ids_) @ step.state.head.weight[0] + step.state.head.bias
        given = reward if level == "token" else [0.0] * (len(reward) - 1) + [sum(reward)]
        clipped = [min(max(r, -2.5), 2.5) for r in given]  # 3.0 is beyond it
        r = (torch.tensor(clipped, dtype=torch.float64) - 0.25 * (p - q)).detach().tolist()
        starts = sorted({*range(0, len(ids_), n), len(ids_) - 1})
        a, ret = by_loop(r, v.tolist(), starts, 1.0, 0.95, "equal")
        kl, macros = kl + float((p - q).detach().sum()), macros + len(starts)
        rows.append((p, v, torch.tensor(a, dtype=torch.float64), torch.tensor(ret, dtype=torch.float64)))
    p, v, a, ret = (torch.cat([row[k] for row in rows]) for k in range(4))
    wanted = (-torch.exp(p - p.detach()) * a + 0.1 * 0.5 * (v - ret).square()).mean()
    wanted.backward()
    assert result.loss / result.count == pytest.approx(float(wanted.detach()), rel=1e-6)
    torch.testing.assert_close(found, gradient(lm), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head, step.state.head.weight.grad, rtol=1e-6, atol=1e-9)
    assert result.metrics["objective/kl"] == (pytest.approx(kl), 3.0), "of sequences, whatever n averages"
    assert result.metrics["macros/count"] == (macros, 3.0) and result.metrics["macros/fallback"] == (0.0, 3.0)
    assert result.metrics["macros/length"] == (10.0, macros)


def test_the_sequences_reward_is_summed_then_clipped_on_the_last_emitted_token():
    """Wherever scorers put it: the last token is a macro of its own, so that no mean makes less of it."""
    objective, seen = MARLHF(rollouts=ONCE, kl=KLControl(kl_coef=0.0)), []
    inner = objective.advantages
    object.__setattr__(objective, "advantages", lambda e, r, s: seen.append(r) or inner(e, r, s))
    make_step(objective, COMPLETIONS, [[1.0, 0, 0, 1.0, 0, 0, 0], [-2.0, -1.0], [1.5]]).run([0, 1, 2], train=True)
    assert [row[row != 0].tolist() for row in seen[0]] == [[2.0], [-2.5], [1.5]]
    assert [int(row.nonzero()[0]) for row in seen[0]] == [6, 1, 0]


def test_the_product_of_a_macros_ratios():
    """rho_tau = prod rho_i; unclipped, the gradient in log pi_i is -A rho_tau; clipped, it is 0."""
    old = torch.zeros(1, 5, dtype=torch.float64)
    new = torch.tensor([[0.05, 0.04, 0.03, 0.15, 0.1]], dtype=torch.float64, requires_grad=True)
    a, mask = torch.tensor([[2.0, 2.0, -1.0, 3.0, 3.0]]), torch.tensor([[True, True, True, True, False]])
    macros = torch.tensor([[0, 0, 1, 2, 2]])
    losses, _ = policy_losses(new, old, a, mask, PolicyLoss(ratio="macro", clip=0.1), macro_NT=macros)
    losses.sum().backward()
    rho = np.exp([0.09, 0.09, 0.03, 0.15])
    wanted = [-2 * rho[0], -2 * rho[1], rho[2], -3 * 1.1]  # the third is clipped: exp(0.15) > 1.1
    assert losses.detach()[0].tolist() == pytest.approx([*wanted, 0.0])
    assert new.grad[0].tolist() == pytest.approx([*wanted[:3], 0.0, 0.0])
    with pytest.raises(ValueError, match="ma-rlhf makes"):
        policy_losses(new, old, a, mask, PolicyLoss(ratio="macro"))


def test_both_ratios_have_one_gradient_on_policy():
    base = MARLHF(rollouts=ONCE, macros=Macros(n=3))
    macro = dataclasses.replace(base, policy_loss=PolicyLoss(ratio="macro"))
    a, b = one_update(base)[0], one_update(macro)[0]
    torch.testing.assert_close(a[2], b[2])
    assert a[2].abs().max() > 0


def test_one_macro_is_reinforce_with_a_critic():
    """Two decisions; lam 1, gamma 1, no KL: the first advantage is the return less the macro's value."""
    rewards, values, mask = tensors(3, n=1, t=9)
    rewards[:, :-1] = 0
    found = macro_gae(rewards, values, ids([0, 8], t=9), mask, 1.0, 1.0)
    wanted = float(rewards[0, -1] - values[0, :8].mean())
    assert found.advantage_NT[0, :8].tolist() == pytest.approx([wanted] * 8)


def test_perplexity_is_the_references():
    """The rule is given the reference's log-probs, not the policy's."""
    seen = []
    objective = MARLHF(rollouts=ONCE, macros=Macros(segmenter=lambda t, logps=None: seen.append(logps) or [0]))
    reference = exact_lm(3)
    step = make_step(objective, COMPLETIONS, REWARDS, models={"reference": reference})
    step.run([0, 1, 2], train=True)
    for group, (ids_,), found in zip(step.groups, COMPLETIONS, seen, strict=True):
        np.testing.assert_allclose(found, logps(reference, group.prompt_ids, ids_).detach(), atol=1e-9)


@pytest.mark.parametrize("rule", ["randomized", "ppl", "parsing"])
def test_every_rule_trains(rule):
    loss, count, grads, *_ = one_update(MARLHF(rollouts=ONCE, macros=Macros(rule=rule)))[0]
    assert np.isfinite(loss) and count == 10 and torch.isfinite(grads).all() and grads.abs().max() > 0


def test_defaults_are_the_papers():
    o = MARLHF()
    assert (o.macros.rule, o.macros.n, o.macros.value_function, o.policy_loss.ratio) == ("fixed", 5, "equal", "token")
    assert (o.gae.gamma, o.gae.lam, o.gae.whitening, o.kl.kl_coef, o.reward_clip) == (1.0, 0.95, "none", 0.05, 2.5)
    assert (o.policy_loss.clip, o.value.value_clip, o.policy_loss.aggregate) == (0.2, 0.2, "token")
    assert (o.rollouts.inner_epochs, o.rollouts.minibatches, o.rollouts.generations) == (1, 1, 1)
    sampling = o.rollouts.sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k) == (512, 0.8, 50)
    assert (o.macros.ppl_cut, o.macros.parser_cutoff, o.macros.discount) == ("release", 5, "macro")


@pytest.mark.parametrize(
    "bad",
    [
        {"rule": "word"},
        {"n": 0},
        {"value_function": "sum"},
        {"discount": "step"},
        {"rule": "ppl", "ppl_cut": "before"},
        {"rule": "parsing", "parser_cutoff": 1},
        {"rule": "randomized", "repeat_times": 0},
    ],
)
def test_bad_options(bad):
    with pytest.raises(ValueError):
        Macros(**bad)
    with pytest.raises(ValueError, match="reward_level"):
        MARLHF(reward_level="span")
    with pytest.raises(ValueError, match="reward_clip"):
        MARLHF(reward_clip=0.0)
