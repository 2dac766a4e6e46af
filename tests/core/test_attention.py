"""A `TreeMask` skips what it forbids, and is the dense mask to whoever reads it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pertoken.core.attention import TreeMask, additive_mask
from pertoken.core.packing import Cost, pack
from pertoken.core.stats import token_stats
from tests.core.test_packing import LOGP, a_trace, model_of

ROWS = {
    "pair": [(7, (3, 5))],
    "no branches": [(4, ())],
    "empty branches": [(3, (0, 4, 0, 2)), (2, (0, 0)), (1, (1,))],
    "several": [(6, (2, 9, 1)), (5, (4,)), (1, (3, 3))],
}


def dense(stretches, dtype: torch.dtype = torch.float64) -> Tensor:
    segment = [i for i, (trunk, lengths) in enumerate(stretches) for _ in range(trunk + sum(lengths))]
    branch, position = [], []
    for trunk, lengths in stretches:
        branch += [0] * trunk + [b for b, n in enumerate(lengths, start=1) for _ in range(n)]
        position += [*range(trunk), *(trunk + i for n in lengths for i in range(n))]
    s, b, t = (torch.tensor([x]) for x in (segment, branch, position))
    return additive_mask(s, b, t, None, dtype)


def attention(mask: Tensor, scale: float | None = None) -> list[Tensor]:
    """Output and gradients."""
    columns = mask.shape[-1]
    rng = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, columns, 8, generator=rng, dtype=torch.float64) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale)
    return [out, *torch.autograd.grad(out, inputs, g)]


@pytest.mark.parametrize("name", ROWS)
def test_the_same_numbers_as_the_dense_mask(name):
    mask = dense(ROWS[name])
    for scale in (None, 0.2):
        for one, two in zip(attention(mask, scale), attention(TreeMask.of(mask, ROWS[name]), scale), strict=True):
            assert type(two) is Tensor
            torch.testing.assert_close(two, one, rtol=0, atol=1e-12)


def test_whoever_reads_it_finds_the_dense_mask():
    stretches = ROWS["several"]
    mask = dense(stretches)
    tree = TreeMask.of(mask, stretches)
    assert isinstance(tree, Tensor) and tree.shape == mask.shape and tree.dtype == mask.dtype
    for read in (lambda m: m[:, :, :3], lambda m: m + 1, lambda m: m.to(torch.float32), lambda m: m == 0):
        assert type(read(tree)) is Tensor and torch.equal(read(tree), read(mask))
    with pytest.raises(ValueError, match="stretches of 27 tokens in a row of 34"):
        TreeMask.of(mask, stretches[:-1])


class Largest(TorchDispatchMode):
    """The most query-key pairs of one attention."""

    pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func) and "backward" not in str(func):
            q, k = [x for x in tree_leaves(args) if isinstance(x, Tensor)][:2]
            self.pairs = max(self.pairs, q.shape[-2] * k.shape[-2])
        return func(*args, **(kwargs or {}))


def test_a_packed_row_is_computed_by_stretches():
    """The mask reaches SDPA through a transformers model: no attention is as wide as the row."""
    lm = model_of("Llama")
    groups = [[a_trace((5,) * 6, (6 + k,) * 9) for k in range(4)] for _ in range(3)]
    (row,) = pack(groups, cost=Cost.of(lm.causal))
    assert row.tokens == 3 * (6 + 4 * 8) and row.stretches == ((6, (8,) * 4),) * 3
    with Largest() as seen:
        token_stats({"policy": lm}, row, LOGP)
    assert 0 < seen.pairs <= (6 + 8) ** 2
