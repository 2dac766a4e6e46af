"""What goes to vLLM and what comes back, in the shapes that it documents (the engine itself wants a GPU)."""

from types import SimpleNamespace

import numpy as np
import pytest

from pertoken.adapters.vllm import VLLMGenerator, traces_of, vllm_options
from pertoken.core.rollout import Sampling
from tests import tiny


def output(ids, logps):
    return SimpleNamespace(
        token_ids=ids, logprobs=[{i: SimpleNamespace(logprob=p)} for i, p in zip(ids, logps, strict=True)]
    )


def test_completions_become_traces():
    lm = tiny.lm(0)
    prompt, stop = lm.encode_prompt("How?"), next(iter(lm.stop_ids))
    outputs = [output([5, 6, stop], [-1.0, -2.0, -0.5]), output([7], [-3.0])]
    one, two = traces_of(lm, prompt, outputs, Sampling(), 3)
    assert (one.completion_ids, one.ended, two.ended) == ((5, 6, stop), True, False)
    np.testing.assert_array_equal(one.sampled_logps, [-1.0, -2.0, -0.5])
    np.testing.assert_array_equal(one.policy_logps, one.sampled_logps)
    assert one.sampling["engine"] == "vllm" and one.completion_pieces[-1] == b""
    cut = traces_of(lm, prompt, outputs, Sampling(temperature=0.7), 3)[0]
    assert cut.policy_logps is None and cut.sampled_logps is not None
    with pytest.raises(ValueError, match="no log-prob"):
        traces_of(lm, prompt, [SimpleNamespace(token_ids=[5], logprobs=None)], Sampling(), 0)


def test_options_draw_as_asked():
    lm = tiny.lm(0)
    found = vllm_options(lm, 4, Sampling(temperature=0.8, top_p=0.9, max_new_tokens=7, min_new_tokens=2), (1 << 40) + 1)
    assert (found["n"], found["temperature"], found["top_p"], found["top_k"]) == (4, 0.8, 0.9, -1)
    assert (found["max_tokens"], found["min_tokens"], found["seed"]) == (7, 2, 1)
    assert found["stop_token_ids"] == sorted(lm.stop_ids)
    assert vllm_options(lm, 1, Sampling(top_k=5), 0)["top_k"] == 5


def test_no_two_samples_share_a_seed(monkeypatch):
    """vLLM gives the k-th of a request's n samples its seed + k."""
    lm, asked = tiny.lm(0), []

    class Engine:
        def generate(self, prompts, params, use_tqdm):
            asked.extend(zip(prompts, params, strict=True))
            return [SimpleNamespace(outputs=[output([5], [-1.0])] * p["n"]) for p in params]

    generate = VLLMGenerator.__new__(VLLMGenerator)
    generate.engine, generate._params = Engine(), dict
    monkeypatch.setattr(VLLMGenerator, "load_weights", lambda self, lm: None)
    prompts = [lm.encode_prompt("How?")] * 2 + [lm.encode_prompt("Why?")]
    found = generate(lm, prompts, 4, Sampling(), seed=(1 << 40) + 7)
    assert [len(some) for some in found] == [4, 4, 4]
    assert [tuple(prompt["prompt_token_ids"]) for prompt, _ in asked] == prompts
    seeds = [params["seed"] + k for _, params in asked for k in range(params["n"])]
    assert len(set(seeds)) == 12


def test_vllm_is_named_where_it_is_missing():
    try:
        import vllm  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ImportError, match="pip install vllm"):
            VLLMGenerator("some/model")
