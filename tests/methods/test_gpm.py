"""GPM: by hand, every identity of its specification, fitting, keeping, and the inputs of its pitfalls."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from pertoken.core.describe import describe
from pertoken.core.pairwise import HeadOptions, PairConfig, PreferenceHead
from pertoken.score._features import ended
from pertoken.score.gpm import GPM
from tests import tiny
from tests.methods.one_pass import exact_lm

LM = exact_lm(0)
TEXTS = ("The plot was great", "A dull film!", "good", "I loved every minute")


def items(prompt="How was the film?", texts=TEXTS):
    return [LM.trace(prompt, text) for text in texts]


def state_at_the_end(trace):
    """The last hidden state from a plain forward."""
    with torch.no_grad():
        return LM.causal.base_model(torch.tensor([trace.ids("all")])).last_hidden_state[0]


def by_hand(model, traces, prompt=None):
    """s / tau of all pairs with loops, in numpy."""
    v = np.array([state_at_the_end(t)[-1].numpy() for t in traces]) @ model.module.embed.detach().double().numpy().T
    if model.head.normalize:
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
    scale = np.ones(v.shape[1] // 2)
    if model.head.gate != "none":
        h = state_at_the_end(traces[0])[len(traces[0].prompt_ids) - 1].numpy()
        logits = model.module.gate.detach().double().numpy() @ h
        scale = np.exp(logits) / np.exp(logits).sum()
    out = np.zeros((len(v), len(v)))
    for i, j in itertools.product(range(len(v)), repeat=2):
        out[i, j] = sum(
            scale[k] * (v[i, 2 * k] * v[j, 2 * k + 1] - v[i, 2 * k + 1] * v[j, 2 * k]) for k in range(len(scale))
        )
    return out / model.head.tau


@pytest.mark.parametrize("options", [{}, {"dim": 4, "normalize": False}, {"dim": 6, "gate": "softmax", "tau": 0.5}])
def test_table_by_hand(options):
    model, traces = GPM.example(LM, head=HeadOptions(**options)), items()
    if model.head.gate != "none":
        with torch.no_grad():
            model.module.gate.mul_(20)
    table = model.pairwise_table(traces)
    np.testing.assert_allclose(table, by_hand(model, traces), atol=1e-4, rtol=1e-4)
    assert (table == -table.T).all()
    np.testing.assert_allclose(model.prefer(traces), 1 / (1 + np.exp(-table)), atol=1e-12)


def test_score_is_the_mean_against_the_set_of_its_prompt():
    model, here, there = GPM.example(LM), items(), items("So?", TEXTS[:3])
    credits = model.score([here[0], there[0], *here[1:], *there[1:]])
    for found, traces in (([credits[0], *credits[2:5]], here), ([credits[1], *credits[5:]], there)):
        expected = by_hand(model, traces).mean(1)
        assert [c.reduce() for c in found] == pytest.approx(expected, abs=1e-4)
        assert sum(c.reduce() for c in found) == pytest.approx(0, abs=1e-9)
        assert {(c.level, c.meta["candidates"]) for c in found} == {("sequence", len(traces))}
    assert "no global reward" in credits[0].meta["scale"]
    assert credits[0].meta["max_abs"] == pytest.approx(np.abs(by_hand(model, here)).max(), rel=1e-4)
    assert model.score(here[:1])[0].reduce() == 0  # alone, it has nothing to be compared with
    pair = [c.reduce() for c in model.score(here[:2])]
    assert pair[0] == pytest.approx(-pair[1]) and pair[0] != pytest.approx(credits[0].reduce())


def test_the_releases_scores_are_twice_ours():
    ours, theirs = GPM.example(LM), GPM.example(LM, compat="reference")
    np.testing.assert_allclose(theirs.pairwise_table(items()), 2 * ours.pairwise_table(items()))
    np.testing.assert_allclose(theirs.prefer(items()), ours.prefer(items()))
    assert theirs.score(items())[1].reduce() == pytest.approx(2 * ours.score(items())[1].reduce())


class Constant:
    """Texts to given features."""

    def __init__(self, rows):
        self.rows, self.calls = np.asarray(rows, np.float32), []

    def __call__(self, texts):
        self.calls.append(len(texts))
        return self.rows[: len(texts)]


def identity_heads(rows, **options):
    """A GPM whose embeddings are the features themselves."""
    options = {"normalize": False, "tau": 1.0, "dim": len(rows[0])} | options
    module = PreferenceHead(len(rows[0]), HeadOptions(**options))
    with torch.no_grad():
        module.embed.copy_(torch.eye(len(rows[0])))
    return GPM(head=module.options, module=module, encoder=Constant(rows))


def test_three_vectors_at_120_degrees_are_a_cycle():
    angles = 2 * np.pi * np.arange(3) / 3
    model = identity_heads(np.stack([np.cos(angles), np.sin(angles)], 1), normalize=True)
    table = model.pairwise_table(items()[:3])
    assert table[0, 1] == pytest.approx(np.sin(2 * np.pi / 3), abs=1e-6)
    assert table[0, 1] == pytest.approx(table[1, 2], abs=1e-6) == pytest.approx(table[2, 0], abs=1e-6)
    assert model.cycles(items()[:3]) == 1
    assert np.abs([c.reduce() for c in model.score(items()[:3])]).max() < 1e-6  # no order is better than another


def test_bradley_terry_is_the_form_with_a_constant():
    rewards = [0.3, -1.0, 2.0, 0.1]
    model = identity_heads([[r, 1.0] for r in rewards])
    table = model.pairwise_table(items())
    np.testing.assert_allclose(table, np.subtract.outer(rewards, rewards), atol=1e-6)
    assert model.rank(items()) == [2, 0, 3, 1] and model.cycles(items()) == 0
    assert model.encoder.calls == [4] * 3  # K responses, K rows, and K^2 comparisons of them


def test_rank_depends_on_the_set():
    """Of a cycle with weights, the order of two items turns with who else is there."""
    blocks = np.array([[1.0, 0.0], [0.0, 1.0], [-3.0, -3.0]])
    model = identity_heads(blocks)
    both, three = model.rank(items()[:2]), model.rank(items()[:3])
    assert both == [0, 1] and three.index(1) < three.index(0)
    ties = identity_heads([[1.0, 1.0]] * 3)
    assert ties.rank(items()[:3]) == [0, 1, 2]


def test_one_forward_a_response(monkeypatch):
    from pertoken.core import packing

    fed = []
    built = packing._build
    monkeypatch.setattr(packing, "_build", lambda rows, *rest: fed.append(rows) or built(rows, *rest))
    GPM.example(LM).prefer(items())
    assert sum(len(stretch.completions) for rows in fed for row in rows for stretch in row) == len(TEXTS)


def test_the_gate_needs_one_prompt():
    model, mixed = GPM.example(LM, head=HeadOptions(dim=4, gate="softmax")), [*items()[:2], *items("So?")[:1]]
    for ask in (model.prefer, model.pairwise_table, model.rank, model.cycles):
        with pytest.raises(ValueError, match="prompt by prompt"):
            ask(mixed)
    with pytest.raises(ValueError, match="prompt by prompt"):
        model.table(torch.zeros(2, 32), torch.eye(2, 32))
    assert len(model.score(mixed)) == 3  # by prompt
    assert GPM.example(LM).prefer(mixed).shape == (3, 3)


def test_terminators():
    whole, cut = LM.trace("How?", "It was good"), LM.trace("How?", "It was good", ended=False)
    assert ended(whole, LM) is whole
    assert ended(cut, LM).completion_ids == whole.completion_ids and ended(cut, LM).ended
    model = GPM.example(LM)
    np.testing.assert_allclose(model.features([cut])[0], model.features([whole])[0], atol=1e-6)
    assert ended(LM.trace_of_ids(whole.prompt_ids, []), LM).completion_ids == (LM.terminator,)
    assert ended(dataclasses.replace(cut, completion_ids=(5, 2), completion_pieces=(b"", b""), ended=True), LM).ended
    small = tiny.lm()
    small.context = len(whole.prompt_ids) + 3
    short = ended(whole, small)
    assert short.completion_ids == (*whole.completion_ids[:2], LM.terminator) and len(whole) > 3
    assert short.completion_pieces == (*whole.completion_pieces[:2], b"")
    small.context = len(whole.prompt_ids)
    with pytest.raises(ValueError, match="fills the model's"):
        ended(whole, small)


def test_padding_does_not_move_the_embedding():
    """Responses of several lengths in one pack, in any company."""
    model, traces = GPM.example(LM), items()
    together = model.features(traces)[0]
    for i, trace in enumerate(traces):
        np.testing.assert_allclose(model.features([trace])[0][0], together[i], atol=1e-5)
        np.testing.assert_allclose(together[i], state_at_the_end(trace)[-1], atol=1e-5)


# ---- fitting


def cycle_pairs(n=3, groups=4, seed=0):
    """Each item has random features and beats the next (n - 1) / 2 round the circle."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups * n, 48)).astype(np.float32)
    pairs = [
        (g * n + i, g * n + (i + step) % n)
        for g in range(groups)
        for i in range(n)
        for step in range(1, (n - 1) // 2 + 1)
    ]
    return x, pairs


def accuracy(model, x, pairs):
    table = model.table(x)
    return float(np.mean([table[i, j] > 0 for i, j in pairs]))


CONFIG = PairConfig(lr=0.02, epochs=120, batch_size=64, dev_share=0.0, optimizer="adam")


@pytest.mark.parametrize("n", [3, 5])
def test_cycles_are_learned_where_bradley_terry_cannot(n):
    x, pairs = cycle_pairs(n)
    bound = {3: 2 / 3, 5: 0.7}[n]
    best = max(
        np.mean([order.index(i) < order.index((i + s) % n) for i in range(n) for s in range(1, (n - 1) // 2 + 1)])
        for order in map(list, itertools.permutations(range(n)))
    )
    assert best == pytest.approx(bound)
    fitted = {
        name: GPM(head=HeadOptions(**options)).fit_features(x, pairs, config=CONFIG)
        for name, options in (
            ("flat", {"dim": 2, "normalize": False}),
            ("round", {"dim": 4}),
            ("bt", {"form": "bt", "tau": 1.0}),
        )
    }
    assert accuracy(fitted["flat"], x, pairs) == accuracy(fitted["round"], x, pairs) == 1.0
    assert accuracy(fitted["bt"], x, pairs) <= bound + 1e-9
    assert fitted["flat"].record["accuracy"] == 1.0 and fitted["flat"].record["pairs"] == len(pairs)


def test_fit_on_traces_drops_identical_pairs_and_learns_the_rest():
    traces = [*items(), *items("So?"), items()[0]]
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (0, 8)]
    config = PairConfig(lr=0.05, epochs=60, dev_share=0.0)
    model = GPM(lm=LM, head=HeadOptions(dim=4)).fit(traces, pairs, config=config)
    assert model.record["dropped_identical"] == 1 and model.record["pairs"] == 4
    assert model.record["accuracy"] == 1.0 and model.record["max_abs_score"] <= 1 + 1e-6
    assert (model.prefer(items())[[0, 2], [1, 3]] > 0.5).all()
    with pytest.raises(ValueError, match="pair 1 compares responses to two prompts"):
        GPM(lm=LM).fit(traces, [(0, 1), (0, 4)])


def test_fit_with_gate_margin_and_learned_tau():
    head = HeadOptions(dim=4, gate="scaled", learn_tau=True)
    traces, pairs = [*items(), *items("So?")], [(0, 1), (2, 3), (4, 5), (6, 7)]
    config = PairConfig(lr=0.05, epochs=40, dev_share=0.0)
    model = GPM(lm=LM, head=head).fit(traces, pairs, margins=[0.1, 0.2, 0.0, 0.3], config=config)
    assert model.module.t.item() != -2.25 and model.record["accuracy"] == 1.0
    assert not torch.equal(model.module.gate, PreferenceHead(32, head, torch.Generator().manual_seed(0)).gate)
    with pytest.raises(ValueError, match="no margin"):
        GPM(head=HeadOptions(loss="regression")).fit_features(np.eye(2), [(0, 1)], margins=[0.1])


def test_a_margin_asks_for_more():
    """Equal training of one free score goes further with a margin than without."""
    x, pairs = np.eye(2, dtype=np.float32), [(0, 1)]
    config = PairConfig(lr=0.05, epochs=50, dev_share=0.0)
    plain, more = (
        GPM(head=HeadOptions(form="bt", tau=1.0)).fit_features(x, pairs, margins=m, config=config).table(x)[0, 1]
        for m in (None, [3.0])
    )
    assert more > plain > 0


# ---- keeping


def test_save_and_load(tmp_path):
    model = GPM.example(LM, head=HeadOptions(dim=4, gate="softmax", learn_tau=True))
    model.save(tmp_path / "named")
    again = GPM(folder=str(tmp_path / "named"), lm=LM)
    assert again.head == model.head
    np.testing.assert_array_equal(again.prefer(items()), model.prefer(items()))
    assert again.identity() == model.identity() == json.loads(json.dumps(describe(model)))
    with pytest.raises(ValueError, match="other features"):
        GPM(folder=str(tmp_path / "named"), lm=exact_lm(1))
    twice = GPM.example(LM, compat="reference")
    twice.save(tmp_path / "twice")
    table = GPM(folder=str(tmp_path / "twice"), lm=LM).pairwise_table(items())
    np.testing.assert_array_equal(table, twice.pairwise_table(items()))
    model.save(tmp_path / "whole", backbone=True)
    alone = GPM(folder=str(tmp_path / "whole"))
    np.testing.assert_allclose(alone.prefer(items()), model.prefer(items()), atol=1e-4)
    with pytest.raises(ValueError, match="neither a saved GPM"):
        GPM(folder=str(tmp_path))


def test_identity_is_that_of_the_numbers():
    model = GPM.example(LM)
    other = dataclasses.replace(model, module=PreferenceHead(32, model.head, torch.Generator().manual_seed(1)))
    assert describe(model) != describe(other) and describe(model) == describe(GPM.example(LM))
    assert describe(dataclasses.replace(model, compat="reference")) != describe(model)


def test_bad_input():
    with pytest.raises(ValueError, match="no heads"):
        GPM(lm=LM).prefer(items())
    with pytest.raises(ValueError, match="give lm="):
        GPM.example().prefer(items())
    with pytest.raises(ValueError, match="paper, reference"):
        GPM(compat="release")
    with pytest.raises(ValueError, match="tokenizer"):
        GPM.example(LM).prefer([dataclasses.replace(items()[0], tokenizer="other")])
    with pytest.raises(ValueError, match="even"):
        GPM(head=HeadOptions(dim=5))
    assert GPM.example(LM).score([]) == []
