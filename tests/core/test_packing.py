"""Packing: a tree, flat rows and one sequence at a time say the same, in log-probs and in gradients."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from pertoken.core.attention import additive_mask, attends, block_mask
from pertoken.core.lm import LM
from pertoken.core.packing import Cost, Pack, evaluating, pack, shares_prompts
from pertoken.core.stats import Needs, token_stats
from pertoken.core.trace import Trace
from tests import tiny

V = 320
FLOAT32 = 2e-6
LOGP = Needs({"policy": frozenset({"logp"})})
_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "initializer_range": 0.3,
}
WINDOW = 4  # shorter than prompt + completion, so that it matters
_LATER: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
_MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
ARCHITECTURES = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES),
    "Qwen2 windows": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES | _LATER),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _SIZES | {"head_dim": 8}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", _SIZES | {"sliding_window": WINDOW}),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", _GPT | {"bos_token_id": 0, "eos_token_id": 1}),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _SIZES),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _SIZES | {"head_dim": 8} | _MIXED),
}


@cache
def model_of(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> LM:
    config, cls, options = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, cls)._from_config(
            getattr(transformers, config)(**options), attn_implementation=attention
        )
    return LM(model.to(dtype).eval(), tiny.tokenizer())


def some_groups(seed: int = 0, shapes=((2, 3), (1, 1), (4, 2), (5, 1), (3, 5)), longest: int = 9) -> list[list[Trace]]:
    """Prompts of 2 to 9 tokens; (K, ...) completions each, some of one token, some empty."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(int(i) for i in rng.integers(3, V, n))

    out = []
    for k, prompt in shapes:
        head = ids(prompt + 2)
        lengths = [int(n) for n in rng.integers(2, longest + 1, k)]
        lengths[0] = 1 if k > 1 else lengths[0]
        if k > 2:
            lengths[1] = 0
        out.append([a_trace(head, ids(n)) for n in lengths])
    return out


def a_trace(prompt: tuple[int, ...], completion: tuple[int, ...], emitted=None) -> Trace:
    return Trace(
        prompt_ids=prompt,
        completion_ids=completion,
        prompt_pieces=(b"x",) * len(prompt),
        completion_pieces=(b"y",) * len(completion),
        tokenizer="t",
        emitted=emitted,
    )


def weight_of(g: int, k: int, t: int) -> Tensor:
    """A weight a token, so that a mistaken place would show in the gradients."""
    return torch.cos(torch.arange(t) + 1.7 * g + 0.9 * k)


def one_by_one(lm: LM, groups) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:
    """Log-probs of every completion and gradients of their weighted sum, by `model(ids).logits`."""
    logps, total = {}, torch.zeros((), dtype=torch.float64)
    lm.model.zero_grad()
    for g, group in enumerate(groups):
        for k, trace in enumerate(group):
            ids, p = torch.tensor([trace.ids("all")]), len(trace.prompt_ids)
            logits = lm.model(ids, use_cache=False).logits[0, p - 1 : -1]
            logps[g, k] = logits.log_softmax(-1).gather(-1, ids[0, p:, None])[:, 0]
            total = total + (logps[g, k] * weight_of(g, k, len(trace)).to(logps[g, k])).sum()
    total.backward()
    return {key: v.detach() for key, v in logps.items()}, gradients(lm)


def packed(lm: LM, groups, packs: list[Pack]) -> tuple[dict[tuple[int, int], Tensor], list[Tensor]]:
    """The same by packs."""
    logps = {}
    lm.model.zero_grad()
    for p in packs:
        stats = token_stats({"policy": lm}, p, LOGP)["policy"]
        total = torch.zeros((), dtype=torch.float64)
        for row, (g, k) in enumerate(p.order):
            t = len(groups[g][k])
            assert (g, k) not in logps
            logps[g, k] = stats.logp_NT[row, :t].detach()
            assert not stats.logp_NT[row, t:].any()
            total = total + (stats.logp_NT[row, :t] * weight_of(g, k, t).to(stats.logp_NT)).sum()
        if total.requires_grad:
            total.backward()
    return logps, gradients(lm)


def gradients(lm: LM) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in lm.model.parameters()]


def assert_same(one, two, atol: float, of_gradients: float | None = None) -> None:
    """Log-probs to `atol`, gradients to `of_gradients` (default: the same) times the largest of them."""
    assert one[0].keys() == two[0].keys()
    for key in one[0]:
        torch.testing.assert_close(two[0][key], one[0][key], rtol=0, atol=atol)
    largest = max(g.abs().max() for g in one[1])
    assert largest > 0.1  # there is something to compare
    for a, b in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=float((of_gradients or atol) * largest))


# ---- the same numbers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tree_flat_and_one_by_one_agree(name, attention):
    lm, groups = model_of(name, attention), some_groups()
    assert shares_prompts(lm.causal)
    plain = one_by_one(lm, groups)
    for tree in ("always", "never", "auto"):
        assert_same(plain, packed(lm, groups, pack(groups, tree=tree)), 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-NeoX", "Mistral", "Gemma3"])
def test_they_agree_to_rounding_in_float64(name, attention):
    """Except where transformers itself works in float32 whatever the model's dtype: RMSNorm (the log-probs do not show
    it, each position is computed alike) and the softmax of eager attention."""
    logps = 1e-10 if attention == "sdpa" or name == "GPT-2" else FLOAT32
    grads = logps if "GPT" in name else FLOAT32
    lm, groups = model_of(name, attention, torch.float64), some_groups(1)
    plain = one_by_one(lm, groups)
    for tree, left in itertools.product(("always", "never"), (False, True)):
        packs = pack(groups, tree=tree, pad_left=left)
        if tree == "always":
            assert not any(p.causal for p in packs if len(p.order) > len(p.input_ids_RC))
        assert_same(plain, packed(lm, groups, packs), logps, grads)


def test_the_window_matters():
    """A test of the tests: another window gives other numbers, so the sliding mask is really compared."""
    lm, groups = model_of("Mistral", "eager"), some_groups()
    with torch.no_grad():
        stats = token_stats({"policy": lm}, pack(groups, tree="always")[0], LOGP)["policy"].logp_NT
        lm.causal.config.sliding_window = 64
        wide = token_stats({"policy": lm}, pack(groups, tree="always")[0], LOGP)["policy"].logp_NT
        lm.causal.config.sliding_window = WINDOW
    assert (stats - wide).abs().max() > 0.01


@pytest.mark.parametrize("seed", range(4))
def test_random_layouts(seed):
    """Any K, any lengths, any budget, either padding: every completion once, and the same numbers."""
    rng = np.random.default_rng(seed)
    lm = model_of("GPT-2", "sdpa", torch.float64)
    shapes = [(int(rng.integers(1, 6)), int(rng.integers(0, 7))) for _ in range(int(rng.integers(1, 7)))]
    groups = some_groups(seed, shapes, longest=int(rng.integers(2, 14)))
    plain = one_by_one(lm, groups)
    for budget, launch in ((1, 0.0), (40, 1.8e9), (4096, 1e12)):
        cost = Cost(1e6, 1e3, launch)
        for tree in ("always", "never", "auto"):
            packs = pack(groups, cost=cost, tree=tree, max_tokens=budget, pad_left=bool(rng.integers(2)))
            assert_same(plain, packed(lm, groups, packs), 1e-10)


def test_several_prompts_share_a_row():
    groups = some_groups(2, ((1, 30), (2, 3), (2, 4), (3, 2)))
    packs = pack(groups, cost=Cost(1.0, 0.0, 1e9), tree="always")
    assert len(packs) == 1 and not packs[0].causal
    per_row = [len({int(s) for s in row if s >= 0}) for row in packs[0].segment_RC]
    assert max(per_row) > 1 and sum(per_row) == 4
    for name in ("GPT-2", "Gemma3"):
        lm = model_of(name, "sdpa", torch.float64)
        assert_same(one_by_one(lm, groups), packed(lm, groups, packs), 1e-10, FLOAT32)


def test_completions_of_no_and_of_one_token():
    lm = model_of("GPT-2", "sdpa", torch.float64)
    prompt = (5, 6, 7)
    groups = [[a_trace(prompt, c) for c in ((), (9,), ())], [a_trace((8, 9), (4,))], [a_trace((3,), ())]]
    for tree in ("always", "never", "auto"):
        assert_same(one_by_one(lm, groups), packed(lm, groups, pack(groups, tree=tree)), 1e-10)
    empty = pack([[a_trace(prompt, ())]])[0]
    needs = Needs({"policy": frozenset({"logp", "entropy", "top1", "hidden"})})
    stats = token_stats({"policy": lm}, empty, needs)["policy"]
    assert stats.logp_NT.shape == (1, 0) and stats.sums().tolist() == [0] and stats.hidden_NTH.shape == (1, 0, 16)
    assert empty.order == ((0, 0),) and pack([]) == []
    lm.model.zero_grad()
    stats.sums().sum().backward()  # a batch that happens to hold nothing: zeros, not what was in memory
    assert not any(g.any() for g in gradients(lm))


# ---- the layout


@pytest.mark.parametrize("tree", ["always", "never", "auto"])
@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_every_completion_is_in_one_pack_and_a_group_is_whole(tree, max_tokens):
    groups = some_groups(3, [(k, p) for k in range(1, 6) for p in (0, 3, 6)])
    packs = pack(groups, tree=tree, max_tokens=max_tokens)
    order = [o for p in packs for o in p.order]
    assert sorted(order) == [(g, k) for g, group in enumerate(groups) for k in range(len(group))]
    for p in packs:
        of_pack = [g for g, _ in p.order]
        assert all(of_pack.count(g) == len(groups[g]) for g in of_pack)
        assert p.tokens <= max_tokens or len(set(of_pack)) == 1
        assert p.tokens == p.input_ids_RC.numel()


def test_tensors_say_what_the_traces_say():
    groups = some_groups(4, ((3, 2), (1, 4), (2, 0)))
    groups[1] = [dataclasses.replace(t, emitted=tuple(i % 2 == 0 for i in range(len(t)))) for t in groups[1]]
    for tree, left in itertools.product(("always", "never"), (False, True)):
        for p in pack(groups, tree=tree, pad_left=left):
            flat_ids, flat_positions = p.input_ids_RC.flatten(), p.position_ids_RC.flatten()
            for row, (g, k) in enumerate(p.order):
                trace, t = groups[g][k], len(groups[g][k])
                assert p.ids_NT[row].tolist() == [*trace.completion_ids] + [0] * (p.ids_NT.shape[1] - t)
                assert p.present_NT[row].tolist() == [i < t for i in range(p.ids_NT.shape[1])]
                assert p.mask_NT[row, :t].tolist() == trace.mask.tolist() and not p.mask_NT[row, t:].any()
                if t:
                    at = p.predict_NT[row, :t]
                    assert flat_ids[at].tolist() == [trace.prompt_ids[-1], *trace.completion_ids[:-1]]
                    before = len(trace.prompt_ids) - 1
                    assert flat_positions[at].tolist() == list(range(before, before + t))
            # the trunk of a tree is there once
            if tree == "always":
                tokens = sum(len(groups[g][0].prompt_ids) for g in {g for g, _ in p.order})
                tokens += sum(max(len(groups[g][k]) - 1, 0) for g, k in p.order)
                assert int((p.segment_RC >= 0).sum()) == tokens


def test_observation_tokens_are_computed_but_not_counted():
    lm = model_of("Llama", "sdpa", torch.float64)
    emitted = (True, False, False, True, True)
    groups = [[a_trace((5, 6), (7, 8, 9, 10, 11), emitted), a_trace((5, 6), (7, 8, 9))]]
    plain, _ = one_by_one(lm, groups)
    stats = token_stats({"policy": lm}, pack(groups)[0], LOGP)["policy"]
    torch.testing.assert_close(stats.logp_NT[0].detach(), plain[0, 0])  # all of them are there
    expected = [plain[0, 0][torch.tensor(emitted)].sum(), plain[0, 1].sum()]
    torch.testing.assert_close(stats.sums().detach(), torch.stack(expected))
    assert stats.lengths().tolist() == [3, 3]
    assert stats.present_NT.sum(1).tolist() == [5, 3]


def test_plain_rows_need_no_mask():
    groups = some_groups(5, ((1, 2), (1, 5), (1, 3)))
    for p in pack(groups, tree="never"):
        assert p.causal and "attention_mask" not in p.inputs(model_of("Llama").causal)
        # nor does transformers make one: positions run on through the padding instead of starting again
        assert (p.position_ids_RC == torch.arange(p.position_ids_RC.shape[1])).all()
    assert not any(p.causal for p in pack(groups, tree="never", pad_left=True))
    assert not any(p.causal for p in pack(some_groups(5, ((2, 2),)), tree="always"))


def test_never_means_one_completion_a_row():
    groups = some_groups(6, ((1, 30), (2, 2), (2, 2)))
    for p in pack(groups, tree="never", cost=Cost(1.0, 0.0, 1e9)):
        assert p.causal and len(p.order) == len(p.input_ids_RC)


# ---- the choice


def layout_of(prompt: int, response: int, k: int, cost: Cost) -> str:
    groups = [[a_trace((5,) * prompt, (6,) * response) for _ in range(k)]]
    branches = max(int(p.branch_RC.max()) for p in pack(groups, cost=cost, max_tokens=1))
    return "tree" if branches > 1 else "flat"


def test_cost_chooses():
    cost = Cost.of(tiny.llama())
    assert layout_of(600, 8, 4, cost) == "tree"
    # branches of a tree do not meet where attention skips what is masked; a dense mask computes them against each other
    assert cost.skips and layout_of(4, 900, 4, cost) == "tree"
    assert layout_of(4, 900, 4, dataclasses.replace(cost, skips=False)) == "flat"
    assert layout_of(600, 8, 1, cost) == "flat"
    assert cost.linear > 0 and cost.shares
    assert cost.stretch(10) == 10 * cost.linear + 100 * cost.attention
    # without attention only the number of tokens counts, so sharing a prompt always pays
    assert layout_of(4, 900, 4, Cost(1.0, 0.0, 0.0)) == "tree"
    # a row of 100 + 2 x 100 has 90,000 pairs, two of 200 have 80,000, and 300 tokens are 100 fewer than 400
    assert layout_of(100, 100, 2, Cost(200.0, 1.0, 0.0)) == "tree"
    assert layout_of(100, 100, 2, Cost(200.0, 1.0, 0.0, masked=2.0)) == "flat"  # 90,000 more, for 20,000 saved
    assert layout_of(100, 100, 1, Cost(200.0, 1.0, 0.0, masked=2.0)) == "flat"
    assert Cost(1.0, 1.0, 0.0, masked=4.0).stretch(3) == Cost(1.0, 1.0, 0.0).stretch(3) == 12.0  # no branch, no mask


def test_short_rows_share_one_where_their_mask_is_worth_it():
    groups = [[a_trace((5,) * 10, (6,) * n)] for n in (91, 41, 41, 41, 41)]  # of 100 and 4 x 50 positions
    rows = lambda **how: [p.input_ids_RC.shape[0] for p in pack(groups, cost=Cost(1.0, 1.0, 1e9, **how))]
    assert rows() == rows(masked=1.5) == [3] and rows(masked=2.0) == [5]  # 3 x 2 x 10,000 are more than 5 x 10,000
    trees = [group * 2 for group in groups]  # these read a mask however they lie
    assert len(pack(trees, cost=Cost(1.0, 0.0, 1e9, masked=9.0), tree="always")[0].input_ids_RC) < 5


def test_cost_counts_the_layers():
    model = tiny.llama(layers=2)
    layers = sum(p.numel() for p in model.model.layers.parameters()) + model.model.norm.weight.numel()
    assert Cost.of(model).linear == layers and Cost.of(model).attention == 2 * 32 * 2
    tied = model_of("GPT-2").causal
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    inner = sum(p.numel() for n, p in tied.transformer.named_parameters() if n != "wte.weight")
    assert Cost.of(tied).linear == inner


def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.INFO, "pertoken.core.packing"):
        pack(some_groups(), tree="always")
    assert "packed 5 groups (4 as trees: cheaper there) into" in caplog.text


def test_what_cannot_be_packed():
    good = some_groups()
    with pytest.raises(ValueError, match="tree='yes' is not one of auto, always, never"):
        pack(good, tree="yes")
    with pytest.raises(ValueError, match="group 1 has no completion"):
        pack([good[0], []])
    with pytest.raises(ValueError, match=r"group 0 has an empty prompt.*start it with BOS"):
        pack([[a_trace((), (4,))]])
    with pytest.raises(ValueError, match="completions of group 0 follow different prompts"):
        pack([[a_trace((4,), (4,)), a_trace((5,), (4,))]])


# ---- masks


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("left", [False, True])
def test_attends_against_a_loop(window, left):
    for p in pack(some_groups(7), tree="always", pad_left=left, cost=Cost(1.0, 0.0, 1e9)):
        for s, b, t in zip(p.segment_RC, p.branch_RC, p.position_ids_RC, strict=True):
            columns = torch.arange(len(s))
            found = attends(s, b, t, columns[:, None], columns[None, :], window)
            segment, branch, position = s.tolist(), b.tolist(), t.tolist()
            for q, k in itertools.product(range(len(segment)), repeat=2):
                same = segment[q] == segment[k]
                seen = branch[k] == 0 or branch[k] == branch[q]
                near = window is None or position[q] - position[k] < window
                assert bool(found[q, k]) == (k <= q and same and seen and near)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_block_mask_is_the_dense_mask(window):
    """FlexAttention's mask, made on the CPU, cell by cell."""
    from torch.nn.attention.flex_attention import create_mask

    for p in pack(some_groups(8), tree="always", cost=Cost(1.0, 0.0, 1e9)):
        layout = p.segment_RC, p.branch_RC, p.position_ids_RC
        dense, block = additive_mask(*layout, window, torch.float32), block_mask(*layout, window)
        rows, columns = p.input_ids_RC.shape
        cells = create_mask(block.mask_mod, rows, None, columns, columns, device="cpu")
        assert torch.equal(cells, dense == 0) and block.shape == (rows, 1, columns, columns)
        blocks = block.to_dense()[:, :, 0, 0]  # of 128 x 128 cells: short rows have one
        assert blocks.shape == (rows, 1) and bool(blocks.all())


def test_flex_attention_gets_a_block_mask_for_each_kind_of_layer():
    lm = model_of("Gemma3", "eager")
    p = pack(some_groups(), tree="always")[0]
    dense = p._inputs(lm.causal)["attention_mask"]
    assert set(dense) == {"full_attention", "sliding_attention"}
    assert not torch.equal(dense["full_attention"], dense["sliding_attention"])
    assert set(torch.unique(dense["full_attention"]).tolist()) == {0.0, torch.finfo(torch.float32).min}
    assert p.to(torch.device("cpu")) is p and p.to(torch.device("meta")).order == p.order


# ---- models that cannot


def other(name: str, **options) -> LM:
    config = getattr(transformers, f"{name}Config")(vocab_size=V, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager")
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
    return LM(model.eval(), tiny.tokenizer())


@pytest.mark.parametrize(
    "name, options",
    [
        ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),  # ALiBi: distances by column
        ("Falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}),
        ("GPTNeo", {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
        ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_models_that_cannot_share_a_prompt_are_laid_out_flat(name, options):
    """Silently wrong numbers are the worst that could happen here."""
    lm, groups = other(name, **options), some_groups(9, ((3, 3), (2, 2)), longest=5)
    cost = Cost.of(lm.causal)
    assert not cost.shares and not shares_prompts(lm.causal)
    packs = pack(groups, cost=cost)
    assert all(p.causal for p in packs)
    plain, _ = one_by_one(lm, groups)
    with torch.no_grad():
        found, _ = packed(lm, groups, packs)
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"does not keep the branches of a prompt apart.*tree='never'"):
        token_stats({"policy": lm}, pack(groups, tree="always")[0], LOGP)


def test_evaluating_restores_every_module():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert [m.training for m in model.modules()] == before and True in before and False in before
