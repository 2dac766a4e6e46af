"""The planted world: letters are tokens, the start is all but uniform, credit is exact."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportArgumentType=false
# pyright: reportCallIssue=false

import numpy as np
import pytest

from pertoken.core.rollout import sample
from pertoken.worlds.planted import LETTERS, Planted, of_length, policy, prompts


def test_letters_are_tokens_and_hits_are_where_bigrams_end():
    lm = policy()
    trace = lm.trace("c", "abkktsjab")
    assert len(trace) == 10 and trace.text == "abkktsjab"
    assert Planted().hits(trace).nonzero()[0].tolist() == [1, 4, 6, 8]
    end, spread = (Planted(level=level, weight=0.5).score([trace])[0] for level in ("sequence", "token"))
    assert end.reduce() == spread.reduce() == 2.0 and end.values[-1] == 2.0 and end.level == "sequence"
    assert spread.values.nonzero()[0].tolist() == [1, 4, 6, 8]
    assert not Planted().score([lm.trace("a", "b")])[0].values.any()  # the prompt's letter completes nothing


def test_the_start_is_all_but_uniform_and_lengths_are_exact():
    lm = policy(1)
    asked = [lm.encode_prompt(e.prompt) for e in prompts(8)]
    drawn = [t for some in sample(lm, asked, 8, of_length(20), seed=0) for t in some]
    assert {len(t) for t in drawn} == {20}
    logps = np.concatenate([t.policy_logps for t in drawn])
    assert abs(logps.mean() + np.log(len(LETTERS) + 3)) < 0.2


def test_what_was_not_emitted_earns_nothing():
    lm = policy()
    trace = lm.trace("c", "abab")
    tool = lm.trace_of_ids(trace.prompt_ids, trace.completion_ids, emitted=(True, False, True, True, True), ended=True)
    assert Planted(weight=1.0).score([tool])[0].reduce() == 1.0


@pytest.mark.parametrize("bad", [{"bigrams": ()}, {"bigrams": ("abc",)}, {"bigrams": ("a9",)}, {"level": "span"}])
def test_bad_options(bad):
    with pytest.raises(ValueError):
        Planted(**bad)


def test_an_endless_policy_knows_letters_alone(tmp_path):
    """What it says has full length, no token is cut off from the distribution, and it survives saving."""
    from pertoken.core.lm import load

    lm = policy(2, endless=True)
    lm.save(tmp_path)
    for model in (lm, load(tmp_path, device="cpu")):
        drawn = [t for some in sample(model, [model.encode_prompt("c")], 8, of_length(20), seed=0) for t in some]
        assert {len(t) for t in drawn} == {20} and drawn[0].prompt_ids == (2,)
        assert all(np.allclose(t.sampled_logps, t.policy_logps, atol=1e-5) for t in drawn)
        assert set("".join(t.text for t in drawn)) <= set(LETTERS)
    assert Planted(weight=1.0).score([lm.trace("c", "abkt")])[0].reduce() == 2.0
