# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false
"""ICN: the loop against a by-hand one, its identities, the probe's table, and votes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from pertoken.core.cache import ArrayCache
from pertoken.core.rollout import Sampling
from pertoken.generate import icn as module
from pertoken.generate.icn import (
    ICN,
    WAYS,
    Layout,
    Probed,
    Vote,
    cluster_keys,
    correlation_table,
    keys,
    majority,
    mean_precision,
    normalised,
    permutation_p,
    probe,
    self_consistency,
)
from pertoken.generate.icn.keys import probed_rows
from tests import tiny

SHORT = Sampling(max_new_tokens=5, temperature=0.0)
LIST = Layout(head=":\n", closed=False)


def plain_ids(lm, text):
    """As a tokenizer without a chat template reads a text: its BOS first."""
    return (lm.tokenizer.bos_token_id, *lm.tokenizer.encode(text, add_special_tokens=False))


def logits(lm, ids):
    with torch.no_grad():
        return lm.causal(torch.tensor([ids])).logits[0, -1]


def by_hand(lm, instruction, rounds, m, *, reg=True, navigate=True, layout=LIST, most=5):
    """The loop as the specification words it, on whole forwards: first tokens and answers."""

    def write(items):
        listed = "".join(f'{i}. "{text}"\n' for i, text in enumerate(items, 1))
        return plain_ids(lm, f'{instruction}{layout.head}{listed}{len(items) + 1}. "')

    def text_of(ids):
        return b"".join(lm.view.piece(i) for i in ids).decode("utf-8", "replace")

    def valid(token):
        piece = lm.view.piece(token)
        return piece and piece.decode("utf-8", "ignore").encode() == piece

    explored, probed, found = [], [], []
    for _ in range(rounds):
        here = write(explored if navigate else [])
        ranking = logits(lm, here).argsort(descending=True, stable=True).tolist()
        chosen = [t for t in ranking if t not in probed and valid(t)][:m]
        probed += chosen
        for token in chosen:
            ids = [token]
            start = write([]) if reg else here
            while len(ids) < most and '"' not in text_of(ids[-1:]) and ids[-1] not in lm.stop_ids:
                ids.append(int(logits(lm, (*start, *ids)).argmax()))
            answer = text_of(ids).partition('"')[0].strip()
            found.append((token, tuple(ids), answer))
            if answer and normalised(answer) not in {normalised(e) for e in explored}:
                explored.append(answer)
    return found


@pytest.mark.parametrize("reg", [True, False])
@pytest.mark.parametrize("navigate", [True, False])
def test_the_loop_by_hand(reg, navigate):
    lm = tiny.lm(3, chat=False)
    expected = by_hand(lm, "films", 3, 2, reg=reg, navigate=navigate)
    options = ICN(per_round=2, reg=reg, navigate=navigate, layout=LIST)
    (drawn,) = options.generate(lm, ["films"], n=6, sampling=SHORT)
    assert [(d.trace.completion_ids[0], d.trace.completion_ids, d.meta["answer"]) for d in drawn] == expected


def test_the_first_round_is_the_plain_one():
    lm = tiny.lm(chat=False)
    a, b = (
        ICN(per_round=4, navigate=x, layout=LIST).generate(lm, ["films"], n=4, sampling=SHORT)[0] for x in (True, False)
    )
    assert [d.trace.completion_ids for d in a] == [d.trace.completion_ids for d in b]


def test_one_at_a_time_without_a_list_walks_down_the_ranking():
    lm = tiny.lm(chat=False)
    (drawn,) = ICN(per_round=1, navigate=False, layout=LIST).generate(lm, ["films"], n=12, sampling=SHORT)
    ranking = logits(lm, plain_ids(lm, 'films:\n1. "')).argsort(descending=True, stable=True).tolist()
    firsts = [d.trace.completion_ids[0] for d in drawn]
    skipped = [t for t in ranking[: ranking.index(firsts[-1])] if t not in firsts]
    assert firsts == [t for t in ranking if t in set(firsts)]
    for token in skipped:  # special, or a fragment of a character
        assert not lm.view.piece(token) or lm.view.piece(token).decode("utf-8", "replace") == "\ufffd"
    assert [d.meta["rank"] for d in drawn] == [ranking.index(t) + 1 for t in firsts]


def test_first_tokens_never_repeat_and_all_say_something():
    lm = tiny.lm(chat=False)
    (drawn,) = ICN(per_round=7, layout=LIST).generate(
        lm, ["films"], n=30, sampling=Sampling(max_new_tokens=2, temperature=0)
    )
    firsts = [d.trace.completion_ids[0] for d in drawn]
    assert len(set(firsts)) == 30 and all(d.meta["first"] for d in drawn)
    assert [d.meta["round"] for d in drawn] == [k // 7 for k in range(30)]


def test_rounds_are_counted_where_the_ranking_gives_fewer_than_were_asked_for(monkeypatch):
    lm = tiny.lm(chat=False)
    rounds = iter([[(60, 1), (61, 2)], [(62, 1)], [(63, 1), (64, 2)]])
    monkeypatch.setattr(ICN, "first_tokens", lambda *_: next(rounds))
    (drawn,) = ICN(per_round=3, scan=2, layout=LIST).generate(lm, ["films"], n=5, sampling=SHORT)
    assert [d.meta["round"] for d in drawn] == [0, 0, 1, 2, 2]


def test_choosing_is_invariant_to_a_constant():
    lm, rng = tiny.lm(), np.random.default_rng(0)
    x = rng.normal(size=len(lm.tokenizer)).astype(np.float64)
    for options in (ICN(), ICN(penalty=2.0), ICN(scan=20)):
        assert options.first_tokens(lm, x, [7, 9], 5) == options.first_tokens(lm, x + 11.0, [7, 9], 5)
    assert [t for t, _ in ICN(scan=6).first_tokens(lm, x, [], 50)] == [
        t for t in np.argsort(-x)[:6] if lm.view.piece(int(t)).decode("utf-8", "ignore")
    ]


def test_keys_make_the_logits():
    lm = tiny.lm(dtype=torch.float32)
    ids = torch.tensor([lm.encode_prompt("the plot")])
    with torch.no_grad():
        hidden = lm.causal.base_model(ids).last_hidden_state[0, -1].numpy()
        said = lm.causal(ids).logits[0, -1].numpy()
    np.testing.assert_allclose(keys(lm) @ hidden, said, atol=1e-4)


def test_clusters_are_of_the_matrix_alone(tmp_path):
    lm, cache = tiny.lm(), ArrayCache(tmp_path)
    rows = keys(lm)
    found = cluster_keys(lm, 8, cache=cache)
    assert found.shape == (len(rows),) and set(found) <= set(range(8))
    np.testing.assert_array_equal(found, cluster_keys(tiny.lm(), 8, cache=ArrayCache(tmp_path / "other")))
    centre = np.stack([rows[found == c].mean(0) for c in sorted(set(found))])
    mine = [sorted(set(found)).index(c) for c in found]
    spread = ((rows - centre[mine]) ** 2).sum()
    rng = np.random.default_rng(0)
    for _ in range(20):  # better than any random partition of the same sizes
        other = rng.permutation(mine)
        middle = np.stack([rows[other == c].mean(0) for c in range(len(centre))])
        assert spread < ((rows - middle[other]) ** 2).sum()
    with pytest.raises(ValueError, match="clusters=999"):
        cluster_keys(lm, 999)


def test_our_variants(monkeypatch):
    lm = tiny.lm()
    v = len(lm.tokenizer)
    x = -np.arange(v, dtype=float)
    valid = [t for t in range(v) if lm.view.piece(t).decode("utf-8", "ignore").encode() == lm.view.piece(t) != b""]
    groups = np.arange(v) // 4
    monkeypatch.setattr(module, "cluster_keys", lambda lm, n: groups)
    expected, used = [], Counter({int(groups[valid[0]]): 1})
    for t in valid[1:]:
        if used[int(groups[t])] < 1:
            expected.append(t)
            used[int(groups[t])] += 1
    assert [t for t, _ in ICN(per_cluster=1).first_tokens(lm, x, [valid[0]], 5)] == expected[:5]
    rows = keys(lm)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    taken = [valid[3]]
    for _ in range(4):
        near = (unit @ unit[taken].T).max(1)
        taken.append(max((t for t in valid if t not in taken), key=lambda t: x[t] - 30 * near[t]))
    assert [t for t, _ in ICN(penalty=30.0).first_tokens(lm, x, taken[:1], 4)] == taken[1:]


def test_answers():
    assert Layout().answer('Utah", a') == "Utah" and Layout().answer("Utah and") == "" and Layout().answer('" x') == ""
    assert WAYS.answer(" add\n### Way") == "add" and WAYS.answer(" add") == "add"
    assert normalised("  New   York") == normalised("new york")
    text = Layout(given=("a", "b")).text(["c"])
    assert text == '\n\nAnswer:\n1. "a"\n2. "b"\n3. "c"\n4. "'


def test_only_new_answers_are_listed(monkeypatch):
    lm = tiny.lm(chat=False)
    texts = iter(['Utah"', '"', 'UTAH "', 'Ohio"', "Maine"])
    lists = []

    def completed(lm, start, firsts, *rest):
        return [lm.trace("x", next(texts), ended=False) for _ in firsts]

    real = ICN.context
    monkeypatch.setattr(module, "completed", completed)
    monkeypatch.setattr(
        ICN, "context", lambda self, lm, p, e, room: lists.append(list(e)) or real(self, lm, p, e, room)
    )
    (drawn,) = ICN(per_round=1, layout=Layout(given=("Iowa",))).generate(lm, ["states"], n=5, sampling=SHORT)
    assert lists[1:] == [[], ["Utah"], ["Utah"], ["Utah"], ["Utah", "Ohio"]]
    assert [d.meta["listed"] for d in drawn] == [True, False, False, True, False]
    assert [d.meta["answer"] for d in drawn] == ["Utah", "", "UTAH", "Ohio", ""]  # Maine was not closed


def test_long_lists_are_cut():
    lm = tiny.lm(chat=False)
    short = ICN(longest=3).context(lm, "films", ["abcdef"], 5)
    assert short == ICN().context(lm, "films", ["abc"], 5)
    every = [f"film number {k}" for k in range(60)]
    cut = ICN().context(lm, "films", every, 20)
    assert len(cut) + 20 <= lm.context < len(plain_ids(lm, Layout().text(every)))
    left = next(k for k in range(60) if plain_ids(lm, "films" + Layout().text(every[k:])) == cut)
    assert len(plain_ids(lm, "films" + Layout().text(every[left - 1 :]))) + 20 > lm.context  # no more than must be
    with pytest.raises(ValueError, match="cut it"):
        ICN().context(lm, "films " * 300, [], 20)


def test_completions_are_shared():
    lm, memo = tiny.lm(chat=False), {}
    arms = [ICN(per_round=3, navigate=n, layout=LIST) for n in (True, False)]
    alone = [arm.generate(lm, ["films"], n=9, sampling=SHORT)[0] for arm in arms]
    shared = [arm.generate(lm, ["films"], n=9, sampling=SHORT, memo=memo)[0] for arm in arms]
    for a, b in zip(alone, shared, strict=True):
        assert [d.trace.completion_ids for d in a] == [d.trace.completion_ids for d in b]
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x.trace.policy_logps, y.trace.policy_logps, atol=1e-6)
    firsts = [{d.trace.completion_ids[0] for d in row} for row in shared]
    assert len(memo) == len(firsts[0] | firsts[1]) < 18


def test_recorded_log_probs_and_streams():
    lm, seen = tiny.lm(chat=False), []
    warm = Sampling(max_new_tokens=5, temperature=0.8)
    drawn = ICN(per_round=2, layout=LIST).generate(
        lm, ["films", "a plot"], n=3, sampling=warm, seed=4, stream=seen.append
    )
    for i, row in enumerate(drawn):
        for k, d in enumerate(row):
            t = d.trace
            expected = [
                logits(lm, (*t.prompt_ids, *t.completion_ids[:j])).log_softmax(-1)[token].item()
                for j, token in enumerate(t.completion_ids)
            ]
            np.testing.assert_allclose(t.policy_logps, expected, atol=1e-5)
            assert t.sampled_logps[0] == 0 and t.sampling["place"] == [i, k]
            mine = [s for s in seen if (s.prompt, s.sample) == (i, k)]
            assert tuple(s.token for s in mine) == t.completion_ids
            assert [s.ended for s in mine] == [False] * (len(mine) - 1) + [True]
    again = ICN(per_round=2, layout=LIST).generate(lm, ["films", "a plot"], n=3, sampling=warm, seed=4)
    assert [[d.trace.completion_ids for d in r] for r in again] == [[d.trace.completion_ids for d in r] for r in drawn]


def test_a_chat_model_has_its_list_in_the_reply():
    lm = tiny.lm()
    ids = ICN(chat=True).context(lm, "films", [], 5)
    assert ids == (*lm.encode_prompt("films"), *lm.tokenizer.encode('\n\nAnswer:\n1. "', add_special_tokens=False))
    assert ICN().context(lm, [{"role": "user", "content": "films"}], [], 5) == ids
    assert ICN().context(lm, lm.encode_prompt("films"), [], 5) == ids


# ---- the probe


def table(*rows, first=2):
    """Rows of (cluster, right), from rank 1."""
    main = {c for c, _ in rows[:first]}
    return [Probed(i + 1, i, "x", c, c in main, "a", bool(r)) for i, (c, r) in enumerate(rows)]


def test_the_table_by_hand():
    a = table((0, 1), (1, 1), (0, 0), (2, 1), (1, 1), (3, 0))
    b = table((5, 0), (5, 0), (5, 0), (0, 1))
    found = correlation_table([a, b], 2)
    assert found["in"] == {"tokens": 3, "right": 1, "precision": 1 / 3, "mean_rank": 11 / 3, "share": 0.5}
    assert found["out"] == {"tokens": 3, "right": 2, "precision": 2 / 3, "mean_rank": 14 / 3, "share": 0.5}
    assert found["difference"] == pytest.approx(1 / 3)
    assert math.isnan(correlation_table([table((0, 1), (1, 1))], 2)["in"]["precision"])


def test_the_permutation_test_against_all_permutations():
    a = table((0, 1), (1, 1), (0, 0), (2, 1), (1, 0), (3, 1), (0, 1))
    b = table((5, 0), (5, 0), (5, 0), (0, 1), (1, 0))
    # right tokens in main clusters: 1 of a's 3 (of 5 tokens, 3 right), 0 of b's 1 (of 3 tokens, 1 right)
    ways = {k: math.comb(3, k) * math.comb(2, 3 - k) / math.comb(5, 3) for k in (1, 2, 3)}
    exact = ways[1] * 2 / 3  # no permutation has fewer
    p = permutation_p([a, b], 2, draws=20_000)
    assert abs(p - exact) < 5 * (exact * (1 - exact) / 20_000) ** 0.5  # seed fixed; false alarm 6e-7
    assert math.isnan(permutation_p([table((0, 1), (1, 1), (0, 1))], 2))


def test_main_clusters_are_those_of_the_first_tokens():
    ranked = [(0, "a", "Utah"), (1, "b", ""), (2, "c", "Rome"), (3, "d", "Ohio")]
    rows = probed_rows(ranked, np.array([7, 8, 7, 9]), 2, {"Utah", "Ohio", ""}.__contains__)
    assert [(r.rank, r.cluster, r.main, r.right) for r in rows] == [
        (1, 7, True, True),
        (2, 8, True, False),  # an empty answer is wrong
        (3, 7, True, False),
        (4, 9, False, True),
    ]


def test_mean_precision_by_hand():
    assert mean_precision([True, False, True], 10) == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert mean_precision([False, True, True], 2) == pytest.approx((0 + 1 / 2) / 2)
    assert mean_precision([], 5) == 0.0


def test_the_probe_completes_the_ranking():
    lm = tiny.lm(chat=False)
    groups = np.arange(len(lm.tokenizer)) % 9
    rows = probe(lm, "films", lambda a: "e" in a, groups, LIST, tokens=12, first=3, sampling=SHORT, batch=5)
    expected = by_hand(lm, "films", 1, 12)
    assert [(r.token, r.answer) for r in rows] == [(token, answer) for token, _, answer in expected]
    main = {int(groups[token]) for token, _, _ in expected[:3]}
    assert [r.main for r in rows] == [int(groups[r.token]) in main for r in rows]
    assert [r.right for r in rows] == ["e" in answer for _, _, answer in expected]


# ---- votes


def test_votes():
    assert majority(["3", "4", "4", None]) == "4" and majority(["3", "4", None, "4", "3"]) == "3"
    assert majority([None, None]) is None and majority([]) is None
    vote = Vote(("a", "b", "c", "d"), ("1200", "1200.0", None, "7"), "1200")
    assert vote.accuracy("1,200") == (1.0, 0.5) and vote.accuracy("7.00") == (0.0, 0.25)
    assert Vote((), ("100",), "100").accuracy("1") == (0.0, 0.0)


def test_self_consistency_runs_on_a_model():
    lm = tiny.lm(chat=False)
    options = ICN(layout=WAYS, per_round=1, scan=100)
    found = self_consistency(lm, "how many films", options, sampling=SHORT, pattern="[a-z]", suffix="\nso ")
    (drawn,) = options.generate(lm, ["how many films"], n=4, sampling=SHORT)
    assert found.paths == tuple(d.meta["answer"] for d in drawn) and len(found.answers) == 4
    for d, answer in zip(drawn, found.answers, strict=True):
        kept = d.trace.completion_ids
        if b"#" in lm.view.piece(kept[-1]) or d.trace.ended:
            kept = kept[:-1]
        ids = [*d.trace.prompt_ids, *kept, *lm.tokenizer.encode("\nso ", add_special_tokens=False)]
        said = []
        while len(said) < 8 and not (said and (said[-1] in lm.stop_ids or b"\n" in lm.view.piece(said[-1]))):
            said.append(int(logits(lm, (*ids, *said)).argmax()))
        text = b"".join(lm.view.piece(t) for t in said).decode("utf-8", "replace")
        assert answer == next((c for c in text if c in "abcdefghijklmnopqrstuvwxyz"), None)
    assert found.vote == majority(found.answers)


def test_refusals():
    lm = tiny.lm(chat=False)
    with pytest.raises(ValueError, match="per_round"):
        ICN(per_round=0)
    for penalty in (-1.0, math.nan, math.inf):  # without end it would order nothing
        with pytest.raises(ValueError, match="penalty >= 0"):
            ICN(penalty=penalty)
    with pytest.raises(ValueError, match="first tokens can be probed"):
        ICN(scan=2, per_round=1, navigate=False, layout=LIST).generate(lm, ["the plot"], n=3, sampling=SHORT)
