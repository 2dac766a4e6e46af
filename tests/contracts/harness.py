"""One pass of an objective over tiny float64 models, laid out as a contract wants it. No training loop in between."""

from __future__ import annotations

import atexit
import copy
import dataclasses
import sqlite3
import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pertoken.catalog import Method, method
from pertoken.core.data import Group
from pertoken.core.examples import Example
from pertoken.core.lm import LM
from pertoken.core.loop import StepResult
from pertoken.core.packing import Cost, pack
from pertoken.core.protocols import Batch
from pertoken.core.stats import PER_COMPLETION, Stats, token_stats
from pertoken.core.step import needs_of, with_mismatched
from pertoken.core.trace import Trace
from tests import tiny
from tests.methods.one_pass import exact_lm

KINDS = {"pairs": "pair", "unpaired": "unpaired", "sft": "sft", "prompts": "prompt"}


@lru_cache(maxsize=1)
def _film() -> str:
    """A database with one table, in a folder that goes with the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = f"{folder.name}/film.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE film (good TEXT, said TEXT); INSERT INTO film VALUES ('a', 'b');")
    connection.close()
    return path


META = {  # columns of a row that scorers ask for
    "references": ["It was a good film, and the plot was great.", "Not good."],
    "original": "The plot was horrible, the acting was great.",
    "gold_call": "say(what='good')",
    "tools": {"say": ["what"]},
    "ground_truth": '<think> t </think>\n<tool_call>\n{"name": "say", "parameters": {"what": "good"}}\n</tool_call>',
    "sql": "SELECT good, said FROM film",
    "database": _film(),
}
_ONE_PACK = Cost(linear=1.0, attention=0.0, launch=1e12)  # another forward is never worth it


@lru_cache(maxsize=8)
def model(name: str) -> LM:
    """The model that plays a part: for every name another seed of one shape, float64 throughout."""
    return exact_lm(_seed(name))


@lru_cache(maxsize=8)
def scoring_model(name: str) -> LM:
    """The same for scorers, whose prompts may be long: a tiny Llama, as its rotary positions have no end."""
    lm = tiny.lm(_seed(name))
    lm.context = 1024
    return lm


def _seed(name: str) -> int:
    return 0 if name == "policy" else 1 + sum(name.encode()) % 97


@lru_cache(maxsize=32)
def state_of(objective: Any) -> nn.Module | None:
    """The objective's own module, made once; whoever trains it takes a copy.

    In evaluation mode: there is no chance in it, so that what a `stochastic` method computes can be checked, too.
    """
    make = getattr(objective, "init_state", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = make(model("policy").causal.config) if make else None
        return state.double().eval() if state is not None else None


def without_dropout(state: nn.Module | None) -> nn.Module | None:
    """The module in training mode, as the loop has it, where it may learn from a batch; dropout is off."""
    for module in state.train().modules() if state is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return state


def draws(row: Method, objective: Any) -> bool:
    """Whether passes of an objective differ by chance: what its attribute ``stochastic`` says; else a method that is
    `stochastic`, unless all its chance is in its module, which draws nothing in evaluation mode."""
    own = getattr(objective, "stochastic", None)
    return own if own is not None else row.stochastic and not hasattr(objective, "init_state")


@dataclass(frozen=True)
class Pass:
    """What one pass found: the loss's sum and count, the gradient of the sum (flat), metrics as (sum, count)."""

    sum: float
    count: float
    grads: Tensor
    metrics: dict[str, tuple[float, float]]

    def __add__(self, other: Pass) -> Pass:
        joined = StepResult(metrics=dict(self.metrics))
        joined.add(StepResult(metrics=other.metrics))
        metrics = joined.metrics
        return Pass(self.sum + other.sum, self.count + other.count, self.grads + other.grads, metrics)


def objective_pass(
    objective: Any,
    groups: Sequence[Group],
    *,
    tree: str = "auto",
    chunk: int | None = None,
    pad_left: bool = False,
    outside: float | None = None,
    models: Mapping[str, LM] | None = None,
    state: nn.Module | None = None,
) -> Pass:
    """Loss and gradients of one batch.

    Args:
        objective: of the room `train`.
        groups: of `make_groups`, all of them one batch.
        tree: as `pack`; chunk: positions that reach the LM head together; pad_left: padding first.
        outside: a value that all statistics get on tokens that the policy did not emit, and beyond the ends.
        models: by name; default: `model` of each name. state: default: a copy of `state_of` the objective, since a
            pass may change it.
    """
    needs, state = needs_of(objective), state or copy.deepcopy(state_of(objective))
    models = models or {name: model(name) for name in needs.stats}
    layout: dict[str, Any] = {"tree": tree, "max_tokens": 1 << 20, "pad_left": pad_left, "ends": needs.ends}
    packs = pack([g.traces for g in groups], cost=_ONE_PACK, **layout)
    assert len(packs) == 1
    stats = token_stats(models, packs[0], needs, chunk, trained="policy")
    if outside is not None:
        stats = {name: _with_outside(s, outside) for name, s in stats.items()}
    batch = make_batch(objective, groups, packs[0].order, tuple(packs[0].mask_NT.shape))
    loss = objective.loss(stats, batch, state)
    weights = [p for m in (models["policy"].model, state) if m is not None for p in m.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.sum, weights, allow_unused=True)
    grads = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(weights, found)])
    metrics = {name: (float(a), float(b)) for name, (a, b) in loss.metrics.items()}
    return Pass(float(loss.sum.detach()), float(loss.count), grads, metrics)


def _with_outside(stats: Stats, value: float) -> Stats:
    def fill(x_NT: Tensor) -> Tensor:
        return torch.where(stats.mask_NT, x_NT, value) if x_NT.is_floating_point() and x_NT.ndim == 2 else x_NT

    extra = {name: x if name in PER_COMPLETION else fill(x) for name, x in stats.extra.items()}
    return Stats(stats.mask_NT, fill(stats.logp_NT), stats.present_NT, extra)


def make_batch(
    objective: Any, groups: Sequence[Group], order: Sequence[tuple[int, int]], shape: tuple[int, ...]
) -> Batch:
    """What the objective sees beside the statistics, for completions in the order of a pack."""
    columns: dict[str, Tensor] = {}
    for name in groups[0].columns:
        given = [groups[g].columns[name] for g, _ in order]
        entries = [c[k] if isinstance(c, list) else c for c, (_, k) in zip(given, order, strict=True)]
        if not np.ndim(entries[0]):  # a number a completion, or one for the group
            columns[name] = torch.tensor(entries, dtype=torch.float64)
            continue
        columns[name] = torch.zeros(shape, dtype=torch.float64)
        for row, values in zip(columns[name], map(torch.as_tensor, entries), strict=True):
            row[: len(values)] = values
    if getattr(objective, "mismatched", False):
        columns["mismatched_N"] = torch.tensor([k == 1 for _, k in order])
    pairs = label = None
    if objective.data == "pairs":
        place = {o: i for i, o in enumerate(order)}
        pairs = torch.tensor([[place[g, 0], place[g, 1]] for g in range(len(groups))])
    if objective.data == "unpaired":
        label = torch.tensor([bool(groups[g].example.label) for g, _ in order])
    return Batch(pairs, columns, label, tuple(groups[g].example.row for g, _ in order))


def make_groups(
    objective: Any, n: int = 4, seed: int = 0, completions: Sequence[Sequence[Trace]] | None = None
) -> list[Group]:
    """Random groups of the kind of data that the objective takes, with the columns that its `prepare` would give.

    Every second token of the longest first response was not emitted by the policy.
    """
    kind = KINDS[objective.data]
    k = 2 if kind == "pair" else 1
    drawn = [list(traces) for traces in completions or tiny.groups(model("policy"), n=n, k=k, seed=seed)]
    if completions is None:
        longest = max(drawn, key=lambda traces: len(traces[0]))
        longest[0] = dataclasses.replace(longest[0], emitted=tuple(t % 2 == 0 for t in range(len(longest[0]))))
    groups = []
    for row, traces in enumerate(drawn):
        label = row % 2 == 0 if kind == "unpaired" else None
        said = () if kind == "prompt" else ("!",) * k
        example = Example(prompt="?", responses=said, kind=kind, label=label, row=row)
        groups.append(Group(example=example, prompt_ids=traces[0].prompt_ids, traces=tuple(traces)))
    if getattr(objective, "mismatched", False):
        groups = with_mismatched(groups)
    example_columns = getattr(type(objective), "example_columns", None)
    if example_columns is not None:
        rng = np.random.default_rng(seed)
        for group in groups:
            longest = max(len(t) for t in group.traces)
            mask = np.zeros((len(group.traces), longest), bool)
            for i, trace in enumerate(group.traces):
                mask[i, : len(trace)] = trace.mask
            for name, column in example_columns(rng, torch.from_numpy(mask)).items():
                if column.ndim < 2:  # numbers: one for the group, or one a completion
                    group.add_column(name, column.tolist())
                    continue
                group.add_column(name, [np.asarray(row)[: len(t)] for row, t in zip(column, group.traces, strict=True)])
    return groups


def variants(row: Method) -> list[Any]:
    """The method with its defaults, then with each other value of each option that is a choice or a switch."""
    cls = method(row.slug)
    hints = typing.get_type_hints(cls)
    out = [cls()]
    for field in dataclasses.fields(cls):
        choices = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        choices = (True, False) if hints[field.name] is bool else choices
        out += [cls(**{field.name: choice}) for choice in choices if choice != getattr(out[0], field.name)]
    return out


def rebuild(cls: type, data: Any) -> Any:
    """A dataclass from what `dataclasses.asdict` made of it, nested ones too."""
    if not dataclasses.is_dataclass(cls) or not isinstance(data, dict):
        return tuple(data) if isinstance(data, list) else data
    hints = typing.get_type_hints(cls)
    return cls(**{name: rebuild(hints[name], value) for name, value in data.items()})


def make_scorer(row: Method) -> Any:
    """A scorer of the catalog with tiny models in the fields called lm, policy or reference, and the options that its
    class gives as an example, if its defaults do not do (`example_options`); one that has to be fitted has a
    classmethod `example`, which gives one with random weights."""
    cls = method(row.slug)
    models = {"lm": "policy", "policy": "policy", "reference": "reference"}
    given = {f.name: scoring_model(models[f.name]) for f in dataclasses.fields(cls) if f.name in models}
    made: Any = getattr(cls, "example", cls)
    return made(**given, **getattr(cls, "example_options", dict)())
