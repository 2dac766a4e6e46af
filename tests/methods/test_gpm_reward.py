"""GPM reward training: by hand, the identities of its specification through a real pass, margins, and a real run."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken import catalog
from pertoken.core.loop import LoopConfig
from pertoken.core.pairwise import PreferenceHead
from pertoken.core.protocols import Batch
from pertoken.core.run import Run
from pertoken.core.stats import Stats
from pertoken.score.gpm import GPM
from pertoken.train.gpm_reward import GPMReward, Regularizer, regularized
from tests import tiny
from tests.core.training import make_groups
from tests.methods.one_pass import exact_lm, gradient, means, pair_stats

LM = exact_lm(0)
GROUPS = tiny.groups(LM, n=4)


def heads(objective, scale=1.0, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = objective.init_state(LM.causal.config).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name != "t":
                p.mul_(scale)
    return made


def real(objective, state=None, groups=GROUPS, columns=None):
    """Loss of one real pass, its statistics, batch and heads."""
    state = state or heads(objective)
    stats, batch = pair_stats(objective, {"policy": LM}, groups)
    batch = Batch(batch.pairs_B2, columns or {}, rows=batch.rows)
    return objective.loss(stats, batch, state), stats, batch, state


def states(trace):
    with torch.no_grad():
        return LM.causal.base_model(torch.tensor([trace.ids("all")])).last_hidden_state[0]


@torch.no_grad()
def scores(objective, state, groups=GROUPS):
    """s of each pair with plain forwards and loops."""
    out = []
    for chosen, rejected in groups:
        if objective.head == "bt":
            r = [float(states(t)[-1] @ state.embed[0]) for t in (chosen, rejected)]
            out.append(r[0] - r[1])
            continue
        a, b = ((state.embed @ states(t)[-1]).tolist() for t in (chosen, rejected))
        if objective.normalize:
            a, b = (list(np.array(v) / np.linalg.norm(v)) for v in (a, b))
        scale = [1.0] * (len(a) // 2)
        if objective.gate == "softmax":
            logits = state.gate @ states(chosen)[len(chosen.prompt_ids) - 1]
            scale = (logits.exp() / logits.exp().sum()).tolist()
        out.append(sum(g * (a[2 * i] * b[2 * i + 1] - a[2 * i + 1] * b[2 * i]) for i, g in enumerate(scale)))
    return np.array(out)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dim": 4, "normalize": False},
        {"dim": 6, "gate": "softmax"},
        {"head": "bt", "tau": 1.0},
        {"loss_form": "regression"},
    ],
)
def test_loss_by_hand(options):
    objective = GPMReward(**options)
    state = heads(objective, scale=4.0)
    loss, _, _, _ = real(objective, state)
    s = scores(objective, state)
    x = s / objective.tau
    each = 0.5 * (x - 10) ** 2 if objective.loss_form == "regression" else np.log1p(np.exp(-x))
    assert loss.sum.item() == pytest.approx(each.sum(), rel=1e-9) and loss.count == 4
    shown = means(loss)
    assert shown["rewards/margins"] == pytest.approx(s.mean()) and shown["score/max"] == pytest.approx(np.abs(s).max())
    assert shown["rewards/accuracies"] == (s > 0).mean() and shown["score/abs"] == pytest.approx(np.abs(s).mean())
    assert shown["probability"] == pytest.approx((1 / (1 + np.exp(-x))).mean())
    assert shown["rewards/chosen"] == pytest.approx(-shown["rewards/rejected"])
    assert shown["tau"] == pytest.approx(objective.tau)


def test_swapping_a_pair_negates_its_score_exactly():
    objective = GPMReward(dim=4, gate="softmax")
    there, _, _, state = real(objective)
    back, _, _, _ = real(objective, state, [pair[::-1] for pair in GROUPS])
    assert means(there)["rewards/margins"] == pytest.approx(-means(back)["rewards/margins"], abs=1e-12)


def test_identical_responses_teach_nothing():
    pair = [[GROUPS[0][0], GROUPS[0][0]]]
    loss, _, _, state = real(GPMReward(normalize=False), groups=pair)
    assert loss.sum.item() == pytest.approx(math.log(2), abs=1e-12)
    (slope,) = torch.autograd.grad(loss.sum, [state.embed], retain_graph=True)
    assert slope.abs().max() < 1e-12 and gradient(loss.sum, LM).abs().max() < 1e-12


def test_backbone_heads_gate_and_tau_learn():
    objective = GPMReward(dim=4, gate="scaled", learn_tau=True)
    loss, _, _, state = real(objective, heads(objective, 10.0))
    grads = torch.autograd.grad(loss.sum, list(state.parameters()), retain_graph=True)
    assert len(grads) == 3 and all(g.abs().max() > 1e-6 for g in grads)
    assert gradient(loss.sum, LM).abs().max() > 1e-6


def test_bradley_terry_head_is_a_gpm_that_embeds_as_r_and_one():
    objective = GPMReward(head="bt", tau=1.0)
    loss, stats, batch, state = real(objective)
    r = stats["policy"].extra["hidden_end"] @ state.embed[0]
    v = torch.stack([r, torch.ones_like(r)], -1)
    w, l = v[batch.chosen], v[batch.rejected]
    s = w[:, 0] * l[:, 1] - w[:, 1] * l[:, 0]
    assert loss.sum.item() == pytest.approx(-torch.nn.functional.logsigmoid(s).sum().item(), abs=1e-12)


def test_regularizer_by_hand():
    losses, logp = torch.tensor([0.4, 0.6]), torch.tensor([-3.0, -20.0])
    assert regularized(losses, logp, Regularizer()) is losses
    got = regularized(losses, logp, Regularizer(c=0.1))
    assert got.tolist() == pytest.approx([0.9 * 0.4 + 0.1 * 3, 0.9 * 0.6 + 0.1 * 20])
    got = regularized(losses, logp, Regularizer(c=0.1, form="logsigmoid", beta=0.2))
    expected = [0.9 * 0.4 + 0.1 * math.log1p(math.exp(0.6)), 0.9 * 0.6 + 0.1 * math.log1p(math.exp(4))]
    assert got.tolist() == pytest.approx(expected)


def test_regularizer_reads_the_chosen_alone():
    objective = GPMReward(regularizer=Regularizer(c=0.05))
    plain, stats, batch, state = real(GPMReward())
    loss = objective.loss(stats, batch, state)
    nll = -stats["policy"].sums()[batch.chosen].sum().item()
    assert loss.sum.item() == pytest.approx(0.95 * plain.sum.item() + 0.05 * nll, rel=1e-12)


def by_hand_stats(ends):
    """One pair with given states of width 2, tokens without weight."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    return {"policy": Stats(mask, torch.zeros(2, 1, dtype=torch.float64), mask, {"hidden_end": torch.tensor(ends)})}


def test_margin_shifts_the_loss_alone_and_the_release_logs_it():
    column = {"margin": torch.tensor([0.3, 0.3], dtype=torch.float64)}
    batch = Batch(torch.tensor([[0, 1]]), column)
    stats = by_hand_stats([[0.5, 1.0], [0.1, 1.0]])  # s = 0.5 * 1 - 1 * 0.1
    found = {}
    for compat in ("paper", "reference"):
        objective: Any = GPMReward(margin="gap", normalize=False, compat=compat)
        state = PreferenceHead(2, objective.options()).double()
        with torch.no_grad():
            state.embed.copy_(torch.eye(2))
        found[compat] = objective.loss(stats, batch, state)
        assert found[compat].sum.item() == pytest.approx(math.log1p(math.exp(-1.0)), abs=1e-6)
        assert means(found[compat])["rewards/margins"] == pytest.approx(0.4)
    assert means(found["paper"])["probability"] == pytest.approx(1 / (1 + math.exp(-4)), abs=1e-6)
    assert means(found["reference"])["probability"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)
    with pytest.raises(ValueError, match="run prepare"):
        GPMReward(margin="gap").loss(stats, Batch(torch.tensor([[0, 1]])), state)


def make_run(out, objective, groups, held_out=(), **config):
    settings = LoopConfig(**({"lr": 3e-3, "batch_size": 4, "steps": 12, "warmup": 0.0, "seed": 1} | config))
    return Run(
        slug="gpm-reward",
        objective=objective,
        policy=exact_lm(0),
        groups=list(groups),
        held_out=list(held_out),
        config=settings,
        out=out,
        resolve=catalog.method,
        progress=False,
    )


def test_margins_come_from_the_data(tmp_path):
    groups = make_groups(LM, 4)
    with pytest.raises(ValueError, match="no number in column 'gap'"):
        make_run(tmp_path / "a", GPMReward(margin="gap"), groups).go()
    groups = [
        dataclasses.replace(g, columns={}, example=dataclasses.replace(g.example, extra={"gap": 0.1 * i}))
        for i, g in enumerate(groups)
    ]
    run = make_run(tmp_path / "b", GPMReward(margin="gap"), groups, steps=2)
    run.go()
    assert [g.columns["margin"] for g in run.groups] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_run_learns_its_pairs_and_its_folder_is_a_scorer(tmp_path):
    groups = [dataclasses.replace(g, columns={}) for g in make_groups(LM, 6)]
    groups = [
        dataclasses.replace(g, traces=tuple(dataclasses.replace(t, ended=True) for t in g.traces)) for g in groups
    ]
    record = make_run(tmp_path / "run", GPMReward(dim=4, gate="softmax"), groups[:4], groups[4:], steps=30).go()
    assert record["final"]["rewards/accuracies"] == 1.0 and record["final"]["loss"] < 0.3
    assert "eval_score/max" in record["final"] and record["final"]["score/max"] <= 1
    scorer = GPM(folder=str(tmp_path / "run"))
    assert scorer.head == GPMReward(dim=4, gate="softmax").options()
    margins = [float(scorer.pairwise_table(g.traces)[0, 1]) for g in groups[4:]]
    assert np.mean(margins) * 0.1 == pytest.approx(record["final"]["eval_rewards/margins"], abs=1e-4)
    assert all(scorer.prefer(g.traces)[0, 1] > 0.5 for g in groups[:4])


def test_a_run_that_was_stopped_goes_on_alike(tmp_path):
    groups = [dataclasses.replace(g, columns={}) for g in make_groups(LM, 4)]
    options = {"steps": 6, "save_every": 2}
    whole = make_run(tmp_path / "whole", GPMReward(), groups, **options)
    whole.go()
    from pertoken.core.checkpoint import checkpoints

    again = make_run(tmp_path / "again", GPMReward(), groups, **options)
    again.go()
    import shutil

    shutil.rmtree(checkpoints(tmp_path / "again")[-1][1])
    (tmp_path / "again" / "results.json").unlink()
    resumed = make_run(tmp_path / "again", GPMReward(), groups, **options)
    record = resumed.go(resume=True)
    assert record["final"]["loss"] == pytest.approx(whole_loss(tmp_path / "whole"), abs=1e-10)


def whole_loss(folder):
    import json

    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"]


def test_bad_options():
    for options, message in (
        ({"dim": 3}, "even dimension"),
        ({"head": "bt", "gate": "softmax"}, "drop it"),
        ({"compat": "release"}, "paper, reference"),
        ({"margin": "gap", "loss_form": "regression"}, "no margin"),
        ({"tau": -1.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GPMReward(**options)
    for options, message in (({"c": 1.0}, "share"), ({"form": "mse"}, "nll, logsigmoid"), ({"beta": 0}, "above 0")):
        with pytest.raises(ValueError, match=message):
            Regularizer(**options)
    stats, batch = pair_stats(GPMReward(), {"policy": LM}, GROUPS)
    with pytest.raises(ValueError, match="init_state"):
        GPMReward().loss(stats, batch)
