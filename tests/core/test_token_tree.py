"""A tree of continuations in one cache says what whole sequences say."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pertoken.core import token_tree
from pertoken.core.lm import LM
from pertoken.core.token_tree import TokenTree
from tests import tiny

CONTEXT = (5, 9, 17)


def whole(lm, history):
    with torch.no_grad():
        return lm.causal(torch.tensor([[*CONTEXT, *history]])).logits[0, -1].double().log_softmax(-1).numpy()


def gpt2() -> LM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return LM(GPT2LMHeadModel(config).double().eval(), tiny.tokenizer(), name="gpt2")


@pytest.mark.parametrize("slack", [1, 64])
@pytest.mark.parametrize("make", [tiny.lm, gpt2])
def test_branches_equal_whole_sequences_through_forgetting(make, slack, monkeypatch):
    monkeypatch.setattr(token_tree, "_SLACK", slack)
    lm, rng = make(), np.random.default_rng(0)
    tree, known = TokenTree(lm, CONTEXT), [()]
    for step in range(6):
        new = [
            (*known[int(rng.integers(len(known)))], *rng.integers(3, 300, int(rng.integers(1, 4))).tolist())
            for _ in range(4)
        ]
        known = list(dict.fromkeys(known + new))
        for history, said in zip(known, tree.logps(known), strict=True):
            np.testing.assert_allclose(said, whole(lm, history), atol=1e-9)
        if step % 2:
            known = known[::2]
            tree.keep(known)
    short = known[-1][:1]  # a way whose own numbers were forgotten
    tree.keep([known[-1]])
    np.testing.assert_allclose(tree.logps([short])[0], whole(lm, short), atol=1e-9)
    np.testing.assert_allclose(tree.logps([(*short, 7)])[0], whole(lm, (*short, 7)), atol=1e-9)


def test_each_token_is_computed_once():
    tree = TokenTree(tiny.lm(), CONTEXT)
    tree.logps([()])
    assert (tree.forwards, tree.computed) == (1, 3)
    tree.logps([(4, 6), (4, 7), (8,)])
    assert (tree.forwards, tree.computed) == (2, 7)  # 4, 4 6, 4 7, 8
    tree.logps([(4,), (4, 6)])
    assert tree.forwards == 2
    tree.logps([(4, 6, 9)])
    assert (tree.forwards, tree.computed) == (3, 8)


def test_models_that_cannot_share_compute_whole_sequences():
    lm = tiny.lm()
    tree = TokenTree(lm, CONTEXT)
    tree._shares = False
    histories = [(), (4, 6), (8,)]
    for history, said in zip(histories, tree.logps(histories), strict=True):
        np.testing.assert_allclose(said, whole(lm, history), atol=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match="give a BOS"):
        TokenTree(tiny.lm(), ())
    lm = tiny.lm()
    with pytest.raises(ValueError, match="exceed the model's context"):
        TokenTree(lm, CONTEXT).logps([tuple(range(3, lm.context + 3))])
