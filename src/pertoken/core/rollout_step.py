"""Reinforcement learning's step: rollouts, their rewards, one pass of all models over them, then minibatch updates.

For each batch of prompts: the policy answers each one G times (every draw with its log-prob); scorers put rewards on
the tokens; one pass on shared-prefix packs gives what the objective wants of policy, reference, critic and any other
frozen model; the objective turns rewards into advantages; then come `inner_epochs` x `minibatches` updates on them,
which are `step.ObjectiveStep`'s on completions with columns. So rewards of any level, and any method's loss, share it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .advantage import Advantages
from .credit import Credit
from .data import Group
from .experience import Experience, Rollouts
from .lm import LM
from .loop import StepResult
from .packing import pack
from .rewarding import Rewarded, Rewarder, with_row
from .rollout import sample
from .rollout_report import experience_metrics, reward_metrics, why_zero, write_completions
from .stats import PER_COMPLETION, Needs, Stats, token_stats
from .step import REFERENCE, ObjectiveStep, is_sharded, join_stats
from .trace import Trace

Generate = Callable[..., list[list[Trace]]]  # as rollout.sample: (lm, prompts, n, sampling, seed=)


class RolloutStep(ObjectiveStep):
    """`loop.Step` of an objective that learns from rollouts. See `step.ObjectiveStep` for what is not said here.

    Args:
        groups: prompts (completions in them are not looked at).
        rewarder: what scores completions.
        models: frozen models by name, that the objective's `experience` names.
        out: the run's folder, for tables of completions. say: told what a reader of the log would wonder about.
        generate: what samples (default: `rollout.sample`).
    """

    def __init__(
        self,
        objective: Any,
        policy: LM,
        groups: Sequence[Group],
        *,
        rewarder: Rewarder,
        held_out: Sequence[Group] = (),
        models: Mapping[str, LM] | None = None,
        accelerator: Any = None,
        max_tokens: int = 4096,
        tree: str = "auto",
        out: Path | None = None,
        say: Callable[[str], None] | None = None,
        generate: Generate = sample,
    ):
        layout: dict[str, Any] = {"max_tokens": max_tokens, "tree": tree}
        super().__init__(objective, policy, groups, held_out=held_out, accelerator=accelerator, **layout)
        if is_sharded(accelerator):
            raise ValueError("sampling from sharded weights is not supported; launch with configs/ddp.yaml")
        self.rollouts: Rollouts = objective.rollouts
        self.rewarder, self.models, self.generate = rewarder, dict(models or {}), generate
        self.out, self.say = out, say or (lambda line: None)
        self.experience_needs = Needs(dict(objective.experience))
        self.updates_per_batch = self.rollouts.inner_epochs * self.rollouts.minibatches
        if self.state is None:
            self.modules["state"] = self.state = torch.nn.Module()
        # in the checkpoint, so that a resumed run goes on with the same schedules
        self.state.register_buffer("batches_done", torch.zeros((), dtype=torch.long, device=policy.device))
        self.parts: list[list[Group]] = []
        self.part: list[Group] = []
        if hasattr(objective, "start"):
            objective.start(self)

    @property
    def batch(self) -> int:
        """How many batches of rollouts were drawn before."""
        return int(self.state.batches_done)  # type: ignore[union-attr,arg-type]

    def run(self, rows: list[int], *, train: bool) -> StepResult:
        """See `loop.Step`: new rollouts if those of the last batch are used up, then one update's loss."""
        result = StepResult()
        if not self.parts:
            self.parts = self._roll_out([self.groups[r] for r in rows or [0]], bool(rows), result)
        part = self.parts.pop(0)
        self.part = part or self.part  # of a batch too short for all of its minibatches, the last have no completion
        result.add(self._run(self.part, train, 1.0 if rows and part else 0.0))
        return result

    def evaluate(self) -> dict[str, float]:
        """Reward and length of one completion of each held-out prompt, always drawn with the same seed."""
        if not self.held_out:
            return {}
        drawn = self.generate(self.policy, [g.prompt_ids for g in self.held_out], 1, self.rollouts.sampling, seed=0)
        traces = [with_row(g, t) for g, (t,) in zip(self.held_out, drawn, strict=True)]
        found = StepResult()
        found.metrics |= reward_metrics(traces, self.rewarder.at(self.batch)(traces))
        return found.means()

    # ---- one batch of rollouts

    def _roll_out(self, prompts: list[Group], counts: bool, result: StepResult) -> list[list[Group]]:
        """Draw, score and judge; the minibatches of all inner epochs."""
        options, began = self.rollouts, time.perf_counter()
        before = getattr(self.objective, "before_rollouts", None)
        if before is not None:
            known = before(self, len(prompts) * (self.accelerator.num_processes if self.accelerator else 1))
            result.metrics |= known if counts else {}
        seed = int(torch.randint(1 << 62, ()))  # the global generator is in the checkpoint: a resumed run draws alike
        drawn = self.generate(
            self.policy, [g.prompt_ids for g in prompts], options.generations, options.sampling, seed=seed
        )
        traces = [with_row(g, t) for g, some in zip(prompts, drawn, strict=True) for t in some]
        sampled = time.perf_counter()
        rewarded = self.rewarder.at(self.batch)(traces)
        scored = time.perf_counter()
        kept = [i for i, credit in enumerate(rewarded.credits) if credit is not None and len(traces[i])]
        for i, name, what in rewarded.failures[:4]:
            self.say(f"batch {self.batch + 1}: {name} failed on row {traces[i].meta['row']}, left out: {what}")
        empty = [t.meta["row"] for t in traces if not len(t)]
        if empty:
            self.say(f"batch {self.batch + 1}: {len(empty)} completions without a token (row {empty[0]}), left out")
        if not kept:
            why = rewarded.failures[:1] or f"{len(empty)} of {len(traces)} have no token"
            raise ValueError(f"no completion of batch {self.batch + 1} could be scored ({why})")
        place = [g for g, some in enumerate(drawn) for _ in some]
        where = [place[i] for i in kept]
        experience = self._experience([traces[i] for i in kept], where, prompts, rewarded, kept, counts)
        with torch.no_grad():
            rewards = getattr(self.objective, "rewards", None)
            reward_NT = experience.reward_NT if rewards is None else rewards(experience, self.state)
            found: Advantages = self.objective.advantages(experience, reward_NT, self.state)
        judged = time.perf_counter()
        if counts:
            result.metrics |= reward_metrics(traces, rewarded) | experience_metrics(experience) | experience.figures
            spent = {"rollout": sampled - began, "score": scored - sampled, "judge": judged - scored}
            result.metrics |= {f"seconds/{name}": (seconds, 1.0) for name, seconds in spent.items()}
            for line in why_zero(experience, found, options):
                self.say(line)
        main = self.accelerator is None or self.accelerator.is_main_process
        if options.completions_every and self.batch % options.completions_every == 0 and main and self.out is not None:
            write_completions(experience, found, self.out / "completions")
        parts = self._minibatches(self._columns(experience, found), counts)
        self.state.batches_done += 1  # type: ignore[union-attr,operator]
        return parts

    @torch.no_grad()
    def _experience(
        self,
        traces: list[Trace],
        where: list[int],
        prompts: list[Group],
        rewarded: Rewarded,
        kept: list[int],
        counts: bool,
    ) -> Experience:
        longest, device = max(map(len, traces)), self.policy.device
        if not counts:  # a process without a row of its own in a last, short batch: nothing of it is shared
            traces = [_masked(t) for t in traces]
        mask_NT = torch.zeros(len(traces), longest, dtype=torch.bool)
        reward_NT = torch.zeros(len(traces), longest, dtype=torch.float64)
        for n, (trace, i) in enumerate(zip(traces, kept, strict=True)):
            mask_NT[n, : len(trace)] = torch.from_numpy(trace.mask)
            credit = rewarded.credits[i]
            assert credit is not None
            if not trace.ended and self.rollouts.missing_eos_penalty:
                credit = credit + Credit.of_sequence(credit.trace, -self.rollouts.missing_eos_penalty)
            reward_NT[n, : len(trace)] = torch.from_numpy(credit.values)
        stats = self._models_say(traces, where, longest)
        value_NT, hidden = None, stats["policy"].extra.get("hidden") if "policy" in stats else None
        if hidden is not None and getattr(self.state, "head", None) is not None:
            value_NT = torch.where(mask_NT.to(device), self.state.values(hidden), 0.0)  # type: ignore[union-attr,operator]
        dtype = torch.promote_types(next(self.policy.model.parameters()).dtype, torch.float32)
        mask_NT = mask_NT.to(device)
        return Experience(
            tuple(traces),
            tuple(prompts[g] for g in where),
            torch.tensor(where, device=device),
            torch.where(mask_NT, reward_NT.to(device, dtype), 0.0),
            mask_NT,
            torch.tensor([t.ended for t in traces], device=device),
            stats,
            value_NT,
            self.batch,
        )

    def _models_say(self, traces: list[Trace], where: list[int], longest: int) -> dict[str, Stats]:
        """Statistics of all models in one pass, rows in the order of the traces, T the longest of them."""
        if not self.experience_needs.stats:
            return {}
        grouped: dict[int, list[int]] = {}
        for n, g in enumerate(where):
            grouped.setdefault(g, []).append(n)
        listed = list(grouped.values())
        layout: dict[str, Any] = {"cost": self.cost, "tree": self.tree, "max_tokens": self.max_tokens}
        packs = pack([[traces[n] for n in some] for some in listed], ends=self.experience_needs.ends, **layout)
        models = {"policy": self.policy, **self.models}
        with self.accelerator.autocast() if self.accelerator is not None else torch.no_grad():
            parts = [token_stats(models, p, self.experience_needs, self.chunk_tokens) for p in packs]
        order = torch.tensor([listed[g][k] for p in packs for g, k in p.order]).argsort().to(self.policy.device)

        def sort(s: Stats) -> Stats:
            extra = {k: v[order] if k in PER_COMPLETION else v[order][:, :longest] for k, v in s.extra.items()}
            mask_NT, logp_NT, present_NT = (x[order][:, :longest] for x in (s.mask_NT, s.logp_NT, s.present_NT))
            return Stats(mask_NT, logp_NT, present_NT, extra)

        return {name: sort(join_stats([part[name] for part in parts])) for name in parts[0]}

    def _columns(self, experience: Experience, found: Advantages) -> list[Group]:
        """The prompts with their completions, and what the loss wants of each token, as columns."""
        values: dict[str, Tensor | None] = {
            "advantages": found.advantage_NT,
            "returns": found.return_NT,
            "old_values": experience.value_NT if found.return_NT is not None else None,
            "old_logps": experience.stats["policy"].logp_NT if "policy" in experience.stats else None,
            REFERENCE: experience.stats["reference"].logp_NT if "reference" in experience.stats else None,
            **found.columns,
        }
        arrays = {k: v.double().cpu().numpy() for k, v in values.items() if v is not None}
        if "old_logps" not in arrays and self.updates_per_batch > 1:
            arrays["old_logps"] = _recorded(experience.traces, "policy_logps", experience.mask_NT.shape)
        if all(t.sampled_logps is not None for t in experience.traces):
            arrays["sampled_logps"] = _recorded(experience.traces, "sampled_logps", experience.mask_NT.shape)
        by_prompt: dict[int, list[int]] = {}
        for n, g in enumerate(experience.groups_N.tolist()):
            by_prompt.setdefault(g, []).append(n)
        groups = []
        for some in by_prompt.values():
            mine = [experience.traces[n] for n in some]
            if self.rollouts.mask_truncated:
                mine = [t if t.ended else _masked(t) for t in mine]
            group = dataclasses.replace(experience.groups[some[0]], traces=tuple(mine), columns={})
            for name, array in arrays.items():
                group.add_column(name, [array[n, : len(t)] for n, t in zip(some, mine, strict=True)])
            groups.append(group)
        return groups

    def _minibatches(self, groups: list[Group], counts: bool) -> list[list[Group]]:
        """Groups stay whole where there are enough of them; their order is drawn anew in each inner epoch.

        Raises:
            ValueError: fewer completions than minibatches in the first batch. In a later one, which is short because
                the data end or rows could not be scored, an epoch's last minibatches are empty, and learn nothing.
        """
        m = self.rollouts.minibatches
        if len(groups) < m:
            groups = [one for g in groups for one in _alone(g)]
        if len(groups) < m and counts and not self.batch:
            raise ValueError(f"{len(groups)} completions do not make {m} minibatches; lower minibatches")
        out: list[list[Group]] = []
        for _ in range(self.rollouts.inner_epochs):
            order = torch.randperm(len(groups)).tolist() if m > 1 else list(range(len(groups)))
            out += [[groups[i] for i in some] for some in np.array_split(order, m)]
        return out


def _masked(trace: Trace) -> Trace:
    return dataclasses.replace(trace, emitted=(False,) * len(trace))


def _alone(group: Group) -> list[Group]:
    """A group's completions, each as a group."""
    return [
        dataclasses.replace(group, traces=(t,), columns={name: [c[k]] for name, c in group.columns.items()})
        for k, t in enumerate(group.traces)
    ]


def _recorded(traces: Sequence[Trace], which: str, shape: Sequence[int]) -> np.ndarray:
    out = np.zeros(tuple(shape))
    for n, trace in enumerate(traces):
        values = getattr(trace, which)
        if values is None:
            raise ValueError(f"the generator recorded no {which} of row {trace.meta.get('row', n)}")
        out[n, : len(trace)] = np.where(trace.mask, values, 0.0)
    return out
