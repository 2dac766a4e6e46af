"""What every token-level scorer of the catalog keeps. A new row is tested without writing a test."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from pertoken.catalog import method, methods
from pertoken.core.credit import EXTENSIVE, INTENSIVE, Credit
from pertoken.core.protocols import Scorer
from tests.contracts.harness import META, make_scorer, scoring_model

TEXTS = (
    "The plot was great, the acting was not.",
    "A dull, lifeless film!",
    "good",
    "I loved every minute; my naïve friend 😀 did not.",
)
ROWS = [
    row
    for row in methods()
    if row.room == "score" and row.item == "trace" and importlib.util.find_spec(row.path.partition(":")[0])
]
every_row = pytest.mark.parametrize(
    "row", [r for r in ROWS if hasattr(method(r.slug), "score")], ids=lambda row: row.slug
)


def traces():
    """Two prompts, several completions of each: one empty, one cut off, one with tokens the policy did not emit."""
    lm = scoring_model("policy")
    out = [lm.trace(prompt, text, row=row) for row, text in enumerate(TEXTS) for prompt in ("How was the film?", "So?")]
    prompt_ids = out[0].prompt_ids
    out.insert(2, lm.trace_of_ids(prompt_ids, []))
    out.append(lm.trace("How was the film?", "It was wonderful", ended=False))
    tool = lm.trace("How was the film?", "good, said the horrible tool, and bad")
    emitted = tuple(not 3 <= t < 9 for t in range(len(tool)))
    out.append(lm.trace_of_ids(prompt_ids, tool.completion_ids, tool.completion_pieces, emitted=emitted, ended=True))
    return [dataclasses.replace(t, meta={**META, **t.meta}) for t in out]


def assert_equal(a, b):
    assert (a.kind, a.over, a.level, a.method) == (b.kind, b.over, b.level, b.method)
    assert a.trace.ids("all") == b.trace.ids("all")
    np.testing.assert_allclose(a.values, b.values, rtol=0, atol=1e-6)  # Llama's norms compute in float32


@every_row
def test_credit_is_well_formed(row):
    items = traces()
    credits = make_scorer(row).score(items)
    assert len(credits) == len(items)
    for trace, credit in zip(items, credits, strict=True):
        assert isinstance(credit, Credit) and credit.kind in EXTENSIVE | INTENSIVE
        assert credit.trace.ids("all") == trace.ids("all")
        assert credit.values.shape == (len(trace.ids(credit.over)),)
        assert np.isfinite(credit.values).all()
        assert (credit.method, credit.version) == (row.slug, row.version)
        if credit.over == "completion":
            assert not credit.values[~trace.mask].any()
    assert any(credit.values.any() for credit in credits)


@every_row
def test_batch_is_one_by_one_in_any_order(row):
    scorer, items = make_scorer(row), traces()
    together = scorer.score(items)
    alone = [] if row.batch_coupled else items  # an order within a set is no property of its items
    for trace, credit in zip(alone, together, strict=False):
        assert_equal(scorer.score([trace])[0], credit)
    for credit, other in zip(scorer.score(items[::-1])[::-1], together, strict=True):
        assert_equal(credit, other)


@every_row
def test_nothing_and_empty_completions(row):
    scorer = make_scorer(row)
    assert scorer.score([]) == []
    empty = next(trace for trace in traces() if not len(trace))
    (credit,) = scorer.score([empty])
    assert credit.reduce() == 0 and (credit.over != "completion" or len(credit.values) == 0)


@every_row
def test_json_round_trip(row):
    for credit in make_scorer(row).score(traces()):
        again = Credit.from_json(json.loads(json.dumps(credit.to_json())))
        assert_equal(again, credit)
        assert again.values.tobytes() == credit.values.tobytes()
        assert again.meta == json.loads(json.dumps(credit.meta))


@every_row
def test_row_and_scorer_agree(row):
    scorer = make_scorer(row)
    assert isinstance(scorer, Scorer)
    credits = scorer.score(traces())
    levels = {"token": ("token", "span", "sequence"), "span": ("span", "sequence"), "sequence": ("sequence",)}
    assert all(credit.level in levels[row.level] for credit in credits)
    assert set(row.models) <= {name for name in ("policy", "reference", "lm") if hasattr(scorer, name)}
