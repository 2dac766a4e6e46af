"""The step of an objective: every number reaches the completion it belongs to, and every gradient the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pertoken.core.data import Group, encode
from pertoken.core.examples import Example
from pertoken.core.lm import LM
from pertoken.core.loop import StepResult
from pertoken.core.protocols import Batch, Loss
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import completions_stats
from pertoken.core.stats import Stats
from pertoken.core.step import REFERENCE, ObjectiveStep, live_models, needs_of, recomputed_layers, with_mismatched
from pertoken.train.dpo import DPO
from pertoken.train.kto import KTO
from pertoken.train.sft import SFT
from pertoken.train.tdpo import TDPO
from tests import tiny
from tests.core.training import (
    FIRST_ROW,
    Stop,
    config,
    largest_difference,
    make_groups,
    timeless,
    train,
    weights,
    with_reference,
)
from tests.methods.one_pass import exact_lm

LOGP = frozenset({"logp"})


def gradients(step: ObjectiveStep, rows: list[int]) -> tuple[StepResult, dict[str, Tensor]]:
    """What one training batch leaves."""
    for module in step.modules.values():
        module.zero_grad(set_to_none=True)
    result = step.run(rows, train=True)
    named = {f"{m}.{n}": p for m, module in step.modules.items() for n, p in module.named_parameters()}
    return result, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


def naive_logps(lm: LM, trace: Any) -> Tensor:
    """Log-probs (T,) from a plain forward."""
    ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
    return lm.causal(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(trace) :, 0]


def test_a_reference_column_is_a_live_reference():
    lm, reference = exact_lm(), exact_lm(1)
    groups = with_reference(make_groups(lm, 6), reference)
    bare = [dataclasses.replace(g, columns={}) for g in groups]
    column = ObjectiveStep(DPO(), lm, groups, max_tokens=60)
    live = ObjectiveStep(DPO(), lm, bare, others={"reference": reference}, max_tokens=60)
    a, b = gradients(column, [4, 0, 3]), gradients(live, [4, 0, 3])
    assert a[0].loss == pytest.approx(b[0].loss, rel=1e-9) and a[0].count == 3
    assert a[0].loss != pytest.approx(3 * math.log(2), rel=1e-2)
    assert largest_difference(a[1], b[1]) < 1e-9 < max(float(g.abs().max()) for g in a[1].values())
    assert all(p.grad is None for p in reference.model.parameters())
    with pytest.raises(ValueError, match="no column 'reference_logps'"):
        ObjectiveStep(DPO(), lm, bare).run([0], train=False)


def test_which_models_run_beside_the_policy():
    assert live_models(DPO()) == () and live_models(SFT()) == ()
    assert live_models(TDPO()) == ("reference",)  # its KL needs the whole distribution
    assert live_models(Entropy()) == ("reference",)  # so does a joint


@dataclasses.dataclass
class Columns:
    """Not a loss to learn by: it looks at what it is given. Column ``own`` holds the policy's own log-probs."""

    data: str = "pairs"
    batch_coupled: bool = False
    seen: list[Batch] = dataclasses.field(default_factory=list)
    models: ClassVar[tuple[str, ...]] = ()

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        return {"policy": LOGP}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None) -> Loss:
        self.seen.append(batch)
        policy = stats["policy"]
        torch.testing.assert_close(batch.columns["own"], policy.logp_NT.detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(batch.columns["total"], policy.logp_NT.detach().sum(1), rtol=0, atol=1e-9)
        assert batch.columns["row"].tolist() == list(batch.rows)
        assert REFERENCE not in batch.columns
        n = len(policy.logp_NT)
        pairs = batch.pairs_B2.tolist() if batch.pairs_B2 is not None else [[i] for i in range(n)]
        assert sorted(i for pair in pairs for i in pair) == list(range(n))
        for pair in pairs:
            assert len({batch.rows[i] for i in pair}) == 1
            assert batch.columns["place"][pair].tolist() == list(range(len(pair)))
        return Loss(policy.logp_NT.sum(), float(n))


def with_columns(groups: list[Group], lm: LM) -> list[Group]:
    for g in groups:
        own = [s["logp"] for s in completions_stats(lm, g.traces)]
        g.add_column("own", own)
        g.add_column("total", [float(x.sum()) for x in own])
        g.add_column("place", list(range(len(own))))
        g.add_column("row", g.example.row)
    return groups


@pytest.mark.parametrize("kind", ["pair", "sft"])
@pytest.mark.parametrize("tree", ["auto", "always", "never"])
@pytest.mark.parametrize("max_tokens", [1, 70, 4096])
def test_columns_arrive_at_their_completions(kind, tree, max_tokens):
    lm = exact_lm()
    groups = with_columns(make_groups(lm, 7, kind), lm)
    objective = Columns(data="pairs" if kind == "pair" else "sft")
    step = ObjectiveStep(objective, lm, groups, max_tokens=max_tokens, tree=tree)
    for rows in ([0, 1, 2, 3, 4, 5, 6], [5, 2, 6, 0], [3]):
        objective.seen.clear()
        result = step.run(rows, train=False)
        seen = [r for batch in objective.seen for r in batch.rows]
        k = 2 if kind == "pair" else 1
        assert sorted(seen) == sorted(FIRST_ROW + r for r in rows for _ in range(k)) == sorted(result.rows)
        assert result.count == k * len(rows)
        assert (len(objective.seen) == 1) == (max_tokens > 70 or rows == [3]) or max_tokens == 70


@pytest.mark.parametrize("coupled", [True, False])
def test_a_coupled_objective_sees_the_whole_batch_at_once(coupled):
    lm = exact_lm()
    objective = Columns(batch_coupled=coupled)
    step = ObjectiveStep(objective, lm, with_columns(make_groups(lm, 6), lm), max_tokens=1)
    step.run([5, 1, 2, 4], train=True)
    sizes = [len(b.rows) for b in objective.seen]
    assert sizes == ([8] if coupled else [2, 2, 2, 2])


def test_permuting_a_batch_changes_nothing():
    lm = exact_lm()
    step = ObjectiveStep(DPO(), lm, with_reference(make_groups(lm, 6), exact_lm(1)), max_tokens=60)
    a, b = gradients(step, [0, 1, 2, 3, 4]), gradients(step, [3, 0, 4, 2, 1])
    assert a[0].loss == pytest.approx(b[0].loss, rel=1e-12)
    assert largest_difference(a[1], b[1]) < 1e-11
    assert a[0].means() == pytest.approx(b[0].means())


# ---- unpaired data


def test_mismatched_completions():
    lm = exact_lm()
    groups = make_groups(lm, 5, "unpaired")
    asked = {"prompt_ids": groups[1].prompt_ids, "prompt_pieces": groups[1].traces[0].prompt_pieces}
    same = dataclasses.replace(groups[2].traces[0], **asked)
    groups[2] = dataclasses.replace(groups[2], prompt_ids=groups[1].prompt_ids, traces=(same,))
    out = with_mismatched(groups)
    for i, (was, now) in enumerate(zip(groups, out)):
        other = groups[(i + 1 + (i == 1)) % 5]  # the next example of row 1 answers the same prompt
        own, mismatched = now.traces
        assert own is was.traces[0] and now.columns == {} and now.example is was.example
        assert mismatched.prompt_ids == was.prompt_ids
        assert mismatched.completion_ids == other.traces[0].completion_ids
    with pytest.raises(ValueError, match=rf"row {FIRST_ROW}: no response to another prompt fits"):
        with_mismatched(groups[:1])
    longest = max(len(g.traces[0]) for g in groups)
    tight = len(groups[0].prompt_ids) + longest - 1
    fitting = [t for g in with_mismatched(groups[:1] + groups[3:], tight) for t in g.traces[1:]]
    assert all(len(t.prompt_ids) + len(t) <= tight for t in fitting) and len(fitting) == 3


def test_unpaired_labels_and_the_mismatched_column():
    lm, reference = exact_lm(), exact_lm(1)
    groups = with_reference(with_mismatched(make_groups(lm, 6, "unpaired")), reference)
    beta, rows = 0.3, [4, 1, 0, 5]
    step = ObjectiveStep(KTO(beta=beta), lm, groups, max_tokens=1)
    result, found = gradients(step, rows)
    lm.model.zero_grad()
    traces = [t for r in rows for t in groups[r].traces]
    ratios = torch.stack([(naive_logps(lm, t) - naive_logps(reference, t).detach()).sum() for t in traces])
    own, z0 = ratios[0::2], ratios[1::2].detach().mean().clamp(min=0)
    sign = torch.tensor([1.0 if groups[r].example.label else -1.0 for r in rows], dtype=torch.float64)
    loss = (1 - torch.sigmoid(beta * sign * (own - z0))).sum()
    loss.backward()
    assert result.loss == pytest.approx(float(loss), rel=1e-9) and result.count == 4
    assert {float(s) for s in sign} == {1.0, -1.0}
    assert largest_difference(found, {f"policy.{n}": p.grad for n, p in lm.model.named_parameters()}) < 1e-9


# ---- several assistant turns


def test_only_emitted_tokens_are_learned():
    lm = exact_lm()
    said: Any = [
        {"role": "assistant", "content": "The plot"},
        {"role": "user", "content": "and the acting?"},
        {"role": "assistant", "content": "was not."},
    ]
    groups, report = encode([Example(prompt="how was the film", responses=(said,), kind="sft", row=3)], lm)
    trace = groups[0].traces[0]
    assert report.kept == 1 and 0 < trace.mask.sum() < len(trace)
    result, found = gradients(ObjectiveStep(SFT(), lm, groups), [0])
    lm.model.zero_grad()
    loss = -naive_logps(lm, trace)[torch.from_numpy(trace.mask)].sum()
    loss.backward()
    assert result.loss == pytest.approx(float(loss), rel=1e-9) and result.count == trace.mask.sum()
    assert largest_difference(found, {f"policy.{n}": p.grad for n, p in lm.model.named_parameters()}) < 1e-9


# ---- an objective's own module, and its own function of the logits


class Scales(nn.Module):
    """A learned weight a layer, at ten times the policy's rate; and how many batches it has seen."""

    lr_factor = 10.0
    batches: Tensor

    def __init__(self, layers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((layers,), 0.1, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))


@dataclasses.dataclass(frozen=True)
class Probe:
    """Imitation, and a readout of all layers that should come to 1 on every token."""

    data: ClassVar[str] = "sft"
    models: ClassVar[tuple[str, ...]] = ()

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        return {"policy": frozenset({"logp", "hidden_all"})}

    def init_state(self, config: Any) -> nn.Module:
        return Scales(config.num_hidden_layers + 1)

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None) -> Loss:
        assert isinstance(state, Scales)
        if state.training:
            state.batches += 1
        policy = stats["policy"]
        read = (policy.extra["hidden_all"].mean(-1) * state.weight).sum(-1)
        per_token = torch.where(policy.mask_NT, (read - 1) ** 2 - policy.logp_NT, 0.0)
        return Loss(per_token.sum(), policy.mask_NT.sum())


def probe_step(after: int | None = None) -> Stop:
    lm = exact_lm()
    step = Stop(Probe(), lm, make_groups(lm, 8, "sft"))
    step.after = after
    return step


def test_a_state_is_trained_saved_and_resumed(tmp_path):
    settings = config(warmup=0.0, save_every=1, schedule="constant", max_grad_norm=0.0)
    whole = probe_step()
    start = weights(whole)
    history = train(whole, tmp_path / "one", dataclasses.replace(settings, steps=1))
    moved = {k: (v - start[k]).abs().max() for k, v in weights(whole).items()}
    # Adam's first update is the rate, whatever the gradient
    assert float(moved["state.weight"]) == pytest.approx(10 * settings.lr, rel=1e-3)
    assert float(moved["policy.transformer.h.0.mlp.c_fc.weight"]) == pytest.approx(settings.lr, rel=1e-3)
    assert history[0]["learning_rate"] == settings.lr

    whole = probe_step()
    history = train(whole, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(probe_step(after=2), tmp_path / "half", settings)
    half = probe_step()
    assert timeless(train(half, tmp_path / "half", settings, resume=True)) == timeless(history)
    assert largest_difference(weights(half), weights(whole)) == 0
    assert isinstance(half.state, Scales) and isinstance(whole.state, Scales)
    assert int(half.state.batches) == int(whole.state.batches) == 4


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Cross-entropy between the reference's and the policy's whole distributions, inside the chunk."""

    data: ClassVar[str] = "sft"
    models: ClassVar[tuple[str, ...]] = ("reference",)

    @property
    def stats(self) -> Mapping[str, frozenset[str]]:
        return {"policy": LOGP, "reference": LOGP}

    def token_stats(self, logits: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        target = logits["reference"].softmax(-1)
        return {"cross": -(target * logits["policy"].log_softmax(-1)).sum(-1)}

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None) -> Loss:
        policy = stats["policy"]
        return Loss(torch.where(policy.mask_NT, policy.extra["cross"], 0.0).sum(), policy.mask_NT.sum())


def test_an_objectives_own_function_of_the_logits_has_gradients():
    lm, reference = exact_lm(), exact_lm(1)
    assert list(needs_of(Entropy()).joints) == ["Entropy"]
    groups = make_groups(lm, 4, "sft")
    step = ObjectiveStep(Entropy(), lm, groups, others={"reference": reference}, max_tokens=30, chunk_tokens=3)
    result, found = gradients(step, [2, 0, 3])
    lm.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for r in (2, 0, 3):
        trace = groups[r].traces[0]
        ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
        ours, theirs = (m.causal(ids).logits[0, -len(trace) - 1 : -1] for m in (lm, reference))
        total = total + F.cross_entropy(ours, theirs.detach().softmax(-1), reduction="sum")
    total.backward()
    assert result.loss == pytest.approx(float(total), rel=1e-9)
    assert largest_difference(found, {f"policy.{n}": p.grad for n, p in lm.model.named_parameters()}) < 1e-9


# ---- the step itself


def test_a_process_without_rows_adds_nothing():
    lm = exact_lm()
    step = ObjectiveStep(DPO(), lm, make_groups(lm, 3))
    result, found = gradients(step, [])
    assert (result.loss, result.count, result.rows, result.means()) == (0.0, 0.0, (), {})
    assert all(p.grad is not None for p in lm.model.parameters()), "a data-parallel wrapper would wait for them"
    assert max(float(g.abs().max()) for g in found.values()) == 0


class Rolled(SFT):
    """Imitation of what the policy itself says."""

    rollout: ClassVar[Sampling] = Sampling(max_new_tokens=5)
    seen: ClassVar[list[Batch]] = []

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        Rolled.seen.append(batch)
        return super().loss(stats, batch, state)


class RolledDPO(DPO):
    """An objective that wants the reference's log-probs of what was sampled."""

    rollout: ClassVar[Sampling] = Sampling(max_new_tokens=5)


def rolled_step(after: int | None = None) -> Stop:
    lm = exact_lm()
    groups = make_groups(lm, 10, "sft")
    made = Stop(Rolled(), lm, groups[:8], held_out=groups[8:])
    made.after = after
    return made


def test_training_batches_are_answered_by_the_policy_as_it_is(tmp_path):
    Rolled.seen.clear()
    step, settings = rolled_step(), config(batch_size=4, save_every=1)
    torch.manual_seed(5)
    result = step.run([0, 3], train=True)
    torch.manual_seed(5)
    seed = int(torch.randint(1 << 62, ()))
    lm = exact_lm()
    drawn = sample(lm, [step.groups[r].prompt_ids for r in (0, 3)], 1, Rolled.rollout, seed=seed)
    expected = -sum(float(naive_logps(lm, t).sum()) for (t,) in drawn)
    assert result.loss == pytest.approx(expected, rel=1e-9) and result.count == sum(len(t) for (t,) in drawn)
    assert "reference" in live_models(RolledDPO())  # nothing that was sampled is in a cache
    held = step.evaluate()  # the data's own responses
    tokens = [naive_logps(lm, g.traces[0]) for g in step.held_out]
    assert held["loss"] == pytest.approx(-float(torch.cat(tokens).mean()), rel=1e-9)

    whole = train(rolled_step(), tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(rolled_step(after=2), tmp_path / "cut", settings)
    torch.manual_seed(99)
    resumed = train(rolled_step(), tmp_path / "cut", settings, resume=True)
    assert timeless(resumed) == timeless(whole)


def test_evaluation_is_the_mean_over_held_out_groups():
    lm = exact_lm()
    groups = with_reference(make_groups(lm, 70, longest=4, prompt=3), exact_lm(1))
    step = ObjectiveStep(DPO(), lm, groups[:1], held_out=groups)
    found = step.evaluate()
    again = ObjectiveStep(DPO(), lm, groups).run(list(range(70)), train=False)
    assert found == pytest.approx(again.means()) and again.count == 70
    assert all(p.grad is None for p in lm.model.parameters())
    assert ObjectiveStep(DPO(), lm, groups).evaluate() == {}


def test_a_row_that_spoils_its_pack_is_named_alone():
    """A column that is not finite would be refused, so this one is put past the check."""
    lm = exact_lm()
    groups = make_groups(lm, 6)
    groups[4].columns[REFERENCE][1] = np.full(len(groups[4].traces[1]), -np.inf)
    step = ObjectiveStep(DPO(), lm, groups)
    assert step.run([0, 4, 2, 5], train=True).bad_rows == (FIRST_ROW + 4,)
    assert step.run([0, 2, 5], train=True).bad_rows == ()


# ---- layers computed again


def gpt2_with_dropout() -> LM:
    lm = exact_lm()
    assert lm.model.transformer.drop.p > 0
    return lm


def lora() -> LM:
    from peft import LoraConfig, get_peft_model

    lm = tiny.lm()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        return LM(get_peft_model(lm.model, options).eval(), lm.tokenizer, name="lora")


@pytest.mark.parametrize("make", [gpt2_with_dropout, tiny.lm, lora])
def test_layers_computed_again_give_the_same_gradients_and_keep_less(make):
    lm = make()
    step = ObjectiveStep(DPO(), lm, with_reference(make_groups(lm, 4), exact_lm(1)))

    def measured() -> tuple[int, StepResult, dict[str, Tensor]]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() if not isinstance(tensor, nn.Parameter) else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stats, order = step._statistics(step.module, *packs_of(step))
        for module in step.modules.values():
            module.zero_grad()
        del stats, order
        return kept, *gradients(step, [0, 1, 2, 3])

    training = [m.training for m in lm.model.modules()]
    forwards = [m.__dict__.get("forward") for m in lm.model.modules()]
    usual, plain, wanted = measured()
    with recomputed_layers(lm.causal):
        less, again, found = measured()
        assert step.evaluate() == {}
    assert again.loss == pytest.approx(plain.loss, rel=1e-12)
    assert largest_difference(found, wanted) < 1e-12 < max(float(g.abs().max()) for g in wanted.values())
    assert less < 0.5 * usual
    assert [m.training for m in lm.model.modules()] == training
    assert [m.__dict__.get("forward") for m in lm.model.modules()] == forwards
    assert measured()[0] == usual


def packs_of(step: ObjectiveStep) -> tuple[list, list]:
    from pertoken.core.packing import pack

    return pack([g.traces for g in step.groups], cost=step.cost), list(step.groups)


def test_layers_computed_again_beside_statistics_of_layers():
    plain, again = probe_step(), probe_step()
    wanted = gradients(plain, [0, 1, 2])
    with recomputed_layers(again.policy.causal):
        found = gradients(again, [0, 1, 2])
    assert wanted[0].loss == found[0].loss and largest_difference(wanted[1], found[1]) < 1e-12


def test_layers_that_cannot_be_computed_again():
    with pytest.raises(ValueError, match="turn gradient_checkpointing off"), recomputed_layers(nn.Linear(2, 2)):
        pass
