"""A checkpoint holds all of it, whole or not at all."""

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pertoken.core import checkpoint
from pertoken.core.checkpoint import STATE, checkpoints, load_checkpoint, save_checkpoint, save_state, saved_state
from pertoken.core.record import write_json
from tests.core.training import largest_difference
from tests.methods.one_pass import exact_lm


class State(nn.Module):
    """What an objective may keep: something learned, something frozen, something counted."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.number = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def trained(steps: int = 2, size: int = 3) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    """A model and a state after some updates."""
    modules = {"policy": exact_lm().model, "state": State(size)}
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    with torch.random.fork_rng():
        for i in range(steps):
            torch.manual_seed(i)
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
    with torch.no_grad():
        modules["state"].shift.fill_(2.5)
        modules["state"].seen.fill_(7)
    return modules, optimizer


def everything(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}


def test_all_of_it_comes_back(tmp_path):
    modules, optimizer = trained()
    path = save_checkpoint(tmp_path, 2, modules, optimizer, {"note": ["ü", 1]})
    drawn = torch.rand(3)
    fresh = {"policy": exact_lm(5).model, "state": State()}
    other = torch.optim.AdamW([p for m in fresh.values() for p in m.parameters() if p.requires_grad], lr=0.01)
    assert load_checkpoint(path, fresh, other) == {"step": 2, "note": ["ü", 1]}
    assert torch.equal(torch.rand(3), drawn), "the random state is not the saved one"
    assert largest_difference(everything(modules), everything(fresh)) == 0
    assert fresh["state"].seen.dtype == torch.int64
    for steps in range(2):  # both go on alike, so the optimizer's state is all there
        for group in (modules, fresh):
            with torch.random.fork_rng():
                torch.manual_seed(40 + steps)
                for m in group.values():
                    for p in m.parameters():
                        p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        other.step()
    assert largest_difference(everything(modules), everything(fresh)) == 0
    assert len(other.state) == len(optimizer.state) > 0


def test_only_what_is_trained_is_kept(tmp_path):
    modules, optimizer = trained()
    names = load_file(save_checkpoint(tmp_path, 1, modules, optimizer, {}) / "weights.safetensors").keys()
    assert {n for n in names if n.startswith("state")} == {"state.scale", "state.number", "state.shift", "state.seen"}
    assert "policy.transformer.wte.weight" in names
    assert "policy.lm_head.weight" not in names, "tied weights are there twice"


def test_other_modules_are_refused_before_anything_changes(tmp_path):
    modules, optimizer = trained()
    path = save_checkpoint(tmp_path, 1, modules, optimizer, {})
    for other, odd in (
        ({"policy": exact_lm(5).model}, "state.number"),
        ({"policy": exact_lm(5).model, "state": State(1)}, "state.scale"),  # a shape that copying would broadcast
    ):
        before = {k: v.clone() for k, v in everything(other).items()}
        with pytest.raises(ValueError, match=rf"checkpoint-000001 holds other parameters \({odd}"):
            load_checkpoint(path, other)
        assert largest_difference(before, everything(other)) == 0


def test_the_newest_are_kept_by_number(tmp_path):
    modules, optimizer = trained(1)
    for step in (9, 10, 100, 1_000_000, 2_000_000):
        save_checkpoint(tmp_path, step, modules, optimizer, {}, keep=3)
    assert [s for s, _ in checkpoints(tmp_path)] == [100, 1_000_000, 2_000_000]
    save_checkpoint(tmp_path, 2_000_001, modules, optimizer, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2000001"]
    assert checkpoints(tmp_path / "none") == []


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path):
    for name in ("checkpoint-", "checkpoint-last", "checkpoint-000002.bak", ".checkpoint-000003.part", "xcheckpoint-4"):
        (tmp_path / name).mkdir()
    modules, optimizer = trained(1)
    save_checkpoint(tmp_path, 5, modules, optimizer, {}, keep=1)
    assert [s for s, _ in checkpoints(tmp_path)] == [5] and len(list(tmp_path.iterdir())) == 6


def test_one_written_again_replaces_the_old_one(tmp_path):
    modules, optimizer = trained(1)
    save_checkpoint(tmp_path, 5, modules, optimizer, {"turn": 1})
    (tmp_path / ".checkpoint-000005.part").mkdir()
    (tmp_path / ".checkpoint-000005.part" / "rest").write_text("of a kill")
    path = save_checkpoint(tmp_path, 5, modules, optimizer, {"turn": 2})
    assert load_checkpoint(path, modules)["turn"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000005"] and not (path / "rest").exists()


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    modules, optimizer = trained(1)
    path = save_checkpoint(tmp_path / "run", 5, modules, optimizer, {}, write=False)
    assert path.name == "checkpoint-000005" and not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
    modules, optimizer = trained(1)
    good = save_checkpoint(tmp_path, 1, modules, optimizer, {})
    before = {k: v.clone() for k, v in everything(modules).items()}
    optimizer.step()

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, modules, optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    fresh = {"policy": exact_lm(5).model, "state": State()}
    load_checkpoint(good, fresh)
    assert largest_difference(before, everything(fresh)) == 0


def test_what_an_objective_learnt_is_saved_beside_the_model(tmp_path):
    module = nn.Linear(2, 3)
    module.register_buffer("steps", torch.tensor(7))
    save_state(None, tmp_path)
    save_state(nn.ReLU(), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds no trained run"):
        saved_state(tmp_path)
    save_state(module, tmp_path)
    models = {"start": {"name": "a"}, "reference": {"name": "b"}}
    write_json(tmp_path / "results.json", {"method": "m", "options": {"beta": 1}, "provenance": {"models": models}})
    made, tensors = saved_state(tmp_path)
    assert made == {"method": "m", "options": {"beta": 1}, "reference": {"name": "b"}}
    other = nn.Linear(2, 3)
    other.register_buffer("steps", torch.tensor(0))
    other.load_state_dict(tensors)
    assert torch.equal(other.weight, module.weight) and int(other.steps) == 7
    (tmp_path / STATE).unlink()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    path = save_checkpoint(tmp_path, 5, {"policy": nn.Linear(1, 1)}, optimizer, {"method": "m"})
    with pytest.raises(ValueError, match="learnt nothing beside the model"):
        saved_state(tmp_path)
    path = save_checkpoint(tmp_path, 6, {"policy": nn.Linear(1, 1), "state": module}, optimizer, {"method": "m"})
    for folder in (tmp_path, path):  # the newest checkpoint of a run, or the one that is named
        made, tensors = saved_state(folder)
        assert made == {"method": "m", "options": {}, "reference": {}} and torch.equal(tensors["weight"], module.weight)
