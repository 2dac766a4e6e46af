"""The grammar worlds: known credit by hand, the language's own probabilities, its tokenizer, its small LM and pairs."""

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pertoken.worlds._tiny_lm import cached_folder
from pertoken.worlds.grammar import GRAMMARS, Grammar, prompts, to_text, train_lm

REVIEWS, LEXICON64, SLOTS45 = (GRAMMARS[name] for name in ("reviews", "lexicon64", "slots45"))
TOY = Grammar(  # eight texts a prompt at most: small enough to enumerate
    name="toy",
    slots={"X": "X"},
    rules={"X": "cat | dog", "PROMPT": "the =X :", "COMPLETION": "the =X SAYS<X> | 3 no",
           "SAYS<cat>": "+2 purrs MORE | -1 bites | 0.5", "SAYS<dog>": "barks", "MORE": "1 | again | again again"},
    lexicon={"purrs": 1.0, "bites": -1.0},
    model={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    steps=6,
    batch=4,
    learning_rate=1e-2,
)  # fmt: skip


def drawn(grammar, n, seed=0, polarity=None):
    return grammar.sample(n, np.random.default_rng(seed), polarity)


@pytest.mark.parametrize(
    ("text", "credit"),
    [
        ("the plot was good .", [0, 0, 0, 1, 0]),
        ("the plot was very good .", [0, 0, 0, 0.5, 1, 0]),
        ("the plot was slightly bad .", [0, 0, 0, 0.5, -1, 0]),  # softens a fault
        ("the plot was not good .", [0, 0, 0, -0.375, -0.375, 0]),
        ("the plot was not very good .", [0, 0, 0, -0.375, 0.25, -0.375, 0]),  # -0.5: milder than "not good"
        ("the plot was hardly terrible .", [0, 0, 0, 0.5, 0.5, 0]),  # -2 * -0.5 = +1
        ("neither good nor dull", [-0.375, -0.375, 0.375, 0.375]),
        ("never not good", [0.1875, 0.1875, 0.1875]),  # 0.5625 in three parts
        ("very very superb", [0.5 * 3, 0.5 * 2, 2]),  # innermost first: 2 -> 3 -> 4.5
        ("i did not really enjoy the very good cake", [0, 0, -0.375, 0.25, -0.375, 0, 0.5, 1, 0]),
        ("it did not have much charm", [0, 0, -0.375, 0, 0.25, -0.375]),  # the negator waits, "much" is next to charm
        ("not a bad film", [0.375, 0, 0.375, 0]),
        ("not here . good", [0, 0, 0, 1]),  # the scope ends with the clause
        ("very the good", [0, 0, 1]),  # a degree word that touches nothing lapses
        ("not very <unk> <eos>", [0, 0, 0, 0]),
        ("", []),
    ],
)
def test_credit_by_hand(text, credit):
    np.testing.assert_allclose(REVIEWS.credit(text), credit, rtol=0, atol=1e-15)
    assert REVIEWS.credit(text).dtype == np.float64
    assert REVIEWS.score(text.split()) == pytest.approx(sum(credit), abs=1e-15)


def test_order_of_scores_and_the_docstring_example():
    texts = ["very bad", "bad", "not good", "not very good", "fine", "good", "very good", "extremely good", "superb ,"]
    scores = [REVIEWS.score(text) for text in texts]
    assert scores[:7] == sorted(set(scores[:7])) and scores[-1] == scores[-2] == 2
    example = "the plot was not very good . the acting was really superb ."
    assert REVIEWS.credit(example).tolist() == [0, 0, 0, -0.375, 0.25, -0.375, 0, 0, 0, 0, 1, 2, 0]


def test_credit_is_not_a_bag_of_words_in_reviews_and_is_one_in_lexicon64():
    assert REVIEWS.score("not good , bad") != REVIEWS.score("good , not bad")
    for review in drawn(LEXICON64, 50):
        by_word = [LEXICON64.lexicon.get(word, 0.0) for word in review.completion]
        assert LEXICON64.credit(review.completion).tolist() == by_word


@pytest.fixture(params=[REVIEWS, LEXICON64, SLOTS45], ids=lambda grammar: grammar.name)
def grammar(request):
    return request.param


def test_samples_use_the_vocabulary_and_have_positive_probability(grammar):
    known = {to_text(p.split()) for side in prompts(grammar).values() for p in side}
    for review in drawn(grammar, 100):
        assert {*review.prompt, *review.completion} <= {*grammar.vocabulary}
        assert to_text(review.prompt) in known
        assert -200 < grammar.logprob(review.prompt, review.completion) < 0
        assert grammar.logprob(review.prompt, [*review.completion, "the"]) == -math.inf
    assert {*grammar.lexicon, *grammar.degrees, *grammar.negators, *grammar.closers} <= {*grammar.vocabulary}


def test_every_review_is_a_function_of_the_generator(grammar):
    assert drawn(grammar, 20, 3) == drawn(grammar, 20, 3) != drawn(grammar, 20, 4)


def test_polarity_tilts_the_mean_score_and_both_signs_occur_without_it(grammar):
    # 400 reviews of standard deviation < 2.5: the standard error of a mean is < 0.13 and the true means are 0 and
    # about +-1.4 (reviews), +-2.7 (lexicon64), +-1.6 (slots45), so a bound is 5 errors away: false alarm < 1e-6 for a
    # random seed.
    scores = {
        p: [grammar.score(r.completion) for r in drawn(grammar, 400, 7, p)] for p in (None, "positive", "negative")
    }
    assert np.mean(scores["positive"]) > 0.7 and np.mean(scores["negative"]) < -0.7
    assert abs(np.mean(scores[None])) < 0.7
    assert np.mean(np.array(scores[None]) > 0) > 0.25 and np.mean(np.array(scores[None]) < 0) > 0.25
    with pytest.raises(ValueError, match="'positive' or 'negative'"):
        grammar.sample(1, np.random.default_rng(0), "good")


def test_prompts_are_split_for_good(grammar):
    split = prompts(grammar)
    assert len(split["train"]) >= 300 and len(split["test"]) >= 50
    assert not {*split["train"]} & {*split["test"]} and split == prompts(grammar)


def test_text_and_ids_round_trip(grammar):
    tokenizer = grammar.tokenizer()
    every = to_text(grammar.vocabulary)
    assert tokenizer.encode(every) == list(range(4, 4 + len(grammar.vocabulary)))
    assert tokenizer.decode(tokenizer.encode(every)).encode() == every.encode()
    for review in drawn(grammar, 50):
        for words in review:
            ids = tokenizer.encode(to_text(words))
            assert len(ids) == len(words) and tokenizer.decode(ids) == to_text(words)
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3] and tokenizer.chat_template is None


def test_lexicon64_is_the_language_of_its_specification():
    assert len(LEXICON64.vocabulary) == 64
    assert {len(review.completion) + 1 for review in drawn(LEXICON64, 100)} == {24}  # with <eos>


def test_slots45_is_the_language_of_its_specification():
    assert len(SLOTS45.vocabulary) == 45
    right = []
    for polarity, sign in (("positive", 1), ("negative", -1)):
        for review in drawn(SLOTS45, 500, 5, polarity):
            credit = SLOTS45.credit(review.completion)
            assert np.count_nonzero(credit) == 2  # one slot a sentence, and nothing else shows the label
            right += (credit[credit != 0] == sign).tolist()
            for i in np.flatnonzero(credit):
                assert review.completion[i - 1] in ("very", "the")
    assert abs(np.mean(right) - 0.9) < 0.035  # 5 standard errors: false alarm < 1e-6 for a random seed


def test_a_completion_of_a_prompt(grammar):
    (prompt, _), rng = drawn(grammar, 1, 6)[0], np.random.default_rng(1)
    said = {grammar.complete(prompt, rng, polarity) for polarity in (None, "positive", "negative") for _ in range(9)}
    assert len(said) > 9 and all(grammar.logprob(prompt, words) > -200 for words in said)
    with pytest.raises(ValueError, match="is no prompt"):
        grammar.complete("hello", rng)


@pytest.mark.parametrize("polarity", [None, "positive", "negative"])
def test_probabilities_of_a_small_language_by_hand(polarity):
    up = {None: 1.0, "positive": math.e, "negative": 1 / math.e}[polarity]
    purrs, bites, nothing = np.array([2 * up, 1 / up, 0.5]) / (2 * up + 1 / up + 0.5)
    expected = {"no": 0.75, "the cat": nothing / 4, "the cat bites": bites / 4}
    expected |= {f"the cat purrs{' again' * k}": purrs / 12 for k in range(3)}
    for text, probability in expected.items():
        assert math.exp(TOY.logprob("the cat :", text, polarity)) == pytest.approx(probability, rel=1e-12)
    assert sum(expected.values()) == pytest.approx(1, rel=1e-12)
    assert TOY.logprob("the dog :", "the dog barks") == pytest.approx(math.log(0.25))
    counts = [r.completion == ("no",) for r in drawn(TOY, 2000, 1, polarity)]
    assert abs(np.mean(counts) - 0.75) < 0.05  # 5 standard errors: false alarm < 1e-6 for a random seed


def test_goal_words_are_read_but_say_nothing_of_sentiment():
    goals = GRAMMARS["goals"]
    split = prompts(goals)
    bare = [p for p in (*split["train"], *split["test"]) if not p.startswith(" aim")]
    assert len(bare) == 400 and len(split["train"]) + len(split["test"]) == 11 * 400
    reviews = drawn(goals, 4000)
    aimed = [r for r in reviews if r.prompt[0] == "aim"]
    assert abs(len(aimed) - 2000) < 160
    said = [w for r in aimed for w in r.completion if w.isdigit()]
    assert len(said) > 1000 and not [w for r in reviews if r.prompt[0] != "aim" for w in r.completion if w.isdigit()]
    assert all(w == r.prompt[1] for r in aimed for w in r.completion if w.isdigit())
    scores = {n: [goals.score(r.completion) for r in aimed if (int(r.prompt[1]) > 5) == n] for n in (False, True)}
    assert abs(np.mean(scores[True]) - np.mean(scores[False])) < 5 * 1.7 * math.sqrt(2 / 1000)


def test_bad_grammars_and_prompts_are_refused():
    with pytest.raises(ValueError, match="no rule for \\['Z'\\]"):
        dataclasses.replace(TOY, rules={**TOY.rules, "MORE": "Z"}).table()
    with pytest.raises(ValueError, match="two prompts read the same"):
        prompts(dataclasses.replace(TOY, rules={**TOY.rules, "PROMPT": "hello"}))
    with pytest.raises(ValueError, match="is no prompt"):
        TOY.logprob("the cow :", "no")


def test_training_is_deterministic_cached_and_leaves_the_global_generators_alone(tmp_path):
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state(legacy=False))
    first, second = (train_lm(TOY, seed=1, folder=tmp_path / side, progress=False) for side in "ab")
    assert torch.equal(before, torch.get_rng_state()) and numpy_before == str(np.random.get_state(legacy=False))
    assert first.name == second.name and first.name.startswith("grammar-toy-")
    weights = [load_file(path / "model.safetensors") for path in (first, second)]
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])

    written = (first / "model.safetensors").stat().st_mtime_ns
    assert train_lm(TOY, seed=1, folder=tmp_path / "a", progress=False) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    others = [dict(seed=2), dict(seed=1, polarity="positive")]
    names = {train_lm(TOY, folder=tmp_path / "a", progress=False, **other).name for other in others}
    names.add(train_lm(dataclasses.replace(TOY, steps=5), seed=1, folder=tmp_path / "a", progress=False).name)
    assert len({first.name, *names}) == 4 and {p.name for p in (tmp_path / "a").iterdir()} == {first.name, *names}


def test_concurrent_callers_share_one_whole_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    together = threading.Barrier(3)  # all three have found nothing and build

    def build(path):
        (path / "part").write_text("1")
        together.wait(timeout=10)
        (path / "rest").write_text("2")

    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: cached_folder("thing", {"seed": 0}, build), range(3)))
    assert len(found) == 1 and [*tmp_path.iterdir()] == [*found]  # and no scratch folder is left
    assert {p.name for p in found.pop().iterdir()} == {"part", "rest"}

    def broken(path):
        (path / "part").write_text("1")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder("other", 0, broken)
    assert len([*tmp_path.iterdir()]) == 1


def test_the_folder_loads_as_any_model_and_training_learns(tmp_path):
    folder = train_lm(
        dataclasses.replace(TOY, steps=150, batch=16, learning_rate=3e-2), folder=tmp_path, progress=False
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = to_text("the cat purrs again .".split()[:4])
    assert tokenizer.encode(text) == TOY.tokenizer().encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)
    gaps = []
    for prompt, completion in drawn(TOY, 200, 9):
        ids = torch.tensor([[1, *tokenizer.encode(to_text(prompt)), *tokenizer.encode(to_text(completion)), 2]])
        logp_T = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) :, 0]
        gaps.append(TOY.logprob(prompt, completion) - logp_T.sum().item())
    # Nats a completion above the language's own entropy: about 7 for a uniform model, 0 for a perfect one.
    assert -0.1 < np.mean(gaps) < 0.5
