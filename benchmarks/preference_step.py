"""Optimiser steps of DPO on SmolLM2-135M: pertoken against TRL's `DPOTrainer`, in one process, step by step in turn.

Both train a copy of the same weights on the same pairs in the same order, from the same token ids and the same
reference log-probs (computed once, before), with AdamW (fused, no weight decay), clipping at norm 1 and a constant
learning rate. TRL's own loop runs (`trainer.train()`), with no other change than that it is handed ids instead of
text; between two of its steps a callback runs one of ours, so that both meet the machine in the same state. A pilot
tries TRL's settings (the whole batch at once, or pair by pair with accumulation; layers kept or computed again in
backward) on the two batches of middle size, and the fastest one races. TRL 1.16 has switched its padding-free option
off.

Memory: the most that torch's allocator held at any moment of a step, less weights, gradients and optimizer state,
measured on the largest batch, in a step that is not timed. The same step says where the time goes (profiler).

    python benchmarks/preference_step.py               12 timed steps of 4 pairs (HH when PERTOKEN_DATA is set)
    python benchmarks/preference_step.py --quick       3 steps, no pilot: does it run?
    python benchmarks/preference_step.py --curve       also generated pairs of prompt : response 256:64, 64:64, 32:128
    python benchmarks/preference_step_cuda.py          the same on a GPU, as a result of its own
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import tyro
from _models import described, named
from _pairs import by_size, draw_pairs, longest, random_pair
from _profiled import WARM, Profiled, Race, machine
from _trl import BETA, CLIP, RATE, Setting, Step, now, run_trl, same_ids

from pertoken.core.data import Group
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig, apply_gradients, make_accelerator, make_optimizer
from pertoken.core.packing import pack
from pertoken.core.run import add_reference_logps
from pertoken.core.step import ObjectiveStep, recomputed_layers
from pertoken.results import save_result
from pertoken.train.dpo import DPO

CONFIG = LoopConfig(lr=RATE)
CURVE = ((256, 64), (64, 64), (32, 128))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    steps: int = 12
    """Timed steps (one before them warms up, one after them is profiled)."""
    batch: int = 4
    """Pairs a step."""
    pairs: int = 0
    """Pairs to draw; gone through again when the steps need more (0: as many as the steps need)."""
    max_tokens: int = 4096
    """Positions of one of our forwards."""
    threads: int = 2
    model: str = "smollm2"
    """Or smollm2-1.7b, with random weights."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    curve: bool = False
    """Also generated pairs of three prompt : response lengths."""
    quick: bool = False
    """Three steps; TRL pair by pair, without a pilot."""
    json: bool = False
    """Write results/preference-step.json."""


class Ours:
    """pertoken's step and update, as `loop.fit` runs them."""

    def __init__(self, groups: Sequence[Group], options: Options, recompute: bool = False):
        self.recompute = recompute
        lm = named(options.model, options.dtype, options.device)
        self.accelerator = make_accelerator(CONFIG, tempfile.gettempdir())
        self.step = ObjectiveStep(
            DPO(beta=BETA), lm, groups, accelerator=self.accelerator, max_tokens=options.max_tokens
        )
        self.optimizer = make_optimizer(self.step.modules, CONFIG)

    def __call__(self, rows: Sequence[int]) -> Step:
        begin = now()
        self.optimizer.zero_grad(set_to_none=True)
        with recomputed_layers(self.step.policy.causal) if self.recompute else contextlib.nullcontext():
            result = self.step.run(list(rows), train=True)
        norm = apply_gradients(self.optimizer, self.accelerator, result.count, RATE, CLIP)
        return Step(*(b - a for a, b in zip(begin, now())), result.means()["loss"], norm)


def positions(groups: Sequence[Group], options: Options, setting: Setting, ours: Ours) -> dict[str, int]:
    """What both sides compute, over all batches. Without Triton, TRL's LM head runs on prompts and padding, too."""
    layers, head, count = "positions in the layers", "positions in the LM head", Counter[str]()
    for start in range(0, len(groups), options.batch):
        batch = groups[start : start + options.batch]
        for at in range(0, len(batch), setting.micro):
            part = batch[at : at + setting.micro]
            count[f"TRL: {layers}, padded"] += 2 * len(part) * max(map(longest, part))
        for g in batch:
            lengths = [len(t) for t in g.traces]
            count[f"TRL: {layers}, unpadded"] += 2 * len(g.prompt_ids) + sum(lengths)
            count[f"pertoken: {layers}, unpadded"] += len(g.prompt_ids) + sum(lengths) - 2
            count[f"pertoken: {head}"] += sum(lengths)
        count[f"pertoken: {layers}, padded"] += sum(
            p.tokens for p in pack([g.traces for g in batch], cost=ours.step.cost, max_tokens=options.max_tokens)
        )
    on_all = options.device == "cpu"
    count[f"TRL: {head}"] = count[f"TRL: {layers}, padded"] if on_all else count[f"pertoken: {head}"]
    return dict(count)


def model_of(options: Options) -> Callable[[], LM]:
    """Makes a copy."""
    return lambda: named(options.model, options.dtype, options.device)


def race(groups: Sequence[Group], options: Options, setting: Setting, recompute: bool = False) -> Race:
    """One step of TRL, one of ours, and so on over the groups."""
    ours, steps = Ours(groups, options, recompute), list[Step]()
    gradients = sum(p.numel() * p.element_size() for p in ours.step.policy.model.parameters())
    held = Profiled(gradients, options.device), Profiled(gradients, options.device)
    last = len(groups) // options.batch - 1

    def around(who: int, n: int) -> Any:
        return held[who]() if n == last else contextlib.nullcontext()

    def after(n: int) -> None:
        with around(1, n):
            steps.append(ours(range(n * options.batch, (n + 1) * options.batch)))

    trl = run_trl(groups, setting, options.batch, model_of(options), after, lambda n: around(0, n))
    return Race(trl, steps, held, positions(groups, options, setting, ours))


def fastest(groups: Sequence[Group], options: Options) -> dict[Setting, float]:
    """Seconds of a step of TRL's settings, on the batches of middle size."""
    n, b = len(groups) // options.batch, options.batch
    some = groups[(n // 2 - 1) * b : (n // 2 + 1) * b]
    settings = [Setting(micro, again) for micro in (1, b) for again in (False, True)]
    return {s: run_trl(some, s, b, model_of(options))[-1].seconds for s in settings}


def main(options: Options, slug: str = "preference-step", gap: float = 1e-3) -> None:
    """Measure, print, and write the result if asked to. gap: of the losses, that counts as none."""
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    steps = 3 if options.quick else options.steps
    lm = named(options.model, options.dtype, options.device)
    wanted = (steps + WARM + 1) * options.batch
    groups, what = draw_pairs(lm, options.pairs or wanted, options.seed)
    add_reference_logps(groups, lm.as_reference())
    groups = by_size((groups * wanted)[:wanted], options.batch)
    load_before = os.getloadavg()[0]
    print(f"{what}, {options.batch} a step; {options.threads} threads, load {load_before:.1f}")
    if "HH (" in what:
        print(f"ids as TRL makes them: {same_ids(groups[:64], lm)}; TRL is given ours")
    pilot = {} if options.quick else fastest(groups, options)
    for setting, seconds in pilot.items():
        print(f"TRL, {setting}: {seconds:.2f} s")
    setting = min(pilot, key=pilot.__getitem__) if pilot else Setting(1, False)
    found = race(groups, options, setting)
    print(f"\nTRL with {setting}\nstep   TRL s  ours s  ratio   TRL loss  ours loss  TRL norm  ours norm")
    for n, (a, b) in enumerate(zip(found.trl, found.ours)):
        note = " (warm-up)" if n < WARM else " (profiled)" if n == len(found.trl) - 1 else ""
        print(
            f"{n:4}{a.seconds:8.2f}{b.seconds:8.2f}{a.seconds / b.seconds:7.2f}{a.loss:11.5f}{b.loss:11.5f}"
            f"{a.norm:10.4f}{b.norm:11.4f}{note}"
        )
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(found.ratios, (10_000, len(found.ratios))), 1)
    ratio, interval = float(np.median(found.ratios)), tuple(map(float, np.percentile(medians, (2.5, 97.5))))
    memory = [h.peak / 2**20 for h in found.held]
    print(
        f"\nratio {ratio:.2f} {interval}, loss differs by {found.gap('loss'):.1e}, norm {found.gap('norm'):.1e} of it"
    )
    print(*(f"{name} {n}" for name, n in found.count.items()), sep="\n")
    print(f"memory of the largest batch: {memory[0]:.0f} and {memory[1]:.0f} MiB, {memory[1] / memory[0]:.2f}")
    for part in Profiled.PARTS:
        print(f"{part:<26}{found.held[0].parts[part]:8.2f} s {found.held[1].parts[part]:8.2f} s")
    rows = further(found, pilot, setting, memory)
    if not options.quick:
        again = race(groups[-2 * options.batch :], options, Setting(setting.micro, True), recompute=True)
        held = [h.peak / 2**20 for h in again.held]
        rows.append({"metric": "memory when both recompute layers (MiB)", "value": held[1], **versus(held[0])})
        print(f"both recompute their layers: {held[0]:.0f} and {held[1]:.0f} MiB, {held[1] / held[0]:.2f}")
    for prompt, response in CURVE if options.curve else ():
        pairs = [random_pair(lm, rng, prompt, response, response) for _ in range(options.batch * (WARM + 4))]
        add_reference_logps(pairs, lm.as_reference())
        ratios = race(pairs, options, setting).ratios
        name = f"time ratio on generated pairs, prompt {prompt}, responses {response}"
        rows.append({"metric": name, "value": float(np.median(ratios)), "world": "random ids"})
        print(f"{name}: {np.median(ratios):.2f}")
    print(f"load {os.getloadavg()[0]:.1f}")
    if options.json:
        save_result(
            slug,
            metric="time of TRL's DPO step / ours (median of pairs of steps; more is better)",
            value=ratio,
            interval=interval,
            baseline=f"TRL {version('trl')}",
            baseline_value=1.0,
            bound=f"at least 2 at equal loss ({gap:g}), memory at most 0.7 of TRL's",
            reached=ratio >= 2 and found.gap("loss") <= gap and memory[1] <= 0.7 * memory[0],
            world=f"{described(options.model)}, {options.dtype}, {options.batch} {what}, "
            f"{machine(options.device, options.threads)}",
            seeds=[options.seed],
            notes=f"TRL's fastest setting: {setting}; interval: bootstrap over steps; the machine's load was "
            f"{load_before:.1f} before and {os.getloadavg()[0]:.1f} after",
            rows=rows,
        )


def versus(value: float) -> dict[str, Any]:
    """The fields of a row that give TRL's figure."""
    return {"baseline": f"TRL {version('trl')}", "baseline_value": value}


def further(found: Race, pilot: dict[Setting, float], setting: Setting, memory: list[float]) -> list[dict[str, Any]]:
    """The rows beside the main figure."""
    timed = [steps[WARM:-1] for steps in (found.trl, found.ours)]
    seconds, cpu = ([float(np.median([getattr(s, k) for s in side])) for side in timed] for k in ("seconds", "cpu"))
    rows = [
        {"metric": "seconds a step (median)", "value": seconds[1], **versus(seconds[0])},
        {"metric": "CPU seconds a step (median)", "value": cpu[1], **versus(cpu[0])},
        {"metric": "largest difference of the loss", "value": found.gap("loss")},
        {"metric": "largest relative difference of the gradient norm", "value": found.gap("norm")},
        {"metric": "memory above weights, gradients, optimizer state (MiB)", "value": memory[1], **versus(memory[0])},
    ]
    for name in ("positions in the layers, padded", "positions in the layers, unpadded", "positions in the LM head"):
        rows.append({"metric": name, "value": found.count[f"pertoken: {name}"], **versus(found.count[f"TRL: {name}"])})
    for part in Profiled.PARTS:
        trl, ours = (held.parts[part] for held in found.held)
        rows.append({"metric": f"seconds of the largest batch in {part}", "value": ours, **versus(trl)})
    for other, time in pilot.items():
        chosen = " (raced)" if other == setting else ""
        rows.append({"metric": f"seconds of TRL's step in the pilot, {other}{chosen}", "value": time})
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
