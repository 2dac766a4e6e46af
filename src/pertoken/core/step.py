"""The step of every objective on a language model: rows -> packs -> statistics -> loss -> backward.

One forward of the policy a pack; the reference comes from the cached column when its log-probs are all that is wanted,
else from a second forward. An objective that looks at a whole batch at once (`batch_coupled`) gets all packs together.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .data import Group
from .distributed import alone
from .lm import LM
from .loop import StepResult
from .packing import Cost, Pack, pack
from .protocols import Batch, Loss
from .rollout import Sampling, sample
from .stats import PER_COMPLETION, Needs, Stats, TokenStats

REFERENCE = "reference_logps"


def needs_of(objective: Any) -> Needs:
    """What an objective wants of one pass."""
    joint = getattr(objective, "token_stats", None)
    return Needs(objective.stats, {type(objective).__name__: joint} if joint else {})


def live_models(objective: Any) -> tuple[str, ...]:
    """Models that must run beside the policy: all but a reference of which only log-probs are wanted (those are
    computed once and cached)."""
    if hasattr(objective, "experience"):  # all speak of fresh rollouts
        return tuple(name for name in objective.experience if name != "policy")
    wanted = objective.stats
    whole = {w.partition(":")[2] for w in wanted["policy"] if w.startswith("kl_")}
    fresh = hasattr(objective, "token_stats") or getattr(objective, "rollout", None) is not None
    return tuple(
        name
        for name in wanted
        if name != "policy" and (name != "reference" or name in whole or wanted[name] != {"logp"} or fresh)
    )


def with_mismatched(groups: Sequence[Group], context: int | None = None) -> list[Group]:
    """Beside each completion, that of the next example of another prompt, after the same prompt: what KTO estimates its
    KL term on. Both share the prompt, so they are one tree.

    Args:
        groups: one completion each.
        context: most tokens of prompt and completion; completions that would not fit are passed over.

    Raises:
        ValueError: an example for which there is none.
    """
    n = len(groups)
    out = []
    for i, here in enumerate(groups):
        room = (context or math.inf) - len(here.prompt_ids)
        others = (groups[(i + k) % n] for k in range(1, n))
        after = next((g for g in others if g.prompt_ids != here.prompt_ids and len(g.traces[0]) <= room), None)
        if after is None:
            raise ValueError(
                f"row {here.example.row}: no response to another prompt fits after its prompt; give data of several "
                "prompts, or a smaller max_length"
            )
        other = dataclasses.replace(
            after.traces[0],
            prompt_ids=here.prompt_ids,
            prompt_pieces=here.traces[0].prompt_pieces,
            sampled_logps=None,
            policy_logps=None,
        )
        out.append(dataclasses.replace(here, traces=(here.traces[0], other), columns={}))
    return out


@contextlib.contextmanager
def recomputed_layers(causal: Any) -> Iterator[None]:
    """Inside, each layer keeps only its input and is computed again in backward (gradient checkpointing).

    transformers does so in training mode alone, but there dropout is on, and packed would no longer equal flat.

    Raises:
        ValueError: an architecture whose layers transformers cannot compute again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"no layer of {type(causal).__name__} can be computed again; turn gradient_checkpointing off")

    def again(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    for layer in layers:
        layer.forward = again(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class ObjectiveStep:
    """`loop.Step` of an objective.

    Args:
        objective: what is minimised.
        policy: the model that is trained.
        groups: encoded training data; `held_out` for evaluation.
        others: live models by name (`live_models`).
        accelerator: wraps the policy (data parallel, sharding) and runs the backward pass.
        max_tokens: most positions of one forward; tree: how prompts are shared (`packing.pack`).
        chunk_tokens: positions that reach the LM head together.
    """

    def __init__(
        self,
        objective: Any,
        policy: LM,
        groups: Sequence[Group],
        *,
        held_out: Sequence[Group] = (),
        others: Mapping[str, LM] | None = None,
        accelerator: Any = None,
        max_tokens: int = 4096,
        tree: str = "auto",
        chunk_tokens: int | None = None,
    ):
        self.objective, self.policy, self.groups, self.held_out = objective, policy, groups, held_out
        self.others, self.max_tokens, self.tree, self.chunk_tokens = dict(others or {}), max_tokens, tree, chunk_tokens
        self.needs = needs_of(objective)
        live = {"policy", *self.others}
        self.live_needs = Needs({n: w for n, w in self.needs.stats.items() if n in live}, self.needs.joints)
        self.cost = Cost.of(policy.causal)
        self.coupled = bool(getattr(objective, "batch_coupled", False))
        self.mismatched = bool(getattr(objective, "mismatched", False))
        self.sampling: Sampling | None = getattr(objective, "rollout", None)
        make_state = getattr(objective, "init_state", None)
        self.state: nn.Module | None = make_state(policy.causal.config) if make_state else None
        self.inner = TokenStats(policy)
        self.accelerator = accelerator
        if self.sampling is not None and is_sharded(accelerator):
            raise ValueError("sampling from sharded weights is not supported; launch with configs/ddp.yaml")
        self.module = self.inner if accelerator is None else _prepared(self.inner, policy.causal, accelerator)
        self.modules: dict[str, nn.Module] = {"policy": policy.model}
        if self.state is not None:  # never wrapped: an objective may use any of its attributes
            self.modules["state"] = self.state.to(policy.device)
        self.size = len(groups)

    def run(self, rows: list[int], *, train: bool) -> StepResult:
        """See `loop.Step`. A process that has no row in a last, short batch computes one with weight 0."""
        groups = [self.groups[r] for r in rows or [0]]
        if train and self.sampling is not None:
            groups = self._rolled_out(groups)
        return self._run(groups, train, 1.0 if rows else 0.0)

    def _rolled_out(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with one completion each, sampled from the policy as it is now."""
        seed = int(torch.randint(1 << 62, ()))  # the global generator is in the checkpoint: a resumed run draws alike
        drawn = sample(self.policy, [g.prompt_ids for g in groups], 1, self.sampling, seed=seed)
        return [dataclasses.replace(g, traces=tuple(t), columns={}) for g, t in zip(groups, drawn, strict=True)]

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics on the held-out groups, by this process, in batches of 64."""
        total = StepResult()
        for start in range(0, len(self.held_out), 64):
            total.add(self._run(self.held_out[start : start + 64], False, 1.0))
        return total.means()

    def _run(self, groups: Sequence[Group], train: bool, weight: float) -> StepResult:
        if self.state is not None:
            self.state.train(train)
        layout: dict[str, Any] = {"cost": self.cost, "tree": self.tree, "max_tokens": self.max_tokens}
        packs = pack([g.traces for g in groups], ends=self.needs.ends, **layout)
        idle = self._idle(len(packs))
        parts = [packs] if self.coupled else [[p] for p in [*packs, *packs[:1] * idle]]
        result = StepResult()
        for i, together in enumerate(parts):
            last, share = i == len(parts) - 1, weight if i < len(packs) else 0.0
            with torch.set_grad_enabled(train), self._sync(last or not train):
                stats, order = self._statistics(self.module, together, groups)
                batch = self._batch(stats["policy"], order, groups, counts=share > 0)
                loss: Loss = self.objective.loss(stats, batch, self.state)
                # what counts for nothing must be finite: 0 x inf would spoil the gradients
                total = loss.sum * share if share else 0.0 * stats["policy"].logp_NT.sum()
                for _ in range(idle if self.coupled else 0):
                    more = self.module(packs[0], self.live_needs, self.others, self.chunk_tokens)
                    total = total + 0.0 * more["policy"].logp_NT.sum()
                if train:
                    (self.accelerator.backward if self.accelerator is not None else torch.Tensor.backward)(total)
            part = _result(loss, batch, share)
            if train and share and not np.isfinite(part.loss):
                part.bad_rows = self._bad_rows([groups[g] for g in sorted({g for g, _ in order})])
            result.add(part)
        if train:
            self._share_state_gradients()
        if is_sharded(self.accelerator):  # a forward without backward leaves some parameters gathered
            self.module.reshard()  # type: ignore[operator]
        return result

    def _idle(self, packs: int) -> int:
        """Forwards without weight to add: where parameters are sharded, all processes must compute equally many."""
        if not is_sharded(self.accelerator):
            return 0
        from accelerate.utils import gather_object

        return max(gather_object([packs])) - packs

    def _share_state_gradients(self) -> None:
        """Average the gradients of the objective's own module over processes, as the wrapper does the policy's."""
        if self.state is None or self.accelerator is None or self.accelerator.num_processes == 1:
            return
        for p in self.state.parameters():
            if p.requires_grad:
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "mean")

    @torch.no_grad()
    def _bad_rows(self, groups: Sequence[Group]) -> tuple[int, ...]:
        """Rows whose loss is not finite alone: in a pack, one that is not finite spoils those beside it."""
        rows = tuple(g.example.row for g in groups)
        if is_sharded(self.accelerator):
            return rows
        bad, state = [], copy.deepcopy(self.state)
        if state is not None:
            state.eval()
        for group in groups:
            packs = pack([group.traces], cost=self.cost, ends=self.needs.ends)
            stats, order = self._statistics(self.inner, packs, [group])
            with alone():
                loss = self.objective.loss(stats, self._batch(stats["policy"], order, [group]), state)
            if not np.isfinite(float(loss.sum)):
                bad.append(group.example.row)
        return tuple(bad) or rows

    def _statistics(
        self, module: nn.Module, packs: list[Pack], groups: Sequence[Group]
    ) -> tuple[dict[str, Stats], list[tuple[int, int]]]:
        parts = [module(p, self.live_needs, self.others, self.chunk_tokens) for p in packs]
        order = [o for p in packs for o in p.order]
        stats = {name: join_stats([part[name] for part in parts]) for name in parts[0]}
        if "reference" in self.needs.stats and "reference" not in stats:
            like = stats["policy"]
            columns = [_reference_column(groups, g, k) for g, k in order]
            stats["reference"] = Stats(like.mask_NT, _padded(columns, like.logp_NT), like.present_NT)
        return stats, order

    def _batch(self, like: Stats, order: list[tuple[int, int]], groups: Sequence[Group], counts: bool = True) -> Batch:
        device = like.logp_NT.device
        place = {o: i for i, o in enumerate(order)}
        columns: dict[str, Tensor] = {}
        for name in groups[0].columns:
            if name == REFERENCE:
                continue
            values = [_of_completion(groups[g].columns[name], k) for g, k in order]
            if np.ndim(values[0]):
                columns[name] = _padded(values, like.logp_NT)
            else:
                columns[name] = torch.tensor(values, dtype=like.logp_NT.dtype, device=device)
        if self.mismatched:
            columns["mismatched_N"] = torch.tensor([k == 1 for _, k in order], device=device)
        pairs = label = None
        # two rollouts of a prompt are no pair, though the data that the prompt is from may be pairs
        if self.objective.data == "pairs" and len(groups[0].traces) == 2 and not hasattr(self.objective, "rollouts"):
            pairs = torch.tensor(
                [[place[g, 0], place[g, 1]] for g in range(len(groups)) if (g, 0) in place], device=device
            )
        elif self.objective.data == "unpaired":
            label = torch.tensor([bool(groups[g].example.label) for g, _ in order], device=device)
        return Batch(pairs, columns, label, tuple(groups[g].example.row for g, _ in order), counts)

    def _sync(self, on: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients of several packs are summed here before they are shared once."""
        if on or self.accelerator is None:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.module)


def _prepared(module: nn.Module, causal: Any, accelerator: Any) -> nn.Module:
    """The module as accelerate trains it: data parallel, sharded, in mixed precision."""
    if not is_sharded(accelerator):  # a single process trains where the model lies
        return accelerator.prepare_model(module, device_placement=accelerator.num_processes > 1)
    for name in ("_no_split_modules", "tie_weights"):  # what accelerate asks a transformers model for
        setattr(module, name, getattr(causal, name))
    trained = [p for p in module.parameters() if p.requires_grad]
    # accelerate shards no model without an optimizer; the loop makes its own, of the sharded parameters
    return accelerator.prepare(module, torch.optim.SGD(trained, lr=0.0))[0]


def is_sharded(accelerator: Any) -> bool:
    """Whether parameters are sharded over processes (FSDP2)."""
    return accelerator is not None and accelerator.is_fsdp2


def _reference_column(groups: Sequence[Group], g: int, k: int) -> np.ndarray:
    if REFERENCE not in groups[g].columns:
        raise ValueError(f"the groups have no column {REFERENCE!r}; add it with run.add_reference_logps")
    return groups[g].columns[REFERENCE][k]


def _of_completion(column: Any, k: int) -> Any:
    return column[k] if isinstance(column, (list, tuple, np.ndarray)) else column


def _padded(arrays: Sequence[np.ndarray], like: Tensor) -> Tensor:
    """Ragged arrays as a tensor of the shape, dtype and device of `like`, zeros beyond the ends."""
    out = np.zeros(like.shape, np.float64)
    for row, values in enumerate(arrays):
        out[row, : len(values)] = values
    return torch.from_numpy(out).to(like.device, like.dtype)


def join_stats(parts: list[Stats]) -> Stats:
    """Statistics of several packs as one, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(p.mask_NT.shape[1] for p in parts)

    def cat(tensors: list[Tensor], by_token: bool = True) -> Tensor:
        if not by_token:
            return torch.cat(tensors)
        return torch.cat([F.pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) for t in tensors])

    return Stats(
        cat([p.mask_NT for p in parts]),
        cat([p.logp_NT for p in parts]),
        cat([p.present_NT for p in parts]),
        {key: cat([p.extra[key] for p in parts], key not in PER_COMPLETION) for key in parts[0].extra},
    )


def _result(loss: Loss, batch: Batch, weight: float) -> StepResult:
    def number(x: Tensor | float) -> float:
        return float(x.detach()) if isinstance(x, Tensor) else float(x)

    if not weight:
        return StepResult(metrics={k: (0.0, 0.0) for k in loss.metrics})
    metrics = {k: (weight * number(a), weight * number(b)) for k, (a, b) in loss.metrics.items()}
    return StepResult(weight * number(loss.sum), weight * number(loss.count), metrics, batch.rows)
