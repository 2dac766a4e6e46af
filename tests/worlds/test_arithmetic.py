"""The arithmetic world: chains by hand, planted slips, the checker, its tokenizer and its small LM."""

import hashlib

import numpy as np
import pytest
from safetensors.torch import load_file

from pertoken.core.lm import load
from pertoken.worlds import arithmetic
from pertoken.worlds.arithmetic import (
    LENGTH,
    SLOTS,
    Problem,
    careless,
    correct,
    final_answer,
    misbelief,
    misled,
    planted,
    problems,
    tokenizer,
    train_lm,
    write,
)


def test_chains_by_hand():
    assert write(Problem(47, 38)) == ("7+8=15,40+30=070,070+15=085,085.", ())
    assert write(Problem(99, 99)).text == "9+9=18,90+90=180,180+18=198,198."
    assert write(Problem(10, 20)).text == "0+0=00,10+20=030,030+00=030,030."
    forgot = write(Problem(47, 38), lambda slot, digit: 0 if slot == 4 else digit)  # the carry
    assert forgot == ("7+8=05,40+30=070,070+05=075,075.", (4,))  # goes on from what was written
    believed = write(Problem(47, 38), belief=lambda digits: 16 if digits == (7, 8) else sum(digits))
    assert believed == ("7+8=16,40+30=070,070+16=086,086.", (5,))
    both = write(Problem(45, 45), belief=lambda digits: 9 if digits == (5, 5) else sum(digits))
    assert both == ("5+5=09,40+40=080,080+09=089,089.", (4, 5))  # both digits of the sum are wrong: the first derails


def test_slots_are_the_digits():
    text, worked = write(Problem(47, 38)).text, []
    write(Problem(47, 38), lambda slot, digit: worked.append(slot) or digit)
    assert len(text) + 1 == LENGTH and tuple(worked) == SLOTS and all(text[slot].isdigit() for slot in SLOTS)
    assert 3 / LENGTH < 0.2  # chance of three guesses


@pytest.mark.parametrize("plant", [planted, misled])
def test_a_planted_slip_makes_the_answer_wrong(plant):
    rng, seen = np.random.default_rng(0), set()
    for problem in problems()["test"][:400]:
        chain = plant(problem, rng)
        if chain is None:
            assert plant is misled
            continue
        right = write(problem).text
        first = chain.slips[0]
        assert chain.text[:first] == right[:first] and chain.text[first] != right[first]
        assert len(chain.text) + 1 == LENGTH
        assert not correct(problem.prompt + chain.text) and correct(problem.prompt + right)
        assert len(chain.slips) == 1 or plant is misled
        seen.add(first)
    assert seen == set(SLOTS) if plant is planted else seen == {4, 5, 13, 14}


def test_misbeliefs_are_a_share_of_the_sums_and_neighbours():
    sums = [(u, v) for u in range(10) for v in range(10)]
    hard = [s for s in sums if misbelief(s)[0]]
    assert 0.2 < len(hard) / len(sums) < 0.4 and all(0.45 <= misbelief(s)[0] <= 0.8 for s in hard)
    assert all(abs(misbelief(s)[1] - sum(s)) == 1 and 0 <= misbelief(s)[1] <= 19 for s in sums)


def test_careless_chains():
    problem = Problem(47, 38)
    rng = np.random.default_rng(0)
    assert any(careless(problem, rng, 0.3).slips for _ in range(5))
    for chain in (careless(problem, np.random.default_rng(i)) for i in range(300)):
        assert correct(problem.prompt + chain.text) or chain.slips
    assert careless(problem, np.random.default_rng(3), 0.2) == careless(problem, np.random.default_rng(3), 0.2)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+8=15,40+30=070,070+15=085,085.", "85"),
        (",000.", "0"),
        ("7+8=15,40+30=070,070+15=085,085", ""),  # not finished
        ("085.", ""),
        ("7+8,.", ""),
        ("7+8,0+5.", ""),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_the_checker():
    assert correct("47+38:,085.") and correct("47+38:whatever,85.")  # only the answer counts
    for wrong in ("47+38:,086.", "47+38:", "47+38:085", "4+38:,042.", "85", ""):
        assert not correct(wrong)


def test_problems_are_split_for_good():
    split = problems()
    every = [p for side in split.values() for p in side]
    assert len(every) == len(set(every)) == 8100
    assert len(split["dev"]) >= 500 and len(split["test"]) >= 1000 and len(split["train"]) >= 4000
    assert hashlib.sha256(repr(split["test"][:50]).encode()).hexdigest()[:8] == "73a67b22"


def test_one_token_a_character():
    tok = tokenizer()
    text = "47+38:" + write(Problem(47, 38)).text
    ids = tok.encode(text)
    assert ids == [4 + arithmetic.CHARACTERS.index(c) for c in text] and tok.decode(ids) == text
    assert tok.encode("4x") == [8, 3]


def test_the_lm_is_a_function_of_its_seed_and_cached(tmp_path):
    first = train_lm(seed=1, steps=3, folder=tmp_path / "a", progress=False)
    again = train_lm(seed=1, steps=3, folder=tmp_path / "b", progress=False)
    other = train_lm(seed=2, steps=3, folder=tmp_path / "a", progress=False)
    assert train_lm(seed=1, steps=3, folder=tmp_path / "a", progress=False) == first != other
    weights = [load_file(f / "model.safetensors") for f in (first, again, other)]
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[0])
    assert not all((weights[0][k] == weights[2][k]).all() for k in weights[0])
    trace = load(first, device="cpu").trace("47+38:", write(Problem(47, 38)).text)
    assert (trace.prompt_text, len(trace), trace.prompt_ids[0], trace.completion_ids[-1]) == ("47+38:", LENGTH, 1, 2)
    assert trace.text == "7+8=15,40+30=070,070+15=085,085."
