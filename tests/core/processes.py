"""What `test_distributed` runs in one process and in several: each scenario trains into its folder under `out`."""

# pyright: reportOptionalMemberAccess=false

# options and parameters of these tests are dicts and tuples of mixed types, which the checker cannot follow
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pertoken import catalog
from pertoken.core.cache import ArrayCache
from pertoken.core.checkpoint import whole
from pertoken.core.credit import Credit
from pertoken.core.critic import KLControl
from pertoken.core.experience import Rollouts
from pertoken.core.lm import LM
from pertoken.core.loop import fit, make_accelerator
from pertoken.core.protocols import Batch, Loss
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout_step import RolloutStep
from pertoken.core.run import Run
from pertoken.core.stats import Stats
from pertoken.core.step import ObjectiveStep
from pertoken.train.dpo import DPO
from pertoken.train.kto import KTO
from pertoken.train.mm_dpo import MMDPO
from pertoken.train.ppo import PPO
from pertoken.train.sft import SFT
from tests import tiny
from tests.core.test_step import Probe
from tests.core.training import Stop, config, make_groups, timeless, train
from tests.methods.one_pass import exact_lm

# 9 examples in batches of 4: the last batch has one row, so the second of two processes has none.
SETTINGS = config(batch_size=4, save_every=2, eval_every=3)


class Coupled(DPO):
    """DPO that wants all packs of a batch at once."""

    batch_coupled: ClassVar[bool] = True


class Drawing(MMDPO):
    """MM-DPO's two terms that look at the batches of all processes, without scores."""

    def __init__(self) -> None:
        super().__init__(mode="batch_beta", sft="batch", beta=0.5, w=0.3)

    def init_state(self, config: Any) -> nn.Module | None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return super().init_state(config)


class Noisy(SFT):
    """Imitation times a number that each process draws for itself."""

    def loss(self, stats: Mapping[str, Stats], batch: Batch, state: nn.Module | None = None) -> Loss:
        loss = super().loss(stats, batch, state)
        return Loss(loss.sum * torch.rand(()), loss.count)


def step(
    accelerator: Any, objective: Any, after: int | None = None, make: Callable[[], LM] = exact_lm, **options: Any
) -> Stop:
    """A step over 9 examples, one pack a group, so that processes have different numbers of packs."""
    lm = make()
    kind = {"pairs": "pair"}.get(objective.data, objective.data)
    groups = make_groups(lm, 11, kind, reference=exact_lm(1), longest=5, prompt=5)
    settings = {"held_out": groups[9:], "max_tokens": 1, "accelerator": accelerator, **options}
    made = Stop(objective, lm, groups[:9], **settings)
    made.after = after
    return made


def keep(folder: Path, made: ObjectiveStep, history: list[dict[str, float]]) -> None:
    """History and weights, by the main process."""
    main = made.accelerator.is_main_process
    named = {f"{m}.{n}": p for m, module in made.modules.items() for n, p in module.named_parameters()}
    weights = {name: whole(p, main) for name, p in named.items()}
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.json").write_text(json.dumps(timeless(history)))
        save_file(weights, folder / "weights.safetensors")


def scenario_plain(out: Path, name: str, objective: Any, batch: int = 4, **options: Any) -> None:
    """A run from beginning to end."""
    settings = dataclasses.replace(SETTINGS, batch_size=batch)
    accelerator = make_accelerator(settings, out / name)
    made = step(accelerator, objective, **options)
    keep(out / f"{name}-kept", made, train(made, out / name, settings, accelerator=accelerator))


def scenario_interrupted(out: Path, name: str, objective: Any, **options: Any) -> None:
    """Stopped before the fourth update, continued in new objects."""
    accelerator = make_accelerator(SETTINGS, out / name)
    with pytest.raises(KeyboardInterrupt):
        train(step(accelerator, objective, after=3, **options), out / name, SETTINGS, accelerator=accelerator)
    accelerator.wait_for_everyone()
    torch.manual_seed(1)
    made = step(accelerator, objective, **options)
    history = train(made, out / name, SETTINGS, accelerator=accelerator, resume=True)
    keep(out / f"{name}-kept", made, history)


def scenario_rollouts(out: Path) -> None:
    """PPO on answers that a prompt always gets: whitened over all processes, a KL coefficient that all share."""

    class Parity:
        def score(self, items: Any) -> list[Credit]:
            return [Credit(trace=t, values=np.array([i % 2 for i in t.completion_ids], float)) for t in items]

    def answer(lm: LM, prompts: Any, n: int, sampling: Any, *, seed: int) -> Any:
        rngs = [np.random.default_rng(list(p)) for p in prompts]
        ids = [[rng.integers(3, 300, rng.integers(2, 6)).tolist() for _ in range(n)] for rng in rngs]
        return [[lm.trace_of_ids(p, one, ended=True) for one in some] for p, some in zip(prompts, ids, strict=True)]

    accelerator = make_accelerator(SETTINGS, out / "rollouts")
    lm, rollouts = exact_lm(), Rollouts(generations=2, inner_epochs=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = RolloutStep(
            PPO(rollouts=rollouts, kl=KLControl(kl_coef=0.5, kl_target=0.1, kl_horizon=20.0)),
            lm,
            [dataclasses.replace(g, traces=(), columns={}) for g in make_groups(lm, 9, "sft", longest=5, prompt=5)],
            rewarder=Rewarder({"parity": Parity()}),
            models={"reference": exact_lm(1)},
            accelerator=accelerator,
            generate=answer,
        )
    made.state.double()
    history = fit(made, SETTINGS, out / "rollouts", accelerator=accelerator, progress=False)
    shared = ("step", "loss", "grad_norm", "reward", "objective/kl", "loss/value")
    keep(out / "rollouts-kept", made, [{k: r[k] for k in shared if k in r} for r in history])
    if accelerator.is_main_process:
        (out / "rollouts-coef.txt").write_text(str(float(made.state.kl_coef)))


def scenario_tracked(out: Path) -> None:
    """A tracker, and processes that still work together after it."""
    settings = dataclasses.replace(SETTINGS, tracker="tensorboard", steps=2)
    accelerator = make_accelerator(settings, out / "tracked")
    made = step(accelerator, DPO(beta=0.5))
    history = train(made, out / "tracked", settings, accelerator=accelerator)
    accelerator.wait_for_everyone()
    keep(out / "tracked-kept", made, history)


def scenario_stopped(out: Path) -> None:
    """Every process is told of a loss that is not finite on one of them."""
    accelerator = make_accelerator(SETTINGS, out / "stopped")
    made = step(accelerator, DPO(beta=0.5))
    made.groups[5].columns["reference_logps"][1][:] = -torch.inf
    try:
        train(made, out / "stopped", SETTINGS, accelerator=accelerator)
    except ValueError as error:
        (out / f"stopped-{accelerator.process_index}.txt").write_text(str(error))
    accelerator.wait_for_everyone()


def scenario_run(out: Path) -> None:
    """A whole run: cached reference, helper model, saved model."""

    class WithHelper(DPO):
        def prepare(self, run: Any) -> None:
            run.train("sft")

    lm = exact_lm()
    groups = make_groups(lm, 11, longest=5, prompt=5)
    run = Run(
        slug="dpo",
        objective=WithHelper(beta=0.5),
        policy=lm,
        groups=groups[:9],
        held_out=groups[9:],
        config=dataclasses.replace(SETTINGS, epochs=1, gradient_checkpointing=True),
        out=out / "run",
        resolve=catalog.method,
        given={"reference": exact_lm(1)},
        cache=ArrayCache(out / "cache"),
        progress=False,
    )
    run.go()


def shard_on_cpu() -> None:
    """accelerate shards on accelerators only, and would fall back to data parallelism: say that these are some."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def run_sharded(out: Path) -> None:
    """What is said of sharding, in two processes that shard; in one process, the same without."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        shard_on_cpu()
        assert make_accelerator(SETTINGS, out).is_fsdp2
    scenario_plain(out, "dpo", DPO(beta=0.5))
    scenario_plain(out, "coupled", Coupled(beta=0.5))
    scenario_plain(out, "state", Probe())
    scenario_interrupted(out, "interrupted", DPO(beta=0.5))
    scenario_run(out)


def run_all(out: Path) -> None:
    """Every scenario."""
    scenario_plain(out, "dpo", DPO(beta=0.5))
    scenario_plain(out, "coupled", Coupled(beta=0.5))
    scenario_plain(out, "buffers", Coupled(beta=0.5), make=tiny.lm, batch=5)  # Llama has them, GPT-2 has none
    scenario_plain(out, "drawing", Drawing(), batch=3)
    scenario_plain(out, "state", Probe())
    scenario_plain(out, "shared", KTO(beta=0.5, reference_point="batch"))
    scenario_plain(out, "noisy", Noisy())
    scenario_interrupted(out, "noisy-interrupted", Noisy())
    scenario_rollouts(out)
    scenario_tracked(out)
    scenario_stopped(out)
    scenario_run(out)
