"""Critical tokens by rollout: the rule, Pass@k, and rollouts against exact probabilities of a tiny model."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.core.rollout import Sampling
from pertoken.score.critical_rollout import CriticalRollout, critical_token, pass_at_k, without_token
from tests import tiny
from tests.methods.one_pass import exact_lm

LM = exact_lm(0)
ONE = Sampling(max_new_tokens=1)
INF = float("inf")


# ---- the rule


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ([30, 12, 0, 0, 0], 2),
        ([30, 0, 3, 1, 0], 1),  # up to 3 of 64 may still be right by luck
        ([30, 0, 4, 1, 0], 4),  # a rise above 3 begins the search again
        ([30, 0, 4, 1, 0, 9, 0, 2], 6),  # twice
        ([30, 0, 4, 1, 2], 1),  # none after the rise: the last candidate
        ([0, 9, 0, 9, 5], 2),  # the last of two candidates, not the first
        ([0, 0, 0], 0),
        ([5, 2, 1], None),  # never 0
        ([], None),
        ([64, 0], 1),
    ],
)
def test_the_first_zero_that_does_not_rise_again(counts, found):
    assert critical_token(counts) == found


def test_how_far_it_may_rise_is_an_option():
    assert critical_token([2, 0, 1, 0], rise=0) == 3 and critical_token([2, 0, 1, 0], rise=1) == 1


# ---- Pass@k


def test_pass_at_k_by_hand_and_by_counting():
    assert pass_at_k(4, 1, 2) == pytest.approx(1 / 2)
    for n in (1, 3, 6):
        for c in range(n + 1):
            for k in range(1, n + 1):
                drawn = list(itertools.combinations(range(n), k))  # of samples 0..n-1, those below c are right
                share = sum(any(i < c for i in one) for one in drawn) / len(drawn)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_monotone_and_c_over_n_at_1():
    for c in (0, 1, 5, 63, 64):
        values = [pass_at_k(64, c, k) for k in range(1, 65)]
        assert values[0] == pytest.approx(c / 64, abs=1e-12)
        assert all(a <= b + 1e-15 for a, b in itertools.pairwise(values))
        assert values[-1] == (c > 0)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_counts_that_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"Pass@{k} of {c} right among {n}"):
        pass_at_k(n, c, k)


# ---- the "without" distribution


def test_without_a_token_the_others_are_renormalised():
    p = np.array([0.5, 0.3, 0.2])
    logits = torch.tensor(p, dtype=torch.float64).log() + 2.0
    assert without_token(logits, 0).exp().tolist() == pytest.approx([0.0, 0.6, 0.4], abs=1e-14)
    assert logits[0].item() == pytest.approx(math.log(0.5) + 2)  # left as they were
    with pytest.raises(ValueError, match="token 1 is the only one"):
        without_token(torch.tensor([-INF, 0.0]), 1)


# ---- rollouts


def next_probabilities(prefix):
    with torch.no_grad():
        return LM.model(torch.tensor([prefix])).logits[0, -1].softmax(-1).numpy()


def rollout(**options):
    given: dict[str, Any] = {"lm": LM, "sampling": ONE, "samples": 64} | options
    return CriticalRollout(**given)


TRACE = LM.trace_of_ids([9, 30], [40, 41, 42])


def says(ids):
    """A judge: whether the last token is one of these (each token of the tiny model's says something else)."""
    pieces = {LM.view.piece(i) for i in ids}
    return lambda text: any(text.encode().endswith(p) for p in pieces if p)


def test_scores_are_the_models_own_chances():
    """One more token, right if it ends as a third of the vocabulary does: the share is binomial about the exact one."""
    n = 1000
    judge = says(range(40, 140))
    good = np.array([judge(LM.view.piece(i).decode("utf8", "replace")) for i in range(len(LM.tokenizer))])
    (credit,) = rollout(samples=n, correct=judge).score([TRACE])
    for t in range(3):
        prefix = [*TRACE.prompt_ids, *TRACE.completion_ids[: t + 1]]
        before = judge(LM.trace_of_ids([9], TRACE.completion_ids[: t + 1]).text)
        p = next_probabilities(prefix)
        exact = p[good].sum() + (p[LM.terminator] if before else 0.0)  # a terminator leaves the text as it was
        assert abs(credit.values[t] - exact) < 5 * math.sqrt(exact * (1 - exact) / n) + 0.02
    assert credit.meta["counts"] == [round(v * n) for v in credit.values]
    assert (credit.kind, credit.method) == ("probability", "critical-rollout")


def test_the_judge_sees_prefix_and_continuation_in_one_text():
    seen: list[str] = []
    rollout(samples=3, correct=lambda text: bool(seen.append(text))).score([TRACE])
    pieces = [p.decode("utf8", "replace") for p in TRACE.completion_pieces]
    for k in range(3):
        assert all(text.startswith("".join(pieces[: k + 1])) for text in seen[3 * k : 3 * k + 3])
    assert seen[9] == TRACE.text and len(seen) == 10
    seen.clear()
    rollout(samples=1, correct=lambda text: bool(seen.append(text)), sees="all").score([TRACE])
    assert all(text.startswith(TRACE.prompt_text + pieces[0]) for text in seen)


def test_an_ended_response_is_judged_as_it_stands():
    trace = LM.trace_of_ids([9, 30], [40, LM.terminator], ended=True)
    for right in (True, False):
        (credit,) = rollout(samples=4, correct=lambda text, right=right: right).score([trace])
        assert credit.values.tolist() == [float(right)] * 2
        assert credit.meta["correct"] is right and credit.meta["critical"] == (None if right else 0)
    seen: list[str] = []
    rollout(samples=4, correct=lambda text: bool(seen.append(text))).score([trace])
    assert seen[4:] == [trace.text] * 5 and len(set(seen[:4])) > 1  # nothing is sampled after the terminator


def test_the_critical_token_is_found_among_emitted_ones():
    """Right as long as the third token was not said, so that token is critical; tool output between is passed over."""
    bad = LM.view.piece(42).decode("utf8", "replace")
    trace = LM.trace_of_ids([9, 30], [40, 41, 42, 43], emitted=(True, False, True, True))
    prefix = trace.text[: trace.text.index(bad)]
    (credit,) = rollout(correct=lambda text: not text.startswith(prefix + bad)).score([trace])
    assert credit.meta["critical"] == 2 and credit.values[1] == 0 and credit.values[0] == 1.0
    assert credit.values[2:].tolist() == [0.0, 0.0] and len(credit.meta["counts"]) == 3


def test_a_full_context_leaves_nothing_to_sample():
    lm = exact_lm(0)
    lm.context = 5
    trace = lm.trace_of_ids([9, 30], [40, 41, 42])
    seen: list[str] = []
    (credit,) = rollout(lm=lm, samples=2, correct=lambda text: bool(seen.append(text))).score([trace])
    assert seen[4:6] == [trace.text] * 2 and credit.values.shape == (3,)


def test_draws_depend_on_the_seed_and_the_ids_alone():
    judge = says(range(40, 140))
    other = LM.trace_of_ids([9, 31], [50, 51])
    (alone,) = rollout(correct=judge).score([TRACE])
    (_, again) = rollout(correct=judge).score([other, TRACE])
    (small,) = rollout(correct=judge, batch=1).score([TRACE])
    (seeded,) = rollout(correct=judge, seed=1).score([TRACE])
    assert alone.meta["counts"] == again.meta["counts"] == small.meta["counts"] != seeded.meta["counts"]


def test_without_draws_from_the_renormalised_distribution():
    """One more token follows the replacement, so a text that begins with a letter's own piece has it, or a longer token
    that begins with it, in the place of the forbidden one."""
    prefix = [*TRACE.prompt_ids, *TRACE.completion_ids[:1]]
    p = next_probabilities(prefix)
    pieces = [LM.view.piece(i) for i in range(len(p))]
    said = LM.trace_of_ids([9], TRACE.completion_ids[:1]).text
    letter = max((i for i, piece in enumerate(pieces) if piece.isalpha() and piece.isascii()), key=lambda i: p[i])
    alike = [i for i, piece in enumerate(pieces) if piece.startswith(pieces[letter])]
    for forbidden in (letter, int(p.argmin())):
        trace = LM.trace_of_ids(TRACE.prompt_ids, [TRACE.completion_ids[0], forbidden, 50])
        seen: list[str] = []
        n = 1000
        assert rollout(samples=n, correct=lambda text, seen=seen: seen.append(text) or True).without(trace, 1) == n
        share = sum(text.startswith(said + pieces[letter].decode()) for text in seen) / n
        exact = sum(p[i] for i in alike if i != forbidden) / (1 - p[forbidden])
        assert len(seen) == n and share == pytest.approx(exact, abs=0.03)  # a special token before the letter: rare


def test_without_counts_the_right_ones():
    counted: list[int] = []

    def judge(text):
        counted.append(len(counted) % 3 == 0)
        return bool(counted[-1])

    assert rollout(samples=9, correct=judge).without(TRACE, 2) == 3
    with pytest.raises(ValueError, match="position 3 does not lie in the 3 tokens"):
        rollout(correct=judge).without(TRACE, 3)


def test_bad_input():
    wrongs: list[dict[str, Any]] = [{"samples": 0}, {"rise": -1}, {"batch": 0}, {"seed": -1}, {"sees": "prompt"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CriticalRollout(**wrong)
    with pytest.raises(ValueError, match="a judge of answers"):
        CriticalRollout(lm=LM).score([TRACE])
    stranger = tiny.LM(tiny.llama(vocab=300), tiny.tokenizer(vocab=300), name="stranger")
    with pytest.raises(ValueError, match="tokenizer"):
        rollout(lm=stranger, correct=bool).score([TRACE])
