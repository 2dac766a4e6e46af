# pyright: reportArgumentType=false
"""A guide inside transformers' own `generate`: what our decoder draws, and what is refused."""

import math

import pytest
import torch

from pertoken.adapters.logits_processor import guide_processor
from pertoken.core.decode import LMGuide, Product, decode
from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling
from tests import tiny

BASE, ARM, OTHER = tiny.lm(0, torch.float32), tiny.lm(1, torch.float32), tiny.lm(2, torch.float32)
PROMPTS = ["the plot", "a film, a score and a friend"]
NEW = 7


def inputs(prompts=PROMPTS):
    ids = [BASE.encode_prompt(p) for p in prompts]
    width, pad = max(map(len, ids)), BASE.tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([[pad] * (width - len(i)) + list(i) for i in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
    }


def transformers(processor, prompts=PROMPTS, **options):
    return BASE.causal.generate(
        **inputs(prompts),
        logits_processor=[processor],
        max_new_tokens=NEW,
        eos_token_id=sorted(BASE.stop_ids),
        pad_token_id=BASE.tokenizer.pad_token_id,
        **options,
    )


def ours(guide, alpha):
    product = Product([LMGuide(lm=BASE), guide], (1.0, alpha))
    drawn = decode(BASE, product, PROMPTS, sampling=Sampling(max_new_tokens=NEW, temperature=0))
    return [some[0].completion_ids for some in drawn]


@pytest.mark.parametrize("alpha", [1.0, 3.0, -0.5])
def test_greedy_equals_our_decoder(alpha):
    """With a prompt of the guide's own, and left padding that the guide never sees."""
    guide = LMGuide(lm=ARM, prompt=lambda p: p + ", and so?")
    out = transformers(guide_processor(guide, PROMPTS, alpha=alpha), do_sample=False)
    for row, wanted in zip(out[:, -NEW:].tolist(), ours(guide, alpha), strict=True):
        assert tuple(row[: len(wanted)]) == wanted
    assert ours(guide, alpha) != ours(guide, 0.0)


def test_a_product_of_guides_and_rows_that_end():
    both = Product([LMGuide(lm=ARM), LMGuide(lm=OTHER)], (1.0, 0.5))
    out = transformers(guide_processor(both, PROMPTS), do_sample=False)
    drawn = decode(
        BASE,
        Product([LMGuide(lm=m) for m in (BASE, ARM, OTHER)], (1.0, 1.0, 0.5)),
        PROMPTS,
        sampling=Sampling(max_new_tokens=NEW, temperature=0),
    )
    for row, (wanted,) in zip(out[:, -NEW:].tolist(), drawn, strict=True):
        assert tuple(row[: len(wanted)]) == wanted.completion_ids


def test_sampling_is_from_the_formula_at_a_temperature():
    """Processors come before temperature; each prompt has its n rows."""
    torch.manual_seed(0)
    found = transformers(
        guide_processor(LMGuide(lm=ARM), PROMPTS, alpha=0.8, n=2),
        do_sample=True,
        temperature=0.7,
        top_k=0,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row in range(4):
        prompt = BASE.encode_prompt(PROMPTS[row // 2])
        done = found.sequences[row, -len(found.scores) :].tolist()
        for t, scores in enumerate(found.scores):
            ids = torch.tensor([[*prompt, *done[:t]]])
            with torch.no_grad():
                said = [m.causal(ids).logits[0, -1].log_softmax(-1) for m in (BASE, ARM)]
            wanted = ((said[0] + 0.8 * said[1]) / 0.7).log_softmax(-1)
            torch.testing.assert_close(scores[row].log_softmax(-1), wanted, atol=1e-4, rtol=0)
            if done[t] in BASE.stop_ids:
                break


def test_alpha_0_and_infinite_scores():
    scores, ids = torch.tensor([[1.0, -math.inf, 2.0]]), torch.tensor([[5]])
    assert guide_processor(LMGuide(lm=ARM), ["x"], alpha=0.0)(ids, scores) is scores
    out = guide_processor(LMGuide(lm=ARM), ["x"], alpha=-1.0)(ids, scores)  # a head of three ids: cut to them
    assert out.shape == (1, 3) and out[0, 1] == -math.inf and out[0, [0, 2]].isfinite().all()
    narrow = LM(tiny.llama(dtype=torch.float32, vocab=318), tiny.tokenizer())
    out = guide_processor(LMGuide(lm=narrow), ["x"])(ids, torch.zeros(1, 320))
    assert (out[0, 318:] == -math.inf).all() and out[0, :318].isfinite().all()


def test_beams_and_other_generations_are_refused():
    with pytest.raises(ValueError, match=r"6 rows for 2 prompts x n=1.*beams are not supported"):
        transformers(guide_processor(LMGuide(lm=ARM), PROMPTS), num_beams=3, do_sample=False)
    with pytest.raises(ValueError, match="beams change places"):  # as many rows as asked, but they move
        transformers(guide_processor(LMGuide(lm=ARM), PROMPTS, n=4), num_beams=4, do_sample=False)
    used = guide_processor(LMGuide(lm=ARM), PROMPTS)
    transformers(used, do_sample=False)
    with pytest.raises(ValueError, match="new processor for each call"):
        transformers(used, do_sample=False)


def test_bad_options():
    for prompts, options in (([], {}), (["x"], {"n": 0}), (["x"], {"alpha": math.nan})):
        with pytest.raises(ValueError, match="give a prompt or more"):
            guide_processor(LMGuide(lm=ARM), prompts, **options)
