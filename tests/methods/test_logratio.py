"""The implicit token reward of two models: against the full logits, its identities, and bad input."""

from typing import Any

import numpy as np
import pytest
import torch

from pertoken.core.protocols import Scorer
from pertoken.core.trace import Trace
from pertoken.score import _logps
from pertoken.score.logratio import LogRatio
from pertoken.train._preference import implicit_rewards
from pertoken.train.dpo import DPO
from tests import tiny
from tests.methods.one_pass import exact_lm, pair_stats

POLICY, REFERENCE = exact_lm(0), exact_lm(1)
GROUPS = tiny.groups(POLICY, n=3)
TRACES = [trace for group in GROUPS for trace in group]


def score(traces=TRACES, **options):
    given: dict[str, Any] = {"policy": POLICY, "reference": REFERENCE} | options
    return LogRatio(**given).score(traces)


def flat_logps(lm, trace):
    """From the logits of one plain forward."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])
    with torch.no_grad():
        logp = torch.log_softmax(lm.model(ids).logits[0, len(trace.prompt_ids) - 1 : -1], -1)
    return logp.gather(-1, torch.tensor(trace.completion_ids)[:, None])[:, 0].numpy()


def test_a_trace_beyond_the_context_is_named():
    long = POLICY.trace_of_ids([5] * 200, [6] * 100, meta={"row": 7})
    with pytest.raises(ValueError, match="prompt and response of row 7 take 300 tokens, more than the 256"):
        score([TRACES[0], long])


def test_against_a_plain_forward():
    for trace, credit in zip(TRACES, score(beta=0.3)):
        assert credit.trace is trace
        expected = 0.3 * (flat_logps(POLICY, trace) - flat_logps(REFERENCE, trace))
        np.testing.assert_allclose(credit.values, expected, atol=1e-10)
        assert (credit.kind, credit.level, credit.method, credit.over) == (
            "logratio",
            "token",
            "logratio",
            "completion",
        )
        assert credit.meta["beta"] == 0.3
    assert isinstance(LogRatio(), Scorer)


def test_the_sum_is_dpos_reward():
    models = {"policy": POLICY, "reference": REFERENCE}
    stats, batch = pair_stats(DPO(), models, GROUPS)
    rewards = implicit_rewards(stats, 0.1).detach()
    sums = [c.reduce("sum") for c in score(beta=0.1)]
    got = rewards[batch.pairs_B2].flatten().tolist()
    assert sums == pytest.approx(got, abs=1e-10)


def test_identities():
    here, there = score(beta=1.0), score(beta=1.0, policy=REFERENCE, reference=POLICY)
    for a, b, same in zip(here, there, score(reference=POLICY)):
        assert np.array_equal(a.values, -b.values) and not same.values.any()
    for a, b in zip(here, score(beta=0.5)):
        np.testing.assert_allclose(0.5 * a.values, b.values, atol=1e-15)


def test_one_by_one_and_in_any_order():
    whole = score()
    for trace, credit in zip(TRACES, whole):
        np.testing.assert_allclose(score([trace])[0].values, credit.values, atol=1e-10)
    for credit, back in zip(whole, reversed(score(TRACES[::-1]))):
        np.testing.assert_allclose(back.values, credit.values, atol=1e-10)


def test_what_was_not_emitted_and_what_is_empty():
    emitted = POLICY.trace_of_ids([5, 6], [7, 8, 9], emitted=(True, False, True))
    empty = POLICY.trace_of_ids([5, 6], [])
    first, second, third = score([empty, emitted, empty])
    assert first.values.shape == third.values.shape == (0,)
    assert second.values[1] == 0 and second.values[0] != 0 != second.values[2]
    assert score([]) == [] and score([empty, empty])[1].values.shape == (0,)


def test_the_terminator_has_a_value():
    trace = POLICY.trace("how was the film", "great")
    assert trace.ended and score([trace])[0].values[-1] != 0


def test_missing_models():
    cases: list[tuple[dict[str, Any], str]] = [({}, "policy and reference"), ({"policy": POLICY}, "reference")]
    for given, missing in cases:
        with pytest.raises(ValueError, match=rf"LogRatio\({missing}=\.\.\.\)"):
            LogRatio(**given).score(TRACES)
    with pytest.raises(ValueError, match="beta"):
        LogRatio(beta=0.0)


def test_other_tokenizers():
    stranger = tiny.LM(tiny.llama(vocab=300), tiny.tokenizer(vocab=300), name="stranger")
    with pytest.raises(ValueError, match="different tokenizers"):
        score(reference=stranger)
    foreign = Trace(**{**vars(TRACES[0]), "tokenizer": "another", "meta": {"row": 12}})
    with pytest.raises(ValueError, match=r"row 12 is of tokenizer another, .*Credit\.to"):
        score([TRACES[1], foreign])


def test_a_log_prob_that_is_not_finite(monkeypatch):
    real = _logps.completions_stats

    def masked(lm, traces):
        out = real(lm, traces)
        out[1]["logp"][0] = -np.inf
        return out

    monkeypatch.setattr(_logps, "completions_stats", masked)
    with pytest.raises(ValueError, match="token 0 of item 1 under policy is -inf"):
        score()
