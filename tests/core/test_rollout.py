"""Sampling does what it records: log-probs, distributions, ends, and the prompt computed once a group."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from pertoken.core.lm import LM
from pertoken.core.rollout import Sampling, check_logprobs, inverse_cdf, sample
from pertoken.core.trace import Trace
from tests import tiny
from tests.methods.one_pass import exact_lm

PROMPTS = ["a", "how was the film", "The plot was great, the acting was not. A dull, lifeless film", "user question"]
TRANSFORMS = [
    Sampling(max_new_tokens=9),
    Sampling(max_new_tokens=9, temperature=0.7),
    Sampling(max_new_tokens=9, temperature=1.6, top_p=0.8),
    Sampling(max_new_tokens=9, top_k=7),
    Sampling(max_new_tokens=9, temperature=1.3, top_p=0.7, top_k=20, min_new_tokens=4),
]


def mistral() -> LM:
    """Attention of 6 positions, so that windows end inside prompts and inside completions."""
    config = MistralConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=6,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LM(MistralForCausalLM(config).eval(), tiny.tokenizer(), name="mistral")


def gpt2() -> LM:
    lm = exact_lm()
    lm.model.float()
    return lm


def stopping(lm: LM, share: float = 0.25) -> LM:
    """With many ids that end a completion, so that completions end at many places."""
    lm.stop_ids = frozenset(range(0, len(lm.tokenizer), round(1 / share))) | lm.stop_ids
    return lm


MODELS = {"llama": lambda: tiny.lm(dtype=torch.float32), "mistral": mistral, "gpt2": gpt2}


def flat(drawn: list[list[Trace]]) -> list[Trace]:
    return [trace for group in drawn for trace in group]


def ids(drawn: list[list[Trace]]) -> list[list[tuple[int, ...]]]:
    return [[t.completion_ids for t in group] for group in drawn]


@torch.no_grad()
def one_by_one(lm: LM, trace: Trace) -> torch.Tensor:
    """Logits (T, V) at each completion token, from one plain unpadded forward."""
    both = torch.tensor([trace.prompt_ids + trace.completion_ids])
    return lm.causal(input_ids=both).logits[0, len(trace.prompt_ids) - 1 : -1].double()


def naive_logps(logits: np.ndarray, how: Sampling, forbidden: list[int]) -> np.ndarray:
    """The renormalised distribution of one token, written out."""
    scaled = logits / how.temperature
    scaled[forbidden] = -np.inf
    alive = list(np.argsort(-scaled, kind="stable"))
    if how.top_k:
        alive = alive[: how.top_k]
    p = np.exp(scaled[alive] - scaled.max())
    p /= p.sum()
    if how.top_p < 1:
        enough = next(i for i in range(len(p)) if p[: i + 1].sum() >= how.top_p)
        alive, p = alive[: enough + 1], p[: enough + 1] / p[: enough + 1].sum()
    out = np.full(len(logits), -np.inf)
    out[alive] = np.log(p)
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", TRANSFORMS, ids=lambda s: f"T{s.temperature}-p{s.top_p}-k{s.top_k}")
def test_recorded_log_probs_are_those_of_a_fresh_forward(name, how):
    lm = stopping(MODELS[name](), 0.1)
    traces = flat(sample(lm, PROMPTS, 3, how, seed=1))
    found = check_logprobs(lm, traces)
    assert found["max_difference"] <= found["bound"] == 1e-4
    assert found["tokens"] == sum(map(len, traces))
    for trace in traces:
        assert trace.policy_logps is not None and trace.sampled_logps is not None
        logits = one_by_one(lm, trace)
        policy = logits.log_softmax(-1)
        for t, token in enumerate(trace.completion_ids):
            forbidden = [i for i in lm.stop_ids if i < logits.shape[1] and t < how.min_new_tokens]
            drawn = naive_logps(logits[t].numpy().copy(), how, forbidden)
            assert trace.policy_logps[t] == pytest.approx(float(policy[t, token]), abs=1e-4)
            assert trace.sampled_logps[t] == pytest.approx(drawn[token], abs=1e-3)  # 1e-4 / lowest temperature


def test_sampling_transform_equals_the_naive_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, 50))
    for how in [*TRANSFORMS, Sampling(top_p=1e-9), Sampling(top_k=1), Sampling(top_k=500, top_p=0.99)]:
        ours = how.logps(torch.from_numpy(logits)).numpy()
        naive = np.stack([naive_logps(row.copy(), how, []) for row in logits])
        np.testing.assert_allclose(ours, naive, atol=1e-12)
    cold = Sampling(temperature=1e-37).logps(torch.tensor([[10.0, 30.0, 20.0]]))  # 30 / 1e-37 is beyond float32
    assert cold.exp().tolist() == [[0.0, 1.0, 0.0]]


def test_check_detects_a_tampered_log_prob():
    lm = MODELS["llama"]()
    traces = flat(sample(lm, PROMPTS[:2], 2, Sampling(max_new_tokens=5)))
    assert traces[3].policy_logps is not None
    wrong = traces[3].policy_logps.copy()
    wrong[2] += 2e-3
    traces[3] = dataclasses.replace(traces[3], policy_logps=wrong)
    found = check_logprobs(lm, traces)
    assert found["max_difference"] == pytest.approx(2e-3, rel=0.05) and found["max_difference"] > found["bound"]
    with pytest.raises(ValueError, match="trace 1 has no recorded log-probs"):
        check_logprobs(lm, [traces[0], dataclasses.replace(traces[1], policy_logps=None)])
    with pytest.raises(ValueError, match="no traces"):
        check_logprobs(lm, [])
    assert check_logprobs(tiny.lm(seed=1, dtype=torch.float32), traces)["max_difference"] > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_a_draw_depends_neither_on_the_batch_nor_on_neighbours(name):
    lm, how = stopping(MODELS[name](), 0.1), Sampling(max_new_tokens=8, temperature=1.2, top_p=0.95)
    wanted = ids(sample(lm, PROMPTS, 4, how, seed=5))
    for batch in (1, 5, 8):
        assert ids(sample(lm, PROMPTS, 4, how, seed=5, batch=batch)) == wanted
    others = [PROMPTS[0], "I loved every minute", "x" * 50, PROMPTS[3]]
    beside = ids(sample(lm, others, 4, how, seed=5))
    assert [beside[0], beside[3]] == [wanted[0], wanted[3]]
    assert [g[:2] for g in wanted] == ids(sample(lm, PROMPTS, 2, how, seed=5))
    assert [g[:1] for g in wanted[:1]] == ids(sample(lm, PROMPTS[:1], 1, how, seed=5))


def test_seeds_and_places_decide():
    lm, how = MODELS["llama"](), Sampling(max_new_tokens=6)
    a = sample(lm, ["same", "same"], 3, how, seed=7)
    torch.manual_seed(123)  # global random state has no say
    again = sample(lm, ["same", "same"], 3, how, seed=7)
    assert ids(a) == ids(again)
    for x, y in zip(flat(a), flat(again)):
        np.testing.assert_array_equal(x.sampled_logps, y.sampled_logps)
    assert len({t.completion_ids for t in flat(a)}) == 6, "places of one prompt draw alike"
    assert not {t.completion_ids for t in flat(a)} & {t.completion_ids for t in flat(sample(lm, ["same"], 3, how))}


def test_ends():
    lm = stopping(MODELS["llama"]())
    traces = flat(sample(lm, PROMPTS, 16, Sampling(max_new_tokens=6), seed=2))
    assert {t.ended for t in traces} == {True, False}
    for t in traces:
        assert not set(t.completion_ids[:-1]) & lm.stop_ids
        assert t.ended == (t.completion_ids[-1] in lm.stop_ids)
        assert t.ended or len(t) == 6
    assert any(t.ended and len(t) == 1 for t in traces)
    late = flat(sample(lm, PROMPTS, 16, Sampling(max_new_tokens=6, min_new_tokens=4), seed=2))
    assert {len(t) for t in late} == {5, 6} and any(t.ended and len(t) == 5 for t in late)
    never = flat(sample(lm, PROMPTS[:1], 4, Sampling(max_new_tokens=3, min_new_tokens=3)))
    assert [(len(t), t.ended) for t in never] == [(3, False)] * 4


@pytest.mark.parametrize("name", MODELS)
def test_the_context_is_never_exceeded(name):
    lm = MODELS[name]()
    lm.context = 24
    if name == "gpt2":  # really no further position
        lm.model.transformer.wpe.weight = torch.nn.Parameter(lm.model.transformer.wpe.weight[:24].clone())
    prompts = [tuple(range(10, 10 + n)) for n in (3, 20, 23)]
    drawn = sample(lm, prompts, 2, Sampling(max_new_tokens=12, min_new_tokens=12))
    assert [[len(t) for t in g] for g in drawn] == [[12, 12], [4, 4], [1, 1]]
    assert not any(t.ended for t in flat(drawn))
    assert check_logprobs(lm, flat(drawn))["max_difference"] <= 1e-4
    with pytest.raises(ValueError, match="prompt 1 has 24 of 24 positions; cut it"):
        sample(lm, [(5, 6), tuple(range(10, 34))])


@pytest.mark.parametrize("name", MODELS)
def test_temperature_zero_is_transformers_greedy_search(name):
    lm = MODELS[name]()
    for prompt, drawn in zip(PROMPTS, sample(lm, PROMPTS, 2, Sampling(max_new_tokens=10, temperature=0.0))):
        wanted = lm.causal.generate(
            torch.tensor([lm.encode_prompt(prompt)]),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=sorted(lm.stop_ids),
            pad_token_id=lm.tokenizer.pad_token_id,
        )[0].tolist()
        assert [list(t.prompt_ids + t.completion_ids) for t in drawn] == [wanted, wanted]
        assert drawn[0].sampled_logps is not None and drawn[0].policy_logps is not None
        assert drawn[0].sampled_logps.tolist() == [0.0] * len(drawn[0])
        assert (drawn[0].policy_logps < 0).all()


def test_draws_follow_the_distribution():
    """20 000 first tokens by chi-square. The bound's false-alarm rate is 1e-6 with a fresh seed; the seed is fixed, so
    it is 0 from now on. The same test rejects a temperature that is off by a tenth."""
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        lm = LM(LlamaForCausalLM(config).eval(), tiny.tokenizer(), name="24 words")
    prompt, how = (5, 9, 3), Sampling(max_new_tokens=1, temperature=0.8, top_k=20)
    (drawn,) = sample(lm, [prompt], 20_000, how, seed=11)
    counts = np.bincount([t.completion_ids[0] for t in drawn], minlength=24)
    with torch.no_grad():
        logits = lm.causal(torch.tensor([prompt])).logits[0, -1].double().numpy()

    def p_value(temperature: float) -> float:
        p = np.exp(naive_logps(logits.copy(), dataclasses.replace(how, temperature=temperature), []))
        assert counts[p == 0].sum() == 0
        kept = p * 20_000 > 5
        found, wanted = (np.append(x[kept], x[~kept].sum()) for x in (counts, p * 20_000))
        cells = wanted > 0
        statistic = ((found - wanted)[cells] ** 2 / wanted[cells]).sum()
        return float(torch.special.gammaincc(torch.tensor((cells.sum() - 1) / 2), torch.tensor(statistic / 2)))

    assert p_value(0.8) > 1e-6
    assert p_value(0.88) < 1e-6


def test_inverse_cdf_never_gives_a_token_of_probability_zero():
    rng = np.random.default_rng(0)
    top = float(np.nextafter(1.0, 0.0))
    for vocabulary in (2, 7, 50_000):
        logits = torch.from_numpy(rng.normal(0, 4, (64, vocabulary))).float()
        zero = torch.from_numpy(rng.random((64, vocabulary)) < 0.5)
        zero[:, 0] = True  # the first and the last are where rounding shows
        zero[:, -1] = vocabulary > 2
        zero[zero.all(1), 1] = False
        logps = logits.masked_fill(zero, -torch.inf).log_softmax(-1)
        for uniform in (0.0, 1e-300, 0.5, 1 - 2**-24, top):
            token = inverse_cdf(logps, torch.full((64,), uniform, dtype=torch.float64))
            assert not zero.gather(1, token[:, None]).any(), uniform
    p = torch.tensor([0.25, 0.0, 0.5, 0.25]).log().expand(5, 4)
    assert inverse_cdf(p, torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76]).double()).tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_is_computed_once_a_group(name):
    lm = stopping(MODELS[name](), 0.1)
    sample(lm, PROMPTS[:1])  # what is checked once a model
    seen = []
    hook = lm.causal.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    drawn = sample(lm, PROMPTS, 6, Sampling(max_new_tokens=7))
    hook.remove()
    longest = max(len(g[0].prompt_ids) for g in drawn)
    assert seen[0] == (len(PROMPTS), longest)
    assert all(shape[1] == 1 for shape in seen[1:]) and len(seen) == max(map(len, flat(drawn)))
    assert sum(s[0] for s in seen[1:]) == sum(len(t) - 1 for t in flat(drawn)), "sequences that ended are computed on"


def test_dropout_is_off_and_stays_as_it_was():
    lm = MODELS["gpt2"]()
    wanted = ids(sample(lm, PROMPTS[:2], 2, Sampling(max_new_tokens=5)))
    lm.model.train()
    assert ids(sample(lm, PROMPTS[:2], 2, Sampling(max_new_tokens=5))) == wanted
    assert lm.model.training and lm.model.transformer.drop.training


def test_what_a_trace_says_of_itself():
    lm = MODELS["llama"]()
    how, finished = Sampling(max_new_tokens=3, top_p=0.9), []
    turns = [
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "?"},
    ]
    encoded = lm.encode_prompt("how")
    drawn = sample(lm, ["how", turns, encoded], 2, how, seed=4, system="sys", batch=2, progress=finished.append)
    assert sum(finished) == 6
    assert [g[0].meta for g in drawn] == [{"prompt": "how"}, {"prompt": turns}, {}]
    assert drawn[0][0].prompt_ids == lm.encode_prompt("how", "sys") and drawn[2][0].prompt_ids == encoded
    assert drawn[1][1].sampling == dataclasses.asdict(how) | {"model": lm.name, "seed": 4, "place": [1, 1]}
    assert drawn[0][0].tokenizer == lm.view.fingerprint
    assert Trace.from_json(drawn[0][0].to_json()).completion_ids == drawn[0][0].completion_ids
    assert sample(lm, [], 2) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_new_tokens": -1},
        {"max_new_tokens": 4, "min_new_tokens": 5},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"must lie|are needed"):
        Sampling(**wrong)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch": 0}, {"seed": -1}])
def test_calls_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="n >= 1, batch >= 1 and seed >= 0"):
        sample(MODELS["llama"](), ["a"], **({"n": 1} | wrong))


def test_a_broken_model_is_told():
    lm = MODELS["llama"]()
    prompts = [(10, 11), (10, 300)]
    with torch.no_grad():
        lm.causal.get_input_embeddings().weight[300] = torch.nan
    with pytest.raises(ValueError, match="after prompt 1 are not finite"):
        sample(lm, prompts, 2)


def test_flex_attention_is_put_aside_while_decoding():
    lm = tiny.lm(dtype=torch.float32)
    expected = sample(lm, ["how was it"], 2, Sampling(max_new_tokens=4), seed=1)
    lm.causal.set_attn_implementation("flex_attention")
    found = sample(lm, ["how was it"], 2, Sampling(max_new_tokens=4), seed=1)
    assert lm.causal.config._attn_implementation == "flex_attention"
    assert [t.completion_ids for t in found[0]] == [t.completion_ids for t in expected[0]]
