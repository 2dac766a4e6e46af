"""One training run from data to saved model: preparation stages, the cached reference, the loop, the record.

`Run` is what `Objective.prepare` is given (`protocols.Preparation`). It knows methods only through `resolve`, a function
from a slug to an options class, so that core imports no room.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cache import ArrayCache, key_of, remember
from .data import Group
from .lm import LM, load, same_vocabulary
from .loop import RESULT, LoopConfig, fit, make_accelerator, refuse_old_run
from .packing import Cost, pack
from .protocols import Scorer, token_columns
from .record import data_hash, provenance, write_json
from .stages import Stages, load_ragged, save_ragged
from .stats import Needs, Stats, token_stats
from .step import REFERENCE, ObjectiveStep, live_models, with_mismatched
from .trace import Trace

Say = Callable[[str], None]
_TOGETHER = 16  # completions of one prompt that share its forward


@torch.no_grad()
def completions_stats(
    lm: LM,
    traces: Sequence[Trace],
    wants: frozenset[str] = frozenset({"logp"}),
    *,
    max_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Statistics of one model on any traces, prompts that are the same computed once.

    Returns:
        For each trace, in order: ``logp`` and what else was wanted, each of shape (T, ...), float64 where it was a
        number; observation tokens are in it too.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, trace in enumerate(traces):
        by_prompt.setdefault(trace.prompt_ids, []).append(i)
    # Very many completions of one prompt would make one huge pack, so they are taken some at a time.
    indices = [some[i : i + _TOGETHER] for some in by_prompt.values() for i in range(0, len(some), _TOGETHER)]
    out: list[dict[str, np.ndarray]] = [{} for _ in traces]
    with lm.active() as causal:
        cost = Cost.of(causal)
    for packed in pack([[traces[i] for i in some] for some in indices], cost=cost, max_tokens=max_tokens):
        stats: Stats = token_stats({"model": lm}, packed, Needs({"model": wants}))["model"]
        values = {"logp": stats.logp_NT, **stats.extra}
        arrays = {name: v.double().cpu().numpy() for name, v in values.items() if v.ndim > 1}
        for row, (g, k) in enumerate(packed.order):
            i = indices[g][k]
            out[i] = {name: a[row, : len(traces[i])].copy() for name, a in arrays.items()}
        if progress:
            progress(len(packed.order))
    return out


def add_reference_logps(
    groups: Sequence[Group], reference: LM, cache: ArrayCache | None = None, say: Say | None = None
) -> None:
    """Add the column of per-token reference log-probs, from the cache by content, computing what is missing."""
    shelf = (cache or ArrayCache()).context(reference.identity())
    traces = [t for g in groups for t in g.traces]

    def compute(missing: list[Trace]) -> list[np.ndarray]:
        if say:
            say(f"reference log-probs of {len(missing)} responses ({len(traces) - len(missing)} known or repeated)")
        return [s["logp"] for s in completions_stats(reference, missing)]

    arrays = iter(remember(shelf, traces, lambda t: key_of(t.prompt_ids, t.completion_ids), compute, chunk=512))
    for group in groups:
        group.add_column(REFERENCE, [next(arrays) for _ in group.traces])


@dataclass(kw_only=True)
class Run:
    """A run of one method; `Preparation` for its objective.

    Attributes:
        slug, objective: the method and its options.
        policy: what is trained; it is the reference too, before the first update.
        groups, held_out: encoded data; `every` is both.
        config: the loop's options. out: the run's folder. resolve: slug -> options class.
        cache: of reference log-probs. say: told lines for the user.
    """

    slug: str
    objective: Any
    policy: LM
    groups: list[Group]
    held_out: list[Group]
    config: LoopConfig
    out: Path
    resolve: Callable[[str], type[Any]]
    version: int = 1
    pack_tokens: int = 4096
    tree: str = "auto"
    given: Mapping[str, LM] = field(default_factory=dict)
    cache: ArrayCache | None = None
    say: Say = lambda line: None  # noqa: E731
    progress: bool = True
    stage_folder: Path | None = None

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.stages = Stages(self.stage_folder or self.out / "stages", self.say)
        self._reference: LM | None = None
        self.notes: list[str] = []
        self.updates = 0  # of this run and of its helper models
        for name, lm in self.given.items():
            del name
            same_vocabulary(self.policy, lm)

    @property
    def every(self) -> list[Group]:
        """Training and held-out groups."""
        return [*self.groups, *self.held_out]

    @property
    def reference(self) -> LM:
        """The frozen starting checkpoint (or the reference that was given); made once, before the first update."""
        if self._reference is None:
            self._reference = self.given.get("reference") or self.policy.reference()
        return self._reference

    def report(self, line: str) -> None:
        """Tell the user something, and keep it in the run's record."""
        self.notes.append(line)
        self.say(line)

    def data_key(self) -> str:
        """Hash of the encoded data."""
        return key_of([], [], *(key_of(t.prompt_ids, t.completion_ids) for g in self.every for t in g.traces))

    def scorer(self, slug: str, **options: Any) -> Scorer:
        """See `protocols.Preparation`: fields called lm, policy or reference are filled with the starting checkpoint."""
        kind = self.resolve(slug)
        for f in dataclasses.fields(kind):
            if f.name in ("lm", "policy", "reference") and options.get(f.name) is None:
                options[f.name] = self.given.get("reference") or self.policy.as_reference()
        return kind(**options)

    def credits(self, name: str, scorer: Scorer) -> list[list[np.ndarray]]:
        """See `protocols.Preparation`: token values of every completion of `every`, kept as a stage."""
        groups = self.every

        def make(folder: Path) -> None:
            traces = [
                t if "prompt" in t.meta else dataclasses.replace(t, meta={**t.meta, "prompt": g.example.prompt})
                for g in groups
                for t in g.traces
            ]
            save_ragged(folder / "values.npz", token_columns(scorer.score(traces)))

        inputs = {"scorer": describe(scorer), "data": self.data_key()}
        values = iter(load_ragged(self.stages.run(name, inputs, make) / "values.npz"))
        return [[next(values) for _ in g.traces] for g in groups]

    def train(self, slug: str, **options: Any) -> LM:
        """See `protocols.Preparation`: a helper model trained by another method on the same data, kept as a stage."""
        objective = self.resolve(slug)(**options)
        inputs = {
            "method": slug,
            "options": describe(objective),
            "data": self.data_key(),
            "start": self.policy.identity(),
            "config": asdict(self.config),
        }
        steps = self.config.total_steps(len(self.groups))

        def make(folder: Path) -> None:
            lm = self.policy.clone()
            helper = dataclasses.replace(
                self,
                slug=slug,
                objective=objective,
                policy=lm,
                groups=[dataclasses.replace(g, columns=dict(g.columns)) for g in self.groups],
                held_out=[],
                out=folder / "run",
                stage_folder=None,
            )
            helper.go(final=False)
            lm.save(folder / "model")

        self.updates += steps
        folder = self.stages.run(f"{slug}-model", inputs, make)
        dtype = str(next(self.policy.model.parameters()).dtype).removeprefix("torch.")
        return load(folder / "model", dtype=dtype, device=str(self.policy.device), template=self.policy.template)

    def go(self, *, resume: bool = False, final: bool = True) -> dict[str, Any]:
        """Prepare, train, evaluate, save. Returns what ``results.json`` holds.

        Raises:
            ValueError: as `loop.fit`; data of a kind that the objective does not take.
        """
        refuse_old_run(self.out, resume)
        if resume and (self.out / RESULT).exists():
            self.say(f"{self.out} is finished; nothing to resume")
            return json.loads((self.out / RESULT).read_text("utf8"))
        started = time.perf_counter()
        start = self.policy.identity()
        if getattr(self.objective, "mismatched", False):
            self.groups, self.held_out = with_mismatched(self.groups), with_mismatched(self.held_out)
        prepare = getattr(self.objective, "prepare", None)
        if prepare is not None:
            prepare(self)
        live = live_models(self.objective)
        wants = self.objective.stats
        if "reference" in wants and "reference" not in live:
            lm = self.given.get("reference") or (self._reference or self.policy.as_reference())
            add_reference_logps(self.every, lm, self.cache, self.say)
        others = {name: self.reference if name == "reference" else self.given[name] for name in live}
        accelerator = make_accelerator(self.config, self.out)
        step = ObjectiveStep(
            self.objective,
            self.policy,
            self.groups,
            held_out=self.held_out,
            others=others,
            accelerator=accelerator,
            max_tokens=self.pack_tokens,
            tree=self.tree,
        )
        meta = {"method": self.slug, "options": describe(self.objective), "data": self.data_key(), "start": start}
        history = fit(
            step,
            self.config,
            self.out,
            accelerator=accelerator,
            resume=resume,
            meta=meta,
            say=self.say,
            progress=self.progress,
        )
        self.policy.changed()
        self.updates += len(history)
        record = {
            "method": self.slug,
            "options": describe(self.objective),
            "config": asdict(self.config),
            "final": {k: v for k, v in (history[-1] if history else {}).items() if np.isfinite(v)},
            "updates": self.updates,
            "seconds": time.perf_counter() - started,
            "stages": [{k: s.get(k) for k in ("name", "seconds", "reused")} for s in self.stages.records],
            "notes": self.notes,
            "provenance": provenance(
                models={"start": start},
                seed=self.config.seed,
                methods={self.slug: self.version},
                data=data_hash(g.example for g in self.groups),
            ),
        }
        if final and accelerator.is_main_process:
            self.policy.save(self.out / "model")
            write_json(self.out / RESULT, record)
        return record


def describe(thing: Any) -> Any:
    """A method's options as JSON: dataclasses by field, models by identity, functions by name."""
    if isinstance(thing, LM):
        return thing.identity()
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"type": type(thing).__name__, **fields}
    if isinstance(thing, Mapping):
        return {str(k): describe(v) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [describe(v) for v in thing]
    if thing is None or isinstance(thing, (int, float, str, bool)):
        return thing
    code = getattr(thing, "__code__", None)  # two lambdas of one name are not one scorer
    digest = key_of(list(code.co_code), [], repr(code.co_consts)) if code else ""
    return (getattr(thing, "__qualname__", None) or type(thing).__name__) + (f"-{digest[:12]}" if digest else "")
