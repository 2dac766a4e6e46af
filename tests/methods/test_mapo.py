"""MaPO: by hand, its identities through a real pass, against activations of a plain forward, and degenerate input."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pertoken.core.step import live_models
from pertoken.train.mapo import LOGITS, MaPO, activation_mask, mask_credit, min_max, over_tokens
from pertoken.train.tdpo import TDPO
from tests import tiny
from tests.contracts.harness import make_groups, model, objective_pass
from tests.methods.one_pass import exact_lm

GROUPS = make_groups(MaPO())
MASK = torch.tensor([[True, True, True, False], [True, False, False, False], [False, False, False, False]])


def series(*rows):
    return torch.tensor(rows, dtype=torch.float64)[..., None]


def test_min_max_by_hand():
    values = series([2.0, 4.0, 3.0, 99.0], [5.0, -1.0, 7.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    expected = [[0, 1, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 0]]  # a single token weighs 1, an empty response has none
    np.testing.assert_allclose(min_max(values, MASK)[..., 0], expected)
    np.testing.assert_allclose(min_max(values.half(), MASK)[..., 0], expected)
    assert min_max(values.half(), MASK).dtype == torch.float32
    assert min_max(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0, 3)


@pytest.mark.parametrize("value", [0.0, 0.7, -3e4])
def test_constant_activations_weigh_one(value):
    noisy = value * (1 + 1e-8 * torch.randn(1, 6, 1, generator=torch.Generator().manual_seed(0)).double())
    assert torch.equal(min_max(noisy, torch.ones(1, 6, dtype=torch.bool)), torch.ones(1, 6, 1, dtype=torch.float64))


def test_z_norm_before_min_max_changes_nothing():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(3, 20, (4, 9, 2)), rng.random((4, 9)) < 0.7
    normed = values.copy()
    for n in range(4):
        of = values[n][mask[n]]
        normed[n] = (values[n] - of.mean(0)) / (of.std(0, ddof=1) + 1e-12)
    got, wanted = (min_max(torch.from_numpy(x), torch.from_numpy(mask)) for x in (normed, values))
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    assert set(got[0, torch.from_numpy(mask[0])].amax(0).tolist()) == {1.0}


def test_layer_norm_over_tokens_by_hand():
    values = series([2.0, 4.0, 3.0, 99.0], [5.0, -1.0, 7.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    scale = 1 / math.sqrt(2 / 3 + 1e-5)
    np.testing.assert_allclose(over_tokens(values, MASK)[..., 0], [[-scale, scale, 0, 0], [0] * 4, [0] * 4], atol=1e-12)


def test_types_count_equally_whatever_they_hold():
    many = torch.cat([series([0.0, 1.0], [0.0, 1.0])] * 5, -1)
    few = series([1.0, 0.0], [0.0, 1.0])
    both = torch.ones(2, 2, dtype=torch.bool)
    found = activation_mask({"attn": many, "logits": few}, both)
    assert found.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert activation_mask({"mlp": few}, both, "sigmoid").tolist() == [[1.0, 0.0], [0.0, 1.0]]  # as they are


# ---- a real pass


def activations(lm, trace):
    """Means over features of every tensor, by type, from a plain forward of Llama or GPT-2."""
    found: dict[str, list[torch.Tensor]] = {"mlp": [], "attn": [], "resid": []}
    llama = hasattr(lm.model, "model")
    body = lm.model.model if llama else lm.model.transformer
    layers = body.layers if llama else body.h

    def out(kind, module, pieces=1):
        def hook(_m, _i, y):
            y = y[0] if isinstance(y, tuple) else y
            found[kind].extend(part.mean(-1) for part in y.chunk(pieces, -1))

        module.register_forward_hook(hook)

    def before(kind, module):
        module.register_forward_pre_hook(lambda _m, args: found[kind].append(args[0].mean(-1)))

    def rotated(attn, _args, kwargs):
        h = kwargs["hidden_states"]
        flat = (
            F.linear(h, p.weight) for p in (attn.q_proj, attn.k_proj)
        )  # not through the modules, whose hooks would run
        q, k = (x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for x in flat)
        for x in apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"]):
            found["attn"].append(x.mean((1, 3)))

    for layer in layers:
        attn, norms = (
            (layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm))
            if llama
            else (layer.attn, (layer.ln_1, layer.ln_2))
        )
        out("mlp", layer.mlp.act_fn if llama else layer.mlp.act)
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj) if llama else ():
            out("attn", projection)
        if not llama:
            out("attn", attn.c_attn, 3)
        before("attn", attn.o_proj if llama else attn.c_proj)
        if llama:
            attn.register_forward_pre_hook(rotated, with_kwargs=True)
        for norm in norms:
            before("resid", norm)
            out("resid", norm)
        out("resid", attn)
        out("resid", layer.mlp)
        out("resid", layer)
    out("resid", body.embed_tokens if llama else body.drop)
    out("resid", body.norm if llama else body.ln_f)
    with torch.no_grad():
        logits = lm.model(torch.tensor([trace.ids("all")])).logits
    at = slice(len(trace.prompt_ids) - 1, -1)
    rows = {kind: torch.stack([v[0, at] for v in values]) for kind, values in found.items()}
    return {**rows, "logits": logits[0, at].mean(-1)[None]}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("types", ["all", "mlp", "attn+resid", "logits"])
def test_the_mask_of_a_plain_forward(name, types):
    make = (lambda: tiny.lm(0)) if name == "llama" else (lambda: exact_lm(0))
    lm, hooked = make(), make()
    for one in (lm, hooked):
        for p in one.model.parameters():  # norms that do something: the mean of a plain LayerNorm is only rounding
            if p.ndim == 1:
                torch.nn.init.normal_(p, 1.0, 0.3, generator=torch.Generator().manual_seed(len(p)))
    trace = lm.trace_of_ids([5, 6, 7], [8, 9, 10, 11, 12], emitted=(True, True, False, True, True))
    (credit,) = mask_credit(MaPO(activations=types), lm, [trace])
    by_type = activations(hooked, trace)
    layers = 2
    sizes = {"mlp": layers, "attn": (6 if name == "llama" else 4) * layers, "resid": 7 * layers + 2, "logits": 1}
    assert {kind: len(rows) for kind, rows in by_type.items()} == sizes
    each = []
    for kind in by_type if types == "all" else types.split("+"):
        rows = by_type[kind][:, trace.mask].double()
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        each.append(((rows - low) / (high - low)).mean(0))
    expected = np.zeros(5)
    expected[trace.mask] = torch.stack(each).mean(0).numpy()
    np.testing.assert_allclose(credit.values, expected, atol=1e-5)
    assert credit.kind == "weight" and "before each token" in credit.meta["reads"]


def test_uniform_is_tdpo1():
    found = objective_pass(MaPO(activations="uniform", beta=0.3), GROUPS)
    wanted = objective_pass(TDPO(variant="tdpo1", beta=0.3), GROUPS)
    assert found.sum == pytest.approx(wanted.sum, abs=1e-12)
    torch.testing.assert_close(found.grads, wanted.grads, atol=1e-10, rtol=0)


def test_one_detached_mask_for_both_sides():
    """The loss and its gradient are those of TDPO1's terms under a fixed mask."""
    from pertoken.core.packing import Cost, pack
    from pertoken.core.stats import token_stats
    from pertoken.core.step import needs_of
    from tests.contracts.harness import make_batch

    objective = MaPO(beta=0.5)
    models = {name: model(name) for name in ("policy", "reference")}
    (one,) = pack([g.traces for g in GROUPS], cost=Cost(linear=1, attention=0, launch=1e12), max_tokens=1 << 20)
    stats = token_stats(models, one, needs_of(objective), trained="policy")
    m_NT = objective.mask(stats)
    assert not m_NT.requires_grad and float(m_NT.min()) >= 0 and float(m_NT.max()) <= 1
    policy, reference = stats["policy"], stats["reference"]
    u = (m_NT * (policy.logp_NT - reference.logp_NT)).sum(1)
    d = (m_NT * policy.extra["kl_forward:reference"]).sum(1)
    batch = make_batch(objective, GROUPS, one.order, tuple(one.mask_NT.shape))
    w, l = batch.chosen, batch.rejected
    wanted = torch.log1p(torch.exp(-0.5 * (u[w] - u[l] - d[l] + d[w]))).sum()
    loss = objective.loss(stats, batch)
    assert loss.sum.item() == pytest.approx(wanted.item(), abs=1e-10)
    parameters = list(models["policy"].model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.sum, parameters, retain_graph=True), torch.autograd.grad(wanted, parameters)
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert {"sparsity/u_chosen", "mean_mask/u_rejected", "weighted_kl/margin"} <= loss.metrics.keys()


def test_options():
    assert live_models(MaPO()) == ("reference",)
    assert MaPO().token_stats({"reference": torch.zeros(2, 3)}, torch.zeros(2))[LOGITS].tolist() == [0, 0]
    assert MaPO(activations="mlp").token_stats({"reference": torch.zeros(2, 3)}, torch.zeros(2)) == {}
    wrong = {"beta": 0.0, "activations": "mlp+norms", "mapping": "softmax"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            MaPO(**{name: value})  # type: ignore[arg-type]
