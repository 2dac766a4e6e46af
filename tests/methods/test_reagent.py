# pyright: reportArgumentType=false
"""ReAGent: the update by hand, its identities, samplers that never repeat a token, stopping, and the soft metrics."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from pertoken.core.lm import LM
from pertoken.explain import reagent
from pertoken.explain._replacement import MaskedReplacer, distance, inferential, replacer, shape, soft_faithfulness
from pertoken.explain.reagent import ReAGent, Stop, kept_positions, update
from tests import tiny

NEVER = Stop(among=0)


def biased_bert(tokenizer, likeliest, device="cpu"):
    """A masked LM that expects these ids everywhere, the first one most; its tokenizer has a mask token more."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.cls.predictions.bias[list(likeliest)] = torch.arange(len(likeliest), 0, -1.0)
    return MaskedReplacer(model.to(device), tokenizer)


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# ---- the update


def test_update_by_hand():
    """d = 0.5: logit(0.75) = log 3 on what was replaced, -log 3 elsewhere."""
    mask = torch.tensor([[True, False, True]])
    found = update(torch.zeros(1, 3, dtype=torch.float64), mask, t(0.5))
    np.testing.assert_allclose(found, [[math.log(3), -math.log(3), math.log(3)]])
    np.testing.assert_allclose(found, 2 * np.arctanh([[0.5, -0.5, 0.5]]))


def test_no_change_leaves_scores_and_full_change_is_finite():
    s, mask = t([0.1, 0.2]), torch.tensor([[True, False]])
    assert torch.equal(update(s, mask, t(0.0)), s)
    assert torch.isfinite(update(s, mask, t(1.0))).all() and torch.isfinite(update(s, mask, t(-1.0))).all()


def test_masks_of_all_or_nothing_change_no_share():
    s = t([0.3, -0.2, 1.0])
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.bool)):
        torch.testing.assert_close(update(s, mask, t(0.4)).softmax(1), s.softmax(1))


def test_order_of_steps_does_not_matter():
    rng = np.random.default_rng(0)
    steps = [(torch.from_numpy(rng.random((2, 4)) < 0.5), torch.from_numpy(rng.uniform(-1, 1, 2))) for _ in range(5)]
    ways = []
    for order in (steps, steps[::-1]):
        s = torch.zeros(2, 4, dtype=torch.float64)
        for mask, delta in order:
            s = update(s, mask, delta)
        ways.append(s)
    torch.testing.assert_close(*ways)


def test_kept_positions():
    free = torch.tensor([True, False, True, True])
    s = t([1.0, 9.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0])
    assert kept_positions(s, free, 1).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert kept_positions(s, free, 7).all()


# ---- samplers


@pytest.mark.parametrize("name", ["uniform", "shape"])
def test_replacements_are_other_ordinary_tokens(name):
    lm = tiny.lm()
    ids = lm.encode_prompt("The plot 7, was great 😀")
    drawn = replacer(name)(lm, ids)(200, np.random.default_rng(0))
    assert drawn.shape == (200, len(ids))
    assert not (drawn == torch.tensor(ids)).any() and not set(drawn.flatten().tolist()) & set(lm.view.special_ids)
    if name == "shape":
        for place, i in enumerate(ids):
            if i not in lm.view.special_ids:
                kinds = {shape(lm.view.piece(d)) for d in drawn[:, place].tolist()}
                assert kinds == {shape(lm.view.piece(i))} or len(kinds) > 1


def test_uniform_draws_are_uniform_over_the_others():
    """6,000 draws over 316 ids: chi-square within five standard deviations."""
    lm = tiny.lm()
    ids = lm.encode_completion("o", ended=False)[0]
    drawn = replacer("uniform")(lm, ids)(6000, np.random.default_rng(1))[:, 0].numpy()
    counts = np.bincount(drawn, minlength=320)
    usable = [i for i in range(320) if i not in lm.view.special_ids and lm.view.piece(i) and i != ids[0]]
    expected = 6000 / len(usable)
    chi = ((counts[usable] - expected) ** 2 / expected).sum()
    assert counts[ids[0]] == 0 and abs(chi - len(usable)) < 5 * math.sqrt(2 * len(usable))


def test_a_masked_lm_replaces_by_what_it_expects():
    """Its best guess as the token's text (with the token's space), the second where that is the token itself; special
    tokens and the text around stay."""
    lm = tiny.lm()
    ids = (lm.tokenizer.bos_token_id, *lm.tokenizer.encode("The film was great"))
    best, second = (lm.tokenizer.encode(text)[0] for text in (" film", " was"))
    replace = biased_bert(lm.tokenizer, (best, second))
    drawn = replace(lm, ids)(3, np.random.default_rng(0))
    assert drawn.shape == (3, len(ids)) and torch.equal(drawn[0], drawn[2])
    wanted = [ids[0]]
    for own, piece in zip(ids[1:], lm.view.pieces(ids)[1:], strict=True):
        lead = " " if piece[:1] == b" " else ""
        words = (lm.tokenizer.encode(lead + word)[0] for word in ("film", "was"))
        wanted.append(next(word for word in words if word != own))
    assert drawn[0].tolist() == wanted and wanted[2] != ids[2]
    found = ReAGent(replace=replace, max_steps=2, probes=2, stop=NEVER).attribute(lm, ids, 5)
    assert found["scores"].shape == (len(ids),)
    with pytest.raises(ValueError, match="no mask token"):
        MaskedReplacer(biased_bert(lm.tokenizer, (best,)).model, lm.tokenizer)


def test_shapes():
    wanted = {b" The": " title", b"abc": "lower", b" USA": " upper", b"12": "digit", b",": "punctuation", b" ": "space"}
    assert {k: shape(k) for k in wanted} == wanted and shape(b"\xf0\x9f") == "bytes"


def test_inferential_is_the_models_own_guess():
    lm = tiny.lm()
    ids = lm.encode_prompt("the plot was")
    found = inferential(lm, ids)(3, np.random.default_rng(0))
    assert torch.equal(found[0], found[2]) and found[0, 0] == ids[0]
    with torch.no_grad():
        logits = lm.causal(torch.tensor([ids])).logits[0]
    for place in range(1, len(ids)):
        first, second = logits[place - 1].topk(2).indices.tolist()
        assert found[0, place] == (first if first != ids[place] else second)


def test_unknown_and_missing_samplers():
    with pytest.raises(ValueError, match="uniform, shape"):
        replacer("x")
    try:
        import nltk  # noqa: F401
    except ImportError:
        lm = tiny.lm()
        with pytest.raises(ImportError, match="NLTK"):
            replacer("postag")(lm, lm.encode_prompt("q"))


# ---- attributions


def copying(place: int = 2, cue: int = 5, target: int = 9):
    """A real LM whose head is put aside: probabilities depend on one position alone."""
    lm = tiny.lm()

    def probabilities(_lm, ids):
        p = torch.full((len(ids), 320), 0.1 / 319, dtype=torch.float64)
        seen = ids[:, place] == cue
        p[:, target] = torch.where(seen, 0.9, 0.1)
        return p / p.sum(1, keepdim=True)

    return lm, probabilities


def attribute(lm, probabilities, method, ids, target=9):
    bound = type("Bound", (ReAGent,), {"_probabilities": staticmethod(probabilities)})
    options = {name: getattr(method, name) for name in method.__dataclass_fields__}
    return bound(**options).attribute(lm, ids, target)


def test_the_one_position_that_matters_is_found():
    lm, probabilities = copying()
    ids = [10, 11, 5, 12, 13, 14]
    found = attribute(lm, probabilities, ReAGent(max_steps=40, stop=NEVER, sampler="uniform"), ids)
    assert found["scores"].sum() == pytest.approx(1) and found["scores"].argmax() == 2 and found["scores"][2] > 0.9
    assert found["rows"] == 1 + 40 * 5 and not found["converged"] and found["p0"] == pytest.approx(0.9, abs=0.01)


def test_a_target_that_ignores_the_input_keeps_the_start():
    lm = tiny.lm()
    constant = lambda _lm, ids: torch.full((len(ids), 320), 1 / 320, dtype=torch.float64)
    flat = attribute(lm, constant, ReAGent(max_steps=10, stop=NEVER), [10, 11, 12])
    np.testing.assert_allclose(flat["scores"], [1 / 3] * 3)
    noisy = attribute(lm, constant, ReAGent(max_steps=10, stop=NEVER, init="uniform", seed=3, probes=2), [10, 11, 12])
    start = torch.from_numpy(np.random.default_rng([3]).spawn(2)[0].uniform(size=(2, 3))).softmax(1).mean(0)
    np.testing.assert_allclose(noisy["scores"], start)


def test_fixed_and_special_positions_get_nothing():
    lm, probabilities = copying()
    ids = [0, 11, 5, 12, 13, 14]  # 0 is special
    found = attribute(lm, probabilities, ReAGent(max_steps=20, stop=NEVER, fixed=(-1, 3)), ids)
    assert found["scores"][[0, 3, 5]].tolist() == [0, 0, 0] and found["scores"].argmax() == 2
    with pytest.raises(ValueError, match="fixed or special"):
        attribute(lm, probabilities, ReAGent(fixed=(0, 1, 2, 3, 4, 5)), ids)


def test_a_rationale_as_long_as_the_input_stops_at_the_first_test():
    lm, probabilities = copying()
    stop = Stop(rationale=10, min_steps=0, among=3)
    found = attribute(lm, probabilities, ReAGent(stop=stop), [10, 11, 5, 12])
    assert found["steps"] == [1] * 5 and found["converged"] and sorted(found["rationale"]) == [0, 1, 2, 3]


def test_stopping_is_sticky_and_tested_when_said():
    lm, probabilities = copying()
    stop = Stop(rationale=1, min_steps=38, every=4, among=1)
    found = attribute(lm, probabilities, ReAGent(stop=stop, max_steps=200), [10, 11, 5, 12, 13])
    assert found["converged"] and all(s % 4 == 0 and s >= 40 for s in found["steps"]) and found["rationale"] == [2]


@pytest.mark.parametrize("stop", [NEVER, Stop(rationale=2, min_steps=3, every=2, among=150)])
def test_how_many_steps_go_together_changes_nothing(monkeypatch, stop):
    """Against the loop as it is written down: a step, its test, the next step."""
    lm, ids, target = tiny.lm(), [10, 11, 5, 12, 13, 14], 9
    method = ReAGent(max_steps=23, stop=stop, probes=4, sampler="uniform", seed=5)
    found = {}
    for tokens in (1, 60, 4096):
        monkeypatch.setattr(reagent, "_TOGETHER", tokens)
        seen = []
        found[tokens] = method.attribute(lm, ids, target, watch=lambda step, s, seen=seen: seen.append((step, s)))
        assert [step for step, _ in seen] == list(range(1, max(found[tokens]["steps"]) + 1))
    probing, testing = np.random.default_rng([5]).spawn(2)
    draw = replacer("uniform")(lm, tuple(ids))

    def p(rows):
        with torch.no_grad():
            return lm.causal(rows).logits[:, -1].softmax(-1)

    x = torch.tensor(ids)
    probing.uniform(size=(4, 6))
    p0, s, steps, rows = p(x[None])[0, target], torch.zeros(4, 6, dtype=torch.float64), [23] * 4, 1
    live = [True] * 4
    for step in range(1, 24):
        mask = torch.from_numpy(probing.random((4, 6)) < 0.3)
        d = (p0 - p(torch.where(mask, draw(4, probing), x))[:, target]).double()
        rows += sum(live)
        for b in range(4):
            s[b] += live[b] * 2 * torch.atanh(torch.where(mask[b], d[b], -d[b]))
        if stop.among and step >= stop.min_steps and step % stop.every == 0:
            others, top = draw(4, testing), s.argsort(1, descending=True)[:, :2]
            for b in range(4):
                if live[b]:
                    kept = others[b].scatter(0, top[b], x[top[b]])
                    if target in p(kept[None])[0].topk(stop.among).indices:
                        live[b], steps[b] = False, step
        if not any(live):
            break
    counted = [b for b in range(4) if not live[b]] or [0, 1, 2, 3]
    for got in found.values():
        assert got["steps"] == steps
        np.testing.assert_allclose(got["scores"], s[counted].softmax(1).mean(0), atol=1e-6)
    assert found[1]["rows"] >= rows


def test_a_replacement_by_the_same_token_is_none():
    """The sampler puts the cue where it is: only the others count as replaced, and nothing is learned of the cue."""
    lm, probabilities = copying(place=3)
    same = lambda _lm, ids: lambda n, rng: torch.tensor([ids[0], 99, ids[2], 99]).expand(n, -1)
    found = attribute(
        lm, probabilities, ReAGent(max_steps=40, stop=NEVER, replace=same, seed=1), [10, 11, 12, 5], target=9
    )
    assert found["scores"].argmax() == 3 and found["scores"][0] == pytest.approx(found["scores"][2])
    nothing = lambda _lm, ids: lambda n, rng: torch.tensor(ids).expand(n, -1)
    flat = attribute(lm, probabilities, ReAGent(max_steps=9, stop=NEVER, replace=nothing), [10, 11, 12, 5])
    np.testing.assert_allclose(flat["scores"], [0.25] * 4)


def test_the_models_own_guess_is_never_a_special_token():
    lm = tiny.lm()
    ids = lm.encode_completion("the plot was great", ended=False)[0]
    with torch.no_grad():
        lm.causal.get_output_embeddings().weight[sorted(lm.view.special_ids)] *= 100  # far ahead, one way or the other
    drawn = inferential(lm, ids)(1, np.random.default_rng(0))[0].tolist()
    assert not set(drawn) & set(lm.view.special_ids)


def test_inputs_beyond_the_context_and_nothing_to_replace():
    lm = tiny.lm()
    method = ReAGent(max_steps=2, stop=NEVER, probes=2)
    trace = lm.trace_of_ids([0, *[5] * 270], [6])
    ((credit,),) = method.explain(lm, [trace])
    assert credit.meta["cut"] == 271 - lm.context == 15 and credit.meta["target"] == 271
    assert not credit.values[:15].any() and (credit.values[15:271] > 0).all()
    with pytest.raises(ValueError, match="context has 256"):
        method.attribute(lm, [5] * 271, 6)
    with pytest.raises(ValueError, match="no id of the model"):
        method.attribute(lm, [5], 320)
    for before in ([], [0]):
        one, two = method.explain(lm, [lm.trace_of_ids(before, [5, 6])])[0]
        assert not one.values.any() and one.meta["reason"].startswith("no token") and "p0" not in one.meta
        assert two.values.sum() == pytest.approx(1)


def test_credits_of_a_real_model():
    lm = tiny.lm()
    trace = lm.trace("how was the film", "great plot")
    method = ReAGent(max_steps=3, stop=NEVER, probes=2)
    (credits,) = method.explain(lm, [trace], targets=(0, -1))
    p = len(trace.prompt_ids)
    assert [c.meta["target"] for c in credits] == [p, p + len(trace) - 1]
    for credit in credits:
        assert credit.over == "all" and credit.kind == "attribution" and credit.values.sum() == pytest.approx(1)
        assert not credit.values[credit.meta["target"] :].any() and credit.values[0] == 0  # a template marker
    with torch.no_grad():
        p0 = lm.causal(torch.tensor([trace.prompt_ids])).logits[0, -1].softmax(-1)[trace.completion_ids[0]]
    assert credits[0].meta["p0"] == pytest.approx(float(p0), abs=1e-6)
    again = method.explain(lm, [trace], targets=(0,))[0][0]
    np.testing.assert_allclose(again.values, credits[0].values)
    assert len(method.explain(lm, [trace])[0]) == len(trace)


def test_bad_input():
    lm = tiny.lm()
    trace = lm.trace("q", "a")
    with pytest.raises(ValueError, match="none at 7"):
        ReAGent().explain(lm, [trace], targets=(7,))
    with pytest.raises(ValueError, match="nothing stands before"):
        ReAGent().attribute(lm, (), 3)
    with pytest.raises(ValueError, match="another tokenizer"):
        ReAGent().explain(LM(lm.model, tiny.tokenizer(vocab=300)), [trace])
    for bad in ({"probes": 0}, {"ratio": 0.0}, {"ratio": 1.0}, {"init": "x"}, {"max_steps": 0}):
        with pytest.raises(ValueError):
            ReAGent(**bad)
    for bad in ({"among": -1}, {"every": 0}, {"rationale_ratio": 0.0}):
        with pytest.raises(ValueError):
            Stop(**bad)
    assert Stop(rationale=0, rationale_ratio=0.3).size(11) == 4


# ---- soft metrics


def test_distance_by_hand():
    p, q = t([0.5, 0.5, 0.0]), t([0.0, 0.5, 0.5])
    np.testing.assert_allclose(distance(p, q), [1 / math.sqrt(2)])
    assert distance(p, p).item() == 0 and distance(t([1.0, 0.0]), t([0.0, 1.0])).item() == pytest.approx(math.sqrt(2))


def test_soft_metrics_at_their_limits():
    """All ones: sufficiency keeps everything (Soft-NS = 1), comprehensiveness drops everything (Soft-NC = 1)."""
    lm, rng = tiny.lm(), np.random.default_rng(0)
    ids = lm.encode_prompt("the plot was great")
    found = soft_faithfulness(lm, ids, np.ones(len(ids)), rng=rng)
    assert found["soft_ns"] == pytest.approx(1) and found["soft_nc"] == pytest.approx(1)
    none = soft_faithfulness(lm, ids, np.zeros(len(ids)), rng=rng)
    assert none["soft_ns"] == pytest.approx(0) and none["soft_nc"] == pytest.approx(0)
    scaled = [soft_faithfulness(lm, ids, np.full(len(ids), v), rng=np.random.default_rng(1)) for v in (0.01, 1.0)]
    assert scaled[0] == pytest.approx(scaled[1])
    with pytest.raises(ValueError, match="one each"):
        soft_faithfulness(lm, ids, [1.0], rng=rng)
