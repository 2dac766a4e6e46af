"""What every decoder of the catalog keeps. A new row is tested without writing a test; what it needs beside the model
(an autoregressive reward, a constraint, a verifier) stands in `MADE`."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.catalog import method, methods
from pertoken.core.credit import Credit
from pertoken.core.decode import Drawn
from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling
from tests import tiny


class Verifier:
    """A verifier by formula: log-odds from the mean embedding."""

    def __init__(self, lm: LM):
        self.fingerprint, self.embedding = (
            lm.view.fingerprint,
            lm.causal.get_input_embeddings().weight.detach().double(),
        )
        self.w = torch.from_numpy(np.random.default_rng(0).normal(size=self.embedding.shape[1]))

    def __call__(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (
            torch.where(mask[..., None], embeds, 0.0).sum(1)
            / mask.sum(1, keepdim=True).clamp(min=1)
            @ self.w.to(embeds.device)
        )


MADE: dict[str, Callable[[LM, Any], Any]] = {
    "genarm": lambda lm, kind: kind(arms=tiny.lm(1, dtype=torch.float32), alpha=(0.7,)),
    "best-of-n": lambda lm, kind: kind(candidates=3, scorer=lambda text: float(text.count("e"))),
    "awrs": lambda lm, kind: kind(constraint="regex:[a-z ]{0,12}"),
    "spc": lambda lm, kind: kind(verifier=Verifier(lm), candidates=3, lookahead=2),
    "lm-cascades": lambda lm, kind: kind(large=tiny.lm(1, dtype=torch.float32), threshold=4.0),
}
OPENED = {"icn"}
"""Those that write the beginning of the reply themselves: it follows the prompt."""
PROMPTS = ("How was the film?", "So?")
ROWS = [row for row in methods() if row.room == "generate" and hasattr(method(row.slug), "generate")]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
HOW = Sampling(max_new_tokens=6)


def model() -> LM:
    lm = tiny.lm(dtype=torch.float32)
    lm.context = 256
    return lm


def made(row, lm: LM) -> Any:
    kind = method(row.slug)
    return MADE.get(row.slug, lambda lm, kind: kind())(lm, kind)


def generate(row, prompts=PROMPTS, **options) -> list[list[Drawn]]:
    lm = model()
    return made(row, lm).generate(lm, prompts, **{"sampling": HOW, "n": 2, "seed": 3, **options})


@every_row
def test_draws_are_well_formed(row):
    drawn = generate(row)
    assert len(drawn) == len(PROMPTS) and all(len(some) == 2 for some in drawn)
    lm = model()
    for prompt, some in zip(PROMPTS, drawn, strict=True):
        for one in some:
            assert isinstance(one, Drawn) and not math.isnan(one.logw) and one.logw < math.inf
            json.dumps(dict(one.meta))
            trace = one.trace
            assert trace.prompt_ids[-3:] == lm.encode_prompt(prompt)[-3:] or row.slug in OPENED
            for logps in (trace.sampled_logps, trace.policy_logps):
                assert logps is None or (logps.shape == (len(trace),) and (logps <= 1e-6).all())
            if one.credit is not None:
                assert isinstance(one.credit, Credit) and one.credit.trace.ids("all") == trace.ids("all")
                assert one.credit.method == row.slug and np.isfinite(one.credit.values).all()


@every_row
def test_seeds_decide(row):
    once, again = ([[d.trace.completion_ids for d in some] for some in generate(row, seed=3)] for _ in range(2))
    assert once == again


@every_row
def test_a_prompt_alone_draws_what_it_draws_among_others(row):
    """The first prompt's draws, by place, do not depend on what else is asked."""
    together, alone = generate(row)[0], generate(row, PROMPTS[:1])[0]
    assert [d.trace.completion_ids for d in together] == [d.trace.completion_ids for d in alone]
    np.testing.assert_allclose([d.logw for d in together], [d.logw for d in alone], atol=1e-4)


@every_row
def test_streamed_tokens_are_those_of_the_trace(row):
    seen: list[Any] = []
    ((one,),) = generate(row, PROMPTS[:1], n=1, stream=seen.append)
    assert not seen or tuple(s.token for s in seen) == one.trace.completion_ids


@every_row
def test_bad_numbers_are_refused(row):
    with pytest.raises(ValueError):
        generate(row, n=0)
    with pytest.raises(ValueError):
        generate(row, seed=-1)
