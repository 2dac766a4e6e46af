"""Token rewards of an autoregressive reward model: log-probs of a plain forward, which sum to the trained reward."""

import numpy as np
import pytest
import torch

from pertoken.score.arm_reward import ARMReward
from pertoken.train.arm import ARM
from tests import tiny
from tests.methods.one_pass import exact_lm, pair_stats

LM = exact_lm(2)


def plain(trace):
    with torch.no_grad():
        logits = LM.causal(torch.tensor([[*trace.prompt_ids, *trace.completion_ids]])).logits[0]
    logp = logits[len(trace.prompt_ids) - 1 : -1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(trace.completion_ids)[:, None])[:, 0].numpy()


def test_against_a_plain_forward():
    traces = [t for g in tiny.groups(LM, n=3) for t in g] + [LM.trace("the film", "great")]
    for trace, credit in zip(traces, ARMReward(lm=LM).score(traces), strict=True):
        np.testing.assert_allclose(credit.values, plain(trace), atol=1e-10)
        assert (credit.kind, credit.level, credit.method) == ("reward", "token", "arm-reward")
        assert credit.reduce() == pytest.approx(plain(trace).sum())  # the sequence reward is the sum of token rewards
    assert traces[-1].ended and credit.values[-1] != 0  # the terminator is rewarded, too


def test_its_sum_is_what_training_logs():
    groups = tiny.groups(LM, n=3)
    stats, batch = pair_stats(ARM(), {"policy": LM}, groups)
    logged = 0.05 * stats["policy"].sums().detach()[batch.pairs_B2].flatten()
    sums = [c.reduce() for c in ARMReward(lm=LM, scale=0.05).score([t for g in groups for t in g])]
    assert sums == pytest.approx(logged.tolist(), abs=1e-10)


def test_what_was_not_emitted_has_no_reward():
    trace = LM.trace_of_ids([5, 6], [7, 8, 9], emitted=(True, False, True))
    (credit,) = ARMReward(lm=LM).score([trace])
    assert credit.values[1] == 0 and credit.values[0] < 0 > credit.values[2]


def test_bad_input():
    with pytest.raises(ValueError, match=r"ARMReward\(lm=\.\.\.\)"):
        ARMReward().score([])
    with pytest.raises(ValueError, match="tokenizer"):
        ARMReward(lm=tiny.LM(tiny.llama(vocab=300), tiny.tokenizer(vocab=300))).score([LM.trace("a", "b")])
