"""What every explainer of the catalog keeps. What it needs beside the model stands in `MADE`."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.catalog import method, methods
from pertoken.core.credit import EXTENSIVE, INTENSIVE, Credit
from pertoken.core.lm import LM
from tests import tiny


def overlap(pairs):
    """Share of common letters."""
    return [len(set(a) & set(b)) / max(len(set(a) | set(b)), 1) for a, b in pairs]


def pawn(lm: LM, kind: Any) -> Any:
    from pertoken.explain.pawn import PAWNHead

    torch.manual_seed(0)
    return kind(head=PAWNHead(lm.causal.config.hidden_size, features=8, gates=4).eval())


MADE: dict[str, Callable[[LM, Any], Any]] = {
    "sar": lambda lm, kind: kind(similarity=overlap),
    "reagent": lambda lm, kind: kind(max_steps=2, probes=2),
    "pawn": pawn,
}
ROWS = [row for row in methods() if row.room == "explain" and hasattr(method(row.slug), "explain")]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)


def made(row) -> tuple[LM, Any]:
    lm, kind = tiny.lm(), method(row.slug)
    return lm, MADE.get(row.slug, lambda lm, kind: kind())(lm, kind)


def traces(lm: LM):
    """Answers to two prompts; one has tokens that the policy did not emit."""
    out = [lm.trace("how was the film", text) for text in ("great plot", "dull")]
    tool = lm.trace("so?", "a wonderful score 😀")
    emitted = tuple(k not in (1, 2) for k in range(len(tool)))
    return [
        *out,
        lm.trace_of_ids(tool.prompt_ids, tool.completion_ids, tool.completion_pieces, emitted=emitted, ended=True),
    ]


@every_row
def test_credits_are_well_formed(row):
    lm, explainer = made(row)
    items = traces(lm)
    found = explainer.explain(lm, items)
    assert len(found) == len(items)
    for trace, credits in zip(items, found, strict=True):
        assert credits
        for credit in credits:
            assert isinstance(credit, Credit) and credit.kind in EXTENSIVE | INTENSIVE
            assert credit.trace.ids("all") == trace.ids("all") and credit.values.shape == (len(trace.ids(credit.over)),)
            assert np.isfinite(credit.values).all() and credit.method == row.slug
            json.dumps(credit.meta)


@every_row
def test_the_same_twice(row):
    (lm, one), (_, two) = made(row), made(row)
    for a, b in zip(one.explain(lm, traces(lm)), two.explain(lm, traces(lm)), strict=True):
        for c, d in zip(a, b, strict=True):
            np.testing.assert_allclose(c.values, d.values, atol=1e-9)


@every_row
def test_nothing_to_explain(row):
    lm, explainer = made(row)
    assert explainer.explain(lm, []) == []
