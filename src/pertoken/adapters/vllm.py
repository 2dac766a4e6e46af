"""Rollouts by vLLM, behind the interface of `core.rollout.sample`.

    generate = VLLMGenerator("Qwen/Qwen2.5-0.5B-Instruct", gpu_memory_utilization=0.3)
    RolloutStep(..., generate=generate)           # or: pertoken train grpo ... --generator vllm

The engine lives in this process; the policy's weights are loaded into it before each batch. It records the log-prob of
each token under the distribution that it was drawn from, but in its own arithmetic: switch truncated importance
sampling on (policy_loss importance_cap=2), and look at ``sampling`` in the traces.

Only its conversions are tested here: nobody of us has run it beside an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.lm import LM
from ..core.rollout import Sampling
from ..core.trace import Trace


class VLLMGenerator:
    """A generator on an engine of vLLM.

    Args:
        model: what the engine starts with (of the policy's architecture and tokenizer); or an engine that exists.
        options: of `vllm.LLM`, if the engine is to be made.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, model: Any, **options: Any):
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError("vLLM is not installed: pip install vllm (it wants a GPU)") from error
        made = LLM(model=model, logprobs_mode="processed_logprobs", **options) if isinstance(model, str) else model
        self.engine, self._params = made, SamplingParams

    def __call__(
        self,
        lm: LM,
        prompts: Sequence[tuple[int, ...]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        **_: Any,
    ) -> list[list[Trace]]:
        """n completions of each prompt by the policy as it is now. See `rollout.sample`."""
        sampling = sampling or Sampling()
        self.load_weights(lm)
        # an engine counts on from a request's seed for its n samples; two prompts of one seed would share their draws
        params = [self._params(**vllm_options(lm, n, sampling, seed + n * i)) for i in range(len(prompts))]
        asked = [{"prompt_token_ids": list(p)} for p in prompts]
        found = self.engine.generate(asked, params, use_tqdm=False)
        return [traces_of(lm, p, one.outputs, sampling, seed) for p, one in zip(prompts, found, strict=True)]

    def load_weights(self, lm: LM) -> None:
        """The policy's weights into the engine, and none of its cached prefixes any more."""
        engine = self.engine.llm_engine.model_executor.driver_worker.model_runner.model
        with lm.active() as causal:
            engine.load_weights((name, p.detach()) for name, p in causal.named_parameters())
        self.engine.reset_prefix_cache()


def vllm_options(lm: LM, n: int, sampling: Sampling, seed: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` that draw as `Sampling` says (top_k 0 is vLLM's -1)."""
    return {
        "n": n,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": sorted(lm.stop_ids),
        "logprobs": 0,  # of the drawn token alone
        "seed": seed % (1 << 31),
        "detokenize": False,
    }


def traces_of(lm: LM, prompt: Sequence[int], outputs: Sequence[Any], sampling: Sampling, seed: int) -> list[Trace]:
    """vLLM's completions of one prompt as traces.

    Raises:
        ValueError: an engine that gave no log-probs.
    """
    whole = sampling.temperature == 1 and sampling.top_p == 1 and not sampling.top_k and not sampling.min_new_tokens
    traces = []
    for out in outputs:
        ids = [int(i) for i in out.token_ids]
        if out.logprobs is None or len(out.logprobs) != len(ids):
            raise ValueError("vLLM gave no log-prob for each token; it must run with logprobs on")
        logps = np.array([float(at[i].logprob) for at, i in zip(out.logprobs, ids, strict=True)])
        how = {**vars(sampling), "model": lm.name, "seed": seed, "engine": "vllm"}
        traces.append(
            lm.trace_of_ids(
                prompt,
                ids,
                ended=bool(ids) and ids[-1] in lm.stop_ids,
                sampled_logps=logps,
                policy_logps=logps if whole else None,  # the same distribution, where nothing is cut or scaled
                sampling=how,
            )
        )
    return traces
