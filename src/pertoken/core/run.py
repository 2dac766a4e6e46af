"""One training run from data to saved model: preparation stages, the cached reference, the loop, the record.

`Run` is what `Objective.prepare` is given (`protocols.Preparation`). It knows methods only through `resolve`, a
function from a slug to an options class, so that core imports no room.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapters import merge_lora
from .cache import ArrayCache
from .checkpoint import checkpoints, refuse_other_run, save_state, whole
from .completions import add_reference_logps, completions_stats, data_key
from .data import Group, check_data
from .describe import describe
from .lm import LM, load, same_vocabulary
from .loop import RESULT, LoopConfig, fit, make_accelerator, refuse_old_run
from .protocols import Scorer, token_columns
from .record import data_hash, provenance, read_json, write_json
from .rewarding import Rewarder, make_rewarder, with_row
from .rollout import sample
from .rollout_step import Generate, RolloutStep
from .stages import Stages, load_ragged, save_ragged
from .step import ObjectiveStep, live_models, recomputed_layers, with_mismatched

Say = Callable[[str], None]
__all__ = ["Run", "add_reference_logps", "completions_stats", "save_model"]


@dataclass(kw_only=True)
class Run:
    """A run of one method; `Preparation` for its objective.

    Attributes:
        slug, objective: the method and its options.
        policy: what is trained; it is the reference too, before the first update.
        groups, held_out: encoded data; `every` is both.
        config: the loop's options. out: the run's folder. resolve: slug -> options class.
        cache: of reference log-probs. say: told lines for the user.
        generate: what draws rollouts. max_length: most tokens of a sequence, for data that preparation encodes.
    """

    slug: str
    objective: Any
    policy: LM
    groups: list[Group]
    held_out: list[Group]
    config: LoopConfig
    out: Path
    resolve: Callable[[str], type[Any]]
    version_of: Callable[[str], int] = lambda slug: 1
    pack_tokens: int = 4096
    tree: str = "auto"
    given: Mapping[str, LM] = field(default_factory=dict)
    cache: ArrayCache | None = None
    say: Say = lambda line: None
    progress: bool = True
    stage_folder: Path | None = None
    generate: Generate = sample
    max_length: int | None = None

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.stages = Stages(self.stage_folder or self.out / "stages", self.say)
        self._reference: LM | None = None
        self._made: list[tuple[Scorer, int]] = []  # scorers, and the versions of their methods
        self._rewarder: Rewarder | None = None
        self.notes: list[str] = []
        self.updates = 0  # of this run and of its helper models
        for lm in self.given.values():
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
        """Hash of the data, as words (labels and scores included) and encoded."""
        return data_key(self.groups, self.held_out)

    def _given(self) -> dict[str, Any]:
        return {name: lm.identity() for name, lm in self.given.items()}

    def scorer(self, slug: str, **options: Any) -> Scorer:
        """See `protocols.Preparation`: fields called lm, policy or reference get the starting checkpoint."""
        kind = self.resolve(slug)
        for f in dataclasses.fields(kind):
            if f.name in ("lm", "policy", "reference") and options.get(f.name) is None:
                options[f.name] = self.given.get("reference") or self.policy.as_reference()
        scorer = kind(**options)
        self._made.append((scorer, self.version_of(slug)))
        return scorer

    def credits(self, name: str, scorer: Scorer) -> list[list[np.ndarray]]:
        """See `protocols.Preparation`: token values of every completion of `every`, kept as a stage."""
        groups = self.every

        def make(folder: Path) -> None:
            traces = [t if "prompt" in t.meta else with_row(g, t) for g in groups for t in g.traces]
            save_ragged(folder / "values.npz", token_columns(scorer.score(traces)))

        version = next((v for made, v in self._made if made is scorer), 1)
        data = data_key(self.groups, self.held_out, columns=False)  # scorers see none
        inputs = {"scorer": describe(scorer), "version": version, "data": data}
        values = iter(load_ragged(self.stage(name, inputs, make) / "values.npz"))
        return [[next(values) for _ in g.traces] for g in groups]

    def train(
        self,
        slug: str,
        *,
        on: Sequence[Group] | None = None,
        config: Mapping[str, Any] | None = None,
        lora: int | None = None,
        start: LM | None = None,
        **options: Any,
    ) -> LM:
        """See `protocols.Preparation`: a helper model trained by another method, kept as a stage."""
        own = slice(1) if self.mismatched else slice(None)
        groups = [dataclasses.replace(g, traces=g.traces[own], columns={}) for g in self.groups]
        groups = groups if on is None else [dataclasses.replace(g, columns=dict(g.columns)) for g in on]
        objective = self.resolve(slug)(**options)
        settings = dataclasses.replace(self.config, tracker="none", **(config or {}))
        inputs = {
            "method": slug,
            "version": self.version_of(slug),
            "options": describe(objective),
            "data": data_key(groups, []),
            "start": (start or self.policy).identity(),
            "given": self._given(),
            "config": settings.trajectory(),
            **({"lora": lora} if lora else {}),
        }

        def make(folder: Path) -> None:
            lm = (start or self.policy).clone(lora=lora)
            lm.model.requires_grad_(True) if start is not None and start is not self.policy else None
            given = self.given if start is None else {**self.given, "reference": self.reference}
            helper = dataclasses.replace(
                self,
                slug=slug,
                objective=objective,
                policy=lm,
                given=given,
                groups=groups,
                held_out=[],
                config=settings,
                out=folder / "run",
                stage_folder=None,
            )
            helper.go(final=False)
            if lora and not hasattr(self.policy.model, "disable_adapter"):
                lm.model = merge_lora(lm.model)
            save_model(lm, folder / "model")
            for _, path in checkpoints(folder / "run"):  # several times the model, and of no use any more
                shutil.rmtree(path, ignore_errors=True)

        self.updates += settings.total_steps(len(groups))
        folder = self.stage(f"{slug}-model", inputs, make, together=True)
        alike = self.policy.identity()
        return load(
            folder / "model",
            dtype=alike["dtype"],
            device=str(self.policy.device),
            template=self.policy.template,
            attention=alike["attention"],
        )

    def give(self, name: str, lm: LM) -> None:
        """See `protocols.Preparation`: a live model of the objective's, under the name that its `stats` use.

        Raises:
            ValueError: another vocabulary than the policy's.
        """
        same_vocabulary(self.policy, lm)
        lm.model.to(self.policy.device)
        self.given = {**self.given, name: lm}

    def start_from(self, lm: LM) -> None:
        """See `protocols.Preparation`: the policy gets these weights, which are the reference too.

        Raises:
            ValueError: another vocabulary or architecture, a reference that was given, or a policy with an adapter.
        """
        same_vocabulary(self.policy, lm)
        if "reference" in self.given:
            raise ValueError(f"{self.slug} starts rounds from its own models; do not give it a reference")
        if hasattr(self.policy.model, "disable_adapter"):
            raise ValueError(f"{self.slug} trains in rounds, whose reference an adapter cannot be; leave lora out")
        mine, theirs = ({k: tuple(v.shape) for k, v in m.model.state_dict().items()} for m in (self.policy, lm))
        if mine != theirs:
            raise ValueError(f"{lm.name or 'the other model'} is of another architecture than {self.policy.name}")
        self.policy.model.load_state_dict(lm.model.state_dict())
        self.policy.changed()
        self._reference = None

    def reward_by(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float] | None = None) -> None:
        """See `protocols.Preparation`: what rollouts are scored by, in the place of the objective's own options."""
        self._rewarder = Rewarder(scorers, weights, self.objective.rollouts.on_error)

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None], together: bool = False) -> Path:
        """See `protocols.Preparation`: the main process makes it; the others wait, or train `together` with it."""
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state = PartialState()
        if state.num_processes == 1:
            return self.stages.run(name, inputs, make)
        started: list[Path] = []
        made: Path | None = None
        if state.is_main_process:

            def tell(folder: Path) -> None:
                started.append(folder)
                if together:
                    broadcast_object_list([folder])
                make(folder)

            made = self.stages.run(name, inputs, tell)
        if together and not started:
            folder = broadcast_object_list([None])[0]
            if folder is not None:
                make(folder)
        state.wait_for_everyone()
        return made or self.stages.run(name, inputs, make)

    @property
    def mismatched(self) -> bool:
        """Whether the objective wants the next example's completion beside each."""
        return bool(getattr(self.objective, "mismatched", False))

    def go(self, *, resume: bool = False, final: bool = True) -> dict[str, Any]:
        """Prepare, train, evaluate, save. Returns what ``results.json`` holds.

        Raises:
            ValueError: as `loop.fit`; a model that is needed and was not given.
        """
        accelerator = make_accelerator(self.config, self.out)
        main, processes = accelerator.is_main_process, accelerator.num_processes
        refuse_old_run(self.out, resume)
        accelerator.wait_for_everyone()  # nobody writes before all have looked
        for lm in (self.policy, *self.given.values()) if processes > 1 else ():
            lm.model.to(accelerator.device)
        started, start = time.perf_counter(), self.policy.identity()
        if self.mismatched:
            context = self.policy.context
            self.groups = with_mismatched(self.groups, context)
            self.held_out = with_mismatched(self.held_out, context) if len(self.held_out) > 1 else []
        options, data = describe(self.objective), self.data_key()
        anchor = (self.given.get("reference") or self.policy.as_reference()).identity()
        models = {"start": start, "reference": anchor, "given": self._given()}
        meta = {"method": self.slug, "options": options, "data": data, **models}
        if resume and (self.out / RESULT).exists():
            for _, path in checkpoints(self.out)[-1:]:
                refuse_other_run(path, {"config": self.config.trajectory(), **meta})
            self.say(f"{self.out} is finished; nothing to resume")
            return read_json(self.out / RESULT)
        check_data(self.objective, self.every)
        prepare = getattr(self.objective, "prepare", None)
        if prepare is not None:
            prepare(self)
        reinforced = hasattr(self.objective, "rollouts")
        without = [g.example.row for g in self.held_out if not g.traces and not reinforced]
        if without:
            self.report(f"{len(without)} held-out prompts (row {without[0]} first) have no response to evaluate")
            self.held_out = [g for g in self.held_out if g.traces]
        live, wants = live_models(self.objective), self.objective.stats
        missing = [name for name in live if name != "reference" and name not in self.given]
        if missing:
            raise ValueError(f"{self.slug} needs a model {missing[0]!r}; pass it in given={{{missing[0]!r}: lm}}")
        if "reference" in wants and "reference" not in live and not reinforced:
            lm = self.given.get("reference") or (self._reference or self.policy.as_reference())
            with accelerator.autocast():  # as the policy is computed: untrained, both agree to the bit
                if processes > 1:  # each computes a share, then reads the others' from the cache
                    add_reference_logps(self.every[accelerator.process_index :: processes], lm, self.cache, self.say)
                    accelerator.wait_for_everyone()
                add_reference_logps(self.every, lm, self.cache, self.say)
        others = {name: self.reference if name == "reference" else self.given[name] for name in live}
        torch.manual_seed(self.config.seed)  # the objective's own module begins alike in every run and process
        layout: dict[str, Any] = {"accelerator": accelerator, "max_tokens": self.pack_tokens, "tree": self.tree}
        if reinforced:
            o = self.objective
            rewarder = self._rewarder or make_rewarder(o.reward, o.scorer, self.scorer, o.rollouts.on_error)
            told = {"out": self.out, "say": self.report if main else None}
            given = {"held_out": self.held_out, "models": others, "generate": self.generate, **layout, **told}
            step: ObjectiveStep = RolloutStep(o, self.policy, self.groups, rewarder=rewarder, **given)
        else:
            step = ObjectiveStep(
                self.objective, self.policy, self.groups, held_out=self.held_out, others=others, **layout
            )
        again = self.config.gradient_checkpointing
        with recomputed_layers(self.policy.causal) if again else contextlib.nullcontext():
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
            "options": options,
            "config": asdict(self.config),
            "final": {k: v for k, v in (history[-1] if history else {}).items() if np.isfinite(v)},
            "updates": self.updates,
            "seconds": time.perf_counter() - started,
            "stages": [{k: s.get(k) for k in ("stage", "seconds", "reused")} for s in self.stages.records],
            "notes": self.notes,
            "provenance": provenance(
                models={"start": start, "reference": anchor, **self._given()},
                seed=self.config.seed,
                methods={self.slug: self.version_of(self.slug)},
                data=data_hash(g.example for g in self.groups),
            ),
        }
        if final:
            save_model(self.policy, self.out / "model")
            if main:
                save_state(step.state, self.out)
                write_json(self.out / RESULT, record)
        accelerator.wait_for_everyone()
        return record


def save_model(lm: LM, folder: Path) -> None:
    """`LM.save`, of a sharded model too: all processes call it, the main one writes."""
    from accelerate import PartialState

    write = PartialState().is_main_process
    named = dict(lm.model.named_parameters())  # tied weights once
    if not any(hasattr(p, "full_tensor") for p in named.values()):
        if write:
            lm.save(folder)
        return
    tied = {name for name, _ in lm.model.named_parameters(remove_duplicate=False)} - named.keys()
    weights = {name: whole(t, write) for name, t in lm.model.state_dict().items() if name not in tied}
    if write:
        lm.model.save_pretrained(folder, state_dict=weights)
        lm.tokenizer.save_pretrained(folder)
