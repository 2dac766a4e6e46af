"""AlignDistil: by hand, every identity of its specification, the stages, and the inputs of its pitfalls."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportCallIssue=false

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from pertoken.catalog import method
from pertoken.core.data import Group, encode
from pertoken.core.examples import Example
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig
from pertoken.core.packing import Cost, pack
from pertoken.core.protocols import Batch
from pertoken.core.rollout import Sampling
from pertoken.core.run import Run
from pertoken.core.stats import Stats
from pertoken.core.stats import token_stats as statistics
from pertoken.core.step import live_models, needs_of
from pertoken.train.aligndistil import AlignDistil, Teachers, swapped, teacher_logits, weights
from pertoken.train.dpo import DPO
from tests import tiny
from tests.methods.one_pass import exact_lm, gradient, means, pair_stats

MODES = ("aligndistil", "theorem1", "theorem1_contrast", "theorem1_adaptive", "gkd")
MODELS = {name: exact_lm(seed) for seed, name in enumerate(("policy", "dpo", "reverse", "reference"))}
GROUPS = tiny.groups(MODELS["policy"], n=3)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def expected(mode, z_s, z_d, z_r, beta, beta2, temperature=1.0, student_temperature=None):
    """KL, b, w and D of each position by the table of the specification, in numpy, from logits (T, V)."""
    p_d, p_r = softmax(z_d), softmax(z_r)
    l1 = np.abs(p_d - p_r).sum(-1)
    w = beta2 * l1 + 1e-3 if mode in ("aligndistil", "theorem1_adaptive") else np.full(len(l1), beta / beta2)
    v = w[:, None]
    z = {
        "aligndistil": z_d + v * (z_d - z_r),
        "theorem1_contrast": z_d + v * (z_d - z_r),
        "theorem1": v * z_d + (1 - v) * z_r,
        "theorem1_adaptive": v * z_d + (1 - v) * z_r,
        "gkd": z_d,
    }[mode]
    b = {"aligndistil": beta / w, "theorem1_adaptive": beta / w, "gkd": np.ones_like(w)}.get(
        mode, np.full_like(w, beta2)
    )
    p = softmax(z_s / (student_temperature or temperature))
    return (p * (np.log(p) - np.log(softmax(z / temperature)))).sum(-1), b, w, l1


def logits(*seed, shape=(5, 7), scale=1.5):
    return np.random.default_rng(seed).normal(0, scale, shape)


def tensors(third, z_s, z_d, z_r):
    student = torch.tensor(z_s, requires_grad=True)
    return {"policy": student, "dpo": torch.tensor(z_d), third: torch.tensor(z_r)}


def joint(objective, z_s, z_d, z_r):
    """The objective's statistics of positions (T, V), and the student's logits, a leaf."""
    given = tensors(objective.third or "reverse", z_s, z_d, z_r)
    return objective.token_stats(given, torch.zeros(len(z_s), dtype=torch.long)), given


def responses(objective, values, *lengths):
    """Loss of responses of these lengths, made of the positions in order; no pairs."""
    longest = max(lengths)
    mask = torch.tensor([[t < n for t in range(longest)] for n in lengths])
    extra = {}
    for name, value in values.items():
        full = torch.full(mask.shape, torch.nan, dtype=value.dtype)
        extra[name] = full.masked_scatter(mask, value)
    return objective.loss({"policy": Stats(mask, torch.zeros(mask.shape), mask, extra)}, Batch(None))


def real_pass(objective, groups=GROUPS, models=MODELS, **options):
    """Statistics and batch of pairs, as core computes them."""
    (one,) = pack(groups, cost=Cost(linear=1, attention=1, launch=1e12), max_tokens=1 << 20)
    needed = {name: models[name] for name in objective.stats}
    stats = statistics(needed, one, needs_of(objective), trained="policy", **options)
    place = {o: i for i, o in enumerate(one.order)}
    return stats, Batch(torch.tensor([[place[g, 0], place[g, 1]] for g in range(len(groups))]))


def test_on_paper():
    """Two symbols. p_dpo = (3/4, 1/4), p_rev = (1/4, 3/4), student (1/2, 1/2): D = 1, w = 10.001 and the teacher's
    odds are 3 * 9^w."""
    values, _ = joint(AlignDistil(), *(np.log([p]) for p in ([0.5, 0.5], [0.75, 0.25], [0.25, 0.75])))
    w, odds = 10.001, 3 * 9**10.001
    assert values["l1"].item() == pytest.approx(1)
    kl = math.log(0.5) + 0.5 * (2 * math.log1p(odds) - math.log(odds))
    assert values["distil_kl"].item() == pytest.approx(kl, rel=1e-9)
    loss = responses(AlignDistil(), values, 1)
    assert loss.sum.item() == pytest.approx(0.1 / w * kl, rel=1e-9)
    assert means(loss)["teacher/weight"] == pytest.approx(w)
    assert means(loss)["rewards/expected"] == pytest.approx(0, abs=1e-12)  # log 3 and -log 3, equally likely
    kl_dpo = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert means(loss)["kl/dpo"] == means(loss)["kl/third"] == pytest.approx(kl_dpo)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature, compat", [(1.0, "none"), (2.0, "none"), (2.0, "reference")])
def test_every_mode_against_numpy(mode, temperature, compat):
    z = [logits(1, i) for i in range(3)]
    beta2 = 7.0 if mode in ("aligndistil", "theorem1_adaptive") else 0.04
    objective = AlignDistil(mode=mode, beta2=beta2, kd_temperature=temperature, compat=compat, beta=0.2)
    values, _ = joint(objective, *z)
    undivided = 1.0 if compat == "reference" else None
    kl, b, w, l1 = expected(mode, *z, 0.2, beta2, temperature, undivided)
    np.testing.assert_allclose(values["distil_kl"].detach(), kl, rtol=1e-10)
    loss = responses(objective, values, 2, 3)
    assert loss.sum.item() == pytest.approx((b * kl)[:2].mean() + (b * kl)[2:].mean(), rel=1e-10)
    summed = dataclasses.replace(objective, reward_len_norm=False)
    assert responses(summed, values, 2, 3).sum.item() == pytest.approx((b * kl).sum(), rel=1e-10)
    if mode != "gkd":
        np.testing.assert_allclose(values["l1"], l1, rtol=1e-10)  # at T = 1, whatever T is
        assert means(loss)["teacher/weight"] == pytest.approx((w[:2].mean() + w[2:].mean()) / 2)


def test_on_policy_the_student_is_always_divided():
    z = [logits(2, i) for i in range(3)]
    plain, quirk = (AlignDistil(kd_temperature=2.0, compat=c, on_policy=True) for c in ("none", "reference"))
    assert torch.equal(joint(plain, *z)[0]["distil_kl"], joint(quirk, *z)[0]["distil_kl"])
    kl, *_ = expected("aligndistil", *z, 0.1, 15.0, 2.0)  # and the multiplier is 15
    np.testing.assert_allclose(joint(plain, *z)[0]["distil_kl"].detach(), kl, rtol=1e-10)


def test_diagnostics():
    """Sums over tokens, then means over responses; token figures are means of means, never pooled over tokens."""
    z = [logits(3, i) for i in range(3)]
    z[1][0] = z[2][0] + 5.0  # the two models agree at one position: all of 1/w = 1000 is there
    objective = AlignDistil(beta=0.3)
    shown = means(responses(objective, joint(objective, *z)[0], 1, 4))
    p_s, p_d, p_r = map(softmax, z)
    reward = (p_s * 0.3 * (np.log(p_d) - np.log(p_r))).sum(-1)
    assert shown["rewards/expected"] == pytest.approx((reward[:1].sum() + reward[1:].sum()) / 2)
    for name, p in (("dpo", p_d), ("third", p_r)):
        kl = (p_s * (np.log(p_s) - np.log(p))).sum(-1)
        assert shown[f"kl/{name}"] == pytest.approx(kl.sum() / 2)
        assert shown[f"kl_token/{name}"] == pytest.approx((kl[0] + kl[1:].mean()) / 2)
    kl, b, w, l1 = expected("aligndistil", *z, 0.3, 10.0)
    assert l1[0] < 1e-12 and w[0] == pytest.approx(1e-3)
    assert shown["teacher/weight"] == pytest.approx((w[0] + w[1:].mean()) / 2)
    assert shown["teacher/l1"] == pytest.approx((l1[0] + l1[1:].mean()) / 2)
    share = b[0] * kl[0] / (b[0] * kl[0] + (b * kl)[1:].mean())
    assert shown["loss_share/equal_teachers"] == pytest.approx(share) and share > 0.9


# ---- identities of the specification


def test_temperature_and_floor_reach_only_what_they_should():
    """Diagnostics are of the student at T = 1; the floor is what the option says."""
    z_s, z_d, z_r = (logits(40, k) for k in range(3))
    warm, _ = joint(AlignDistil(kd_temperature=2.0), z_s, z_d, z_r)
    p, log = softmax(z_s), lambda z: np.log(softmax(z))
    for name, z in (("kl_dpo", z_d), ("kl_third", z_r)):
        np.testing.assert_allclose(warm[name].numpy(), (p * (log(z_s) - log(z))).sum(-1), atol=1e-12)
    equal, _ = joint(AlignDistil(w_floor=0.5), z_s, z_d, z_d)
    assert means(responses(AlignDistil(w_floor=0.5), equal, 5))["teacher/weight"] == pytest.approx(0.5)
    wanted = 0.1 / 0.5 * (p * (log(z_s) - log(z_d))).sum(-1).mean()
    assert means(responses(AlignDistil(w_floor=0.5), equal, 5)) and float(
        responses(AlignDistil(w_floor=0.5), equal, 5).sum
    ) == pytest.approx(wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_only_the_teacher_excludes_has_a_finite_gradient(mode):
    z_s, z_d, z_r = (logits(41, k) for k in range(3))
    z_d[0, 2] = -np.inf
    values, given = joint(AlignDistil(mode=mode), z_s, z_d, z_r)
    (grad,) = torch.autograd.grad(values["distil_kl"].sum(), [given["policy"]])
    assert torch.isfinite(values["distil_kl"]).all() and torch.isfinite(grad).all() and values["distil_kl"][0] > 10


def test_theorem1_with_beta2_equal_to_beta_is_the_dpo_model():
    z_d, z_r = (torch.log_softmax(torch.tensor(logits(4, i)), -1) for i in range(2))
    w, b = weights(torch.ones(5), "theorem1", 0.1, 0.1)
    assert (w, b) == (1.0, 0.1) and torch.equal(teacher_logits(z_d, z_r, w, "theorem1"), z_d)
    z = [logits(4, i) for i in range(3)]
    theorem, gkd = (joint(AlignDistil(mode=m), *z)[0]["distil_kl"] for m in ("theorem1", "gkd"))
    assert torch.equal(theorem, gkd)
    assert torch.equal(theorem, joint(AlignDistil(mode="gkd"), *z)[0]["kl_dpo"])


@pytest.mark.parametrize("mode", MODES)
def test_third_model_that_is_the_dpo_model(mode):
    z_s, z_d = logits(5, 0), logits(5, 1)
    objective = AlignDistil(mode=mode, beta2=3.0)
    values, _ = joint(objective, z_s, z_d, z_d)
    p, q = softmax(z_s), softmax(z_d)
    np.testing.assert_allclose(values["distil_kl"].detach(), (p * np.log(p / q)).sum(-1), rtol=1e-10)
    if mode in ("aligndistil", "theorem1_adaptive"):
        loss = responses(objective, values, 2, 3)
        assert not values["l1"].any() and means(loss)["teacher/weight"] == pytest.approx(1e-3)
        assert loss.sum.item() == pytest.approx(responses(AlignDistil(mode="gkd"), values, 2, 3).sum.item() * 100)
        assert means(loss)["loss_share/equal_teachers"] == pytest.approx(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature, compat", [(1.0, "none"), (2.5, "none"), (2.5, "reference")])
def test_student_that_is_the_teacher(mode, temperature, compat):
    """Loss and gradient are 0; not so with the release's temperature, which is why it is no default."""
    objective = AlignDistil(mode=mode, kd_temperature=temperature, compat=compat, beta2=2.0)
    z_d, z_r = logits(6, 1), logits(6, 2)
    p_d, p_r = softmax(z_d), softmax(z_r)
    w = 2.0 * np.abs(p_d - p_r).sum(-1, keepdims=True) + 1e-3
    w = w if mode in ("aligndistil", "theorem1_adaptive") else 0.1 / 2.0
    z_s = w * z_d + (1 - w) * z_r if mode.startswith("theorem1") and "contrast" not in mode else z_d + w * (z_d - z_r)
    values, given = joint(objective, z_d if mode == "gkd" else z_s, z_d, z_r)
    loss = responses(objective, values, 5).sum
    (moved,) = torch.autograd.grad(loss, given["policy"])
    if compat == "reference":
        assert loss.item() > 1e-3 and moved.abs().max() > 1e-3
    else:
        assert abs(loss.item()) < 1e-12 and moved.abs().max() < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_constants_added_to_logits_change_nothing(mode):
    z = [logits(7, i) for i in range(3)]
    shift = np.random.default_rng(0).normal(0, 50, (3, 5, 1))
    objective = AlignDistil(mode=mode)
    here, there = joint(objective, *z)[0], joint(objective, *(z[i] + shift[i] for i in range(3)))[0]
    for name, value in here.items():
        torch.testing.assert_close(value, there[name], rtol=1e-9, atol=1e-11)


SYMBOLS, STATES = range(4), [(), *((i,) for i in range(4))]  # a 4-symbol tabular LM, two steps: 5 states, 16 responses


def sequences(table):
    """Probability of every response under a table (5, 4) of next-symbol probabilities."""
    return {(a, b): table[0][a] * table[1 + a][b] for a, b in itertools.product(SYMBOLS, SYMBOLS)}


@pytest.mark.parametrize("beta2", [0.1, 0.04])
def test_minimiser_on_a_toy_by_brute_force(beta2):
    """theorem1 minimised over every state gives the KL-regularised optimum of each single position, which is the
    optimum of whole responses only with beta2 = beta."""
    beta, p_d, p_ref = (
        0.1,
        softmax(logits(8, 1, shape=(5, 4), scale=0.8)),
        softmax(logits(8, 2, shape=(5, 4), scale=0.8)),
    )
    objective = AlignDistil(mode="theorem1", beta=beta, beta2=beta2)
    student = torch.tensor(logits(8, 3, shape=(5, 4)), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [student], lr=1, max_iter=300, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        given = {"policy": student, "dpo": torch.tensor(p_d).log(), "reference": torch.tensor(p_ref).log()}
        total = responses(objective, objective.token_stats(given, torch.zeros(5, dtype=torch.long)), 5).sum
        total.backward()
        return total

    optimizer.step(closure)
    found = softmax(student.detach().numpy())
    reward = beta * np.log(p_d / p_ref)
    single = p_ref * np.exp(reward / beta2)  # max_p sum p r - beta2 KL(p || p_ref), one state alone
    single /= single.sum(-1, keepdims=True)
    assert np.abs(found - single).max() < 1e-6
    value = lambda p: (p * reward - beta2 * p * np.log(p / p_ref)).sum(-1)
    rng = np.random.default_rng(0)
    for _ in range(50):  # the closed form is the maximum
        assert (value(softmax(np.log(single) + rng.normal(0, 0.3, single.shape))) < value(single)).all()
    # whole responses: p(y) is proportional to p_ref(y) exp(r(y)/beta2); its conditionals by enumeration
    ref = sequences(p_ref)
    whole = {y: ref[y] * math.exp((reward[0][y[0]] + reward[1 + y[0]][y[1]]) / beta2) for y in ref}
    whole = {y: p / sum(whole.values()) for y, p in whole.items()}
    first = np.array([sum(whole[a, b] for b in SYMBOLS) for a in SYMBOLS])
    second = np.array([[whole[a, b] / first[a] for b in SYMBOLS] for a in SYMBOLS])
    assert np.abs(found[1:] - second).max() < 1e-6  # the last step has no future
    apart = np.abs(found[0] - first).max()
    assert apart < 1e-6 if beta2 == beta else apart > 0.01


def test_dpo_on_swapped_pairs_is_reverse_dpo():
    traces = tuple(GROUPS[0])
    example = Example(
        prompt="p", responses=("good", "bad"), scores=(2.0, -1.0), aspects={"style": (0.5, 0.25)}, row=7, tags=("t",)
    )
    group = dataclasses.replace(group_of(example, traces), columns={"reference_logps": [np.zeros(1)] * 2})
    other = swapped(group)
    assert other.pair == (traces[1], traces[0]) and other.columns == {}
    assert (other.example.responses, other.example.scores) == (("bad", "good"), (-1.0, 2.0))
    assert other.example.aspects == {"style": (0.25, 0.5)} and (other.example.row, other.example.tags) == (7, ("t",))
    unscored = swapped(group_of(Example(prompt="p", responses=("good", "bad")), traces))
    assert unscored.example.scores is None
    there = [list(swapped(group_of(example, tuple(pair))).traces) for pair in GROUPS]
    dpo = DPO(beta=0.5)
    stats, batch = pair_stats(dpo, {n: MODELS[n] for n in dpo.stats}, there)
    u = stats["policy"].sums() - stats["reference"].sums()
    back = [stats_of(pair) for pair in GROUPS]  # log-ratios of (chosen, rejected) as the data have them
    reverse = sum(math.log1p(math.exp(0.5 * (w - l))) for w, l in back)  # -log sigmoid(-margin)
    assert dpo.loss(stats, batch).sum.item() == pytest.approx(reverse, rel=1e-9)
    assert u[batch.chosen].tolist() == pytest.approx([l for _, l in back])


def group_of(example, traces):
    return Group(example=example, prompt_ids=traces[0].prompt_ids, traces=traces)


def flat_logits(lm, trace):
    """Logits (L, V) that predict each of the L tokens of a response, from a plain forward."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])
    with torch.no_grad():
        return lm.model(ids).logits[0, len(trace.prompt_ids) - 1 : -1].numpy()


def stats_of(pair):
    """log pi - log pi_ref of both responses, from plain forwards."""
    out = []
    for trace in pair:
        ids = list(trace.completion_ids)
        p, q = (softmax(flat_logits(MODELS[n], trace))[range(len(ids)), ids] for n in ("policy", "reference"))
        out.append(float(np.log(p / q).sum()))
    return out


# ---- a real pass


@pytest.mark.parametrize("mode", MODES)
def test_the_positions_that_predict_the_chosen_tokens_are_distilled(mode):
    """Not those after them (the release), and none of the rejected; whole vocabulary."""
    objective = AlignDistil(mode=mode)
    stats, batch = real_pass(objective)
    result, beta2 = objective.loss(stats, batch), 10.0 if "adaptive" in mode or mode == "aligndistil" else 0.1
    total = 0.0
    for chosen, _ in GROUPS:
        z = [flat_logits(MODELS[n], chosen) for n in ("policy", "dpo", objective.third or "reverse")]
        kl, b, *_ = expected(mode, *z, 0.1, beta2)
        assert len(kl) == len(chosen)
        total += (b * kl).mean()
    assert result.sum.item() == pytest.approx(total, rel=1e-9) and result.count == len(GROUPS)
    assert gradient(result.sum, MODELS["policy"]).abs().max() > 0
    for name in objective.models:
        assert not gradient(result.sum, MODELS[name]).any()


def test_held_out_pairs_have_accuracies_against_the_third_model():
    shown = means(AlignDistil(mode="theorem1").loss(*real_pass(AlignDistil(mode="theorem1"))))
    ratios = [stats_of(pair) for pair in GROUPS]
    assert shown["rewards/margins"] == pytest.approx(0.1 * np.mean([w - l for w, l in ratios]))
    assert shown["rewards/accuracies"] == pytest.approx(np.mean([w > l for w, l in ratios]))
    no_third = means(AlignDistil(mode="gkd").loss(*real_pass(AlignDistil(mode="gkd"))))
    assert no_third["rewards/chosen"] == pytest.approx(0.1 * no_third["logps/chosen"])


def test_single_responses_have_no_sides():
    objective = AlignDistil()
    stats, _ = real_pass(objective)
    every = objective.loss(stats, Batch(None))
    assert every.count == 2 * len(GROUPS) and not any(
        name.startswith(("logps/", "rewards/c")) for name in every.metrics
    )


def test_response_without_tokens():
    lm = MODELS["policy"]
    empty = lm.trace_of_ids(GROUPS[0][0].prompt_ids, [])
    for norm in (True, False):
        objective = AlignDistil(reward_len_norm=norm)
        alone = objective.loss(*real_pass(objective, [[empty, GROUPS[0][1]]]))
        assert alone.sum.item() == 0 and alone.count == 1
        assert all(math.isfinite(float(x)) for pair in alone.metrics.values() for x in pair)


# ---- pitfalls


@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits(mode):
    """Confident tokens under w = 30, in float32: probabilities underflow, nothing is NaN."""
    z = [np.zeros((2, 3), np.float32) for _ in range(3)]
    z[1][:, 0], z[2][:, 1], z[0][0, 2] = 3000.0, 3000.0, 200.0
    objective = AlignDistil(mode=mode, on_policy=True)
    values, given = joint(objective, *z)
    assert all(torch.isfinite(v).all() for v in values.values())
    (moved,) = torch.autograd.grad(responses(objective, values, 2).sum, given["policy"])
    assert torch.isfinite(moved).all()


def test_differences_are_clamped():
    z_d, z_r = torch.tensor([[0.0, -math.inf, -5e4]]), torch.tensor([[0.0, -math.inf, 0.0]])
    teacher = teacher_logits(z_d, z_r, torch.tensor([30.0]), "aligndistil")
    assert teacher.tolist() == [[0.0, -math.inf, -6e4]]
    assert teacher_logits(z_r, z_d, torch.tensor([30.0]), "aligndistil").tolist() == [[0.0, -math.inf, 1e4]]


def test_vocabularies_of_different_sizes():
    padded = LM(tiny.llama(1, vocab=len(tiny.tokenizer()) + 64), tiny.tokenizer())
    with pytest.raises(ValueError, match="vocabularies of different sizes"):
        real_pass(AlignDistil(), models={**MODELS, "reverse": padded})


def test_options():
    assert (AlignDistil().models, AlignDistil(mode="theorem1").models) == (("dpo", "reverse"), ("dpo", "reference"))
    chosen = AlignDistil(teachers=Teachers(third="reference"))
    assert chosen.models == ("dpo", "reference") and live_models(chosen) == ("dpo", "reference")
    assert AlignDistil(mode="gkd", teachers=Teachers(third="reverse")).models == ("dpo",)
    assert AlignDistil().rollout is None
    sampled = AlignDistil(on_policy=True, max_new_tokens=9).rollout
    assert sampled == Sampling(max_new_tokens=9, temperature=1.0, top_p=1.0)
    wrong = {"mode": "x", "compat": "x", "beta": 0.0, "beta2": -1.0, "w_floor": 0.0, "kd_temperature": 0.0}
    for name, value in {**wrong, "max_new_tokens": 0}.items():
        with pytest.raises(ValueError, match=name):
            AlignDistil(**{name: value})
    with pytest.raises(ValueError, match="third"):
        AlignDistil(teachers=Teachers(third="other"))  # type: ignore[arg-type]


# ---- the stages


WORDS = ["great", "a dull one", "I loved it", "not great", "good!", "bad film"]


def make_run(tmp_path, objective, name="run", **changes):
    lm = changes.pop("lm", None) or tiny.lm(0, dtype=torch.float32, layers=1)
    rows = [("how was the film", 0), ("how was the plot", 2), ("how was the acting", 4), ("was it great", 0)]
    examples = [Example(prompt=p, responses=(WORDS[i], WORDS[i + 1]), scores=(1.0, 0.0), row=i) for p, i in rows]
    groups, _ = encode(examples, lm)
    settings = {
        "groups": groups[:3],
        "held_out": groups[3:],
        "out": tmp_path / name,
        "stage_folder": tmp_path / "stages",
    }
    config = LoopConfig(epochs=1, batch_size=2, lr=1e-2)
    common = {"slug": "aligndistil", "config": config, "resolve": method, "progress": False}
    return Run(objective=objective, policy=lm, **{**common, **settings, **changes})


def weights_of(lm):
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def test_stages_then_distillation(tmp_path):
    """Stage b is DPO on the swapped pairs to the bit; updates of all three are counted; held-out pairs stay pairs."""
    run = make_run(tmp_path, AlignDistil())
    ids = [g.traces[0].completion_ids for g in run.groups]
    swap = make_run(tmp_path, DPO(), "dpo", slug="dpo")
    swap.groups = [swapped(g) for g in swap.groups]
    swap.held_out = []
    swap.go(final=False)
    start = weights_of(run.policy)
    record = run.go(final=False)
    assert run.given.keys() == {"dpo", "reverse"}
    reverse, dpo = weights_of(run.given["reverse"]), weights_of(run.given["dpo"])
    for name, p in weights_of(swap.policy).items():
        torch.testing.assert_close(reverse[name], p, rtol=0, atol=1e-7)
    assert any((dpo[n] - reverse[n]).abs().max() > 1e-3 for n in dpo)
    assert [[t.completion_ids for t in g.traces] for g in run.groups] == [[i] for i in ids]
    assert [len(g.traces) for g in run.held_out] == [2]
    assert record["updates"] == 3 * 2 and {"eval_rewards/accuracies", "eval_loss"} <= record["final"].keys()
    assert "rewards/chosen" not in record["final"] and record["final"]["kl/dpo"] > 0
    assert any((p - start[n]).abs().max() > 1e-3 for n, p in weights_of(run.policy).items())
    for name, p in weights_of(run.given["dpo"]).items():  # the teachers stand still
        assert torch.equal(p, dpo[name])


def test_models_that_are_trained_already_and_options_of_the_stages(tmp_path):
    saved = tiny.lm(5, dtype=torch.float32, layers=1).save(tmp_path / "saved")
    run = make_run(tmp_path, AlignDistil(beta=0.7, teachers=Teachers(dpo=str(saved), stage_steps=1, stage_lr=1e-9)))
    start = weights_of(run.policy)
    run.objective.prepare(run)
    assert run.updates == 1 and len(run.stages.records) == 1
    assert run.stages.records[0]["inputs"]["options"]["beta"] == 0.7
    for name, p in weights_of(tiny.lm(5, dtype=torch.float32, layers=1)).items():
        assert torch.equal(weights_of(run.given["dpo"])[name], p)
    moved = max((p - start[n]).abs().max() for n, p in weights_of(run.given["reverse"]).items())
    assert moved < 1e-7


def test_the_reference_as_third_model_trains_one_stage(tmp_path):
    run = make_run(tmp_path, AlignDistil(mode="theorem1", beta2=0.05))
    record = run.go(final=False)
    assert run.given.keys() == {"dpo"} and record["updates"] == 2 * 2 and run.notes == []
    plain = make_run(tmp_path, AlignDistil(mode="theorem1"), "plain")
    plain.objective.prepare(plain)
    assert "smaller beta2 goes beyond" in plain.notes[0] and plain.stages.records[0]["reused"]


def test_another_tokenizer_is_refused(tmp_path):
    other = LM(tiny.llama(1, torch.float32, vocab=400, layers=1), tiny.tokenizer(vocab=330)).save(tmp_path / "other")
    run = make_run(tmp_path, AlignDistil(teachers=Teachers(dpo=str(other))))
    with pytest.raises(ValueError, match="different tokenizers"):
        run.objective.prepare(run)


def test_on_policy_trains_on_its_own_samples(tmp_path):
    """Other responses than the data's: the loss differs from the off-policy one of the same models; draws repeat."""
    losses = []
    for name, on in (("one", True), ("two", True), ("off", False)):
        objective = AlignDistil(on_policy=on, max_new_tokens=5, beta2=10.0)
        record = make_run(tmp_path, objective, name).go(final=False)
        losses.append(record["final"]["loss"])
        assert "eval_rewards/accuracies" in record["final"]
    assert losses[0] == losses[1] != losses[2]
