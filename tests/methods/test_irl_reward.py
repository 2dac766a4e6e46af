"""Inverse RL on finite sets and on features: the min-max problem, its gradient, rounds, balance, saving."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false
# pyright: reportOptionalSubscript=false

import dataclasses
import math

import numpy as np
import pytest
import torch

from pertoken.core.irl import IRL, RewardHead, balanced, fit_reward, inner_value, objective, pool_policy
from pertoken.score.irl_reward import IRLReward
from tests import tiny

BETA = 0.3
LOGREF = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()
R = torch.tensor([0.3, -0.2, 0.7, 0.1], dtype=torch.float64)
DEMO = 2  # the demonstration is the third response


def optimal():
    weights = [math.exp(float(q) + float(r) / BETA) for q, r in zip(LOGREF, R, strict=True)]
    return [w / sum(weights) for w in weights]


def test_the_inner_minimum_is_the_log_ratio_of_the_optimal_policy():
    pi = optimal()
    wanted = math.log(pi[DEMO]) - float(LOGREF[DEMO])
    found = inner_value(R[DEMO], R, torch.tensor(pi, dtype=torch.float64).log(), LOGREF, BETA)
    assert float(found) == pytest.approx(wanted, abs=1e-12)
    for seed in range(50):  # any other policy is worse
        other = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(4))).log()
        assert float(inner_value(R[DEMO], R, other, LOGREF, BETA)) > wanted


def test_the_objective_has_the_gradient_of_the_likelihood():
    """Exact pool: (grad r(y) - E_pi grad r) / beta, against finite differences of log pi_theta(y|x)."""
    r = R.clone().requires_grad_()
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    objective(r[DEMO][None], r[None], pool_policy(r[None], BETA), BETA).backward()
    for i in range(4):
        value = []
        for h in (1e-6, -1e-6):
            z = [math.exp((float(x) + (h if k == i else 0)) / BETA) for k, x in enumerate(R)]
            value.append(math.log(z[DEMO] * uniform[DEMO] / sum(w * u for w, u in zip(z, uniform, strict=True))))
        assert float(r.grad[i]) == pytest.approx((value[0] - value[1]) / 2e-6, abs=1e-5)


def test_objective_by_hand():
    demo, samples = torch.tensor([1.0, 0.5]), torch.tensor([[0.0, 1.0], [0.5, -0.5]])
    weight = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    # differences / 0.5: [2, 0] and [0, 2]
    assert float(objective(demo, samples, weight, 0.5)) == pytest.approx((0.25 * 2 + 0.5 * 2) / 2)
    log = lambda d: -math.log1p(math.exp(-d))
    wanted = (0.25 * log(2) + 0.75 * log(0) + 0.5 * log(0) + 0.5 * log(2)) / 2
    assert float(objective(demo, samples, weight, 0.5, bounded=True)) == pytest.approx(wanted)


def test_weights_carry_no_gradient_and_bounding_saturates():
    weight = torch.tensor([[0.5, 0.5]], requires_grad=True)
    r = torch.tensor([[100.0, 90.0]], requires_grad=True)
    demo = torch.tensor([200.0], requires_grad=True)
    objective(demo, r, weight, 0.1, bounded=True).backward()
    assert weight.grad is None and float(demo.grad) == pytest.approx(0, abs=1e-12)
    demo.grad = None
    objective(demo, r, weight, 0.1).backward()
    assert float(demo.grad) == pytest.approx(10)  # unbounded: 1 / beta however large the margin


def features(n=40, k=6, seed=0):
    rng = np.random.default_rng(seed)
    demo = rng.normal(size=(n, 5)) + np.array([1.5, 0, 0, 0, 0])
    return torch.from_numpy(demo).float(), torch.from_numpy(rng.normal(size=(n, k, 5))).float()


def test_rounds_learn_keep_the_best_and_repeat():
    demo, pool = features()
    numbers = []
    draw = lambda number, head: numbers.append(number) or pool
    before = torch.get_rng_state()
    head, record = fit_reward(demo, draw, IRL(irl_batch=8))
    assert torch.equal(before, torch.get_rng_state())
    assert numbers == list(range(len(record["rounds"])))
    gaps = [r["gap"] for r in record["rounds"]]
    assert record["best"] == int(np.argmax(gaps))
    fresh, other = features(seed=1)
    assert float((head(fresh)[:, None] > head(other)).float().mean()) > 0.7
    again, _ = fit_reward(demo, lambda *_: pool, IRL(irl_batch=8))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_it_stops_where_the_held_out_gap_stops_growing():
    """A policy that answers as the demonstrations from the second round on: the gap is 0, the first round is kept."""
    demo, pool = features()
    draw = lambda number, head: pool if number == 0 else demo[:, None]
    _, record = fit_reward(demo, draw, IRL(irl_rounds=5, irl_patience=2, irl_lr=1e-6, irl_policy="grpo"))
    gaps = [r["gap"] for r in record["rounds"]]
    assert len(gaps) < 5 and len(gaps) == record["best"] + 3 and max(gaps) == gaps[record["best"]]


def test_equal_prompts_are_not_split():
    demo, pool = features(n=4)
    demo[2:] += 1000  # two prompts, twice each: the statistics of training come from one prompt alone
    head, _ = fit_reward(demo, lambda *_: pool, IRL(irl_rounds=1), groups=["a", "a", "b", "b"])
    means = [float(torch.cat([demo[s], pool[s].flatten(0, 1)]).mean()) for s in (slice(2), slice(2, 4))]
    assert min(abs(float(head.mean.mean()) - m) for m in means) < 1e-3


def test_balanced_takes_as_many_of_each():
    names = ["insult"] * 6 + ["crime"] * 2 + ["insult"] + ["privacy"] * 3
    kept = balanced(names, seed=3)
    assert kept == sorted(kept) and sorted(names[i] for i in kept) == ["crime"] * 2 + ["insult"] * 2 + ["privacy"] * 2
    assert balanced([]) == []


def encode(texts):
    words = ("sorry", "cannot", "sure", "help")
    return np.array([[text.count(w) for w in words] for text in texts], np.float32)


def rewards(categories=("", "", "", "")):
    lm = tiny.lm()
    demos = [lm.trace(f"q{i}", "sorry, I cannot", category=c) for i, c in enumerate(categories)]
    demos = [dataclasses.replace(d, meta={"category": c, "row": i}) for i, (d, c) in enumerate(zip(demos, categories))]
    pools = [[lm.trace(f"q{i}", text) for text in ("sure, here", "sure, help")] for i in range(len(demos))]
    return lm, IRLReward(encoder=encode, irl=IRL(irl_batch=2)).fit(demos, pools)


def test_fit_save_and_load(tmp_path):
    lm, made = rewards()
    items = [lm.trace("q9", "sorry, I cannot"), lm.trace("q9", "sure")]
    values = [c.reduce() for c in made.score(items)]
    assert values[0] > values[1]
    assert made.score(items)[0].values[-1] == values[0] and not made.score(items)[0].values[:-1].any()
    again = IRLReward(folder=str(made.save(tmp_path / "r")), encoder=encode)
    assert [c.reduce() for c in again.score(items)] == values
    with pytest.raises(ValueError, match="other features"):
        IRLReward(folder=str(tmp_path / "r"), encoder=lambda texts: np.zeros((len(texts), 4)))
    with pytest.raises(ValueError, match="no saved rewards"):
        IRLReward(folder=str(tmp_path))


def test_categories_have_models_of_their_own():
    lm, made = rewards(("crime", "crime", "insult", "insult"))
    assert sorted(made.heads) == ["crime", "insult"]
    item = dataclasses.replace(lm.trace("q", "sorry"), meta={"category": "insult", "row": 7})
    wanted = float(made.heads["insult"](made.features([item]))[0])
    assert made.score([item])[0].reduce() == pytest.approx(wanted)
    with pytest.raises(ValueError, match="row 7: category None"):
        made.score([dataclasses.replace(item, meta={"row": 7})])
    with pytest.raises(ValueError, match="name no category"):
        rewards(("crime", "", "insult", "insult"))


def test_bad_input():
    lm = tiny.lm()
    one = lm.trace("q", "a")
    with pytest.raises(ValueError, match="2 or more of each category"):
        IRLReward(encoder=encode).fit([one], [[one]])
    with pytest.raises(ValueError, match="give each one K samples"):
        IRLReward(encoder=encode).fit([one, one], [[one], [one, one]])
    with pytest.raises(ValueError, match="not finite"):
        fit_reward(torch.full((3, 2), float("nan")), lambda *_: torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="not fitted"):
        IRLReward(encoder=encode).score([one])
    with pytest.raises(ValueError, match="use it in dr-irl"):
        IRLReward(encoder=encode, irl=IRL(irl_policy="grpo")).fit([one, one], [[one], [one]])
    with pytest.raises(ValueError, match="irl_beta > 0"):
        IRL(irl_beta=0.0)
    assert RewardHead(3)(torch.zeros(2, 4, 3)).shape == (2, 4)
