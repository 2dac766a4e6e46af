"""The loop is the plain loop: by hand, in any number of packs, and stopped at any moment."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pertoken.core import checkpoint
from pertoken.core.checkpoint import checkpoints, load_checkpoint
from pertoken.core.data import batches
from pertoken.core.loop import (
    LoopConfig,
    StepResult,
    apply_gradients,
    fit,
    make_accelerator,
    make_optimizer,
    refuse_old_run,
)
from pertoken.core.protocols import Batch, Loss
from pertoken.core.step import ObjectiveStep
from pertoken.train.sft import SFT
from tests.core.training import (
    FIRST_ROW,
    Stop,
    assert_close,
    config,
    dpo_step,
    largest_difference,
    log,
    make_groups,
    timeless,
    train,
    weights,
)
from tests.methods.one_pass import exact_lm


def test_learning_rates_by_hand():
    settings = LoopConfig(lr=2.0, warmup=0.2, epochs=1)
    cosine = [1.0, 2.0] + [1 + math.cos(math.pi * i / 8) for i in range(8)]
    assert [settings.learning_rate(i, 10) for i in range(10)] == pytest.approx(cosine)
    linear = dataclasses.replace(settings, schedule="linear")
    assert [linear.learning_rate(i, 10) for i in range(10)] == pytest.approx(
        [1, 2, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25]
    )
    constant = dataclasses.replace(settings, schedule="constant", warmup=0.0)
    assert [constant.learning_rate(i, 3) for i in range(3)] == [2.0, 2.0, 2.0]
    assert [dataclasses.replace(settings, warmup=1.0).learning_rate(i, 4) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_updates_of_a_run():
    assert [config(epochs=e).total_steps(10) for e in (0, 0.5, 1, 2.5)] == [0, 2, 3, 8]
    assert config(steps=7).total_steps(10) == 7 and config(steps=0).total_steps(10) == 0


def naive_dpo(lm, group, beta: float) -> torch.Tensor:
    """The loss of one pair from two plain forwards."""
    ratios = []
    for trace, reference in zip(group.traces, group.columns["reference_logps"]):
        ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
        logps = lm.causal(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(trace) :, 0]
        ratios.append(logps.sum() - float(np.sum(reference)))
    return -F.logsigmoid(beta * (ratios[0] - ratios[1]))


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_a_run_is_the_plain_loop(tmp_path, clip):
    settings = config(max_grad_norm=clip, weight_decay=0.1)
    step = dpo_step()
    history = train(step, tmp_path / "run", settings)

    lm = exact_lm()
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1.0, weight_decay=0.1)
    clipped = 0
    for i, record in enumerate(history):
        rows = batches(10, 4, seed=3, epoch=i // 3)[i % 3]
        optimizer.zero_grad()
        loss = torch.stack([naive_dpo(lm, step.groups[r], 0.5) for r in rows]).mean()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in lm.model.parameters()))
        if clip and norm > clip:
            clipped += 1
            for p in lm.model.parameters():
                p.grad *= clip / norm
        optimizer.param_groups[0]["lr"] = settings.learning_rate(i, 6)
        optimizer.step()
        found = [record[k] for k in ("step", "loss", "grad_norm", "learning_rate")]
        assert found == pytest.approx([i + 1, loss.item(), norm, settings.learning_rate(i, 6)], rel=1e-6)
    assert len(history) == 6 and (clipped > 1) == bool(clip)
    manual = {f"policy.{n}": p for n, p in lm.model.named_parameters()}
    assert largest_difference(weights(step), manual) < 1e-6  # clipping adds 1e-6 to the norm


@pytest.mark.parametrize("tree", ["auto", "never", "always"])
def test_the_size_of_packs_changes_nothing(tmp_path, tree):
    whole = dpo_step(reference=1)
    wanted = train(whole, tmp_path / "whole")
    parts = dpo_step(reference=1, max_tokens=1, tree=tree, chunk_tokens=3)
    assert_close(wanted, train(parts, tmp_path / "parts"), 1e-9)
    assert largest_difference(weights(whole), weights(parts)) < 1e-9
    assert wanted[-1]["loss"] < wanted[0]["loss"], "nothing was learned, so nothing was shown"


def test_order_of_the_data(tmp_path):
    seen = []

    class Seeing(ObjectiveStep):
        def run(self, rows, *, train):
            seen.append(list(rows))
            return super().run(rows, train=train)

    lm = exact_lm()
    groups = make_groups(lm, 7, "sft")
    train(Seeing(SFT(), lm, groups), tmp_path / "a", config(epochs=3, batch_size=3))
    assert seen == [b for epoch in range(3) for b in batches(7, 3, seed=3, epoch=epoch)]
    for epoch in range(3):
        assert sorted(r for rows in seen[3 * epoch : 3 * epoch + 3] for r in rows) == list(range(7))
    assert len({str(seen[3 * e : 3 * e + 3]) for e in range(3)}) == 3
    first, seen[:] = list(seen), []
    train(Seeing(SFT(), lm, groups), tmp_path / "b", config(epochs=1, batch_size=3, seed=4))
    assert seen != first[:3]


def test_log_history_and_evaluation(tmp_path):
    step = dpo_step()
    history = train(step, tmp_path / "run", config(eval_every=2, save_every=2))
    assert log(tmp_path / "run") == timeless(history)
    assert [r["step"] for r in history] == [1, 2, 3, 4, 5, 6]
    assert [("eval_loss" in r) for r in history] == [False, True, False, True, False, True]
    assert all(r["seconds"] > 0 for r in history)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "eval_rewards/margins"):
        assert name in history[-1]
    lm = step.policy
    losses = [naive_dpo(lm, g, 0.5) for g in step.held_out]
    assert history[-1]["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-9)
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-12)


def test_no_update_at_all(tmp_path):
    step = dpo_step()
    before = weights(step)
    assert train(step, tmp_path / "run", config(steps=0)) == []
    assert largest_difference(before, weights(step)) == 0


def test_a_batch_without_anything_to_learn_from(tmp_path):
    """Not one emitted token: loss 0 over 0 is no NaN."""
    lm = exact_lm()
    groups = make_groups(lm, 3, "sft")
    for i in (0, 2):
        silent = dataclasses.replace(groups[i].traces[0], emitted=(False,) * len(groups[i].traces[0]))
        groups[i] = dataclasses.replace(groups[i], traces=(silent,))
    history = train(ObjectiveStep(SFT(), lm, groups), tmp_path / "run", config(batch_size=1, epochs=1))
    assert sorted(r["loss"] == 0 and r["grad_norm"] == 0 for r in history) == [False, True, True]


# ---- what stops a run


def test_a_loss_that_is_not_finite(tmp_path):
    """One token id has an infinite embedding; the row that holds it is named, not those packed beside it."""
    step = dpo_step()
    bad = next(g for g in step.groups if g.example.row == FIRST_ROW + batches(10, 4, seed=3, epoch=0)[1][2])
    holders = [{*t.prompt_ids, *t.completion_ids} for g in step.groups for t in g.traces]
    token = next(t for t in bad.prompt_ids if sum(t in ids for ids in holders) == 2)
    with torch.no_grad():
        step.policy.model.transformer.wte.weight[token] = torch.inf
    table = step.policy.model.transformer.wte.weight
    # untied, for the head gives every row that id's logit
    step.policy.model.lm_head.weight = torch.nn.Parameter(table.detach().clone().nan_to_num(posinf=0.1))
    out = tmp_path / "run"
    with pytest.raises(ValueError) as stopped:
        train(step, out, config(save_every=1))
    assert "the loss is nan at update 1 " in str(stopped.value), str(stopped.value)
    assert f"(rows {bad.example.row});" in str(stopped.value)
    assert str(out / "stopped") in str(stopped.value)
    ((done, path),) = checkpoints(out / "stopped")
    assert done == 1 and [r["step"] for r in log(out)] == [1]
    ((_, good),) = checkpoints(out)
    saved, before = dpo_step(), dpo_step()
    for where, target in ((path, saved), (good, before)):
        target.policy.model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(table))
        load_checkpoint(where, target.modules)
    a, b = weights(saved), weights(before)
    a["policy.transformer.wte.weight"][token] = b["policy.transformer.wte.weight"][token] = 0
    assert largest_difference(a, b) == 0, "the state before the update was not what was saved"


class Root(SFT):
    """A loss of 0 whose gradient is 0 * infinity."""

    def loss(self, stats: Mapping, batch: Batch, state=None) -> Loss:
        x = stats["policy"].logp_NT
        return Loss(torch.sqrt((x - x.detach()) ** 2).sum(), float(len(x)))


def test_a_gradient_that_is_not_finite(tmp_path):
    lm = exact_lm()
    step = ObjectiveStep(Root(), lm, make_groups(lm, 3, "sft"))
    before = weights(step)
    rows = ", ".join(str(FIRST_ROW + r) for r in sorted(batches(3, 2, seed=3, epoch=0)[0]))
    with pytest.raises(ValueError, match=rf"the gradient norm is nan at update 0 \(rows {rows}\)"):
        train(step, tmp_path / "run", config(batch_size=2))
    assert largest_difference(before, weights(step)) == 0


@pytest.mark.parametrize("k", range(7))
def test_interrupted_at_any_update_and_resumed(tmp_path, k, whole_run):
    out = tmp_path / "run"
    first = dpo_step()
    first.after = k
    settings = config(save_every=2, eval_every=3)
    if k < 6:
        with pytest.raises(KeyboardInterrupt):
            train(first, out, settings)
    else:
        train(first, out, settings)
    torch.manual_seed(99)
    again, said = dpo_step(), []
    history = train(again, out, settings, resume=True, say=said.append)
    assert timeless(history) == whole_run[0] == log(out)
    assert largest_difference(weights(again), whole_run[1]) == 0
    assert said == ([f"resumed {out} after update {k // 2 * 2}"] if k >= 2 else [])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    step = dpo_step()
    history = train(step, tmp_path_factory.mktemp("whole") / "run", config(save_every=2, eval_every=3))
    return timeless(history), weights(step)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("file", ["weights", "optimizer", "state"])
def test_stopped_in_the_middle_of_a_checkpoint(tmp_path, monkeypatch, whole_run, error, file):
    """Half a file, then a full disk or an interrupt, at the second checkpoint."""
    out, settings = tmp_path / "run", config(save_every=2, eval_every=3)
    write, write_json, calls = checkpoint.save_file, checkpoint.write_json, []

    def breaks(what: str, path) -> None:
        calls.append(what)
        if calls.count(file) == 2 and what == file:
            path.write_bytes(b"half")
            raise error(28, "No space left on device")

    def save_file(tensors, path):
        breaks(path.stem, path)
        write(tensors, path)

    def save_json(path, obj):
        breaks(path.stem, path)
        write_json(path, obj)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", save_file)
        patched.setattr(checkpoint, "write_json", save_json)
        with pytest.raises(error):
            train(dpo_step(), out, settings)
    assert [s for s, _ in checkpoints(out)] == [2]
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-000002", "log.jsonl"]
    again = dpo_step()
    assert timeless(train(again, out, settings, resume=True)) == whole_run[0]
    assert largest_difference(weights(again), whole_run[1]) == 0


def test_rests_of_a_kill_do_not_count(tmp_path, whole_run):
    """What a process leaves that is killed while it writes a checkpoint and a line of the log."""
    out, settings = tmp_path / "run", config(save_every=2, eval_every=3)
    first = dpo_step()
    first.after = 3
    with pytest.raises(KeyboardInterrupt):
        train(first, out, settings)
    rest = out / ".checkpoint-000004.part"
    rest.mkdir()
    (rest / "weights.safetensors").write_bytes(b"half")
    with (out / "log.jsonl").open("a") as lines:
        lines.write('{"step": 4, "loss": 0.3')
    (out / "log.jsonl.part").write_text("")
    again = dpo_step()
    assert timeless(train(again, out, settings, resume=True)) == whole_run[0] == log(out)
    assert not rest.exists() and [s for s, _ in checkpoints(out)] == [4, 6]


def test_random_draws_go_on_where_they_stopped(tmp_path):
    """An objective that draws from torch's generator, the one whose state a checkpoint keeps."""

    class Noisy(SFT):
        def loss(self, stats: Mapping, batch: Batch, state=None) -> Loss:
            loss = super().loss(stats, batch, state)
            return Loss(loss.sum * torch.rand(()), loss.count)

    def step(after: int | None = None) -> Stop:
        lm = exact_lm()
        made = Stop(Noisy(), lm, make_groups(lm, 8, "sft"))
        made.after = after
        return made

    settings = config(save_every=1)
    wanted = timeless(train(step(), tmp_path / "whole", settings))
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        train(step(after=2), tmp_path / "half", settings)
    torch.manual_seed(6)
    assert timeless(train(step(), tmp_path / "half", settings, resume=True)) == wanted


# ---- folders


def test_an_output_folder_that_holds_a_run(tmp_path):
    out = tmp_path / "run"
    train(dpo_step(), out, config(epochs=1))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"holds a run stopped at update 3; nothing is overwritten.*--resume"):
        train(dpo_step(), out, config(epochs=1))
    (out / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run"):
        train(dpo_step(), out, config(epochs=1))
    (out / "results.json").unlink()
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    early = tmp_path / "early"  # interrupted before its first checkpoint
    early.mkdir()
    (early / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="holds files; nothing is overwritten"):
        train(dpo_step(), early)
    assert (early / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_folder_that_holds_no_run_is_not_resumed(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds files"):
            refuse_old_run(tmp_path, resume)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        refuse_old_run(tmp_path / "holiday.jpg", True)
    refuse_old_run(tmp_path / "new", True)
    (tmp_path / "stages").mkdir()
    refuse_old_run(tmp_path, True)


@pytest.mark.parametrize(
    ("changes", "meta", "named"),
    [
        ({"lr": 1e-5}, {}, "config.lr"),
        ({"batch_size": 5, "seed": 1}, {}, "config.batch_size, config.seed"),
        ({}, {"options": {"beta": 0.2}}, "options.beta"),
        ({}, {"options": {"beta": 0.1, "gamma": 1}}, "options.gamma"),
        ({}, {"data": "other"}, "data"),
        ({}, {"options": {}}, "options.beta"),
    ],
)
def test_resumed_with_other_options(tmp_path, changes, meta, named):
    same = {"options": {"beta": 0.1}, "data": "x"}
    train(dpo_step(n=4), tmp_path / "run", config(steps=1), meta=same)
    with pytest.raises(ValueError, match=rf"run with other {named}; resume with the same"):
        train(dpo_step(n=4), tmp_path / "run", config(steps=1, **changes), meta=same | meta, resume=True)


def test_resumed_with_another_watch(tmp_path):
    """How often a run is saved, evaluated and tracked changes nothing that is learned, so it may differ."""
    whole = train(dpo_step(), tmp_path / "whole", config())
    with pytest.raises(KeyboardInterrupt):
        stopped = dpo_step()
        stopped.after = 3
        train(stopped, tmp_path / "cut", config(save_every=1, eval_every=1))
    resumed = train(dpo_step(), tmp_path / "cut", config(save_every=2, keep=1), resume=True)
    learned = lambda history: [{k: v for k, v in r.items() if not k.startswith("eval_")} for r in timeless(history)]
    assert learned(resumed) == learned(whole)


def test_a_finished_run_is_returned_as_it_is(tmp_path):
    step = dpo_step()
    history = train(step, tmp_path / "run")
    again = dpo_step()
    again.after = 0
    assert train(again, tmp_path / "run", resume=True) == history
    assert largest_difference(weights(step), weights(again)) == 0


def test_only_safetensors_and_json(tmp_path):
    train(dpo_step(), tmp_path / "run", config(save_every=1, keep=3))
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"} and len(files) == 10
    assert [s for s, _ in checkpoints(tmp_path / "run")] == [4, 5, 6]


# ---- settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "sawtooth"},
        {"optimizer": "sgd"},
        {"precision": "fp16"},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"epochs": -1.0},
        {"epochs": math.inf},
        {"steps": -1},
        {"seed": -1},
        {"keep": 0},
        {"save_every": -1},
        {"eval_every": -1},
        {"max_grad_norm": -1.0},
        {"weight_decay": math.nan},
        {"warmup": 1.5},
    ],
)
def test_options_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        LoopConfig(**wrong)


def test_nothing_to_train(tmp_path):
    step = dpo_step()
    step.policy.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        train(step, tmp_path / "run")
    empty = dpo_step()
    empty.size = 0
    with pytest.raises(ValueError, match="not one example"):
        train(empty, tmp_path / "run", config(steps=3))


class Head(nn.Module):
    """A module that says its own groups: no decay on the bias."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def parameter_groups(self):
        return [
            {"params": [self.linear.weight], "lr_factor": 10.0, "weight_decay": 0.5},
            {"params": [self.linear.bias], "weight_decay": 0.0},
        ]


def test_a_module_says_its_own_parameter_groups():
    head, accelerator = Head(), make_accelerator(config(), Path("."))
    optimizer = make_optimizer({"head": head, "policy": nn.Linear(2, 1)}, config(weight_decay=0.25))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0, 0.25]
    before = [p.detach().clone() for p in head.parameters()]
    for p in head.parameters():
        p.grad = torch.zeros_like(p)
    apply_gradients(optimizer, accelerator, 1.0, 0.01, 0.0)
    weight, bias = head.linear.weight.detach(), head.linear.bias.detach()
    torch.testing.assert_close(weight, before[0] * (1 - 0.01 * 10.0 * 0.5))  # decoupled decay at the group's rate
    torch.testing.assert_close(bias, before[1])


def test_rmsprop(tmp_path):
    step = dpo_step()
    settings = config(optimizer="rmsprop", lr=1e-4)
    assert isinstance(make_optimizer(step.modules, settings), torch.optim.RMSprop)
    history = train(step, tmp_path / "run", settings)
    assert history[-1]["loss"] < history[0]["loss"]


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    history = train(dpo_step(), out, config(tracker="tensorboard"), meta={"options": {"beta": 0.5, "names": [1]}})
    found = EventAccumulator(str(out / "pertoken")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(r["step"], np.float32(r["loss"])) for r in history]
    assert "rewards/margins" in found.Tags()["scalars"]


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pip install"):
        make_accelerator(config(tracker="comet_ml"), tmp_path)
    with pytest.raises(ValueError, match="nonsense"):
        make_accelerator(config(tracker="nonsense"), tmp_path)


def test_a_launchers_accumulation_does_not_divide_the_loss(tmp_path, monkeypatch):
    wanted = train(dpo_step(), tmp_path / "a")
    monkeypatch.setitem(os.environ, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    settings = config()
    accelerator = make_accelerator(settings, tmp_path / "b")
    found = fit(dpo_step(accelerator=accelerator), settings, tmp_path / "b", accelerator=accelerator, progress=False)
    assert_close(wanted, found, 1e-12)


def test_results_add_up():
    total = StepResult()
    total.add(StepResult(2.0, 1.0, {"a": (3.0, 1.0), "none": (0.0, 0.0)}, (1,)))
    total.add(StepResult(4.0, 2.0, {"a": (1.0, 1.0), "b": (5.0, 5.0), "s/max": (7.0, 1.0)}, (2, 3), (3,)))
    total.add(StepResult(0.0, 0.0, {"s/max": (3.0, 1.0)}))
    assert total.means() == {"loss": 2.0, "a": 2.0, "b": 1.0, "s/max": 7.0}
    assert total.rows == (1, 2, 3) and total.bad_rows == (3,)
    assert StepResult().means() == {}
