"""Every method computes on an accelerator what it computes on the CPU.

Skipped without CUDA. ``PERTOKEN_TEST_DEVICE`` names another device. What is compared is computed in float64 where the
model allows it (Llama's norms are float32 whatever the model's type), so that drawn tokens are the same, too: draws
come from generators on the CPU.
"""

# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pertoken.catalog import method
from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.lm import LM, load
from pertoken.core.packing import Cost, pack
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout import Sampling, sample
from pertoken.core.rollout_step import RolloutStep
from pertoken.core.signals import token_signals
from pertoken.core.stats import Needs, token_stats
from pertoken.core.step import ObjectiveStep
from pertoken.core.trace import Trace
from tests import tiny
from tests.contracts import test_decoders, test_explainers, test_scorers
from tests.contracts.harness import make_groups, make_scorer, model, state_of, without_dropout
from tests.contracts.test_objectives import ROWS, every_row
from tests.core import training
from tests.methods.one_pass import exact_lm
from tests.methods.rollouts import Given
from tests.methods.test_reagent import biased_bert

DEVICE = os.environ.get("PERTOKEN_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")


def on(lm: LM, device: str = DEVICE) -> LM:
    """A copy of the model there."""
    moved = copy.deepcopy(lm)
    moved.model.to(device)
    moved.causal.tie_weights()  # a device whose tensors are of another kind than the CPU's unties them
    return moved


def close(a: Any, b: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@every_row
def test_objectives(row):
    """Loss, metrics and gradients of the loop's own step."""
    objective = method(row.slug)()
    groups = make_groups(objective)
    found = []
    for device in ("cpu", DEVICE):
        policy = on(model("policy"), device)
        others = {name: on(model(name), device) for name in objective.stats if name != "policy"}
        step = ObjectiveStep(objective, policy, groups, others=others, max_tokens=40)
        if step.state is not None:
            step.state.double().load_state_dict(state_of(objective).state_dict())
            without_dropout(step.state)
        torch.manual_seed(0)
        result = step.run(list(range(len(groups))), train=True)
        weights = [p for m in step.modules.values() for p in m.parameters() if p.requires_grad]
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu() for p in weights]
        found.append((result, torch.cat(grads)))
    (a, a_grads), (b, b_grads) = found
    if row.stochastic:  # drawn on the device by its module
        assert np.isfinite(b.loss) and b_grads.isfinite().all()
        return
    close((b.loss, b.count), (a.loss, a.count))
    close(b_grads, a_grads, 1e-7)
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        close(b.metrics[name], a.metrics[name])


REINFORCED = [row.slug for row in ROWS if "rollouts" in {f.name for f in dataclasses.fields(method(row.slug))}]

STAGED = {"rto", "dr-irl", "dr-irl-ppo"}


@pytest.mark.parametrize("slug", REINFORCED)
def test_rollouts(slug):
    """A whole batch of a reinforced method: sampling, rewards, statistics of all its models, updates."""
    if slug in STAGED:
        pytest.skip("learns from what its stages before have made")
    kind = method(slug)
    objective = dataclasses.replace(
        kind(), rollouts=dataclasses.replace(kind().rollouts, sampling=Sampling(max_new_tokens=5))
    )
    rewards = [[0.5 * ((3 * i + 2 * t) % 7) - 1 for t in range(8)] for i in range(64)]  # equal ones would teach nothing
    found = []
    for device in ("cpu", DEVICE):
        lm = on(exact_lm(0), device)
        asked = [Example(prompt=f"film {row}?", kind="prompt", row=row) for row in range(2)]
        groups = [Group(example=example, prompt_ids=lm.encode_prompt(example.prompt)) for example in asked]
        models = {n: lm.reference() for n in objective.experience if n != "policy"}
        step = RolloutStep(objective, lm, groups, rewarder=Rewarder({"given": Given(rewards)}), models=models)
        if step.state is not None:
            step.state.double()
            for p in step.state.parameters():
                torch.nn.init.constant_(p, 0.01)
        torch.manual_seed(0)
        result = step.run([0, 1], train=True)
        grads = torch.cat([p.grad.flatten().cpu() for p in lm.model.parameters() if p.grad is not None])
        found.append((result.loss, result.count, grads))
    (*a, a_grads), (*b, b_grads) = found
    close(b, a)
    assert a_grads.abs().max() > 1e-6
    close(b_grads, a_grads, 1e-7)


@test_scorers.every_row
def test_scorers_agree(row):
    items, scorer = test_scorers.traces(), make_scorer(row)
    fields = [f.name for f in dataclasses.fields(scorer) if isinstance(getattr(scorer, f.name), (LM, torch.nn.Module))]
    moved = {name: _moved(getattr(scorer, name)) for name in fields}
    if not moved:
        pytest.skip("computes with no model")
    there = dataclasses.replace(scorer, **moved)
    for a, b in zip(scorer.score(items), there.score(items), strict=True):
        close(b.values, a.values, 1e-5)


def _moved(value: Any) -> Any:
    return on(value) if isinstance(value, LM) else copy.deepcopy(value).to(DEVICE)


@test_decoders.every_row
def test_decoders_agree(row, monkeypatch):
    """The same tokens with the same weights; parts that are models lie on the device, too."""
    found = []
    for device in ("cpu", DEVICE):
        monkeypatch.setattr(tiny, "lm", _tiny(device))
        found.append(test_decoders.generate(row))
    for some, others in zip(*found, strict=True):
        for a, b in zip(some, others, strict=True):
            assert a.trace.completion_ids == b.trace.completion_ids
            close(b.logw, a.logw, 1e-4)
            if a.credit is not None:
                close(b.credit.values, a.credit.values, 1e-4)


def _tiny(device: str, make: Any = tiny.lm) -> Any:
    return lambda *given, **options: on(make(*given, **{**options, "dtype": torch.float64}), device)


@test_explainers.every_row
def test_explainers_agree(row, monkeypatch):
    found = []
    for device in ("cpu", DEVICE):
        monkeypatch.setattr(tiny, "lm", _tiny(device))
        lm, explainer = test_explainers.made(row)
        found.append(explainer.explain(lm, test_explainers.traces(lm)))
    for some, others in zip(*found, strict=True):
        for a, b in zip(some, others, strict=True):
            close(b.values, a.values, 1e-4)


def test_sampling_and_signals():
    """Log-probs of sampled tokens, and the signals of a text."""
    lms = [on(tiny.lm(), device) for device in ("cpu", DEVICE)]
    drawn = [sample(lm, ["How was the film?", "So?"], 3, Sampling(max_new_tokens=6), seed=5) for lm in lms]
    for a, b in zip(*([t for some in traces for t in some] for traces in drawn), strict=True):
        assert isinstance(a, Trace) and a.completion_ids == b.completion_ids
        close(b.sampled_logps, a.sampled_logps, 1e-5)
    texts = [lms[0].trace("So?", "a wonderful score, and a plot 😀")]
    wanted = ("logp", "entropy", "rank")
    one, other = (token_signals(lm, texts, wanted)[0] for lm in lms)
    for name in wanted:
        close(other[name], one[name], 1e-5)


def test_a_masked_lm_replaces_from_its_own_device():
    lm = on(tiny.lm())
    ids = (lm.tokenizer.bos_token_id, *lm.tokenizer.encode("The film was great"))
    likeliest = [lm.tokenizer.encode(text)[0] for text in (" film", " was")]
    drawn = [biased_bert(lm.tokenizer, likeliest, at)(lm, ids)(2, np.random.default_rng(0)) for at in ("cpu", DEVICE)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_packed_is_flat(attention, tmp_path):
    """A shared prompt computed once gives the log-probs and gradients of the flat batch, whatever the attention."""
    if attention == "flex_attention" and DEVICE != "cuda":
        pytest.skip("compiled for CUDA")
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(**shape, vocab_size=len(tiny.tokenizer()), initializer_range=0.3)  # heads of 16: the least
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LM(LlamaForCausalLM(config), tiny.tokenizer()).save(tmp_path)
    lm = load(tmp_path, device=DEVICE, attention=attention)
    groups = tiny.groups(lm, n=6, k=4, seed=1, longest=30, prompt=40)
    found = []
    for tree in ("never", "always"):
        total, grads = {}, None
        lm.model.zero_grad()
        for packed in pack(groups, cost=Cost.of(lm.causal), tree=tree, max_tokens=600):
            stats = token_stats({"policy": lm}, packed, Needs({"policy": frozenset({"logp"})}), trained="policy")
            sums = stats["policy"].sums()
            sums.sum().backward()
            total |= dict(zip(packed.order, sums.tolist(), strict=True))
        grads = torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None]).cpu()
        found.append((np.array([total[k] for k in sorted(total)]), grads))
    close(found[1][0], found[0][0], 1e-4)
    scale = float(found[0][1].abs().max())
    close(found[1][1] / scale, found[0][1] / scale, 1e-4)


def test_a_resumed_run_is_the_same(tmp_path):
    """Optimizer and random states come back to the device."""

    def step() -> training.Stop:
        lm = on(exact_lm())
        return training.Stop(training.DPO(beta=0.5), lm, training.make_groups(lm, 8))

    settings = training.config(save_every=1)
    whole = training.train(step(), tmp_path / "whole", settings)
    broken = step()
    broken.after = 2
    with pytest.raises(KeyboardInterrupt):
        training.train(broken, tmp_path / "broken", settings)
    again = training.train(step(), tmp_path / "broken", settings, resume=True)
    close([r["loss"] for r in again], [r["loss"] for r in whole], 1e-9)
