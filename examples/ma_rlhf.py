"""Does credit to macro actions reach the goal sooner? MA-PPO with n=5 against n=1 (PPO), in the planted world.

Responses of 48 letters, 0.1 for each planted bigram, all of it where the response ends: the best possible reward is 2.4
(24 bigrams), the goal 90 % of it. Arms differ in macros alone: same code, seeds, prompts and budget of rollouts.

    n=1            token PPO, lam 0.95: the terminal reward's weight in the first advantage is 0.95^47 = 0.09
    n=5            macros of five, lam 0.95: 0.95^10 = 0.60
    n=1, lam^1/5   token PPO with the same decay a token: 0.62

Bound: the median (3 seeds) of rollouts until the mean reward of three batches reaches the goal is at most 0.75 x that
of n=1; a run that does not reach it within the budget counts with the budget. Printed beside it: variance of the first
token's advantage and its correlation with the return (each batch's mean taken off), over the first 20 batches.

No KL penalty (kl_coef 0): averaging within macros would make it weigh a fifth at n=5, and the arms would differ in more
than credit. The learning rate is what --tune picked: it looks at n=1 alone, on seeds that are not measured. The
measured seeds (11, 12, 13) had not been run before the rate and the world were fixed; seeds 1 to 3 had.

What was learned. Macros of five reach the goal in all seeds, after 0.62 x the rollouts of token PPO; so does token PPO
with the same decay a token (4,352 both, medians). Here the longer reach of the terminal reward explains the gain, and
the macros do not add to it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from pertoken.core.advantage import GAE, Advantages
from pertoken.core.critic import KLControl
from pertoken.core.data import Example, Group
from pertoken.core.experience import Experience, Rollouts
from pertoken.core.loop import LoopConfig, fit
from pertoken.core.rewarding import Rewarder
from pertoken.core.rollout_step import RolloutStep
from pertoken.core.stats import masked_sum
from pertoken.results import save_result
from pertoken.train.ma_rlhf import MARLHF, Macros
from pertoken.worlds.planted import Planted, of_length, policy, prompts

LENGTH, WEIGHT = 48, 0.1
BEST = LENGTH // 2 * WEIGHT
GOAL, LAST = 0.9 * BEST, 3  # mean of so many batches
EARLY = 20  # batches
PROMPTS, GENERATIONS = 16, 4  # a batch
ROLLOUTS = PROMPTS * GENERATIONS
RATES, TUNED_ON = (5e-3, 1e-2, 2e-2), (101, 102)
CHOSEN = 1e-2  # of --tune: n=1 needs 7680, 5888 and 7680 rollouts at 5e-3, 1e-2 and 2e-2
ARMS = {"n=1": (1, 0.95), "n=5": (5, 0.95), "n=1, lam^(1/5)": (1, 0.95**0.2)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (11, 12, 13)
    batches: int = 120
    """Budget of a run, in batches of 64 rollouts."""
    tune: bool = False
    """Choose the learning rate by n=1 alone on other seeds, and measure nothing."""
    full: bool = False
    """SmolLM2 with VADER as the reward, 12 updates of each arm, instead (a smoke run: no bound)."""
    save: bool = False
    """Write results/ma-rlhf.json."""


@dataclass(frozen=True, kw_only=True)
class Watched(MARLHF):
    """MA-PPO that notes the first token's advantage and the return of each rollout."""

    seen: Any = None

    def advantages(self, experience: Experience, reward_NT: torch.Tensor, state: Any) -> Advantages:
        """As MA-PPO's."""
        found = super().advantages(experience, reward_NT, state)
        returns_N = masked_sum(experience.reward_NT, experience.mask_NT)
        self.seen.append((found.advantage_NT[:, 0].tolist(), returns_N.tolist()))
        return found


class Reached(Exception):
    """The goal is reached: the rest of the budget is not needed."""


def objective(n: int, lam: float, seen: list[Any]) -> Watched:
    """An arm."""
    return Watched(
        kl=KLControl(kl_coef=0.0),
        gae=GAE(lam=lam, whitening="none"),
        macros=Macros(n=n),
        rollouts=Rollouts(generations=GENERATIONS, sampling=of_length(LENGTH), inner_epochs=1),
        seen=seen,
    )


def run(n: int, lam: float, rate: float, seed: int, batches: int) -> dict[str, Any]:
    """One run: rollouts to the goal, rewards on the way, and what the first token's advantage says early on."""
    seen: list[Any] = []
    torch.manual_seed(seed)
    lm = policy(seed, endless=True)
    groups = [Group(example=e, prompt_ids=lm.encode_prompt(e.prompt)) for e in prompts(16 * PROMPTS, seed)]
    arm = objective(n, lam, seen)
    rewarder = Rewarder({"planted": Planted(weight=WEIGHT)})
    step = RolloutStep(arm, lm, groups, rewarder=rewarder, models={"reference": lm.reference()})
    rewards: list[float] = []
    one_update = step.run

    def update(rows: list[int], *, train: bool) -> Any:
        if len(rewards) >= LAST and np.mean(rewards[-LAST:]) >= GOAL:
            raise Reached
        result = one_update(rows, train=train)
        rewards.append(result.metrics["reward"][0] / result.metrics["reward"][1])
        return result

    step.run = update  # type: ignore[method-assign]
    config = LoopConfig(lr=rate, batch_size=PROMPTS, steps=batches, schedule="constant", seed=seed)
    reached = False
    with tempfile.TemporaryDirectory() as out:
        try:
            fit(step, config, Path(out), progress=False)
        except Reached:
            reached = True
    a, r = (np.array([batch[k] for batch in seen[:EARLY]]) for k in (0, 1))
    centred = [x - x.mean(1, keepdims=True) for x in (a, r)]
    return {
        "rollouts": ROLLOUTS * len(rewards),
        "reached": reached,
        "end": float(np.mean(rewards[-LAST:])),
        "rewards": rewards,
        "variance": float(centred[0].var()),
        "correlation": float(np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1]),
    }


def tune(options: Options) -> None:
    """The learning rate with which n=1 reaches the goal after the fewest rollouts (or ends best)."""
    scores = {}
    for rate in RATES:
        found = [run(1, 0.95, rate, seed, options.batches) for seed in TUNED_ON]
        scores[rate] = (-float(np.mean([f["rollouts"] for f in found])), float(np.mean([f["end"] for f in found])))
        print(f"n=1 at {rate:g}: rollouts {-scores[rate][0]:.0f}, reward at the end {scores[rate][1]:.3f}", flush=True)
    print(f"picked: {max(scores, key=lambda rate: scores[rate]):g}; the example uses {CHOSEN:g}")


def main(options: Options) -> None:
    """Run it and print the table."""
    if options.tune:
        return tune(options)
    if options.full:
        return smollm2()
    found: dict[str, list[dict[str, Any]]] = {}
    print(f"planted world, {LENGTH} letters, goal {GOAL:.2f} of {BEST:.1f}, lr {CHOSEN:g}, seeds {options.seeds}")
    print(f"{'arm':<16}{'rollouts (median)':>18}{'reward at end':>15}{'var A_1':>10}{'corr(A_1, R)':>14}   by seed")
    for name, (n, lam) in ARMS.items():
        found[name] = [run(n, lam, CHOSEN, seed, options.batches) for seed in options.seeds]
        each = " ".join(f"{f['rollouts']}{'' if f['reached'] else '+'}" for f in found[name])
        m = {k: float(np.median([f[k] for f in found[name]])) for k in ("rollouts", "end", "variance", "correlation")}
        line = f"{m['rollouts']:>18.0f}{m['end']:>15.3f}{m['variance']:>10.4f}{m['correlation']:>14.3f}"
        print(f"{name:<16}{line}   {each}", flush=True)
    by_arm = {name: float(np.median([f["rollouts"] for f in fs])) for name, fs in found.items()}
    ratio = by_arm["n=5"] / by_arm["n=1"]
    got_there = sum(f["reached"] for f in found["n=5"]) * 2 > len(options.seeds)
    good = ratio <= 0.75 and got_there
    print(f"{'reached' if good else 'MISSED '} n=5 needs {ratio:.2f} x the rollouts of n=1 (bound 0.75)")
    if options.save:
        save(options, found, by_arm, ratio, good)


def save(options: Options, found: dict[str, Any], by_arm: dict[str, float], ratio: float, good: bool) -> None:
    """Write the result."""
    rows: list[dict[str, Any]] = []
    labels = {"rollouts": "rollouts to 90 % of the best reward", "end": "reward at the end"}
    labels |= {"variance": f"variance of the first token's advantage, first {EARLY} batches"}
    labels |= {"correlation": f"its correlation with the return, first {EARLY} batches"}
    for key, label in labels.items():
        for name, runs in found.items():
            values = [f[key] for f in runs]
            row: dict[str, Any] = {"metric": f"{label}, {name}", "value": float(np.median(values))}
            row["notes"] = "by seed: " + ", ".join(f"{v:.4g}" for v in values)
            late = [str(s) for s, f in zip(options.seeds, runs, strict=True) if not f["reached"]]
            row["notes"] += f"; goal not reached within the budget: seeds {', '.join(late)}" if late else ""
            if name != "n=1":
                row |= {"baseline": "n=1", "baseline_value": float(np.median([f[key] for f in found["n=1"]]))}
            rows.append(row)
    fair = by_arm["n=5"] / by_arm["n=1, lam^(1/5)"]
    save_result(
        "ma-rlhf",
        metric="rollouts until the mean reward reaches 90 % of the best one, n=5, relative to n=1 (less: better)",
        value=ratio,
        interval=None,
        baseline="ppo (n=1)",
        baseline_value=1.0,
        bound="at most 0.75",
        reached=good,
        world=f"planted, {LENGTH} letters, terminal reward, goal {GOAL:.2f}, {ROLLOUTS * options.batches} rollouts",
        seeds=options.seeds,
        notes=f"medians; no KL penalty; against token PPO with lam^(1/5), of the same decay a token: {fair:.2f} x",
        rows=rows,
    )


def smollm2() -> None:
    """A few updates of each arm on the real model: that it runs, and what the log says."""
    from pertoken.core.lm import load
    from pertoken.core.rollout import Sampling
    from pertoken.score.vader import Vader
    from pertoken.worlds.sentiment import messages
    from pertoken.worlds.sentiment import prompts as sentiment_prompts

    for name, (n, lam) in ARMS.items():
        torch.manual_seed(0)
        lm = load("smollm2")
        arm = objective(n, lam, [])
        sampling = Sampling(max_new_tokens=LENGTH, temperature=0.8, top_k=50)
        arm = dataclasses.replace(arm, rollouts=dataclasses.replace(arm.rollouts, sampling=sampling))
        texts = sentiment_prompts()["train"][:32]
        examples = [Example(prompt=messages(text), kind="prompt", row=row) for row, text in enumerate(texts)]
        groups = [Group(example=e, prompt_ids=lm.encode_prompt(e.prompt)) for e in examples]
        step = RolloutStep(arm, lm, groups, rewarder=Rewarder({"vader": Vader()}), models={"reference": lm.reference()})
        config = LoopConfig(lr=1e-5, batch_size=8, steps=12, schedule="constant")
        with tempfile.TemporaryDirectory() as out:
            history = fit(step, config, Path(out), progress=True)
        print(name, [round(h["reward"], 3) for h in history], f"KL of sequences {history[-1]['objective/kl']:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
