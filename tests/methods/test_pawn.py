# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
"""PAWN: the network's size and identities, the loss by hand, the metrics at their limits, baselines, and files."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pertoken.core.head import describe
from pertoken.explain._detection import auroc
from pertoken.explain.pawn import (
    METRICS,
    PAWN,
    PAWNHead,
    Signals,
    Training,
    as_traces,
    baselines,
    binoculars,
    fit_pawn,
    judge,
    load_head,
    padded,
    pawn_loss,
    save_head,
    signals_of,
)
from tests import tiny

rng = np.random.default_rng(0)


def fake(n, hidden=8, shift=0.0):
    return Signals(rng.normal(size=(n, 5)) + shift, rng.normal(size=(n + 1, hidden)))


def head(**options):
    torch.manual_seed(1)
    return PAWNHead(8, **{"features": 12, "gates": 4, **options}).double().eval()


def run(model, signals):
    metrics, states, mask = padded(signals)
    return model(metrics.double(), states.double(), mask)


# ---- the network


@pytest.mark.parametrize("hidden,count", [(768, 989_185), (2048, 1_644_545)])
def test_size_is_the_papers(hidden, count):
    assert sum(p.numel() for p in PAWNHead(hidden).parameters()) == count


def test_constant_gates_are_the_mean():
    signals = [fake(5), fake(3)]
    model = head()
    nn.init.zeros_(model.gate.last.weight)
    found, weights = run(model, signals)
    for row, s in enumerate(signals):
        m = torch.from_numpy(s.metrics).float().double()
        wanted = model.out(model.metrics(m).mean(0, keepdim=True))[0, 0]
        torch.testing.assert_close(found[row], wanted)
        torch.testing.assert_close(weights[row, : len(m)], torch.full((len(m),), 1 / len(m)).double())
    plain = head(branch="metrics")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("gate")})
    torch.testing.assert_close(run(plain, signals)[0], found)


def test_weights_sum_to_one_and_a_constant_changes_nothing():
    signals, model = [fake(6), fake(2)], head()
    found, weights = run(model, signals)
    torch.testing.assert_close(weights.sum(1), torch.ones(2).double())
    assert not weights[1, 2:].any()
    with torch.no_grad():
        model.gate.last.bias += 3.0
    torch.testing.assert_close(run(model, signals)[0], found)


def test_padding_and_order_change_nothing():
    model, short, long = head(), fake(3), fake(9)
    alone, _ = run(model, [short])
    torch.testing.assert_close(run(model, [short, long])[0][0], alone[0], atol=1e-9, rtol=0)
    metrics, states, mask = (x.double() if x.dtype != torch.bool else x for x in padded([long]))
    order = torch.randperm(9)
    torch.testing.assert_close(model(metrics[:, order], states[:, order], mask)[0], model(metrics, states, mask)[0])


def test_features_use_their_gates_in_turn():
    """f uses gate f mod G: with G = F = 2 and gates that look at one token each, z is those tokens' features."""
    model = head(features=2, gates=2)
    metrics, states, mask = (x.double() if x.dtype != torch.bool else x for x in padded([fake(2)]))
    pinned = torch.tensor([[[50.0, -50.0], [-50.0, 50.0]]]).double()
    model.gate.forward = lambda s: pinned
    m = model.metrics(metrics)[0]
    torch.testing.assert_close(model(metrics, states, mask)[0], model.out(torch.stack([m[0, 0], m[1, 1]])[None])[:, 0])


def test_content_reaches_the_logit_as_weights_alone():
    """One position: the weight is 1 whatever the states are."""
    model, s = head(), fake(1)
    other = Signals(s.metrics, rng.normal(size=(2, 8)))
    torch.testing.assert_close(run(model, [s])[0], run(model, [other])[0])
    assert not torch.allclose(run(head(branch="hidden"), [s])[0], run(head(branch="hidden"), [other])[0])


def test_dropped_tokens_never_leave_a_text_empty():
    model = head(drop=0.9)
    model.train()
    mask = torch.tensor([[True, False, False], [True, True, True]])
    torch.manual_seed(0)
    for _ in range(50):
        kept = model._dropped(mask)
        assert kept.any(1).all() and not (kept & ~mask).any()
    assert torch.isfinite(run(model, [fake(1), fake(4)])[0]).all()


# ---- the loss


def test_loss_by_hand():
    x, y = torch.tensor([0.3, -1.0]), torch.tensor([True, False])
    s = lambda z: 1 / (1 + math.exp(-z))
    terms = [
        2.5 * 0.9 * math.log(s(0.3)) + 0.1 * math.log(s(-0.3)),
        2.5 * 0.1 * math.log(s(-1.0)) + 0.9 * math.log(s(1.0)),
    ]
    assert pawn_loss(x, y, 0.2, 2.5).item() == pytest.approx(-sum(terms) / 2, rel=1e-6)
    plain = nn.functional.binary_cross_entropy_with_logits(x, y.float())
    assert pawn_loss(x, y, 0.0).item() == pytest.approx(plain.item())


# ---- the metrics


def test_metrics_at_their_limits():
    flat = torch.full((1, 7), -math.log(7))
    found = describe(flat, torch.tensor([3]), (*METRICS[:2], "quantile", "mass"))
    assert found["entropy"].item() == pytest.approx(math.log(7)) and found["quantile"].item() == pytest.approx(1)
    assert found["mass"].item() == pytest.approx(1) and found["top1_logp"].item() == pytest.approx(-math.log(7))
    sure = torch.tensor([[-math.inf, 0.0, -math.inf]])
    found = describe(sure, torch.tensor([1]), ("entropy", "quantile", "mass"))
    assert found["entropy"].item() == 0 and found["quantile"].item() == pytest.approx(1 / 3)
    assert found["mass"].item() == 1
    some = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    found = describe(some, torch.tensor([2]), ("quantile", "mass"))
    assert found["quantile"].item() == 0.75 and found["mass"].item() == pytest.approx(0.9)


def test_signals_are_those_of_a_plain_forward():
    lm = tiny.lm()
    (trace,) = as_traces(lm, ["the plot was great and the acting"], 6)
    (s,) = signals_of(lm, [trace], 6)
    ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
    with torch.no_grad():
        out = lm.causal(ids, output_hidden_states=True)
    logp = out.logits[0, :-1].log_softmax(-1)
    own = logp.gather(1, ids[0, 1:, None])
    wanted = {
        "entropy": -(logp * logp.exp()).sum(1),
        "top1_logp": logp.amax(1),
        "logp": own[:, 0],
        "quantile": (logp >= own).double().mean(1),
        "mass": (logp.exp() * (logp >= own)).sum(1),
    }
    for k, name in enumerate(METRICS):
        np.testing.assert_allclose(s.metrics[:, k], wanted[name], atol=1e-5)
    assert s.hidden.shape[0] == len(trace) + 1 == 7
    last = lm.causal.base_model(ids).last_hidden_state[0].detach()
    np.testing.assert_allclose(s.hidden, last, atol=1e-4)
    longer = as_traces(lm, ["the plot was great and the acting"], 99)
    np.testing.assert_allclose(signals_of(lm, longer, 6)[0].metrics, s.metrics, atol=1e-5)


# ---- training, baselines, files


def test_training_tells_shifted_texts_apart():
    texts = [fake(6, shift=2.0 * (i % 2)) for i in range(80)]
    labels = [i % 2 == 1 for i in range(80)]
    how = Training(epochs=8, batch=16)
    small = {"features": 16, "gates": 4}
    model = fit_pawn(texts[:60], labels[:60], how, **small)
    logits, weights = judge(model, texts[60:])
    assert auroc(logits, np.array(labels[60:])) > 0.9
    assert all(w.sum() == pytest.approx(1, abs=1e-5) for w in weights)
    again, _ = judge(fit_pawn(texts[:60], labels[:60], how, **small), texts[60:])
    np.testing.assert_allclose(again, logits)
    with pytest.raises(ValueError, match="both classes"):
        fit_pawn(texts, [True] * 80)
    with pytest.raises(ValueError, match="no scored token"):
        fit_pawn([*texts, Signals(np.zeros((0, 5)), np.zeros((1, 8)))], [*labels, True])


def test_baselines_by_hand():
    lm = tiny.lm()
    traces = as_traces(lm, ["the plot was great", "a dull film"], 99)
    found = baselines(lm, traces)
    for k, trace in enumerate(traces):
        ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
        with torch.no_grad():
            logp = lm.causal(ids).logits[0, :-1].log_softmax(-1)
        own = logp.gather(1, ids[0, 1:, None])
        rank = ((logp > own).sum(1) + 1).double().log()
        assert found["log_prob"][k] == pytest.approx(own.mean().item(), abs=1e-5)
        assert found["log_rank"][k] == pytest.approx(-rank.mean().item(), abs=1e-5)
        assert found["lrr"][k] == pytest.approx((-own.sum() / rank.sum()).item(), rel=1e-4)


def test_binoculars_by_hand():
    one, two = tiny.lm(0), tiny.lm(1)
    (trace,) = as_traces(one, ["the plot was great"], 99)
    ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
    with torch.no_grad():
        p1, p2 = (lm.causal(ids).logits[0, :-1].log_softmax(-1) for lm in (one, two))
    top = -p2.gather(1, ids[0, 1:, None]).mean()
    wanted = top / -(p1.exp() * p2).sum(1).mean()
    assert binoculars(one, two, [trace])[0] == pytest.approx(wanted.item(), rel=1e-5)


def test_auroc_with_ties():
    assert auroc(np.array([1.0, 2, 3, 4]), np.array([False, False, True, True])) == 1
    assert auroc(np.array([1.0, 1, 1, 1]), np.array([False, True, False, True])) == 0.5
    assert auroc(np.array([1.0, 2, 2, 3]), np.array([False, True, False, True])) == pytest.approx(3.5 / 4)


@pytest.mark.parametrize("branch", ["pawn", "metrics", "hidden"])
def test_files_come_back_and_refuse_another_model(branch, tmp_path):
    lm, signals = tiny.lm(), [fake(4)]
    torch.manual_seed(0)
    model = PAWNHead(8, branch=branch, features=8, gates=4).eval()
    save_head(model, tmp_path, lm)
    np.testing.assert_allclose(judge(load_head(tmp_path, lm), signals)[0], judge(model, signals)[0])
    with pytest.raises(ValueError, match="another model"):
        load_head(tmp_path, tiny.lm(1))


def test_credit_of_completions():
    lm = tiny.lm()
    torch.manual_seed(0)
    model = PAWNHead(lm.causal.config.hidden_size, features=8, gates=4).eval()
    traces = [lm.trace("q", "great plot"), lm.trace_of_ids(lm.encode_prompt("q"), [])]
    (one,), (none,) = PAWN(head=model).explain(lm, traces)
    assert one.kind == "weight" and one.values.sum() == pytest.approx(1, abs=1e-5) and one.meta["short"]
    assert one.meta["probability"] == pytest.approx(1 / (1 + math.exp(-one.meta["logit"])))
    assert none.meta["probability"] is None and none.meta["reason"] == "no token to score"
    ((long,),) = PAWN(head=model, longest=2).explain(lm, traces[:1])
    assert long.meta["cut"] == len(traces[0]) - 2 and not long.values[2:].any() and "cut" not in one.meta
    with pytest.raises(ValueError, match="no head"):
        PAWN().explain(lm, traces)


def test_bad_options():
    with pytest.raises(ValueError, match="must divide"):
        PAWNHead(8, features=10, gates=4)
    with pytest.raises(ValueError, match="branch"):
        PAWNHead(8, branch="x")
    for bad in ({"lr": 0.0}, {"epochs": 0}, {"smoothing": 1.0}, {"w_pos": 0.0}):
        with pytest.raises(ValueError):
            Training(**bad)
