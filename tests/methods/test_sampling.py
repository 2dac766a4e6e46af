"""Plain sampling is `rollout.sample`."""

from pertoken.core.rollout import Sampling as How
from pertoken.core.rollout import sample
from pertoken.generate.sampling import Sampling
from tests import tiny


def test_draws_what_sample_draws():
    lm, how = tiny.lm(), How(max_new_tokens=5, temperature=1.3)
    ours = Sampling().generate(lm, ["the plot", "so"], n=2, sampling=how, seed=9)
    theirs = sample(lm, ["the plot", "so"], 2, how, seed=9)
    assert [[d.trace.completion_ids for d in some] for some in ours] == [[t.completion_ids for t in s] for s in theirs]
    assert all(d.logw == 0 and d.credit is None for some in ours for d in some)
