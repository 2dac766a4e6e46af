"""Token signals equal their definitions on full logits, and are computed once."""

import numpy as np
import pytest
import torch

from pertoken.core import signals
from pertoken.core.cache import ArrayCache
from pertoken.core.lm import LM
from pertoken.core.signals import prompt_states, token_signals
from tests import tiny


def by_definition(lm, trace):
    with torch.no_grad():
        said = lm.causal(torch.tensor([trace.ids("all")]), output_hidden_states=True)
    at = slice(len(trace.prompt_ids) - 1, len(trace.ids("all")) - 1)
    out = {name: [] for name in ("logp", "entropy", "margin", "rank")}
    for row, token in zip(said.logits[0, at].double().numpy(), trace.completion_ids, strict=True):
        logp = row - row.max() - np.log(np.exp(row - row.max()).sum())
        ordered = np.sort(logp)[::-1]
        out["logp"].append(logp[token])
        out["entropy"].append(-(np.exp(logp) * logp).sum())
        out["margin"].append(ordered[0] - ordered[1])
        out["rank"].append((logp > logp[token]).sum())
    return out | {"hidden": said.hidden_states[-1][0, at].numpy()}


def test_signals_are_what_they_say(tmp_path):
    lm = tiny.lm()
    traces = [t for group in tiny.groups(lm, n=2) for t in group] + [lm.trace_of_ids((5, 6), ())]
    found = token_signals(lm, traces, ("logp", "entropy", "margin", "rank", "hidden"), cache=ArrayCache(tmp_path))
    for trace, got in zip(traces, found, strict=True):
        for name, values in by_definition(lm, trace).items():
            assert len(got[name]) == len(trace)
            np.testing.assert_allclose(got[name], np.reshape(values, got[name].shape), atol=1e-5)
        assert got["logp"].dtype == np.float64 and got["hidden"].dtype == np.float32


def test_signals_are_computed_once(tmp_path, monkeypatch):
    lm, cache, calls = tiny.lm(), ArrayCache(tmp_path), []
    real = signals.completions_stats

    def counted(lm, traces, asked, **how):
        calls.append((len(traces), set(asked)))
        return real(lm, traces, asked, **how)

    monkeypatch.setattr(signals, "completions_stats", counted)
    a, b = [t for group in tiny.groups(lm, n=1) for t in group]
    token_signals(lm, [a], ("logp", "entropy"), cache=cache)
    token_signals(lm, [a, b, a], ("logp", "entropy"), cache=cache)
    assert calls == [(1, {"logp", "entropy"}), (1, {"logp", "entropy"})]  # a is known, b new
    again = token_signals(lm, [b], ("margin", "entropy"), cache=cache)
    assert calls[2:] == [(1, {"logp", "margin"})] and len(again[0]["margin"]) == len(b)
    token_signals(tiny.lm(1), [a], ("logp",), cache=cache)  # other weights, other numbers
    assert len(calls) == 4


def test_refusals(tmp_path):
    lm = tiny.lm()
    with pytest.raises(ValueError, match="another tokenizer"):
        token_signals(LM(lm.model, tiny.sentencepiece()), [lm.trace("a", "b")])
    with pytest.raises(ValueError, match="entropie"):
        token_signals(lm, [lm.trace("a", "b")], ("entropie",), cache=ArrayCache(tmp_path))


@pytest.mark.parametrize("prompt, size", [(3, 700), (250, 7), (300, 5), (255, 300)])
def test_traces_beyond_the_context_are_seen_in_windows(tmp_path, prompt, size):
    """Each token against a plain forward over what its window holds, written down token by token."""
    lm, rng = tiny.lm(), np.random.default_rng(0)
    ids = rng.integers(5, 300, prompt + size).tolist()
    trace = lm.trace_of_ids(ids[:prompt], ids[prompt:])
    wants = ("logp", "rank", "hidden", "hidden_end")
    with pytest.warns(UserWarning, match="1 of 2 traces are longer than the 256 tokens"):
        got, short = token_signals(lm, [trace, lm.trace_of_ids([5], [6])], wants, cache=ArrayCache(tmp_path))
    assert len(got["logp"]) == size == len(got["hidden"]) and len(short["logp"]) == 1
    first, seen = 0 if prompt < 256 else prompt - 128, {}
    for k in range(prompt, prompt + size):
        if k == first + 256:
            first = k - 128
        if first not in seen:
            with torch.no_grad():
                seen[first] = lm.causal(torch.tensor([ids[first : first + 256]]), output_hidden_states=True)
        said = seen[first]
        logp, at = said.logits[0].log_softmax(-1), k - first - 1
        assert got["logp"][k - prompt] == pytest.approx(float(logp[at, ids[k]]), abs=1e-5)
        assert got["rank"][k - prompt] == int((logp[at] > logp[at, ids[k]]).sum())
        np.testing.assert_allclose(got["hidden"][k - prompt], said.hidden_states[-1][0, at], atol=1e-4)
    np.testing.assert_allclose(got["hidden_end"], said.hidden_states[-1][0, k - first], atol=1e-4)


def test_prompt_states_are_those_of_the_whole_forward():
    lm = tiny.lm(layers=3)
    prompts = ["the plot", lm.encode_prompt("a film, a score and an acting"), "naive"]
    for layer in (1, 2):
        found = prompt_states(lm, prompts, layer, batch=2)
        for prompt, state in zip(prompts, found, strict=True):
            ids = prompt if isinstance(prompt, tuple) else lm.encode_prompt(prompt)
            with torch.no_grad():
                said = lm.causal(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0, -1]
            np.testing.assert_allclose(state, said, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in lm.causal.modules())
    assert prompt_states(lm, [], 1).shape == (0, 0)
    for layer in (0, 3):
        with pytest.raises(ValueError, match="from 1 to 2"):
            prompt_states(lm, prompts, layer)
    with pytest.raises(ValueError, match="more than the 256"):
        prompt_states(lm, [(5,) * 257], 1)
