# pyright: reportOptionalMemberAccess=false
"""Best of n: the best of the same draws, ties to the first."""

import pytest

from pertoken.core.rollout import Sampling, sample
from pertoken.generate.best_of_n import BestOfN
from tests import tiny


def test_the_best_of_the_same_draws():
    lm, how = tiny.lm(), Sampling(max_new_tokens=6)
    reward = lambda text: float(len(text))
    (some,) = BestOfN(candidates=4, scorer=reward).generate(lm, ["the plot"], n=2, sampling=how, seed=1)
    (drawn,) = sample(lm, ["the plot"], 8, how, seed=1)
    for k, one in enumerate(some):
        part = drawn[4 * k : 4 * k + 4]
        lengths = [len(t.text) for t in part]
        assert one.trace.completion_ids == part[lengths.index(max(lengths))].completion_ids
        assert one.meta == {"rewards": [float(x) for x in lengths], "chosen": lengths.index(max(lengths))}
        assert one.credit.reduce() == max(lengths)


def test_ties_and_one_candidate():
    lm, how = tiny.lm(), Sampling(max_new_tokens=3)
    ((one,),) = BestOfN(candidates=3, scorer=lambda text: 1.0).generate(lm, ["so"], sampling=how)
    assert one.meta["chosen"] == 0
    ((alone,),) = BestOfN(candidates=1, scorer=lambda text: 1.0).generate(lm, ["so"], sampling=how)
    assert alone.trace.completion_ids == one.trace.completion_ids


def test_bad_options():
    with pytest.raises(ValueError, match="candidates=0"):
        BestOfN(candidates=0)
    with pytest.raises(ValueError, match="no scorer"):
        BestOfN().generate(tiny.lm(), ["so"])
