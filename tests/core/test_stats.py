"""Token statistics against full logits and plain formulas; gradients; and no tensor that is (tokens, V)."""

# stand-ins and parametrised options, which the checker cannot follow
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pertoken.core.head import Head, describe, kl_divergence, log_probs
from pertoken.core.lm import LM
from pertoken.core.packing import pack
from pertoken.core.stats import (
    DESCRIPTIVE,
    Needs,
    Stats,
    TokenStats,
    _default_chunk,
    masked_mean,
    masked_sum,
    token_stats,
)
from pertoken.core.trace import Trace
from tests import tiny

V = 320
_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS = {
    "untied": ("Llama", _SIZES | {"tie_word_embeddings": False}),
    "tied": ("Llama", _SIZES | {"tie_word_embeddings": True}),
    "bias": ("Phi", _SIZES),
    "softcap": ("Gemma2", _SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "logit scale": ("Cohere", _SIZES | {"logit_scale": 0.25}),
    "logits scaling": ("Granite", _SIZES | {"logits_scaling": 4.0}),
}
FUSED = {"untied", "tied", "bias"}


def model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64, attention: str = "eager") -> LM:
    cls, options = MODELS[name]
    config = getattr(transformers, f"{cls}Config")(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = getattr(transformers, f"{cls}ForCausalLM")._from_config(config, attn_implementation=attention)
        for p in made.parameters():
            if p.ndim == 1:
                torch.nn.init.normal_(p, 1.0 if p.std() == 0 else 0.0, 0.3)  # norms and biases that do something
    return LM(made.to(dtype).eval(), tiny.tokenizer(), name=f"{name}-{seed}")


@cache
def groups() -> list[list[Trace]]:
    rng = np.random.default_rng(0)

    def a_trace(prompt, n, emitted=None):
        ids = tuple(int(i) for i in rng.integers(3, V, n))
        return Trace(
            prompt_ids=prompt,
            completion_ids=ids,
            prompt_pieces=(b"",) * len(prompt),
            completion_pieces=(b"",) * n,
            tokenizer="t",
            emitted=emitted,
        )

    return [
        [a_trace((5, 6, 7), 4), a_trace((5, 6, 7), 7), a_trace((5, 6, 7), 0)],
        [a_trace((9, 8), 5, (True, False, False, True, True)), a_trace((9, 8), 1)],
    ]


def one_pack():
    packs = pack(groups(), tree="always")
    assert len(packs) == 1
    return packs[0]


def traces() -> list[Trace]:
    return [groups()[g][k] for g, k in one_pack().order]


def wants(*names: str) -> Needs:
    return Needs({"policy": frozenset(names)})


def full(lm: LM) -> list[dict[str, Tensor]]:
    """What the model says of each completion, from full logits: the naive computation."""
    out = []
    for trace in traces():
        ids, p = torch.tensor([trace.ids("all")]), len(trace.prompt_ids)
        with lm.active() as causal:
            said = causal(ids, use_cache=False, output_hidden_states=True)
        at = slice(p - 1, len(ids[0]) - 1)
        out.append(
            {
                "logits": said.logits[0, at],
                "ids": ids[0, p:],
                "hidden_all": torch.stack([h[0, at] for h in said.hidden_states], 1),
            }
        )
    return out


def naive(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Every statistic of one completion by its definition, token by token."""
    logp = logits.log_softmax(-1)
    rows = {name: [] for name in ("logp", *DESCRIPTIVE)}
    for lp, i in zip(logp, ids.tolist(), strict=True):
        plain = lp.tolist()
        probs = lp.exp()
        rows["logp"].append(lp[i])
        rows["entropy"].append(-(probs * lp).sum())
        rows["top1"].append(torch.tensor(plain.index(max(plain))))
        rows["top1_logp"].append(lp.max())
        second = sorted(plain)[-2]
        rows["margin"].append(torch.tensor(max(plain) - second))
        rows["rank"].append(torch.tensor(sum(x > plain[i] for x in plain)))
        rows["sumsq"].append((probs * probs).sum())
    return {name: torch.stack(values) if values else logp.new_zeros(0) for name, values in rows.items()}


def weights(shape: torch.Size) -> Tensor:
    """A weight a token, for a scalar whose gradient notices every place."""
    return torch.cos(torch.arange(shape.numel(), dtype=torch.float64)).reshape(shape)


def weighted(values_NT: Tensor) -> Tensor:
    return (values_NT * weights(values_NT.shape)).sum()


def weighted_rows(rows: list[Tensor]) -> Tensor:
    """The same scalar from ragged rows."""
    longest = max(map(len, rows))
    padded = torch.stack([torch.cat([r, r.new_zeros(longest - len(r))]) for r in rows])
    return weighted(padded)


def grads_of(lm: LM, loss: Tensor) -> list[Tensor]:
    lm.model.zero_grad()
    loss.backward()
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in lm.model.parameters()]


def assert_grads(found: list[Tensor], expected: list[Tensor], rtol: float = 2e-6) -> None:
    largest = max(float(g.abs().max()) for g in expected)
    assert largest > 1e-2  # there is something to compare
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * largest)


# ---- every statistic, every kind of head


@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_the_logits(name):
    lm = model(name)
    assert Head(lm.causal).fused == (name in FUSED)
    with torch.no_grad():
        stats = token_stats({"policy": lm}, one_pack(), wants("logp", *DESCRIPTIVE), 3)["policy"]
        for row, said in enumerate(full(lm)):
            for key, expected in naive(said["logits"], said["ids"]).items():
                found = stats.logp_NT if key == "logp" else stats.extra[key]
                torch.testing.assert_close(found[row, : len(expected)], expected, rtol=0, atol=2e-6, check_dtype=False)
                assert not found[row, len(expected) :].any()  # zeros beyond the end
    assert stats.rank_NT.dtype == stats.top1_NT.dtype == torch.int64
    assert stats.rank_NT.max() > 0 and stats.entropy_NT.dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_logp(name):
    lm = model(name)
    expected = grads_of(lm, weighted_rows([naive(s["logits"], s["ids"])["logp"] for s in full(lm)]))
    for wanted in (("logp",), ("logp", "entropy", "rank")):  # what else is asked for does not matter
        stats = token_stats({"policy": lm}, one_pack(), wants(*wanted), 3)["policy"]
        assert not any(value.requires_grad for value in stats.extra.values())
        assert_grads(grads_of(lm, weighted(stats.logp_NT)), expected)


@pytest.mark.parametrize("name", ["untied", "tied", "softcap"])
def test_chunk_size_is_irrelevant(name):
    lm, reference = model(name), model(name, 1)
    needs = Needs(
        {"policy": frozenset({"logp", "kl_reverse:reference", *DESCRIPTIVE}), "reference": frozenset({"logp"})},
        {"joint": lambda logits, ids: {"gap": (logits["policy"] - logits["reference"]).square().mean(-1)}},
    )
    alone = wants("logp", *DESCRIPTIVE)
    results = []
    for chunk in (1, 3, 1000, None):
        both = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, chunk, trained="policy")
        one = token_stats({"policy": lm}, one_pack(), alone, chunk)["policy"]
        mine = both["policy"]
        learnt = (mine.logp_NT, one.logp_NT, mine.extra["gap"], mine.extra["kl_reverse:reference"])
        loss = torch.stack([weighted(v.double()) for v in learnt]).sum()
        values = [v.detach().double() for s in (*both.values(), one) for v in (s.logp_NT, *s.extra.values())]
        results.append((values, grads_of(lm, loss)))
    for values, grads in results[1:]:
        for a, b in zip(values, results[0][0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_grads(grads, results[0][1], 1e-6)


def test_fused_and_generic_heads_agree():
    """The same model twice: one through the fused function, one through log_softmax and a checkpoint."""
    lm, scaled = model("untied"), model("untied")
    scaled.causal.config.logit_scale = 2.0  # the head's own weights are halved, so the logits are the same
    with torch.no_grad():
        scaled.causal.lm_head.weight /= 2
    object.__setattr__(scaled.causal, "forward", _scaled_forward(scaled.causal))
    assert Head(lm.causal).fused and not Head(scaled.causal).fused
    found = [token_stats({"policy": x}, one_pack(), wants("logp", *DESCRIPTIVE), 4)["policy"] for x in (lm, scaled)]
    torch.testing.assert_close(found[0].logp_NT, found[1].logp_NT)
    for key in DESCRIPTIVE:
        torch.testing.assert_close(found[0].extra[key], found[1].extra[key])
    grads = [grads_of(x, weighted(s.logp_NT)) for x, s in zip((lm, scaled), found, strict=True)]
    names = [n for n, _ in lm.model.named_parameters()]
    grads[1][names.index("lm_head.weight")] /= 2
    assert_grads(grads[0], grads[1], 1e-6)


def _scaled_forward(causal):
    plain = type(causal).forward

    def forward(*args, **kwargs):
        out = plain(causal, *args, **kwargs)
        out.logits = out.logits * 2.0
        return out

    return forward


# ---- hidden states and activations


@pytest.mark.parametrize("name", ["untied", "softcap"])
def test_hidden_states(name):
    lm = model(name)
    stats = token_stats({"policy": lm}, one_pack(), wants("hidden", "hidden_all"))["policy"]
    layers = _SIZES["num_hidden_layers"]
    assert stats.hidden_all_NTLH.shape == (5, 7, layers + 1, 16) and stats.hidden_NTH.shape == (5, 7, 16)
    for row, said in enumerate(full(lm)):
        t = len(said["ids"])
        for layer in range(layers + 1):
            found = stats.hidden_all_NTLH[row, :t, layer]
            torch.testing.assert_close(found, said["hidden_all"][:, layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.hidden_NTH[row, :t], said["hidden_all"][:, -1], rtol=1e-5, atol=1e-5)
    assert stats.logp_NT.isnan().all() and stats.logp_NT.shape == (5, 7)  # not asked for, so not to be mistaken for 0


def test_gradients_flow_through_hidden_states():
    lm = model("untied")
    expected = grads_of(lm, torch.stack([s["hidden_all"].square().sum() for s in full(lm)]).sum())
    stats = token_stats({"policy": lm}, one_pack(), wants("hidden_all", "logp"))["policy"]
    assert_grads(grads_of(lm, stats.hidden_all_NTLH.square().sum()), expected)


def test_modules_are_captured_by_name():
    lm = model("untied")
    names = ["model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.1", "model.embed_tokens"]
    stats = token_stats({"policy": lm}, one_pack(), wants("logp", *(f"module:{n}" for n in names)))["policy"]
    caught: dict[str, Tensor] = {}
    for row, trace in enumerate(traces()):
        with contextlib.ExitStack() as stack:
            for n in names:
                hook = lambda _m, _i, out, n=n: caught.update({n: out[0] if isinstance(out, tuple) else out})
                stack.callback(lm.causal.get_submodule(n).register_forward_hook(hook).remove)
            lm.causal(torch.tensor([trace.ids("all")]), use_cache=False)
        p = len(trace.prompt_ids)
        for n in names:
            expected = caught[n][0, p - 1 : -1]
            torch.testing.assert_close(stats.extra[n][row, : len(trace)], expected, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())  # none is left behind


def test_modules_that_are_not_there_or_do_not_run():
    lm = model("untied")
    with pytest.raises(ValueError, match=r"the model has no module 'model.layers.9'; print\(model\)"):
        token_stats({"policy": lm}, one_pack(), wants("module:model.layers.9"))
    with pytest.raises(ValueError, match="module:lm_head did not run in the backbone"):
        token_stats({"policy": lm}, one_pack(), wants("module:lm_head"))
    assert not any(m._forward_hooks for m in lm.model.modules())


# ---- several models

JOINT = {
    "j": lambda logits, ids: {"gap": (logits["policy"].softmax(-1) - logits["reference"].softmax(-1)).abs().sum(-1)}
}


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("kind", ["kl_forward", "kl_reverse"])
@pytest.mark.parametrize("name", ["untied", "tied", "logit scale"])
def test_kl_and_its_gradient(name, kind):
    lm, reference = model(name), model(name, 1)
    needs = Needs({"policy": frozenset({f"{kind}:reference"}), "reference": frozenset()})
    stats = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3, trained="policy")
    found = stats["policy"].extra[f"{kind}:reference"]
    rows = []
    for mine, theirs in zip(full(lm), full(reference), strict=True):
        a, b = mine["logits"], theirs["logits"].detach()
        rows.append(naive_kl(b, a) if kind == "kl_forward" else naive_kl(a, b))
        torch.testing.assert_close(found[len(rows) - 1, : len(a)], rows[-1], rtol=1e-5, atol=1e-5)
    assert found.max() > 0.1 and (found >= 0).all()
    assert_grads(grads_of(lm, weighted(found)), grads_of(lm, weighted_rows(rows)))
    assert all(p.grad is None for p in reference.model.parameters())


@pytest.mark.parametrize("name", ["untied", "tied", "bias"])
def test_chunks_made_again_by_hand_or_by_checkpoint_agree(name):
    """`trained` names the learner: one buffer for its head's gradient, and its chunks again in backward. Without it,
    autograd's own checkpoints."""
    lm, reference = model(name), model(name, 1)
    assert Head(lm.causal).fused
    kinds = frozenset({"logp", "entropy", "kl_forward:reference", "kl_reverse:reference"})
    needs = Needs({"policy": kinds, "reference": frozenset({"logp"})}, JOINT)
    found = []
    for trained in ("policy", None):
        with torch.no_grad() if trained is None else contextlib.nullcontext():
            token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3, trained=trained)
        for p in reference.model.parameters():
            p.requires_grad_(False)
        mine = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3, trained=trained)["policy"]
        learnt = [mine.logp_NT, *(mine.extra[k] for k in ("gap", "kl_forward:reference", "kl_reverse:reference"))]
        assert not mine.extra["entropy"].requires_grad
        found.append((learnt, grads_of(lm, torch.stack([weighted(v.double()) for v in learnt]).sum())))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert_grads(found[0][1], found[1][1], 1e-9)


def test_second_derivatives_are_refused_where_chunks_are_made_again_by_hand():
    lm, reference = model("untied"), model("untied", 1)
    needs = Needs({"policy": frozenset({"kl_forward:reference"}), "reference": frozenset()})
    stats = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3, trained="policy")["policy"]
    loss = stats.extra["kl_forward:reference"].sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, list(lm.model.parameters()), create_graph=True, allow_unused=True)


def alignment(logits: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """A joint of three models: a distillation loss to a mixture of two, and the policy's own surprisal."""
    teacher = (0.5 * logits["reference"] + 0.5 * logits["critic"]).log_softmax(-1)
    logp = logits["policy"].log_softmax(-1)
    return {"distil": (teacher.exp() * (teacher - logp)).sum(-1), "surprisal": -logp.gather(-1, ids[:, None])[:, 0]}


def test_a_joint_of_several_models():
    lms = {"critic": model("untied", 2), "policy": model("untied"), "reference": model("untied", 1)}
    stats_of = {
        "critic": frozenset({"hidden"}),
        "policy": frozenset({"logp", "rank"}),
        "reference": frozenset({"logp"}),
    }
    stats = token_stats(lms, one_pack(), Needs(stats_of, {"a": alignment}), 3, trained="policy")
    rows = {"distil": [], "surprisal": []}
    for parts in zip(*(full(lms[n]) for n in lms), strict=True):
        said = dict(zip(lms, parts, strict=True))
        logits = {n: s["logits"] if n == "policy" else s["logits"].detach() for n, s in said.items()}
        for key, value in alignment(logits, said["policy"]["ids"]).items():
            rows[key].append(value)
    for key, values in rows.items():
        for name in lms:  # whoever looks for it finds it
            found = stats[name].extra[key]
            for row, value in enumerate(values):
                torch.testing.assert_close(found[row, : len(value)], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats["policy"].extra["surprisal"], -stats["policy"].logp_NT)
    assert "rank" in stats["policy"].extra and "rank" not in stats["reference"].extra
    loss = weighted(stats["policy"].extra["distil"]) + weighted(stats["policy"].extra["surprisal"])
    expected = weighted_rows(rows["distil"]) + weighted_rows(rows["surprisal"])
    assert_grads(grads_of(lms["policy"], loss), grads_of(lms["policy"], expected))
    assert all(p.grad is None for n in ("critic", "reference") for p in lms[n].model.parameters())


@pytest.mark.parametrize("wanted", ["logp", "kl_forward:reference"])
def test_only_the_trained_model_learns(wanted):
    """Even if its log-probs are in the loss, and its parameters ask for gradients."""
    for head in ("untied", "tied", "softcap"):
        lm, reference = model(head), model(head, 1)
        needs = Needs({"policy": frozenset({"logp", wanted}), "reference": frozenset({"logp", "hidden"})})
        stats = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3, trained="policy")
        assert not stats["reference"].logp_NT.requires_grad and not stats["reference"].hidden_NTH.requires_grad
        (weighted(stats["policy"].logp_NT) + weighted(stats["reference"].logp_NT)).backward()
        assert all(p.grad is None for p in reference.model.parameters())
        assert any(p.grad is not None for p in lm.model.parameters())
        both = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3)
        assert_grads(
            grads_of(reference, weighted(both["reference"].logp_NT)),
            grads_of(reference, weighted_rows([naive(s["logits"], s["ids"])["logp"] for s in full(reference)])),
        )


def test_no_gradients_without_autograd():
    lm = model("untied")
    with torch.no_grad():
        stats = token_stats({"policy": lm}, one_pack(), wants("logp", "hidden_all"), trained="policy")["policy"]
    assert not stats.logp_NT.requires_grad and not stats.hidden_all_NTLH.requires_grad


def test_token_stats_module():
    lm, reference = model("untied"), model("untied", 1)
    module = TokenStats(lm)
    needs = Needs({"policy": frozenset({"logp"}), "reference": frozenset({"logp"})})
    stats = module(one_pack(), needs, {"reference": reference}, 5)
    expected = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 5, trained="policy")
    for name in stats:
        torch.testing.assert_close(stats[name].logp_NT, expected[name].logp_NT)
    assert list(module.parameters()) == list(lm.model.parameters())
    assert not stats["reference"].logp_NT.requires_grad


def test_what_cannot_be_answered():
    lm = model("untied")
    needs = Needs({"policy": frozenset({"logp"}), "reference": frozenset({"logp"})})
    with pytest.raises(ValueError, match="statistics of reference are needed, but no such model was given"):
        token_stats({"policy": lm}, one_pack(), needs)
    with pytest.raises(ValueError, match="a KL to reference is wanted; name that model's stats too"):
        token_stats({"policy": lm}, one_pack(), wants("kl_forward:reference"))
    with pytest.raises(ValueError, match=r"entropi, kl_forward wanted of policy: not one of logp, entropy"):
        wants("logp", "entropi", "kl_forward")
    small = LM(tiny.llama(vocab=300), tiny.tokenizer())
    with pytest.raises(ValueError, match=r"vocabularies of different sizes cannot be compared: .*300"):
        needs = Needs({"policy": frozenset({"kl_forward:other"}), "other": frozenset()})
        token_stats({"policy": lm, "other": small}, pack([[tiny_trace()]])[0], needs)
    for key in ("logp", "entropy"):
        mine = {"mine": lambda logits, ids, key=key: {key: ids}}
        with pytest.raises(ValueError, match=f"mine calls a statistic '{key}', which exists already"):
            token_stats({"policy": lm}, one_pack(), Needs({"policy": frozenset()}, mine))


def tiny_trace() -> Trace:
    return Trace(
        prompt_ids=(5,), completion_ids=(6, 7), prompt_pieces=(b"",), completion_pieces=(b"",) * 2, tokenizer="t"
    )


def test_needs_union():
    a = Needs({"policy": frozenset({"logp"}), "reference": frozenset({"logp"})}, {"tdpo": alignment})
    b = Needs(
        {"policy": frozenset({"entropy", "kl_forward:critic"}), "critic": frozenset({"hidden"})}, {"tdpo": alignment}
    )
    union = Needs.union([a, b])
    assert dict(union.stats) == {
        "policy": {"logp", "entropy", "kl_forward:critic"},
        "reference": {"logp"},
        "critic": {"hidden"},
    }
    assert dict(union.joints) == {"tdpo": alignment}
    other = Needs({"policy": frozenset()}, {"tdpo": lambda logits, ids: {}})
    with pytest.raises(ValueError, match="two different joint functions are called 'tdpo'"):
        Needs.union([a, other])
    assert dict(Needs.union([]).stats) == {}


# ---- adapters


def lora(*, head: bool) -> LM:
    from peft import LoraConfig, get_peft_model

    base = model("untied")
    targets = ["q_proj", "down_proj", *(["lm_head"] if head else [])]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft = get_peft_model(base.model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return LM(peft.double().eval(), base.tokenizer, name="lora")


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_adapters_on_and_off_in_one_pass(head, together):
    """Policy and reference are one model. In backward the chunks run again, the reference's still with adapters off."""
    lm = lora(head=head)
    reference, plain = lm.reference(), model("untied")
    assert Head(lm.causal).fused == (not head)
    wanted = {"logp", "kl_reverse:reference"} if together else {"logp"}
    needs = Needs({"policy": frozenset(wanted), "reference": frozenset({"logp"})})
    stats = token_stats({"policy": lm, "reference": reference}, one_pack(), needs, 3)
    ours, theirs = full(lm), full(plain)
    for row, said in enumerate(theirs):
        expected = naive(said["logits"], said["ids"])["logp"]
        torch.testing.assert_close(stats["reference"].logp_NT[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
    assert (stats["policy"].logp_NT - stats["reference"].logp_NT).abs().max() > 0.1
    assert not stats["reference"].logp_NT.requires_grad
    loss = weighted(stats["policy"].logp_NT)
    rows = weighted_rows([naive(s["logits"], s["ids"])["logp"] for s in ours])
    if together:
        loss = loss + weighted(stats["policy"].extra["kl_reverse:reference"])
        pairs = zip(ours, theirs, strict=True)
        rows = rows + weighted_rows([naive_kl(a["logits"], b["logits"].detach()) for a, b in pairs])
    trained = {n for n, p in lm.model.named_parameters() if p.requires_grad}
    assert_grads(grads_of(lm, loss), grads_of(lm, rows))
    assert trained == {n for n, p in lm.model.named_parameters() if p.requires_grad} and trained
    with torch.no_grad():
        torch.testing.assert_close(full(lm)[0]["logits"], ours[0]["logits"])  # and the adapters are on again


# ---- precision


@pytest.mark.parametrize("name", ["untied", "softcap"])
def test_bfloat16_models_give_float32_statistics(name):
    lm, reference = model(name, dtype=torch.bfloat16), model(name, 1, torch.bfloat16)
    needs = Needs({"policy": frozenset({"logp", *DESCRIPTIVE}), "reference": frozenset({"logp"})})
    for n in (needs, Needs(needs.stats, {"j": lambda x, ids: {"gap": (x["policy"] - x["reference"]).abs().mean(-1)}})):
        stats = token_stats({"policy": lm, "reference": reference}, one_pack(), n, 3, trained="policy")["policy"]
        real = {k: v for k, v in stats.extra.items() if k not in ("rank", "top1")}
        assert {v.dtype for v in (stats.logp_NT, *real.values())} == {torch.float32}
        for row, said in enumerate(full(lm)):
            expected = naive(said["logits"].float(), said["ids"])["logp"]
            torch.testing.assert_close(stats.logp_NT[row, : len(expected)], expected, rtol=0, atol=0.1)
        loss = weighted(stats.logp_NT)
        lm.model.zero_grad()
        loss.backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all()
            for p in lm.model.parameters()
        )


def test_autocast_runs_the_head_alike_in_both_directions():
    """float32 weights under autocast: backward makes the logits again as forward made them."""
    lm = model("untied", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats({"policy": lm}, one_pack(), wants("logp"), 3)["policy"]
    hidden = torch.randn(5, 16, requires_grad=True)
    ids = torch.tensor([3, 4, 5, 6, 7])
    head = Head(lm.causal)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_probs(hidden, ids, head, (), contextlib.nullcontext, 3)["logp"]
    found.sum().backward()
    logits = torch.nn.functional.linear(hidden.detach().bfloat16(), head.module.weight.bfloat16()).float()
    delta = torch.nn.functional.one_hot(ids, V) - logits.softmax(-1)
    expected = delta @ head.module.weight
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-5)
    assert stats.logp_NT.dtype == torch.float32
    assert_grads(
        grads_of(lm, weighted(stats.logp_NT.double())),
        grads_of(lm, weighted(token_stats({"policy": lm}, one_pack(), wants("logp"))["policy"].logp_NT.double())),
        0.1,
    )


def test_second_derivatives_are_refused_not_wrong():
    lm = model("untied")
    stats = token_stats({"policy": lm}, one_pack(), wants("logp"))["policy"]
    weight = lm.causal.lm_head.weight
    with pytest.raises(RuntimeError, match=r"no second derivative through the LM head; compute .* in a joint"):
        torch.autograd.grad(stats.logp_NT.sum(), weight, create_graph=True)
    joint = {"mine": lambda logits, ids: {"mine": logits["policy"].log_softmax(-1).gather(-1, ids[:, None])[:, 0]}}
    mine = token_stats({"policy": lm}, one_pack(), Needs({"policy": frozenset()}, joint), 3)["policy"].extra["mine"]
    torch.testing.assert_close(mine, stats.logp_NT)
    (grad,) = torch.autograd.grad(mine.sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    step, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        there = token_stats({"policy": lm}, one_pack(), wants("logp"))["policy"].logp_NT.sum()
        ends.append(torch.autograd.grad(there, weight)[0].square().sum())
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((second * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_of_the_trunk():
    lm = model("untied")
    expected = grads_of(lm, weighted(token_stats({"policy": lm}, one_pack(), wants("logp"), 3)["policy"].logp_NT))
    lm.model.gradient_checkpointing_enable()
    lm.model.train()  # a Llama has no dropout
    wanted = wants("logp", "hidden_all", "module:model.layers.0.mlp")
    stats = token_stats({"policy": lm}, one_pack(), wanted, 3)["policy"]
    assert_grads(grads_of(lm, weighted(stats.logp_NT) + 0.0 * stats.hidden_all_NTLH.sum()), expected)


# ---- memory


class Watch(TorchDispatchMode):
    """Looks at every tensor that is made, forward and backward."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows, self.largest = vocabulary, 0, 0
        self.heads: dict[int, Tensor] = {}  # by place in memory, kept so that no place is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        weight = tensor.ndim == 2 and set(tensor.shape) == {self.vocabulary, _SIZES["hidden_size"]}
        if weight:
            self.heads[tensor.untyped_storage().data_ptr()] = tensor.detach()
        if self.vocabulary in tensor.shape and not weight:
            self.rows = max(self.rows, tensor.numel() // self.vocabulary)


WIDE, CHUNK = 4000, 8


@cache
def wide(seed: int) -> LM:
    sizes: dict[str, Any] = _SIZES | {"vocab_size": WIDE}
    config = transformers.LlamaConfig(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LM(transformers.LlamaForCausalLM(config).eval(), tiny.tokenizer())


def wide_pack():
    rng = np.random.default_rng(0)
    made = []
    for _ in range(3):
        prompt = tuple(int(i) for i in rng.integers(3, WIDE, 6))
        answers = [tuple(int(i) for i in rng.integers(3, WIDE, 9)) for _ in range(3)]
        none: dict[str, Any] = {"prompt_pieces": (b"",) * 6, "completion_pieces": (b"",) * 9, "tokenizer": "t"}
        made.append([Trace(prompt_ids=prompt, completion_ids=ids, **none) for ids in answers])
    return pack(made, tree="always")[0]


BETWEEN = frozenset({"logp", "entropy", "kl_forward:reference", "kl_reverse:reference"})


@pytest.mark.parametrize(
    "needs",
    [
        Needs({"policy": frozenset({"logp"})}),
        Needs({"policy": frozenset({"logp", *DESCRIPTIVE, "hidden_all"})}),
        Needs({"policy": BETWEEN, "reference": frozenset({"logp"})}, JOINT),
    ],
    ids=["logp", "descriptive", "kl and joint"],
)
def test_no_tensor_is_tokens_by_vocabulary(needs):
    models, p = {"policy": wide(0), "reference": wide(1)}, wide_pack()
    tokens = int(p.present_NT.sum())
    assert tokens == 81  # ten chunks
    token_stats(models, p, needs, CHUNK, trained="policy")  # the checks of a new model are made here
    with Watch(WIDE) as watch:
        stats = token_stats(models, p, needs, CHUNK, trained="policy")["policy"]
        loss = stats.logp_NT.sum()
        for key, value in stats.extra.items():
            loss = loss + value.sum() if value.requires_grad and key != "hidden_all" else loss
        loss.backward()
    assert 0 < watch.rows <= CHUNK
    assert watch.largest <= max(CHUNK * WIDE, WIDE * _SIZES["hidden_size"])
    assert wide(0).causal.lm_head.weight.grad is not None


def test_chunks_cost_no_tensor_of_the_head_each():
    needs = Needs({"policy": BETWEEN, "reference": frozenset({"logp"})}, JOINT)
    models, p, made = {"policy": wide(0), "reference": wide(1)}, wide_pack(), []
    for chunk in (CHUNK, 1000):
        with Watch(WIDE) as watch:
            stats = token_stats(models, p, needs, chunk, trained="policy")["policy"]
            sum(v.sum() for v in (stats.logp_NT, *stats.extra.values()) if v.requires_grad).backward()
        made.append((len(watch.heads), watch.rows))
    (many, rows), (one, whole) = made
    assert rows <= CHUNK and whole >= 81
    assert many == one, made


def test_the_watch_sees():
    """A test of the test: plain logits are noticed."""
    p = wide_pack()
    with Watch(WIDE) as watch:
        wide(0).causal(p.input_ids_RC, use_cache=False).logits.log_softmax(-1).sum().backward()
    assert watch.rows >= p.tokens > CHUNK
    assert watch.largest > max(CHUNK * WIDE, WIDE * _SIZES["hidden_size"])


def test_default_chunks_hold_64_megabytes():
    assert _default_chunk(Head(wide(0).causal)) == (1 << 24) // WIDE
    big = Head(wide(0).causal)
    big.vocabulary = 1 << 23
    assert _default_chunk(big) == 16


# ---- the head is checked


def test_a_head_that_is_not_known_is_refused():
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out: Any = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.9
            return out

    sizes: dict[str, Any] = _SIZES | {"initializer_range": 1e-4}
    config = transformers.LlamaConfig(**sizes)  # tiny logits are no excuse
    lm = LM(Shifted(config).eval(), tiny.tokenizer())
    with pytest.raises(ValueError, match="Shifted changes its logits after the head in a way not known here"):
        token_stats({"policy": lm}, one_pack(), wants("logp"))
    with pytest.raises(ValueError, match="no backbone that runs without its head"):
        Head(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**_SIZES, num_local_experts=2)))


def test_dropout_does_not_upset_the_check():
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=1, **sizes)
    causal = transformers.GPT2LMHeadModel(config).train()
    Head(causal)
    assert all(m.training for m in causal.modules())


def test_a_vocabulary_of_three():
    config = transformers.LlamaConfig(**(_SIZES | {"vocab_size": 3, "pad_token_id": None}))
    lm = LM(transformers.LlamaForCausalLM(config).eval(), tiny.tokenizer())
    trace = Trace(
        prompt_ids=(0,), completion_ids=(1, 2), prompt_pieces=(b"",), completion_pieces=(b"",) * 2, tokenizer="t"
    )
    stats = token_stats({"policy": lm}, pack([[trace, trace]], tree="always")[0], wants("logp", "rank"))["policy"]
    assert stats.rank_NT.max() <= 2 and (stats.logp_NT < 0).all()


# ---- the small things


def test_masked_sums_ignore_what_is_beyond():
    values = torch.tensor([[1.0, 2.0, torch.nan], [torch.inf, 4.0, 5.0], [torch.nan] * 3], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, True], [False] * 3])
    assert masked_sum(values, mask).tolist() == [3, 9, 0]
    assert masked_mean(values, mask).tolist() == [1.5, 4.5, 0]
    masked_mean(values, mask).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 0]]
    assert masked_sum(torch.tensor([[-torch.inf, 1.0]]), torch.tensor([[True, True]])).tolist() == [-torch.inf]
    assert masked_sum(torch.ones(2, 0), torch.ones(2, 0, dtype=torch.bool)).tolist() == [0, 0]


def test_impossible_tokens():
    """-inf log-probs: 0 log 0 is 0, a divergence from what lacks the support is infinite, gradients stay finite."""
    inf = torch.inf
    p = torch.tensor([[0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, 0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -inf], [0.0, 0.0, 0.0]])
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    kl = kl_divergence(logp, logq)
    expected = [np.log(3), 0.5 * (np.log(0.5) - float(logq[1, 0])) + 0.5 * (np.log(0.5) - float(logq[1, 1])), 0.0]
    torch.testing.assert_close(kl.detach(), torch.tensor(expected, dtype=torch.float32))
    kl.sum().backward()
    assert p.grad is not None and p.grad.isfinite().all()
    assert kl_divergence(torch.zeros(1, 2).log_softmax(-1), torch.tensor([[0.0, -inf]])).tolist() == [inf]
    described = describe(logp.detach(), torch.tensor([1, 0, 2]), DESCRIPTIVE)
    torch.testing.assert_close(described["entropy"], torch.tensor([0.0, np.log(2), np.log(3)], dtype=torch.float32))
    assert described["rank"].tolist() == [1, 0, 0] and described["top1"].tolist()[0] == 0
    torch.testing.assert_close(described["sumsq"], torch.tensor([1.0, 0.5, 1 / 3]))
    assert described["margin"].tolist() == [inf, 0.0, 0.0]


def test_stats_by_attribute():
    zeros, mask = torch.zeros(1, 2), torch.tensor([[True, False]])
    extra = {
        "entropy": zeros + 1,
        "hidden": zeros[..., None] + 2,
        "hidden_all": zeros[..., None, None] + 3,
        "odd_NT": zeros + 4,
    }
    stats = Stats(mask, zeros, mask, extra)
    assert stats.entropy_NT is stats.entropy is extra["entropy"]
    assert stats.hidden_NTH is extra["hidden"] and stats.hidden_all_NTLH is extra["hidden_all"]
    assert stats.odd_NT is extra["odd_NT"]  # a name that ends like a suffix is a name
    with pytest.raises(AttributeError, match="no statistic 'rank_NT'; there are: logp_NT, entropy, hidden"):
        _ = stats.rank_NT
    assert stats.sums().tolist() == [0] and stats.lengths().tolist() == [1]
    assert not hasattr(Stats(mask, zeros, mask), "kl_NT")


@pytest.mark.parametrize("name", ["untied", "bias"])
@pytest.mark.parametrize("layout", ["always", "never", "left"])
def test_hidden_at_the_ends(name, layout):
    """``hidden_end`` is the state of the last token itself, ``hidden_prompt`` that of the prompt's."""
    lm, tree = model(name), "always" if layout == "left" else layout
    needs = wants("logp", "hidden", "hidden_end", "hidden_prompt")
    for packed in pack(groups(), tree=tree, pad_left=layout == "left", ends=needs.ends):
        stats = token_stats({"policy": lm}, packed, needs)["policy"]
        for row, (g, k) in enumerate(packed.order):
            trace = groups()[g][k]
            states = lm.causal.base_model(torch.tensor([trace.ids("all")]), use_cache=False).last_hidden_state[0]
            p = len(trace.prompt_ids)
            torch.testing.assert_close(stats.hidden_end_NH[row], states[-1], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(stats.hidden_prompt_NH[row], states[p - 1], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(stats.hidden_NTH[row, : len(trace)], states[p - 1 : -1], atol=1e-6, rtol=1e-6)
            logits = lm.causal(torch.tensor([trace.ids("all")])).logits[0, p - 1 : -1].log_softmax(-1)
            logp = logits.gather(1, torch.tensor(trace.completion_ids, dtype=torch.long)[:, None])[:, 0]
            torch.testing.assert_close(stats.logp_NT[row, : len(trace)], logp, atol=1e-6, rtol=1e-6)
    with torch.enable_grad():
        stats = token_stats({"policy": lm}, packed, wants("hidden_end"))["policy"]
    assert stats.extra["hidden_end"].requires_grad and not wants("hidden_prompt").ends
    with pytest.raises(ValueError, match="ends=True"):
        token_stats({"policy": lm}, one_pack(), wants("hidden_end"))
