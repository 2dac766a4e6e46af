"""SparsePO: by hand, every identity of its specification through a real pass, and the inputs of its pitfalls."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

import dataclasses
import math

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.checkpoint import STATE, saved_state
from pertoken.core.loop import make_optimizer
from pertoken.core.protocols import Batch
from pertoken.core.run import Run
from pertoken.core.stats import Stats
from pertoken.core.step import live_models
from pertoken.train._mask_nets import MaskNet, MaskNets
from pertoken.train._token_masks import KL, mask_metrics, masked_losses, masked_terms
from pertoken.train.dpo import DPO
from pertoken.train.sparsepo import LearnedMask, Network, SparsePO, mask_credit, mean_one
from pertoken.train.tdpo import TDPO
from tests import tiny
from tests.contracts.harness import make_groups, model, objective_pass
from tests.core.training import config
from tests.methods.one_pass import exact_lm, means

KINDS = ("simple_all", "simple_last", "ml_all", "ml_last", "binary_all", "binary_last", "random")
CONFIG = model("policy").causal.config
GROUPS = make_groups(SparsePO())
POLICY = sum(p.numel() for p in model("policy").model.parameters())


def nets(objective, seed=0) -> MaskNets:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = objective.init_state(CONFIG)
    assert state is not None
    return state.double().eval()


def constant(state: MaskNets, **values: float) -> MaskNets:
    """Networks that say a number for every token: heads b = value, mixer weights 1/L as they start."""
    for name, value in values.items():
        net = state.nets[name]
        with torch.no_grad():
            for head in net.heads:
                head[0].weight.zero_()
                head[0].bias.fill_(value)
    return state


def run(objective, state=None):
    found = objective_pass(objective, GROUPS, state=state)
    return found, found.grads[:POLICY], found.grads[POLICY:]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def pair(u, d, mask):
    """Statistics of one pair of which u and d are these."""
    present = torch.tensor(mask)
    policy = Stats(present, tensor(u), present, {KL: tensor(d)})
    return {"policy": policy, "reference": Stats(present, torch.zeros_like(policy.logp_NT), present)}


BATCH = Batch(torch.tensor([[0, 1]]))


# ---- by hand


def test_loss_by_hand():
    nan = math.nan
    stats = pair([[1.0, -0.5, nan], [0.25, nan, nan]], [[0.2, 0.4, nan], [0.6, nan, nan]], [[1, 1, 0], [1, 0, 0]])
    stats = {n: dataclasses.replace(s, mask_NT=s.mask_NT.bool(), present_NT=s.mask_NT.bool()) for n, s in stats.items()}
    masks = {"u": tensor([[2.0, 0.0, 9.0], [4.0, 9.0, 9.0]]), "d": tensor([[0.0, 0.5, 9.0], [1.0, 9.0, 9.0]])}
    u_N, d_N = masked_terms(stats, masks)
    assert u_N.tolist() == pytest.approx([2.0, 1.0]) and d_N.tolist() == pytest.approx([0.2, 0.6])
    (loss,) = masked_losses(u_N, d_N, BATCH, 0.5).tolist()
    assert loss == pytest.approx(math.log1p(math.exp(-0.5 * ((2.0 - 1.0) - (0.6 - 0.2)))))
    shown = mask_metrics(masks, stats["policy"].mask_NT, BATCH)
    assert {k: float(a) / float(b) for k, (a, b) in shown.items()} == {
        "sparsity/u_chosen": 50,
        "sparsity/u_rejected": 0,
        "sparsity/d_chosen": 50,
        "sparsity/d_rejected": 0,
        "l1/u_chosen": 2,
        "l1/u_rejected": 4,
        "l1/d_chosen": 0.5,
        "l1/d_rejected": 1,
        "mean_mask/u_chosen": 1,
        "mean_mask/u_rejected": 4,
        "mean_mask/d_chosen": 0.25,
        "mean_mask/d_rejected": 1,
    }


def test_the_mask_gets_the_gradient_of_its_term_and_none_from_other_tokens():
    stats = pair([[1.0, math.nan], [0.5, 2.0]], [[0.2, math.nan], [0.6, 0.1]], [[True, False], [True, True]])
    m_u, m_d = torch.ones(2, 2, dtype=torch.float64).requires_grad_(), torch.ones(2, 2).double().requires_grad_()
    u_N, d_N = masked_terms(stats, {"u": m_u, "d": m_d})
    (loss,) = masked_losses(u_N, d_N, BATCH, 0.8)
    loss.backward()
    slope = -0.8 / (1 + math.exp(0.8 * ((1.0 - 2.5) - (0.7 - 0.2))))
    np.testing.assert_allclose(m_u.grad, slope * np.array([[1.0, 0.0], [-0.5, -2.0]]), atol=1e-12)
    np.testing.assert_allclose(m_d.grad, slope * np.array([[0.2, 0.0], [-0.6, -0.1]]), atol=1e-12)


def numpy_net(net: MaskNet, x: np.ndarray) -> np.ndarray:
    """The network of the specification, by its definition, dropout off: x is (T, L+1, H)."""
    p = {name: value.detach().numpy() for name, value in net.named_parameters()}

    def head(i: int, h: np.ndarray) -> np.ndarray:
        z = h @ p[f"heads.{i}.0.weight"].T + p[f"heads.{i}.0.bias"]
        if net.family == "ml":
            z = z @ p[f"heads.{i}.2.weight"].T + p[f"heads.{i}.2.bias"]
        return np.maximum(z, 0)[:, 0]

    if net.over == "last":
        weight = head(0, x[:, -1])
    else:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / np.sqrt(var + net.norm.eps) * p["norm.weight"] + p["norm.bias"]
        layers = np.stack([head(i, normed[:, i + 1]) for i in range(x.shape[1] - 1)], -1)
        weight = np.maximum(layers @ p["mixer.weight"][0], 0)
    return np.sign(weight) if net.family == "binary" else weight


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_networks_by_their_definition(kind):
    net = MaskNet(kind, 3, 5, 1e-2, 0.5).double().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.from_numpy(rng.normal(0, 1, tuple(p.shape))))
    x = rng.normal(1, 2, (1, 7, 4, 5))
    hidden = torch.from_numpy(x if kind.endswith("all") else x[:, :, -1])
    found = net(hidden, torch.zeros(1, 7, dtype=torch.float64))
    assert found.shape == (1, 7) and found.any()
    np.testing.assert_allclose(found[0].detach(), numpy_net(net, x[0]), atol=1e-12)
    one = net(hidden[:, :1], torch.zeros(1, 1, dtype=torch.float64))  # batch 1, one position: no dimension is lost
    np.testing.assert_allclose(one.detach(), found[:, :1].detach(), atol=1e-12)


def test_embeddings_are_left_out_and_a_binary_mask_learns_nothing():
    net = MaskNet("simple_all", 2, 4, 1e-5, 0.0).eval()
    hidden = torch.randn(1, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    other = hidden.clone()
    other[:, :, 0] += 5
    assert torch.equal(net(hidden, torch.zeros(1, 3)), net(other, torch.zeros(1, 3)))
    _, policy, own = run(SparsePO(mask="binary_all"), nets(SparsePO(mask="binary_all"), 2))
    assert not own.any() and policy.any()


def test_random_masks_are_redrawn_in_training_and_half_in_evaluation():
    net, like = MaskNet("random", 2, 4, 1e-5, 0.0), torch.zeros(50, 40)
    first, second = net(None, like), net(None, like)
    assert not torch.equal(first, second) and float(first.min()) >= 0 and float(first.max()) <= 1
    assert float(first.mean()) == pytest.approx(0.5, abs=0.05)  # 7 standard errors
    assert torch.equal(net.eval()(None, like), torch.full_like(like, 0.5))
    assert not list(net.parameters()) and "hidden" not in str(SparsePO(mask="random").stats)


# ---- identities


@pytest.mark.parametrize("sharing", ["common", "independent"])
def test_masks_of_ones_are_tdpo1(sharing):
    objective = SparsePO(beta=0.3, sharing=sharing)
    state = nets(objective)
    found, grads, _ = run(objective, constant(state, **dict.fromkeys(state.nets, 1.0)))
    tdpo, wanted, _ = run(TDPO(variant="tdpo1", beta=0.3))
    assert (found.sum, found.count) == pytest.approx((tdpo.sum, tdpo.count), abs=1e-12)
    torch.testing.assert_close(grads, wanted, atol=1e-10, rtol=0)


def test_both_masks_off_are_tdpo1_without_a_network():
    objective = SparsePO(beta=0.3, mask_on_reward=False, mask_on_kl=False)
    assert objective.init_state(CONFIG) is None and objective.stats["reference"] == {"logp"}
    found, grads, own = run(objective)
    tdpo, wanted, _ = run(TDPO(variant="tdpo1", beta=0.3))
    assert found.sum == pytest.approx(tdpo.sum, abs=1e-12) and not len(own)
    torch.testing.assert_close(grads, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"mask_on_reward": False}, {"sharing": "independent"}])
def test_kl_masked_away_is_dpo(options):
    objective = SparsePO(beta=0.3, **options)
    values = {"u": 1.0, "d": 0.0} if "sharing" in options else {"d": 0.0}
    found, grads, _ = run(objective, constant(nets(objective), **values))
    dpo, wanted, _ = run(DPO(beta=0.3))
    assert found.sum == pytest.approx(dpo.sum, abs=1e-12)
    torch.testing.assert_close(grads, wanted, atol=1e-10, rtol=0)


def test_masks_of_zeros_move_nothing():
    found, grads, own = run(SparsePO(), constant(nets(SparsePO()), both=0.0))
    assert found.sum / found.count == pytest.approx(math.log(2), abs=1e-12)
    assert not grads.any() and not own.any()
    metrics = {name: a / b for name, (a, b) in found.metrics.items()}
    assert metrics["sparsity/u_chosen"] == metrics["sparsity/d_rejected"] == 100 and metrics["rewards/accuracies"] == 0


def test_a_shared_network_is_two_tied_ones_with_half_the_l1():
    a = 0.02
    common = SparsePO(beta=0.3, l1_u=a, l1_d=a)
    apart = SparsePO(beta=0.3, l1_u=a / 2, l1_d=a / 2, sharing="independent")
    shared, tied = nets(common, 2), nets(apart)
    for net in tied.nets.values():
        net.load_state_dict(shared.nets["both"].state_dict())
    one, grads, own = run(common, shared)
    two, others, each = run(apart, tied)
    assert one.sum == pytest.approx(two.sum, abs=1e-12)
    torch.testing.assert_close(grads, others, atol=1e-10, rtol=0)
    assert own.abs().max() > 1e-4
    torch.testing.assert_close(own, sum(each.chunk(2)), atol=1e-10, rtol=0)  # it gets both uses' gradients


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({}, (0.5, 0.5)),
        ({"sharing": "independent"}, (1.0, 1.0)),
        ({"mask_on_kl": False}, (1.0, 0.0)),
        ({"mask_on_reward": False}, (0.0, 1.0)),
    ],
)
def test_l1_is_halved_only_where_one_network_serves_both_sides(options, share):
    state = constant(nets(SparsePO(**options)), **dict.fromkeys(nets(SparsePO(**options)).nets, 0.5))
    with_l1 = run(SparsePO(**options, l1_u=0.1, l1_d=0.01), state)[0]
    without = run(SparsePO(**options), state)[0]
    tokens = sum(int(t.mask.sum()) for g in GROUPS for t in g.traces)
    expected = 0.5 * tokens * (share[0] * 0.1 + share[1] * 0.01)
    assert with_l1.sum - without.sum == pytest.approx(expected, abs=1e-10)


def test_l1_sees_weights_as_they_were_and_their_mean_has_a_gradient():
    plain, normed = (SparsePO(l1_u=0.3, normalize_mask=how) for how in ("off", "mean1"))
    for one in (plain, normed):
        without = dataclasses.replace(one, l1_u=0.0)
        with_l1, base = (run(o, nets(one)) for o in (one, without))
        if one is plain:
            penalty = with_l1[0].sum - base[0].sum
        else:  # the same networks, so the same penalty, whatever they are divided by
            assert with_l1[0].sum - base[0].sum == pytest.approx(penalty, rel=1e-9)
    m_NT = torch.tensor([[1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    out = mean_one(m_NT, torch.ones(1, 2, dtype=torch.bool))
    (grad,) = torch.autograd.grad(out[0, 0], [m_NT])  # d/da of 2a / (a + b) = 2b / (a + b)^2
    np.testing.assert_allclose(grad, [[6 / 16, -2 / 16]])


def test_the_norm_has_the_models_own_epsilon():
    state = SparsePO().init_state(tiny.lm().causal.config)
    assert state is not None and state.nets["both"].norm.eps == tiny.lm().causal.config.rms_norm_eps != 1e-5


def test_normalized_masks():
    mask_NT = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    weights = tensor([[1.0, 3.0, 7.0], [0.0, 2.0, 2.0], [0.5, 0.0, 1.0]])
    expected = [[0.5, 1.5, 3.5], [0.0, 2.0, 2.0], [1.0, 0.0, 2.0]]
    np.testing.assert_allclose(mean_one(weights, mask_NT), expected, atol=1e-12)
    objective = SparsePO(normalize_mask="mean1", beta=0.3)
    found, grads, _ = run(objective, constant(nets(objective), both=0.25))
    tdpo, wanted, _ = run(TDPO(variant="tdpo1", beta=0.3))
    assert found.sum == pytest.approx(tdpo.sum, abs=1e-12)
    torch.testing.assert_close(grads, wanted, atol=1e-10, rtol=0)


# ---- metrics


def test_metrics():
    objective = SparsePO(beta=0.5, sharing="independent")
    state = constant(nets(objective), u=2.0, d=0.25)
    shown = {name: a / b for name, (a, b) in run(objective, state)[0].metrics.items()}
    plain = {name: a / b for name, (a, b) in run(TDPO(variant="tdpo1"))[0].metrics.items()}
    for side in ("chosen", "rejected"):
        assert shown[f"kl/{side}"] == pytest.approx(plain[f"kl/{side}"])
        assert shown[f"weighted_kl/{side}"] == pytest.approx(0.25 * plain[f"kl/{side}"])
        # beta (u + the NEGATIVE KL); TDPO logs 0.1 (u + KL)
        u = 10 * plain[f"rewards/{side}"] - plain[f"kl/{side}"]
        assert shown[f"rewards/{side}"] == pytest.approx(0.5 * (2 * u - 0.25 * plain[f"kl/{side}"]))
    assert shown["weighted_kl/margin"] == pytest.approx(0.25 * shown["kl/margin"])
    assert shown["accuracy_without_masks"] == plain["accuracy_without_kl"]
    ones = {name: a / b for name, (a, b) in run(objective, constant(state, u=1.0, d=1.0))[0].metrics.items()}
    assert ones["loss_accuracy"] == plain["rewards/accuracies"]


def test_margins_are_of_absolute_differences_and_accuracy_is_strict():
    stats = pair([[0.0]] * 4, [[0.3], [0.1], [0.2], [0.6]], [[True]] * 4)
    objective = SparsePO(mask_on_reward=False, mask_on_kl=False)
    shown = means(objective.loss(stats, Batch(torch.tensor([[0, 1], [2, 3]]))))
    assert shown["kl/margin"] == pytest.approx((0.2 + 0.4) / 2)
    assert shown["rewards/accuracies"] == 0.5  # -0.03 < -0.01, -0.02 > -0.06
    assert shown["loss_accuracy"] == 0.5 and shown["accuracy_without_masks"] == 0  # 0.3 > 0.1, 0.2 < 0.6; 0 = 0
    equal = objective.loss(pair([[0.0]] * 2, [[0.3]] * 2, [[True]] * 2), BATCH)
    assert means(equal)["rewards/accuracies"] == means(equal)["accuracy_without_masks"] == 0


# ---- the networks as they are trained


def test_they_start_alive_and_biases_do_not_decay():
    objective = SparsePO(sharing="independent", network=Network(mask_lr_factor=10.0, mask_weight_decay=0.03))
    state = objective.init_state(CONFIG)
    assert state is not None and set(state.nets) == {"u", "d"} and state.nets["u"] is not state.nets["d"]
    assert all(torch.equal(net.mixer.weight, torch.full((1, 2), 0.5)) for net in state.nets.values())
    assert all(net.norm.eps == CONFIG.layer_norm_epsilon for net in state.nets.values())
    optimizer = make_optimizer({"policy": exact_lm().model, "state": state}, config(weight_decay=0.5))
    _, decayed, plain = optimizer.param_groups
    assert (decayed["lr_factor"], decayed["weight_decay"]) == (10.0, 0.03)
    assert (plain["lr_factor"], plain["weight_decay"]) == (10.0, 0.0)
    names = {p: n for n, p in state.named_parameters()}
    assert {names[p].split(".", 2)[2] for p in plain["params"]} == {
        "heads.0.0.bias",
        "heads.1.0.bias",
        "norm.weight",
        "norm.bias",
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_dropout_is_in_training_only():
    objective = SparsePO(network=Network(mask_dropout=0.5))
    state = constant(nets(objective), both=1.0)
    hidden, like = torch.randn(2, 300, 3, 32).double(), torch.zeros(2, 300).double()
    assert torch.equal(state(("u",), hidden, like)["u"], torch.ones_like(like))
    dropped = state.train()(("u", "d"), hidden, like)
    assert torch.equal(dropped["u"], dropped["d"])  # one network, drawn once
    # two layers of weight 0 or 2, their mean, 0 or doubled: so values 0, 2, 4
    assert set(dropped["u"].unique().tolist()) == {0.0, 2.0, 4.0}


def test_a_dead_network_stops_the_run():
    objective = SparsePO(sharing="independent", network=Network(patience=3, mask_dropout=0.0))
    state = constant(nets(objective), d=0.0).train()
    for _ in range(2):
        run(objective, state)
    alive = constant(state, d=1.0)
    run(objective, alive)
    assert state.dead.tolist() == [0, 0]
    constant(state, d=0.0)
    run(objective, state)
    first = next(state.parameters())
    first.grad = torch.zeros_like(first)  # a second part of the same update
    run(objective, state)
    assert state.dead.tolist() == [0, 1]
    first.grad = None
    run(objective, state)
    with pytest.raises(ValueError, match="'d' gave every token the weight 0 for 3 updates"):
        run(objective, state)
    run(objective, state.eval())  # evaluation does not count
    never = SparsePO(sharing="independent", network=Network(patience=0))
    for _ in range(5):
        run(never, constant(nets(never), d=0.0).train())


# ---- a run, and what is read from it afterwards


def pairs_of(lm):
    from pertoken.core.data import encode, load_examples

    rows = [{"prompt": f"how {i}", "chosen": "great" + "!" * (i % 3 + 1), "rejected": "dull"} for i in range(6)]
    return encode(load_examples(rows)[0], lm)[0]


def test_learned_masks_are_saved_beside_the_model_and_read_as_credit(tmp_path):
    lm = exact_lm()
    groups = pairs_of(lm)
    reference = lm.reference()
    objective = SparsePO(beta=0.5, sharing="independent", l1_u=0.01, network=Network(mask_lr_factor=10.0))
    settings = config(steps=2, save_every=1, seed=2)
    one = Run(
        slug="sparsepo",
        objective=objective,
        policy=lm,
        groups=groups,
        held_out=[],
        config=settings,
        out=tmp_path / "run",
        resolve=catalog.method,
        progress=False,
    )
    one.go()
    traces = [t for g in groups for t in g.traces] + [lm.trace_of_ids([5, 6], [7, 8, 9], emitted=(True, False, True))]
    read = LearnedMask(run=tmp_path / "run", reference=reference).score(traces)
    made, tensors = saved_state(tmp_path / "run")
    assert made["method"] == "sparsepo" and (tmp_path / "run" / STATE).exists()
    assert not any("nets" in n for n, _ in lm.model.named_parameters())  # nothing is merged into the model
    state = objective.init_state(CONFIG)
    assert state is not None
    state.load_state_dict(tensors)
    for trace, credit in zip(traces, read, strict=True):
        with torch.no_grad():
            said = reference.model(torch.tensor([trace.ids("all")]), output_hidden_states=True).hidden_states
        at = slice(len(trace.prompt_ids) - 1, -1)  # the states that predict the tokens
        x = torch.stack([h[0, at] for h in said], 1).numpy()
        expected = np.where(trace.mask, numpy_net(state.nets["u"], x), 0.0)
        np.testing.assert_allclose(credit.values, expected, atol=1e-5)  # float32 networks
        assert (credit.kind, credit.method, credit.meta["side"]) == ("weight", "sparsepo", "reward")
        assert "before each token" in credit.meta["reads"]
    assert any(c.values.any() for c in read)
    start = tmp_path / "run" / "checkpoint-000001"
    was = LearnedMask(run=start, reference=reference, side="kl").score(traces[:1])
    now = LearnedMask(run=tmp_path / "run", reference=reference, side="kl").score(traces[:1])
    assert not np.array_equal(was[0].values, now[0].values)
    (tmp_path / "run" / STATE).unlink()
    again = LearnedMask(run=tmp_path / "run", reference=reference).score(traces[:1])  # from the last checkpoint
    np.testing.assert_array_equal(again[0].values, read[0].values)
    with pytest.raises(ValueError, match="read the states of"):
        LearnedMask(run=tmp_path / "run", reference=exact_lm(1)).score(traces)
    with pytest.raises(ValueError, match="as it was before that run"):  # trained since, whatever its name
        LearnedMask(run=tmp_path / "run", reference=lm).score(traces)
    with pytest.raises(ValueError, match="holds no trained run"):
        LearnedMask(run=tmp_path, reference=reference).score(traces)


def test_credit_is_the_same_some_at_a_time(monkeypatch):
    lm, objective = exact_lm(), SparsePO()
    traces = [t for group in GROUPS for t in group.traces]
    whole = mask_credit(objective, nets(objective, 2), lm, traces)
    monkeypatch.setattr("pertoken.train.sparsepo._TOGETHER", 3)
    for a, b in zip(whole, mask_credit(objective, nets(objective, 2), lm, traces), strict=True):
        assert a.trace is b.trace
        np.testing.assert_allclose(a.values, b.values, atol=1e-10)


def test_a_weight_sees_its_left_context_alone():
    lm, objective = exact_lm(), SparsePO()
    here, there = lm.trace_of_ids([5, 6], [7, 8, 9]), lm.trace_of_ids([5, 6], [7, 8, 20])
    other = lm.trace_of_ids([5, 6], [30, 8, 9])
    a, b, c = (x.values for x in mask_credit(objective, nets(objective, 2), lm, [here, there, other]))
    np.testing.assert_allclose(a, b, atol=1e-12)  # the last token differs, its weight does not
    assert a[0] == pytest.approx(c[0], abs=1e-12) and abs(a[1] - c[1]) > 1e-3


# ---- options and bad input


def test_what_runs_live_and_options():
    assert live_models(SparsePO()) == ("reference",)
    assert SparsePO().stats["reference"] == {"logp", "hidden_all"}
    assert SparsePO(mask="ml_last").stats["reference"] == {"logp", "hidden"}
    assert (SparsePO().beta, SparsePO().sharing, SparsePO().mask) == (0.1, "common", "simple_all")
    assert dataclasses.astuple(Network()) == (0.01, 1.0, 0.01, 50)
    wrong = {"beta": 0.0, "mask": "deep", "sharing": "half", "l1_u": -1.0, "normalize_mask": "sum"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            SparsePO(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dropout"):
        SparsePO(network=Network(mask_dropout=1.0))


def test_sides_that_are_off_and_other_tokenizers():
    lm, objective = exact_lm(), SparsePO(mask_on_kl=False)
    trace = lm.trace_of_ids([5], [6])
    for side in ("kl", "both"):
        with pytest.raises(ValueError, match="no mask on side"):
            mask_credit(objective, nets(objective), lm, [trace], side)
    with pytest.raises(ValueError, match="another tokenizer"):
        mask_credit(objective, nets(objective), lm, [dataclasses.replace(trace, tokenizer="x")])
