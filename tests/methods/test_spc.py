# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
"""SPC: the arithmetic against enumerations in float64, the guide against brute force on a tiny model."""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling, sample
from pertoken.generate.spc import SPC, Local, MaskedLM, Verifier, VerifierOptions, train_verifier
from pertoken.generate.spc.estimate import chances, expected_embeddings, first_order, reweigh
from tests import tiny

PROMPTS = ["the plot", "a film and a friend"]


class Phi:
    """A verifier by formula: log-odds from the mean embedding (linear), or from the last one."""

    def __init__(self, lm, how="mean", seed=0, size=1.0):
        self.fingerprint, self.how = lm.view.fingerprint, how
        self.embedding = lm.causal.get_input_embeddings().weight.detach().double()
        self.w = size * torch.from_numpy(np.random.default_rng(seed).normal(size=self.embedding.shape[1]))

    def __call__(self, embeds, mask):
        if self.how == "constant":
            return torch.full((len(embeds),), self.w[0].item(), dtype=embeds.dtype)
        if self.how == "last":
            return embeds[torch.arange(len(mask)), mask.sum(1) - 1] @ self.w
        return torch.where(mask[..., None], embeds, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1) @ self.w


def full(lm, ids):
    with torch.no_grad():
        return lm.causal(torch.tensor([ids])).logits[0].log_softmax(-1)


def by_table(seed, t=4, v=5, d=3):
    """A sample, a factorised distribution and embeddings of a tiny world: ids (T,), p (T, V), table (V, D)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, v, t), rng.dirichlet(np.ones(v), t), rng.normal(size=(v, d))


# ---- the arithmetic


@pytest.mark.parametrize("t", [1, 4])
def test_linear_verifiers_give_the_enumerated_expectation(t):
    sample_T, p_TV, table = by_table(1, t)
    weight_TD = np.random.default_rng(2).normal(size=(t, 3)) / 10

    def phi(ids):
        return 0.5 + sum(table[i] @ w for i, w in zip(ids, weight_TD, strict=True))

    wanted = sum(
        math.prod(p[i] for p, i in zip(p_TV, ids, strict=True)) * phi(ids)
        for ids in itertools.product(range(5), repeat=t)
    )
    e, p = torch.from_numpy(table), torch.from_numpy(p_TV)
    bar = expected_embeddings(p, e)[None]

    def log_odds(x, mask):
        return torch.logit(0.5 + (x * torch.from_numpy(weight_TD)).sum((1, 2)))

    got = first_order(
        log_odds, e[sample_T][None], bar, torch.ones(1, t, dtype=torch.bool), space="probability", suppress=False
    )
    assert got.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_at_the_sample_itself_it_is_phi(space):
    sample_T, p_TV, table = by_table(3)
    e, mask = torch.from_numpy(table), torch.ones(1, 4, dtype=torch.bool)
    points = torch.nn.functional.one_hot(torch.from_numpy(sample_T), 5).double()
    w = np.array([1.0, -2.0, 0.5])

    def log_odds(x, _):
        return torch.tanh(x.mean(1)) @ torch.from_numpy(w)

    got = first_order(
        log_odds, e[sample_T][None], expected_embeddings(points, e)[None], mask, space=space, suppress=False
    )
    assert got.item() == pytest.approx(1 / (1 + math.exp(-np.tanh(table[sample_T].mean(0)) @ w)), abs=1e-12)


def test_the_slope_by_hand_in_both_spaces():
    """One position, log-odds z = 2x at x = 0.5, expected 1.5: z = 1, dz = 2."""
    x, bar, mask = torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 1.5), torch.ones(1, 1, dtype=torch.bool)

    def log_odds(x, _):
        return 2 * x[:, 0, 0]

    def at(space, suppress):
        return first_order(log_odds, x, bar, mask, space=space, suppress=suppress).item()

    phi = 1 / (1 + math.exp(-1))
    assert at("probability", False) == pytest.approx(phi + phi * (1 - phi) * 2, abs=1e-6)  # 1.124: beyond 1
    assert at("logit", False) == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-6)
    for space in ("probability", "logit"):
        assert at(space, False) + at(space, True) == pytest.approx(1, abs=1e-6)


def test_a_saturated_sigmoid_has_a_slope_in_logit_space_only():
    x, mask = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)

    def at(space):
        return first_order(lambda x, _: 50 + 60 * x[:, 0, 0], x, x - 1, mask, space=space, suppress=False).item()

    assert at("probability") == pytest.approx(1, abs=1e-12)
    assert at("logit") == pytest.approx(1 / (1 + math.exp(10)), abs=1e-9)


def test_averages_come_before_the_clip():
    raw = torch.tensor([[[1.6, 0.2], [-0.4, 0.3], [1.2, 1.4], [0.5, 0.7]]])
    chance, clipped = chances(raw, 0.01)
    np.testing.assert_allclose(chance[0], [0.9, 0.01, 1.0, 0.6], atol=1e-6)
    assert clipped.tolist() == [[False, True, True, False]]


def test_reweighting_by_hand_and_the_fall_back():
    logp, chance = torch.log(torch.tensor([[0.4, 0.2, 0.1]] * 3)), torch.tensor([[0.1, 0.5, 1], [0.01] * 3, [0.0] * 3])
    logq, idle = reweigh(logp, chance, 0.01)
    np.testing.assert_allclose(logq.exp()[0], np.array([0.04, 0.1, 0.1]) / 0.24, atol=1e-6)
    np.testing.assert_allclose(logq.exp()[1:], [[4 / 7, 2 / 7, 1 / 7]] * 2, atol=1e-6)
    assert idle.tolist() == [False, True, True]
    np.testing.assert_allclose(logq.exp().sum(-1), 1, atol=1e-6)


# ---- the guide


@pytest.mark.parametrize("local", [Local(), Local(kind="pseudo", alternatives=2)])
def test_a_constant_verifier_is_top_k_sampling(local):
    lm, how = tiny.lm(), Sampling(max_new_tokens=5, temperature=0.8, min_new_tokens=2)
    steered = SPC(verifier=Phi(lm, "constant"), candidates=7, lookahead=2, samples=1, local=local)
    ours = steered.generate(lm, PROMPTS, n=2, sampling=how, seed=4)
    top = Sampling(max_new_tokens=5, temperature=0.8, min_new_tokens=2, top_k=7)
    for a, b in zip(itertools.chain(*ours), itertools.chain(*sample(lm, PROMPTS, 2, top, seed=4)), strict=True):
        assert a.trace.completion_ids == b.completion_ids and a.trace.meta["prompt"] == b.meta["prompt"]
        np.testing.assert_allclose(a.trace.sampled_logps, b.sampled_logps, atol=1e-5)
        np.testing.assert_allclose(a.trace.policy_logps, b.policy_logps, atol=1e-5)
        np.testing.assert_allclose(a.credit.values, 0, atol=1e-6)


def test_without_look_ahead_it_is_bayes():
    lm = tiny.lm()
    phi = Phi(lm, "last")
    words = [i for i in range(320) if i not in lm.view.special_ids]
    ids = lm.encode_prompt("the plot")
    p = full(lm, ids)[-1].exp().numpy()
    chance = 1 / (1 + np.exp(-(phi.embedding @ phi.w).numpy()))
    last_word = [i for i in ids if i in words][-1]
    chance = np.array([chance[v] if v in words else chance[last_word] for v in range(320)])  # an end adds no word
    guide = SPC(verifier=phi, candidates=320, lookahead=0, floor=0.0).guide(lm)
    got = guide.step(guide.start(["the plot"]), None)[0].exp().numpy()
    np.testing.assert_allclose(got, p * chance / (p * chance).sum(), atol=1e-12)


def test_q_stands_on_k_candidates_and_sums_to_one():
    lm = tiny.lm()
    guide = SPC(verifier=Phi(lm), candidates=6, lookahead=3).guide(lm)
    logq = guide.step(guide.start(PROMPTS), None)
    np.testing.assert_allclose(logq.exp().sum(-1), 1, atol=1e-12)
    for row, prompt in zip(logq, PROMPTS, strict=True):
        best = full(lm, lm.encode_prompt(prompt))[-1].topk(6).indices
        assert set(best.tolist()) == set(torch.nonzero(row > -math.inf)[:, 0].tolist())


def kinds(lm):
    return {"left": Local(), "pseudo": Local(kind="pseudo"), "mlm": Local(masked=bert(lm))}


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("kind", ["left", "pseudo", "mlm"])
def test_complementary_verifiers_sum_to_one_before_clipping(kind, space):
    lm, raw = tiny.lm(), []
    for suppress in (False, True):
        how = SPC(
            verifier=Phi(lm), candidates=3, lookahead=2, local=kinds(lm)[kind], space=space, suppress=suppress
        ).guide(lm)
        state = how.start(PROMPTS)
        how.base.step(state.base, None)
        raw.append(how.estimate(state, torch.arange(2), torch.tensor([[7, 8, 9], [10, 11, 12]])))
    assert raw[0].shape == (2, 3, 2)
    np.testing.assert_allclose(raw[0] + raw[1], 1, atol=1e-12)


def looked(lm, local, far=2, samples=1, over="all", verifier=None, ids=((40, 41),)):
    """The raw estimates of candidates after PROMPTS[0], and the sentences and e_bar that the verifier was given."""
    phi, seen = verifier or Phi(lm), []

    class Spy(Phi):
        def __call__(self, embeds, mask):
            seen.append((embeds.detach().clone(), mask.clone()))
            return phi(embeds, mask)

    guide = SPC(
        verifier=Spy(lm), candidates=2, lookahead=far, samples=samples, local=local, over=over, space="logit"
    ).guide(lm)
    state = guide.start(PROMPTS[:1])
    guide.base.step(state.base, None)
    raw = guide.estimate(state, torch.tensor([0]), torch.tensor(ids))
    embeds, mask = seen[0]
    rows = [
        [int((phi.embedding - e).abs().sum(1).argmin()) for e, m in zip(es, ms, strict=True) if m]
        for es, ms in zip(embeds, mask, strict=True)
    ]
    return raw.flatten(), rows, state.rows[0].told


def linear(phi, fixed, bars):
    """sigmoid(w . mean of embeddings) where the last positions are distributions (V,)."""
    e = phi.embedding
    total = e[fixed].sum(0) + sum(torch.as_tensor(p) @ e for p in bars)
    return 1 / (1 + math.exp(-(total @ phi.w / (len(fixed) + len(bars))).item()))


def renormalised(lm, logp):
    p = logp.exp().numpy().copy()
    p[list(lm.view.special_ids)] = 0
    return p / p.sum()


def test_left_is_the_distribution_each_token_was_drawn_from():
    lm = tiny.lm()
    phi, ids = Phi(lm), lm.encode_prompt(PROMPTS[0])
    words = [i for i in ids if i not in lm.view.special_ids]
    raw, rows, told = looked(lm, Local())
    for got, row, v in zip(raw, rows, (40, 41), strict=True):
        assert row[: len(words) + 1] == [*words, v] and len(row) == len(words) + 3
        logp = full(lm, [*ids, *row[len(words) :]])
        bars = [renormalised(lm, logp[len(ids)]), renormalised(lm, logp[len(ids) + 1])]
        assert got.item() == pytest.approx(linear(phi, row[: len(words) + 1], bars), abs=1e-9)
    assert told.lm_tokens == 4  # two candidates, two tokens each


def test_pseudo_scores_every_alternative_in_place():
    lm = tiny.lm()
    phi, ids, m = Phi(lm), lm.encode_prompt(PROMPTS[0]), 5
    words = [i for i in ids if i not in lm.view.special_ids]
    raw, rows, _ = looked(lm, Local(kind="pseudo", alternatives=m), far=3)
    for got, row in zip(raw, rows, strict=True):
        s, n = [*ids, *row[len(words) :]], len(ids) + 1
        bars = []
        for i in range(n, n + 3):
            p = np.zeros(320)
            left = renormalised(lm, full(lm, s[:i])[-1])
            for v in np.argsort(-left)[:m]:
                changed = [*s[:i], int(v), *s[i + 1 :]]
                logp = full(lm, changed)
                p[v] = math.exp(sum(logp[j - 1, changed[j]].item() for j in range(1, len(changed))))
            bars.append(p / p.sum())
        assert got.item() == pytest.approx(linear(phi, row[: len(words) + 1], bars), abs=1e-9)


def test_variants_of_the_lm_agree_where_there_is_one_position():
    lm = tiny.lm()
    every = looked(lm, Local(kind="pseudo", alternatives=320), far=1)[0]
    np.testing.assert_allclose(looked(lm, Local(), far=1)[0], every, atol=1e-12)


def test_an_end_ends_the_sentence():
    """A candidate that is special has no look-ahead, and what it says is phi of the words before it."""
    lm = tiny.lm()
    phi = Phi(lm)
    words = [i for i in lm.encode_prompt(PROMPTS[0]) if i not in lm.view.special_ids]
    raw, rows, _ = looked(lm, Local(), ids=((lm.terminator, 41),))
    assert rows[0] == words and len(rows[1]) == len(words) + 3
    assert raw[0].item() == pytest.approx(linear(phi, words, []), abs=1e-12)


def test_the_answer_alone_is_read():
    lm = tiny.lm()
    _, rows, _ = looked(lm, Local(), over="completion")
    assert [row[0] for row in rows] == [40, 41] and all(len(row) == 3 for row in rows)


# ---- the masked LM


def copied(tokenizer):
    """A tokenizer of its own (those of `tiny` are shared by all tests)."""
    return copy.deepcopy(tokenizer)


def bert(lm, tokenizer=None, seed=0):
    """A random masked LM over the LM's tokens and a mask token."""
    if tokenizer is None:
        tokenizer = copied(lm.tokenizer)
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,
        hidden_dropout_prob=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedLM(BertForMaskedLM(config).double(), tokenizer)


def conditional(masked, row, at, lm):
    """p(y_at | the others) of a whole forward, words only."""
    ids = [masked.tokenizer.mask_token_id if i == at else t for i, t in enumerate(row)]
    with torch.no_grad():
        return renormalised(lm, masked.model(input_ids=torch.tensor([ids])).logits[0, at, :320].log_softmax(-1))


def test_the_masked_lm_gives_the_local_distribution():
    lm = tiny.lm()
    masked, phi = bert(lm), Phi(lm)
    raw, rows, _ = looked(lm, Local(masked=masked, sweeps=0))
    for got, row in zip(raw, rows, strict=True):
        bars = [conditional(masked, row, i, lm) for i in (len(row) - 2, len(row) - 1)]
        assert got.item() == pytest.approx(linear(phi, row[:-2], bars), abs=1e-9)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_gibbs_sweep_redraws_each_position_given_the_others(parallel):
    from pertoken.generate.spc.masked import gibbs

    lm = tiny.lm()
    masked, words = bert(lm), torch.ones(320, dtype=torch.bool)
    words[list(lm.view.special_ids)] = False
    rows, u = [[20, 30, 40, 50], [25, 35, 45, 0]], np.array([[0.9, 0.2], [0.6, 0.0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    free = torch.tensor([[False, False, True, True], [False, False, True, False]])
    got = gibbs(masked, torch.tensor(rows), mask, free, torch.from_numpy(u), words, parallel)

    def drawn(row, at, x):
        return int(np.searchsorted(conditional(masked, row, at, lm).cumsum(), x, side="right"))

    first = drawn(rows[0], 2, 0.9)
    second = drawn(rows[0] if parallel else [20, 30, first, 50], 3, 0.2)
    assert got.tolist() == [[20, 30, first, second], [25, 35, drawn(rows[1][:3], 2, 0.6), 0]]


def test_sweeps_agree_on_one_position_and_other_kinds_follow_the_refined_sample():
    lm = tiny.lm()
    masked, phi, ids = bert(lm), Phi(lm), lm.encode_prompt(PROMPTS[0])
    one = [looked(lm, Local(masked=masked, parallel=p), far=1)[0] for p in (False, True)]
    assert torch.equal(one[0], one[1])
    raw, rows, told = looked(lm, Local(kind="left", masked=masked))
    plain = looked(lm, Local())[1]
    words = len(rows[0]) - 3
    assert rows != plain and [r[: words + 1] for r in rows] == [r[: words + 1] for r in plain]
    for got, row in zip(raw, rows, strict=True):
        logp = full(lm, [*ids, *row[words:]])
        bars = [renormalised(lm, logp[len(ids)]), renormalised(lm, logp[len(ids) + 1])]
        assert got.item() == pytest.approx(linear(phi, row[: words + 1], bars), abs=1e-9)
    assert told.lm_tokens == 8


def test_another_tokenizer_is_refused_or_cut_anew():
    lm = tiny.lm()
    core = copied(tiny.wordpiece())
    core.add_special_tokens({"mask_token": "[MASK]"})
    masked, phi = bert(lm, core), Phi(lm)
    with pytest.raises(ValueError, match="retokenize=True"):
        SPC(verifier=phi, local=Local(masked=masked)).guide(lm)
    how = SPC(verifier=phi, candidates=3, lookahead=3, samples=1, local=Local(masked=masked, retokenize=True))
    guide = how.guide(lm)
    table, words = guide.other
    film = core.convert_tokens_to_ids("film")
    wanted = phi.embedding[lm.tokenizer.encode(" film", add_special_tokens=False)].mean(0)
    torch.testing.assert_close(table[film], wanted)
    assert not words[core.mask_token_id] and words[film]
    (drawn,), _ = how.generate(lm, PROMPTS, sampling=Sampling(max_new_tokens=3))
    assert all(0 < p <= 1 for p in drawn.meta["probability"])


def test_the_masked_lm_may_be_a_folder(tmp_path):
    """Loaded where the LM is; one that is elsewhere answers where it was asked."""
    lm = tiny.lm()
    masked = bert(lm)
    masked.model.save_pretrained(tmp_path)
    masked.tokenizer.save_pretrained(tmp_path)
    how = SPC(verifier=Phi(lm), local=Local(masked=tmp_path)).guide(lm)
    assert how.masked.model.device == lm.device and how.masked.shares(lm)
    ids, mask, at = torch.tensor([[20, 30, 40]]), torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    np.testing.assert_allclose(how.masked.logps(ids, mask, at), masked.logps(ids, mask, at), atol=1e-6)
    with pytest.raises(ValueError, match="no masked LM at"):
        MaskedLM.load(tmp_path / "nothing")


# ---- generation


def test_draws_do_not_depend_on_the_batch():
    lm, how = tiny.lm(), Sampling(max_new_tokens=4)
    for local in (Local(), Local(masked=bert(lm))):
        steered = SPC(verifier=Phi(lm, size=3), candidates=4, lookahead=2, local=local)
        both = steered.generate(lm, PROMPTS, n=2, sampling=how, seed=9)
        again = steered.generate(lm, [PROMPTS[0], "a dull score with a wonderful friend"], n=2, sampling=how, seed=9)
        for a, b in zip(both[0], again[0], strict=True):
            assert a.trace.completion_ids == b.trace.completion_ids
            np.testing.assert_allclose(a.meta["probability"], b.meta["probability"], atol=1e-9)
        assert both[0][0].meta["probability"] != both[0][1].meta["probability"]


def test_it_steers_and_says_what_it_did():
    lm, how = tiny.lm(), Sampling(max_new_tokens=6, min_new_tokens=6)
    phi = Phi(lm, size=20)
    steered = [
        SPC(verifier=phi, candidates=20, lookahead=3, samples=1, suppress=s, over="completion", space="logit")
        for s in (False, True)
    ]
    up, down = (s.generate(lm, PROMPTS, n=3, sampling=how) for s in steered)

    def odds(d):
        return (phi.embedding[list(d.trace.completion_ids)].mean(0) @ phi.w).item()

    assert min(odds(d) for row in up for d in row) > max(odds(d) for row in down for d in row)
    d = up[0][0]
    assert d.credit.kind == "logratio" and d.meta["estimates"] == 120 and len(d.meta["probability"]) == 6
    assert d.meta["lm_tokens"] == 6 + 20 * (3 + 3 + 3 + 2 + 1 + 0)
    gain = d.trace.sampled_logps - d.trace.policy_logps
    for t, ids in enumerate(np.cumsum([0] + [1] * 5)):
        logp = full(lm, d.trace.prompt_ids + d.trace.completion_ids[:ids])[-1]
        logp[list(lm.stop_ids)] = -math.inf
        among = logp.log_softmax(-1).topk(20).values.logsumexp(0).item()
        again = full(lm, d.trace.prompt_ids + d.trace.completion_ids[:ids])[-1].exp()
        freed = math.log(1 - again[list(lm.stop_ids)].sum().item())
        assert d.credit.values[t] == pytest.approx(gain[t] + among + freed, abs=1e-5)


def test_nothing_above_the_floor_warns_and_leaves_p():
    lm, how = tiny.lm(), Sampling(max_new_tokens=3)
    hopeless = Phi(lm, "constant")
    hopeless.w = torch.full((1,), -40.0)
    with pytest.warns(RuntimeWarning, match="at the floor"):
        ((drawn,),) = SPC(verifier=hopeless, candidates=5, lookahead=1).generate(lm, PROMPTS[:1], sampling=how)
    ((plain,),) = sample(lm, PROMPTS[:1], 1, Sampling(max_new_tokens=3, top_k=5))
    assert drawn.trace.completion_ids == plain.completion_ids
    assert drawn.meta["at_floor"] == len(plain.completion_ids)
    assert drawn.meta["clipped"] == drawn.meta["estimates"] == 5 * len(plain.completion_ids)


def test_no_warning_where_it_steers():
    lm = tiny.lm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SPC(verifier=Phi(lm), candidates=3, lookahead=1).generate(lm, PROMPTS, sampling=Sampling(max_new_tokens=2))


def test_bad_input():
    lm = tiny.lm()
    with pytest.raises(ValueError, match="T must not lie before t"):
        SPC(lookahead=-1)
    with pytest.raises(ValueError, match="lies before t=8"):
        SPC(verifier=Phi(lm), length=5).generate(lm, PROMPTS, sampling=Sampling(max_new_tokens=8))
    with pytest.raises(ValueError, match="lies before t=2"):
        guide = SPC(verifier=Phi(lm), length=1, candidates=2).guide(lm)
        state = guide.start(PROMPTS[:1])
        guide.step(state, None)
        guide.step(state, torch.tensor([40]))
    with pytest.raises(ValueError, match="floor < 1"):
        SPC(floor=1.0)
    with pytest.raises(ValueError, match="space='odds'"):
        SPC(space="odds")
    with pytest.raises(ValueError, match="needs a verifier"):
        SPC().guide(lm)
    with pytest.raises(ValueError, match="needs a masked LM"):
        Local(kind="mlm")
    with pytest.raises(ValueError, match="is not one of"):
        Local(kind="right")
    with pytest.raises(ValueError, match="leave it out"):
        Local(retokenize=True)
    with pytest.raises(ValueError, match="alternatives=0"):
        Local(alternatives=0)
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLM(bert(lm).model, lm.tokenizer)
    with pytest.raises(ValueError, match="another tokenizer"):
        SPC(verifier=Phi(lm_of_words())).guide(lm)


def lm_of_words():
    """The tiny model under another tokenizer."""
    words = copied(tiny.wordpiece())
    words.eos_token = "[SEP]"
    return LM(tiny.llama(), words, template="plain")


# ---- the trained verifier

GOOD = ["The film was great", "I loved the score", "a wonderful friend", "great acting", "loved it", "wonderful plot"]
BAD = ["The film was dull", "a lifeless plot", "dull acting", "a lifeless score", "dull", "lifeless friend"]


def trained(lm, **options):
    how = VerifierOptions(epochs=25, batch=4, lr=3e-2, **options)
    return train_verifier(lm, GOOD + BAD, [1] * 6 + [0] * 6, how)


@pytest.mark.parametrize("options", [{}, {"width": 4}, {"pool": "attention"}, {"prefixes": True}])
def test_a_verifier_learns_its_texts_and_is_saved(tmp_path, options):
    lm = tiny.lm()
    made = trained(lm, **options)
    rows = [lm.view.pieces_of_text(text)[0] for text in GOOD + BAD]
    odds = made.log_odds(rows)
    assert ((odds > 0) == np.array([True] * 6 + [False] * 6)).mean() > (0.7 if options.get("prefixes") else 0.99)
    again = Verifier.load(made.save(tmp_path / "v.safetensors"), tiny.lm())
    np.testing.assert_array_equal(again.log_odds(rows), odds)
    assert not made.training and not again.training and not any(p.requires_grad for p in made.parameters())
    one = np.concatenate([made.log_odds([row]) for row in rows])  # padding is skipped
    np.testing.assert_allclose(one, odds, atol=1e-9)
    steered = SPC(verifier=str(tmp_path / "v.safetensors"), candidates=3, lookahead=1)
    assert steered.generate(lm, PROMPTS[:1], sampling=Sampling(max_new_tokens=2))


def test_the_mean_head_by_hand():
    lm = tiny.lm()
    made = trained(lm)
    row = list(lm.view.pieces_of_text("I loved it")[0])
    e = lm.causal.get_input_embeddings().weight.detach().numpy()
    w, b = made.out.weight.detach().numpy()[0], made.out.bias.item()
    assert made.log_odds([row])[0] == pytest.approx(e[row].mean(0) @ w / e.std(ddof=1) + b, abs=1e-9)


def test_sharpness_multiplies_the_log_odds(tmp_path):
    lm = tiny.lm()
    rows = [lm.view.pieces_of_text(text)[0] for text in GOOD + BAD]
    plain, sharp = trained(lm), trained(lm, sharpness=3.0)
    np.testing.assert_allclose(sharp.log_odds(rows), 3 * plain.log_odds(rows), rtol=1e-9)
    assert Verifier.load(sharp.save(tmp_path / "v.safetensors"), lm).sharpness == 3


def test_dropout_is_off_while_it_steers():
    lm = tiny.lm()
    made = trained(lm)
    how, options = Sampling(max_new_tokens=3), {"candidates": 3, "lookahead": 1}
    ((calm,),) = SPC(verifier=made, **options).generate(lm, PROMPTS[:1], sampling=how)
    made.train()
    ((same,),) = SPC(verifier=made, **options).generate(lm, PROMPTS[:1], sampling=how)
    assert made.training and calm.meta["probability"] == same.meta["probability"]


def test_training_leaves_the_global_random_state_alone():
    lm = tiny.lm()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, two = trained(lm), trained(lm)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.out.weight, two.out.weight)


def test_verifiers_of_other_models_are_refused(tmp_path):
    lm = tiny.lm()
    path = trained(lm).save(tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="other embeddings"):
        Verifier.load(path, tiny.lm(seed=1))
    with pytest.raises(ValueError, match="another tokenizer"):
        Verifier.load(path, lm_of_words())
    with pytest.raises(ValueError, match="no verifier at"):
        Verifier.load(tmp_path / "none.safetensors", lm)


def test_bad_texts():
    lm = tiny.lm()
    with pytest.raises(ValueError, match="0s and 1s"):
        train_verifier(lm, ["a", "b"], [1, 1])
    with pytest.raises(ValueError, match="give one each"):
        train_verifier(lm, ["a"], [0, 1])
    with pytest.raises(ValueError, match="text 1 has no token"):
        train_verifier(lm, ["a", ""], [0, 1])
    with pytest.raises(ValueError, match="pool='max'"):
        VerifierOptions(pool="max")
    for bad in ({"lr": 0}, {"lr": math.inf}, {"sharpness": math.inf}, {"weight_decay": math.nan}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="lr and sharpness > 0"):
            VerifierOptions(**bad)
