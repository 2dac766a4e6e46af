"""What every training objective of the catalog keeps. A new row is tested without writing a test."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportOptionalMemberAccess=false

import copy
import dataclasses
import importlib.util
import json
import math
import re

import pytest
import torch

from pertoken.api import TrainOptions
from pertoken.catalog import about, methods
from pertoken.core.step import ObjectiveStep
from tests import tiny
from tests.contracts.harness import (
    KINDS,
    Pass,
    draws,
    make_groups,
    model,
    objective_pass,
    rebuild,
    state_of,
    variants,
    without_dropout,
)

ROWS = [row for row in methods() if row.room == "train" and importlib.util.find_spec(row.path.partition(":")[0])]
CASES = [(row, objective) for row in ROWS for objective in variants(row)]


def name_of(row, objective):
    changed = [
        f"{f.name}={getattr(objective, f.name)}"
        for f in dataclasses.fields(objective)
        if getattr(objective, f.name) != getattr(type(objective)(), f.name)
    ]
    return "-".join([row.slug, *changed])


every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
every_variant = pytest.mark.parametrize("row, objective", CASES, ids=[name_of(*case) for case in CASES])


def same(a, b):
    """Two passes agree as float64 lets them: only the order of additions may differ."""
    assert (a.sum, a.count) == pytest.approx((b.sum, b.count), rel=1e-11, abs=1e-11)
    torch.testing.assert_close(a.grads, b.grads, rtol=0.0, atol=1e-10 * float(b.grads.abs().max()))
    assert a.metrics.keys() == b.metrics.keys()
    for key, value in a.metrics.items():
        assert value == pytest.approx(b.metrics[key], rel=1e-11, abs=1e-11), key


@every_variant
def test_parts_of_a_batch_add_up_to_the_batch(row, objective):
    """Batch = one by one, and 8 x 1 = 1 x 8 accumulation, by sums and counts."""
    if draws(row, objective) or getattr(objective, "batch_coupled", False):
        pytest.skip("the rows of a batch are coupled, or chance is")
    groups = make_groups(objective, n=8)
    parts = [objective_pass(objective, [group]) for group in groups]
    same(objective_pass(objective, groups), sum(parts[1:], parts[0]))


@every_variant
def test_layout_does_not_matter(row, objective):
    """Packed = flat, padding on either side, any chunk size, any order of the examples; loss, gradients and metrics."""
    if draws(row, objective):
        pytest.skip("draws random numbers")
    groups = make_groups(objective)
    flat = objective_pass(objective, groups, tree="never")
    same(objective_pass(objective, groups, tree="always"), flat)
    same(objective_pass(objective, groups, tree="never", pad_left=True), flat)
    same(objective_pass(objective, groups, tree="always", pad_left=True, chunk=3), flat)
    same(objective_pass(objective, groups[::-1]), flat)


@every_variant
def test_only_emitted_tokens_count(row, objective):
    groups = make_groups(objective)
    assert not all(trace.mask.all() for group in groups for trace in group.traces)
    same(objective_pass(objective, groups, outside=math.nan), objective_pass(objective, groups, outside=-3.0))


@every_variant
def test_loss_is_total(row, objective):
    """Equal and empty responses, and a single row (where none is mismatched), have finite loss, gradient, metrics."""
    lm = model("policy")
    one, other = (tiny.groups(lm, n=1, k=1, seed=seed)[0][0] for seed in (1, 2))
    empty = lm.trace_of_ids(one.prompt_ids, [])
    again = dataclasses.replace(other, prompt_ids=one.prompt_ids, prompt_pieces=one.prompt_pieces)
    for traces in ((one, one), (one, empty), (empty, again), (empty, empty)):
        k = 2 if objective.data == "pairs" else 1
        for completions in [traces] if k == 2 else [traces[:1], traces[1:]]:
            beside = [[other]] if getattr(objective, "mismatched", False) else []  # a response to another prompt
            again_and_again = [completions] * getattr(objective, "least_pairs", 1)  # some refuse to look at one alone
            found = objective_pass(objective, make_groups(objective, completions=[*again_and_again, *beside]))
            assert math.isfinite(found.sum) and math.isfinite(found.count)
            assert torch.isfinite(found.grads).all()
            assert all(math.isfinite(x) for pair in found.metrics.values() for x in pair)


@every_row
def test_gradient_is_finite_and_there(row):
    objective = variants(row)[0]
    found = objective_pass(objective, make_groups(objective))
    assert found.count > 0 and torch.isfinite(found.grads).all() and found.grads.abs().max() > 0


@every_row
def test_metrics_are_sums_and_counts_under_trls_names(row):
    objective = variants(row)[0]
    metrics = objective_pass(objective, make_groups(objective)).metrics
    sides = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
    wanted = {
        "pairs": sides | {"rewards/margins", "rewards/accuracies"},
        "unpaired": sides,
        "sft": {"mean_token_accuracy"},
        "prompts": {"clip_ratio/low_mean", "clip_ratio/high_mean"},
    }
    assert wanted["prompts" if hasattr(objective, "rollouts") else objective.data] <= metrics.keys()
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_]*)?", name) for name in metrics)
    assert not metrics.keys() & {"loss", "step", "grad_norm", "learning_rate", "seconds"}, "the loop's own names"
    assert all(math.isfinite(a) and math.isfinite(b) and b >= 0 for a, b in metrics.values())


@every_row
def test_options(row):
    """Frozen, by keyword, at most ten, and the same after a trip through JSON."""
    objective = variants(row)[0]
    cls = type(objective)
    names = [field.name for field in dataclasses.fields(cls)]
    assert len(names) <= 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, names[0], None)
    with pytest.raises(TypeError):
        cls(0.5)  # keywords only
    data = json.loads(json.dumps(dataclasses.asdict(objective)))
    assert rebuild(cls, data) == objective
    assert hash(rebuild(cls, data)) == hash(objective)


@every_row
def test_flags_are_told_apart(row):
    """The command line has one flag a field, nested ones too, beside those of every run."""

    def flags(options):
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            yield from flags(value) if dataclasses.is_dataclass(value) else [field.name]

    names = [*flags(variants(row)[0]), *flags(TrainOptions())]
    assert not {name for name in names if names.count(name) > 1}


@every_row
def test_row_and_objective_agree(row):
    objective = variants(row)[0]
    assert objective.data == row.data and row.data in KINDS
    assert set(objective.models) == set(row.models)
    wanted = {*objective.stats, *getattr(objective, "experience", ())}  # of rollouts, before the updates
    assert wanted == {"policy", *objective.models}
    assert getattr(objective, "batch_coupled", False) == row.batch_coupled
    assert about(row.slug) is row


@every_row
def test_the_loops_step_computes_the_same(row):
    """`ObjectiveStep`, cut into packs as it likes, sums to the one pass of the harness, and trains the policy alone."""
    objective = variants(row)[0]
    groups = make_groups(objective)
    state = without_dropout(copy.deepcopy(state_of(objective)))
    wanted = objective_pass(objective, groups, state=state)
    policy = model("policy")
    others = {name: model(name) for name in objective.stats if name != "policy"}
    step = ObjectiveStep(objective, policy, groups, others=others, max_tokens=40)
    if step.state is not None:
        step.state.double().load_state_dict(state_of(objective).state_dict())
        without_dropout(step.state)
    found = step.run(list(range(len(groups))), train=True)
    weights = [p for module in step.modules.values() for p in module.parameters() if p.requires_grad]
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
    policy.model.zero_grad(set_to_none=True)
    assert all(p.grad is None for lm in others.values() for p in lm.model.parameters())
    same(Pass(found.loss, found.count, grads, found.metrics), wanted)
