"""One GRPO update with G completions of one prompt: pertoken against TRL's `GRPOTrainer`, in one process, in turn.

Both train a copy of the same weights on the same ids with the same advantages: TRL's `compute_loss` (loss_type bnpo:
the mean over tokens; beta 0) on its padded batch, backward, clipping at norm 1, fused AdamW; ours as `loop.fit` runs
it, the prompt computed once. TRL takes the whole group at once or half of it with accumulation, whichever a pilot at
the first point finds faster. Lengths are equal, so that TRL pads nothing: with others it would do more, we would not.
Losses and gradient norms are compared at every step.

Then: tokens a second of our rollouts against transformers' `generate` on the same prompt (G samples, same length), and
the share of time that each phase of a whole GRPO batch takes (rollout, score, judge, update).

    python benchmarks/group_step.py            the curve over prompt:response lengths, three timed updates each
    python benchmarks/group_step.py --quick    one point, one update: does it run?
    python benchmarks/group_step_cuda.py       the same on a GPU, as a result of its own
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import tyro
from _models import described, named
from _profiled import machine
from _trl import CLIP, RATE, Step, now
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from pertoken.core.data import Example, Group
from pertoken.core.experience import Rollouts
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig, apply_gradients, make_accelerator, make_optimizer
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout import Sampling, sample
from pertoken.core.rollout_step import RolloutStep
from pertoken.core.step import ObjectiveStep
from pertoken.results import save_result
from pertoken.score.vader import Vader
from pertoken.train.grpo import GRPO

CONFIG = LoopConfig(lr=RATE)
CURVE = ((64, 64), (32, 128), (128, 32), (256, 64))
PROMPT = "Write a short review of a film that you saw last week, and say what you liked about it. "


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    repeats: int = 3
    """Timed updates of each side at each point of the curve."""
    generations: int = 8
    """G."""
    longer: int = 1
    """Factor of the lengths."""
    max_tokens: int = 4096
    """Positions of one of our forwards."""
    threads: int = 2
    model: str = "smollm2"
    """Or smollm2-1.7b, with random weights."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    quick: bool = False
    """One point, one update."""
    save: bool = False
    """Write results/group-step.json."""


def random_group(lm: LM, rng: np.random.Generator, prompt: int, response: int, n: int) -> Group:
    """Random ids of these lengths, with random advantages."""
    ids = rng.integers(100, 40000, prompt).tolist()
    traces = tuple(lm.trace_of_ids(ids, rng.integers(100, 40000, response).tolist()) for _ in range(n))
    group = Group(example=Example(prompt="?", kind="prompt"), prompt_ids=tuple(ids), traces=traces)
    group.add_column("advantages", [np.full(response, a) for a in rng.normal(size=n)])
    return group


class Ours:
    """pertoken's update, as `loop.fit` runs it."""

    def __init__(self, groups: Sequence[Group], options: Options):
        lm = named(options.model, options.dtype, options.device)
        self.accelerator = make_accelerator(CONFIG, tempfile.gettempdir())
        self.step = ObjectiveStep(GRPO(), lm, groups, accelerator=self.accelerator, max_tokens=options.max_tokens)
        self.optimizer = make_optimizer(self.step.modules, CONFIG)

    def __call__(self, row: int) -> Step:
        begin = now()
        self.optimizer.zero_grad(set_to_none=True)
        result = self.step.run([row], train=True)
        norm = apply_gradients(self.optimizer, self.accelerator, result.count, RATE, CLIP)
        return Step(*(b - a for a, b in zip(begin, now())), result.means()["loss"], norm)


class Trl:
    """TRL's loss on a batch that is there already, and the update as its loop makes it."""

    def __init__(self, groups: Sequence[Group], options: Options, micro: int):
        self.groups, self.micro = groups, micro
        lm = named(options.model, options.dtype, options.device)
        config = GRPOConfig(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=options.generations,
            num_generations=options.generations,
            loss_type="bnpo",
            beta=0.0,
            learning_rate=RATE,
            use_cpu=options.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        self.trainer = GRPOTrainer(
            model=lm.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "?"}]),
            processing_class=lm.tokenizer,
        )
        self.trainer.current_gradient_accumulation_steps = options.generations // micro
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def __call__(self, row: int) -> Step:
        group = self.groups[row]
        n, device = len(group.traces), self.model.device
        prompt = torch.tensor([group.prompt_ids] * n, device=device)
        completion = torch.tensor([t.completion_ids for t in group.traces], device=device)
        advantages = torch.tensor([a[0] for a in group.columns["advantages"]], dtype=torch.float32, device=device)
        begin, total = now(), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for at in range(0, n, self.micro):
            part = slice(at, at + self.micro)
            inputs = {
                "prompt_ids": prompt[part],
                "prompt_mask": torch.ones_like(prompt[part]),
                "completion_ids": completion[part],
                "completion_mask": torch.ones_like(completion[part]),
                "advantages": advantages[part],
            }
            loss = self.trainer.compute_loss(self.model, inputs)
            self.trainer.accelerator.backward(loss)
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        self.optimizer.step()
        return Step(*(b - a for a, b in zip(begin, now())), total, norm)


def fastest(lm: LM, options: Options, prompt: int, response: int) -> int:
    """How many completions TRL takes a forward."""
    group = random_group(lm, np.random.default_rng(options.seed), prompt, response, options.generations)
    seconds = {}
    for micro in (options.generations, options.generations // 2):
        side = Trl([group], options, micro)
        side(0)
        seconds[micro] = side(0).seconds
    return min(seconds, key=seconds.__getitem__)


def point(lm: LM, options: Options, prompt: int, response: int, micro: int) -> dict[str, Any]:
    """Both sides in turn at one pair of lengths."""
    rng, repeats = np.random.default_rng(options.seed), 1 if options.quick else options.repeats
    groups = [random_group(lm, rng, prompt, response, options.generations) for _ in range(repeats + 1)]
    trl, ours = Trl(groups, options, micro), Ours(groups, options)
    steps = [(trl(row), ours(row)) for row in range(repeats + 1)]  # the first warms up
    timed = steps[1:]
    ratios = [a.seconds / b.seconds for a, b in timed]
    return {
        "prompt": prompt,
        "response": response,
        "ratio": float(np.median(ratios)),
        "low": min(ratios),
        "high": max(ratios),
        "trl": float(np.median([a.seconds for a, _ in timed])),
        "ours": float(np.median([b.seconds for _, b in timed])),
        "micro": micro,
        "loss": max(abs(a.loss - b.loss) for a, b in steps),
        "norm": max(abs(a.norm - b.norm) / a.norm for a, b in steps),
    }


def rollout_speed(options: Options, prompt: int, response: int) -> tuple[float, float]:
    """Sampled tokens a second: ours, and transformers' `generate`; medians of repeats, in turn."""
    lm = named(options.model, options.dtype, options.device)
    ids = np.random.default_rng(options.seed).integers(100, 40000, prompt).tolist()
    inputs = torch.tensor([ids] * options.generations, device=lm.device)
    how = Sampling(max_new_tokens=response, min_new_tokens=response)
    speeds = []
    for turn in range(2 if options.quick else options.repeats + 1):
        begin = time.perf_counter()
        sample(lm, [tuple(ids)], options.generations, how, seed=turn)
        middle = time.perf_counter()
        with torch.no_grad():
            lm.causal.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=True,
                top_k=0,
                max_new_tokens=response,
                min_new_tokens=response,
            )
        end = time.perf_counter()
        speeds.append([options.generations * response / s for s in (middle - begin, end - middle)])
    ours, theirs = np.median(speeds[1:], 0)
    return float(ours), float(theirs)


def phases(options: Options) -> dict[str, float]:
    """Seconds of each phase of one whole batch: one prompt of about 128 tokens, G answers of 64."""
    lm = named(options.model, options.dtype, options.device)
    how = Sampling(max_new_tokens=64, min_new_tokens=64)
    objective = GRPO(rollouts=Rollouts(generations=options.generations, sampling=how))
    example = Example(prompt=PROMPT * 6, kind="prompt")
    groups = [Group(example=example, prompt_ids=lm.encode_prompt(example.prompt))]
    accelerator = make_accelerator(CONFIG, tempfile.gettempdir())
    step = RolloutStep(objective, lm, groups, rewarder=Rewarder({"vader": Vader()}), accelerator=accelerator)
    optimizer = make_optimizer(step.modules, CONFIG)
    out: dict[str, float] = {}
    for _ in range(2):  # the first warms up
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        result = step.run([0], train=True)
        apply_gradients(optimizer, accelerator, result.count, RATE, CLIP)
        total = time.perf_counter() - begin
        out = {k.partition("/")[2]: v[0] for k, v in result.metrics.items() if k.startswith("seconds/")}
        out["update"] = total - sum(out.values())
    return out


def main(options: Options, slug: str = "group-step", allowed: float = 1e-3) -> None:
    """Measure, print, and write the result if asked to. allowed: a difference of the losses that counts as none."""
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    load_before = os.getloadavg()[0]
    lm = named(options.model, options.dtype, options.device)
    print(f"G = {options.generations}; TRL {version('trl')}; {options.threads} threads, load {load_before:.1f}")
    print("prompt response   TRL s  ours s  ratio  (all)            TRL takes  loss differs  norm differs")
    points = []
    curve = [(options.longer * prompt, options.longer * response) for prompt, response in CURVE]
    micro = options.generations if options.quick else fastest(lm, options, *curve[0])
    for prompt, response in curve[:1] if options.quick else curve:
        found = point(lm, options, prompt, response, micro)
        points.append(found)
        print(
            f"{prompt:6}{response:9}{found['trl']:8.2f}{found['ours']:8.2f}{found['ratio']:7.2f}  "
            f"{found['low']:.2f} to {found['high']:.2f}{found['micro']:14}{found['loss']:14.1e}{found['norm']:14.1e}"
        )
    ours, theirs = rollout_speed(options, 256, 64)
    print(f"\nrollouts, prompt 256, response 64: {ours:.0f} tokens/s, generate {theirs:.0f}: {ours / theirs:.2f} x")
    spent = phases(options)
    whole = sum(spent.values())
    print("one GRPO batch: " + ", ".join(f"{name} {100 * s / whole:.0f} %" for name, s in spent.items()))
    shared = [p for p in points if p["prompt"] >= 4 * p["response"]] or points
    fast, slow = min(p["ratio"] for p in shared), min(p["ratio"] for p in points)
    gap = max(p["loss"] for p in points)
    print(f"prompt >= 4 x response: at least {fast:.2f} x; everywhere: at least {slow:.2f} x; loss within {gap:.1e}")
    if options.save:
        rows: list[dict[str, Any]] = [
            {
                "metric": f"TRL's time over ours, prompt {p['prompt']}, response {p['response']}",
                "value": p["ratio"],
                "interval": [p["low"], p["high"]],
                "baseline": "TRL",
                "baseline_value": 1.0,
            }
            for p in points
        ]
        rows.append({"metric": "largest difference of the loss", "value": gap})
        rows.append({"metric": "largest relative difference of the norm", "value": max(p["norm"] for p in points)})
        rows.append(
            {
                "metric": "rollout, sampled tokens a second",
                "value": ours,
                "baseline": "transformers generate",
                "baseline_value": theirs,
            }
        )
        rows += [{"metric": f"share of a batch: {name}", "value": s / whole} for name, s in spent.items()]
        save_result(
            slug,
            metric="time of TRL's GRPO update / ours, the least where the prompt is 4 x the response (more is better)",
            value=fast,
            interval=None,
            baseline=f"TRL {version('trl')}",
            baseline_value=1.0,
            bound="at least 3 where the prompt is 4 x the response or longer, never below 1, at equal loss "
            f"({allowed:g})",
            reached=fast >= 3 and slow >= 1 and gap <= allowed,
            world=f"{described(options.model)}, {options.dtype}, G = {options.generations}, random ids, "
            f"{machine(options.device, options.threads)}",
            seeds=[options.seed],
            notes=f"Medians of {options.repeats} alternating updates, all ratios as interval; "
            f"load {load_before:.1f} before, {os.getloadavg()[0]:.1f} after",
            rows=rows,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
