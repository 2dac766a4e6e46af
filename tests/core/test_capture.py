"""Reduced captures against hooks on a plain forward; names, inputs, pieces, and what is refused."""

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pertoken.core.capture import named, reduce_features
from pertoken.core.packing import pack
from pertoken.core.stats import Needs, token_stats
from tests import tiny
from tests.methods.one_pass import exact_lm


def stats_of(lm, *wants, grad=False):
    groups = tiny.groups(lm, n=3, seed=1)
    packs = pack(groups, tree="always", max_tokens=1 << 20)
    with torch.set_grad_enabled(grad):
        found = token_stats({"policy": lm}, packs[0], Needs({"policy": frozenset(wants)}))["policy"]
    return found, [groups[g][k] for g, k in packs[0].order]


def plain(lm, trace, reduce):
    """What GPT-2's layers say at the positions that predict a trace's tokens, module after module: q, k and v, what
    enters the MLP's projection, what its activation says."""
    seen, hooks = [], []
    for layer in lm.model.transformer.h:
        cut = lambda _m, _i, y: seen.extend(reduce(x) for x in y.chunk(3, -1))
        hooks.append(layer.attn.c_attn.register_forward_hook(cut))
        hooks.append(layer.mlp.act.register_forward_hook(lambda _m, _i, y: seen.append(reduce(y))))
        hooks.append(layer.mlp.c_fc.register_forward_hook(lambda _m, _i, y: seen.append(reduce(y))))
    with torch.no_grad():
        lm.model(torch.tensor([trace.ids("all")]))
    for hook in hooks:
        hook.remove()
    return torch.stack([s[0, len(trace.prompt_ids) - 1 : -1] for s in seen], -1)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["mean", "sigmoid"])
def test_outputs_inputs_and_pieces(how, grad):
    lm = exact_lm()
    reduce = {"mean": lambda x: x.mean(-1), "sigmoid": lambda x: torch.sigmoid(x).mean(-1)}[how]
    # in the order in which GPT-2's modules stand; what enters the activation is what c_fc says
    want = f"{how}:attn.c_attn/3|mlp.act|nothing.like.it|<mlp.act"
    stats, traces = stats_of(lm, want, "logp", grad=grad)
    found = stats.extra[want]
    assert found.shape[2] == 2 * (3 + 2) and not found.requires_grad
    for row, trace in enumerate(traces):
        expected = plain(lm, trace, reduce)[:, [0, 1, 2, 4, 3, 5, 6, 7, 9, 8]]  # c_fc runs before the activation
        torch.testing.assert_close(found[row, : len(trace)], expected, rtol=0, atol=1e-9)
        assert not found[row, len(trace) :].any()
    assert not any(m._forward_hooks for m in lm.model.modules())


def test_names_are_the_end_of_a_path():
    assert named("model.layers.0.mlp.act_fn", "mlp.act_fn") and named("model.layers.0.mlp.act_fn", "*.mlp.act_fn")
    assert named("model.layers.11", "layers.*") and not named("model.layers.11.mlp", "layers.*")
    assert named("a.self_attn.q_proj", "self_attn.[qkv]_proj") and not named("a.self_attn.o_proj", "[qkv]_proj")
    assert not named("mlp", "layers.mlp") and not named("model.post_norm", "norm")


def test_a_mean_that_is_rounding_is_zero():
    x = torch.tensor([[1.0, -1.0, 1e-9], [1.0, -1.0, 1e-3]], dtype=torch.float64)
    assert reduce_features(x, "mean").tolist() == [0.0, pytest.approx(1e-3 / 3)]
    assert reduce_features(x.bfloat16(), "mean").dtype == torch.float32
    torch.testing.assert_close(reduce_features(x, "sigmoid"), x.sigmoid().mean(-1))
    lm = exact_lm()  # its norms are plain
    found, _ = stats_of(lm, "mean:ln_1")
    assert not found.extra["mean:ln_1"].any()


def test_what_is_refused():
    lm = exact_lm()
    with pytest.raises(ValueError, match=r"no module called self_attn|up_proj; print\(model\)"):
        stats_of(lm, "mean:self_attn.q_proj|up_proj")
    with pytest.raises(ValueError, match="did not run in the backbone"):
        stats_of(lm, "mean:lm_head")
    with pytest.raises(ValueError, match="do not make 5 equal pieces"):
        stats_of(lm, "mean:mlp.act/5")
    with pytest.raises(ValueError, match="position by position"):
        stats_of(lm, "mean:<wte")
    with pytest.raises(ValueError, match="not one of logp"):
        Needs({"policy": frozenset({"median:mlp"})})
    assert not any(m._forward_hooks for m in lm.model.modules())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rotated_queries_and_keys(attention):
    lm = tiny.lm()
    lm.model.set_attn_implementation(attention)
    table = dict(ALL_ATTENTION_FUNCTIONS)
    want = "mean:@rotary"
    stats, traces = stats_of(lm, want)
    assert dict(ALL_ATTENTION_FUNCTIONS) == table
    attn = lm.model.model.layers[0].self_attn
    for row, trace in enumerate(traces):
        ids = torch.tensor([trace.ids("all")])
        with torch.no_grad():
            x = lm.model.model.layers[0].input_layernorm(lm.model.model.embed_tokens(ids))
            q, k = (p(x).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
            turned = apply_rotary_pos_emb(q, k, *lm.model.model.rotary_emb(x, torch.arange(ids.shape[1])[None]))
        expected = torch.stack([y.mean((1, 3))[0, len(trace.prompt_ids) - 1 : -1] for y in turned], -1)
        assert (expected - torch.stack([y.mean((1, 3))[0, len(trace.prompt_ids) - 1 : -1] for y in (q, k)], -1)).any()
        torch.testing.assert_close(stats.extra[want][row, : len(trace), :2], expected, rtol=0, atol=1e-5)
    assert stats.extra[want].shape[2] == 2 * 2
    with pytest.raises(ValueError, match="no module called @rotary"):
        stats_of(exact_lm(), want)  # GPT-2 rotates nothing
    ours = lambda *args, **kwargs: None
    ALL_ATTENTION_FUNCTIONS[attention] = ours
    try:
        with pytest.raises(TypeError):  # what was there is called
            stats_of(lm, want)
        assert ALL_ATTENTION_FUNCTIONS[attention] is ours
    finally:
        del ALL_ATTENTION_FUNCTIONS[attention]


def test_half_precision_keeps_small_means():
    """Means of 4,096 rounded numbers are known to about eps / 64 of their size; only what is below that counts as 0."""
    x = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, exact = reduce_features(x, "mean"), x.double().mean(-1)
    assert (found == 0).double().mean() < 0.02
    np.testing.assert_allclose(found, exact, atol=2e-4)
    assert torch.equal(reduce_features(x.float() - x.float().mean(-1, keepdim=True), "mean"), torch.zeros(200))
