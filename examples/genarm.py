"""GenARM's acceptance figures: what a reward model gains that guides a frozen base token by token, beside a DPO twin.

World: the 64-word sentiment language and a 2-layer LM trained on it, the base. Reward: +1 a positive word, -1 a
negative one. Pairs are the best and the worst of four of the base's own responses. ARM and DPO twin start from the base
and make the same updates on the same pairs in the same order, all weights trained; each has the best of the four betas
that the paper's recipes use, by mean reward on 50 validation prompts (ARM: decoding with alpha = 1).

    python examples/genarm.py          three seeds (about three minutes on one thread)
    python examples/genarm.py --full --seeds 1 --no-args    SmolLM2 with LoRA (rank 8), film replies and VADER's
                                                            compound; minutes on a GPU (ARGS takes an hour)

Acceptance (specification; asked of the SmolLM2 run on a GPU, of this world only a gain above 0): with alpha = 1 the
mean reward on held-out prompts exceeds the base's by at least 0.5 standard deviations of the base's reward, is at least
90 % of the DPO twin's gain, and decoding makes at least 0.4 x as many tokens a second as without guidance.

Beside it: best of n with the ARM's summed reward; ARGS (Khanov et al., arXiv 2402.01694): greedy over the k likeliest
tokens of log p + w r(y_<t, v), r the sequence reward model on the response so far; other alphas, with one that steers
away. An independent judge: the share of responses that are sentences of the grammar.

Missed with SmolLM2 (53 held-out prompts, all there are; one seed): the gain is 1.20 base deviations
(reached), 0.875 of the twin's 1.37, and decoding makes 0.347 x as many tokens a second, beside twelve other jobs on the
GPU and before the ARM's LoRA was added into its weights. alpha = 2 gains 1.34. Both arms chose beta 0.01, the edge of
the four, and none of their responses ends within 64 tokens (60 % of the base's do), so both seem to exploit the reward.
Best of 4 and of 16 by the ARM's summed reward are worse than the base (-0.10, -0.58), and short.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from pertoken import catalog
from pertoken.core.adapters import merge_lora
from pertoken.core.data import Group
from pertoken.core.decode import LMGuide, decode
from pertoken.core.lm import LM, load
from pertoken.core.loop import LoopConfig
from pertoken.core.record import read_json, write_json
from pertoken.core.rollout import Sampling, sample
from pertoken.core.run import Run
from pertoken.core.trace import Trace
from pertoken.generate.best_of_n import BestOfN
from pertoken.generate.genarm import GenARM
from pertoken.results import save_result
from pertoken.score.arm_reward import ARMReward
from pertoken.score.gpm import GPM
from pertoken.train.arm import ARM
from pertoken.train.dpo import DPO
from pertoken.train.gpm_reward import GPMReward
from pertoken.worlds.experiment import best_and_worst
from pertoken.worlds.grammar import GRAMMARS, prompts, train_lm

BETAS = (0.01, 0.05, 0.1, 0.5)  # beta_r of the paper's recipes; the DPO twin chooses from the same
ALPHAS = (-1.0, 0.5, 1.0, 2.0)
ARGS_WEIGHTS, ARGS_K = (0.5, 1.5, 5.0), 10
VALIDATION = 50


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    full: bool = False
    """SmolLM2 with LoRA."""
    pairs: int = 0
    """Pairs to train on (default: the world's)."""
    steps: int = 0
    """Updates (default: the world's)."""
    lr: float = 0.0
    """Learning rate of all that is trained (default: the world's)."""
    prompts: int = 0
    """Held-out and validation prompts at most (default: the world's)."""
    args: bool = True
    """Measure ARGS, too."""
    out: str = ""
    """Keep every seed's figures here, and read those that are there (default: a temporary folder)."""
    save: bool = False
    """Write results/genarm.json."""


@dataclass(kw_only=True)
class World:
    """Base, reward, prompts and sizes of an experiment."""

    name: str
    base: LM
    policy: Callable[[], LM]
    reward: Callable[[str], float]
    allowed: Callable[[Trace], bool]
    train: list[Any]
    validation: list[Any]
    test: list[Any]
    sampling: Sampling
    pairs: int
    config: LoopConfig
    margin: float
    each: int  # responses a prompt that figures are the mean of
    batch: int = 256  # responses that are drawn together

    def draw_pairs(self, seed: int) -> tuple[list[Group], int]:
        """Best and worst of four of the base's responses, and how many prompts gave no pair."""
        rng, groups, lost = np.random.default_rng([seed, 1]), [], 0
        for turn in range(20):
            asked = [self.train[i] for i in rng.integers(len(self.train), size=max(16, self.pairs - len(groups)))]
            drawn = sample(self.base, asked, 4, self.sampling, seed=100 * seed + turn, batch=self.batch)
            found, _ = best_and_worst(drawn, self.reward, self.margin, self.name)
            lost += len(asked) - len(found)
            groups += found
            if len(groups) >= self.pairs:
                return groups[: self.pairs], lost
        raise ValueError(f"only {len(groups)} pairs of {self.pairs} differ by {self.margin}; lower the margin")

    def fit(self, slug: str, objective: Any, pairs: Sequence[Group], seed: int, out: Path) -> LM:
        """A copy of the base, trained."""
        run = Run(
            slug=slug,
            objective=objective,
            policy=self.policy(),
            groups=[dataclasses.replace(g, columns={}) for g in pairs],
            held_out=[],
            config=dataclasses.replace(self.config, seed=seed),
            out=out,
            resolve=catalog.method,
            pack_tokens=16384 if torch.cuda.is_available() else 4096,
            progress=False,
        )
        run.go()
        lm = run.policy
        model = merge_lora(lm.model) if hasattr(lm.model, "merge_and_unload") else lm.model  # it only decodes now
        return LM(model, lm.tokenizer, name=slug, template=lm.template)


def small_world() -> World:
    """The grammar."""
    grammar = GRAMMARS["lexicon64"]
    folder, split = str(train_lm(grammar, seed=0, progress=False)), prompts(grammar)
    order = np.random.default_rng(0).permutation(len(split["train"]))
    mixed = [split["train"][i] for i in order]

    def allowed(trace: Trace) -> bool:
        return trace.ended and bool(np.isfinite(grammar.logprob(str(trace.meta["prompt"]), trace.text)))

    return World(
        name="grammar world, preset lexicon64",
        base=load(folder, device="cpu", attention="sdpa"),
        policy=lambda: load(folder, device="cpu", attention="sdpa"),
        reward=grammar.score,
        allowed=allowed,
        train=mixed[VALIDATION:],
        validation=mixed[:VALIDATION],
        test=split["test"],
        sampling=Sampling(max_new_tokens=40),
        pairs=480,
        config=LoopConfig(lr=3e-4, batch_size=16, steps=60, warmup=0.1),
        margin=1.0,
        each=4,
    )


def film_world() -> World:
    """SmolLM2, as the specification has it for one GPU."""
    from pertoken.score.vader import compound
    from pertoken.worlds import sentiment

    torch.set_float32_matmul_precision("high")  # TF32, where there is such a thing
    split = {side: [sentiment.messages(p) for p in some] for side, some in sentiment.prompts().items()}
    return World(
        name="film replies, SmolLM2-135M-Instruct (dequantised Q4_1), LoRA rank 8",
        base=load("smollm2"),
        policy=lambda: load("smollm2", lora=8),
        reward=compound,
        allowed=lambda trace: trace.ended,
        train=split["train"][VALIDATION:],
        validation=split["train"][:VALIDATION],
        test=split["test"][:100],
        sampling=Sampling(max_new_tokens=64),
        pairs=2000,
        config=LoopConfig(lr=5e-4, batch_size=32, epochs=1.0, warmup=0.1, weight_decay=0.05),
        margin=0.2,
        each=1,
        batch=1024,
    )


@dataclass
class _Rows:
    base: Any
    prompts: list[tuple[int, ...]]
    done: list[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class ARGS:
    """ARGS as a guide: log p + w r of the k likeliest tokens, r a reward of the whole response so far."""

    lm: LM
    reward: Callable[[Sequence[Trace]], list[float]]
    weight: float
    k: int = ARGS_K

    @property
    def vocabulary(self) -> int:
        """Of the base."""
        return LMGuide(lm=self.lm).vocabulary

    def start(self, prompts: Sequence[Any]) -> _Rows:
        """The base's cache; the reward model reads everything anew each step."""
        guide = LMGuide(lm=self.lm)
        ids = [guide.ids(p) for p in prompts]
        return _Rows(guide.start(ids), ids, [()] * len(ids))

    def step(self, state: _Rows, last_ids: Tensor | None) -> Tensor:
        """(N, V), -inf beyond the k likeliest."""
        if last_ids is not None:
            state.done = [(*d, t) for d, t in zip(state.done, last_ids.tolist(), strict=True)]
        logp = LMGuide(lm=self.lm).step(state.base, last_ids)
        likeliest = logp.topk(self.k, -1)
        traces = [
            self.lm.trace_of_ids(prompt, (*done, v), ended=v in self.lm.stop_ids)
            for prompt, done, some in zip(state.prompts, state.done, likeliest.indices.tolist(), strict=True)
            for v in some
        ]
        rewards = torch.tensor(self.reward(traces)).to(logp).view(-1, self.k)
        total = torch.full_like(logp, -torch.inf)
        return total.scatter(-1, likeliest.indices, likeliest.values + self.weight * rewards)

    def reorder(self, state: _Rows, index: Tensor) -> None:
        """The base's cache and the responses."""
        LMGuide(lm=self.lm).reorder(state.base, index)
        state.prompts, state.done = ([x[i] for i in index.tolist()] for x in (state.prompts, state.done))


def figures(world: World, traces: Sequence[Trace]) -> dict[str, float]:
    """Of responses to judge: mean and deviation of the reward, length, share the grammar allows, share distinct."""
    rewards = [world.reward(t.text) for t in traces]
    return {
        "reward": float(np.mean(rewards)),
        "sd": float(np.std(rewards)),
        "tokens": float(np.mean([len(t) for t in traces])),
        "allowed": float(np.mean([world.allowed(t) for t in traces])),
        "distinct": len({t.completion_ids for t in traces}) / len(traces),
    }


def one_seed(world: World, seed: int, out: Path, args: bool) -> dict[str, Any]:
    """Everything of one seed; read, where it is there already."""
    if (out / "figures.json").exists():
        return read_json(out / "figures.json")
    began = time.perf_counter()
    pairs, lost = world.draw_pairs(seed)
    result: dict[str, Any] = {"pairs": len(pairs), "prompts_without_pair": lost, "validation": {}, "test": {}}
    sampling, base = world.sampling, world.base

    def sampled(lm: LM, asked: Sequence[Any], each: int) -> list[Trace]:
        return [t for some in sample(lm, asked, each, sampling, seed=seed, batch=256) for t in some]

    def guided(arm: LM, asked: Sequence[Any], each: int, alpha: float = 1.0) -> list[Trace]:
        made = GenARM(arms=arm, alpha=(alpha,), batch=256)
        return [d.trace for some in made.generate(base, asked, n=each, sampling=sampling, seed=seed) for d in some]

    def chosen(
        name: str, values: Sequence[float], make: Callable[[float], Any], draw: Callable[..., list[Trace]]
    ) -> Any:
        """The one of best mean reward on the validation prompts."""
        made = {v: make(v) for v in values}
        each = max(2, world.each // 2)
        found = {v: figures(world, draw(m, world.validation, each))["reward"] for v, m in made.items()}
        best = max(found, key=found.__getitem__)
        result["validation"][name] = {"chosen": best, "rewards": {str(v): r for v, r in found.items()}}
        return made[best]

    arm = chosen("arm", BETAS, lambda b: world.fit("arm", ARM(beta=b), pairs, seed, out / f"arm-{b:g}"), guided)
    twin = chosen("dpo", BETAS, lambda b: world.fit("dpo", DPO(beta=b), pairs, seed, out / f"dpo-{b:g}"), sampled)
    result["train_seconds"] = time.perf_counter() - began
    test = result["test"]
    test["base"] = figures(world, sampled(base, world.test, world.each))
    test["dpo"] = figures(world, sampled(twin, world.test, world.each))
    for alpha in ALPHAS:
        test[f"genarm alpha {alpha:g}"] = figures(world, guided(arm, world.test, world.each, alpha))
    greedy = dataclasses.replace(sampling, temperature=0)
    test["base, greedy"] = figures(world, [t for (t,) in sample(base, world.test, 1, greedy, batch=256)])
    drawn = GenARM(arms=arm, batch=256).generate(base, world.test, sampling=greedy)
    test["genarm, greedy"] = figures(world, [d.trace for (d,) in drawn])
    for n in (4, 16):
        best = BestOfN(candidates=n, scorer=ARMReward(lm=arm))
        drawn = best.generate(base, world.test, n=1, sampling=sampling, seed=seed)
        test[f"best of {n}"] = figures(world, [d.trace for some in drawn for d in some])
    if args:
        objective = GPMReward(head="bt", normalize=False, tau=1.0)
        model = world.fit("gpm-reward", objective, pairs, seed, out / "rm")
        judge = GPM(folder=str(out / "rm"), lm=model)
        result["rm_accuracy"] = _accuracy(judge, pairs)
        rescored = lambda guide, asked, each: [t for some in decode(base, guide, asked, sampling=greedy) for t in some]
        rewards = lambda traces: [c.reduce() for c in judge.score(traces)]
        guide = chosen("args", ARGS_WEIGHTS, lambda w: ARGS(base, rewards, w), rescored)
        test["args, greedy"] = figures(world, rescored(guide, world.test, 1))
    result["speed"] = speed(world, arm)
    result["seconds"] = time.perf_counter() - began
    write_json(out / "figures.json", result)
    return result


def _accuracy(judge: GPM, pairs: Sequence[Group]) -> float:
    scores = [c.reduce() for c in judge.score([t for g in pairs for t in g.traces])]
    return float(np.mean([a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]))


def speed(world: World, arm: LM, rounds: int = 5) -> dict[str, float]:
    """Tokens a second of the same decoder with and without the reward model, in turn (medians), and of `sample`."""
    asked = world.test[:64]
    length = min(24, world.sampling.max_new_tokens)
    how = dataclasses.replace(world.sampling, max_new_tokens=length, min_new_tokens=length)
    runs = {
        "unguided": lambda: GenARM(arms=arm, alpha=(0.0,)).generate(world.base, asked, sampling=how),
        "guided": lambda: GenARM(arms=arm).generate(world.base, asked, sampling=how),
        "sample": lambda: sample(world.base, asked, 1, how),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: len(asked) * length / float(np.median(some[1:])) for name, some in seconds.items()}


def main(options: Options) -> None:
    """Run it and print the table."""
    changed = options.pairs or options.steps or options.lr or options.prompts or not (options.args or options.full)
    if options.save and changed:
        raise ValueError("the saved figure is that of a world as it stands; leave out the options that change it")
    out = Path(options.out or tempfile.mkdtemp(prefix="genarm-"))
    world = film_world() if options.full else small_world()
    changes = {k: v for k, v in {"steps": options.steps, "lr": options.lr}.items() if v}
    world.config, world.pairs = dataclasses.replace(world.config, **changes), options.pairs or world.pairs
    if options.prompts:
        world.validation, world.test = world.validation[: options.prompts], world.test[: options.prompts]
    results = []
    for seed in options.seeds:
        results.append(one_seed(world, seed, out / f"seed-{seed}", options.args))
        print(f"seed {seed}: {_short(results[-1])}", flush=True)
    arms = list(results[0]["test"])
    gains = {
        arm: [(r["test"][arm]["reward"] - r["test"]["base"]["reward"]) / r["test"]["base"]["sd"] for r in results]
        for arm in arms
    }
    guided = gains["genarm alpha 1"]
    share = [a / b if b > 0 else float("nan") for a, b in zip(guided, gains["dpo"], strict=True)]
    ratio = [r["speed"]["guided"] / r["speed"]["unguided"] for r in results]
    print(f"\n{world.name}; {len(world.test)} held-out prompts x {world.each}; medians of seeds {options.seeds}")
    print(f"{'':<18}{'reward':>8}{'gain/sd':>9}{'tokens':>8}{'allowed':>9}{'distinct':>9}   gain by seed")
    for arm in arms:
        row = {k: float(np.median([r["test"][arm][k] for r in results])) for k in results[0]["test"][arm]}
        each = " ".join(f"{g:.2f}" for g in gains[arm])
        print(
            f"{arm:<18}{row['reward']:>8.3f}{np.median(gains[arm]):>9.2f}{row['tokens']:>8.1f}{row['allowed']:>9.3f}"
            f"{row['distinct']:>9.3f}   {each}"
        )
    print(
        "tokens/s " + "  ".join(f"{k} {np.median([r['speed'][k] for r in results]):.0f}" for k in results[0]["speed"])
    )
    checks = {
        "gain >= 0.5 sd of the base's reward": bool(np.median(guided) >= 0.5),
        "gain >= 0.9 x the DPO twin's": bool(np.median(share) >= 0.9),
        "tokens/s >= 0.4 x unguided": bool(np.median(ratio) >= 0.4),
    }
    print(f"share of the DPO twin's gain {np.median(share):.3f}; tokens/s guided / unguided {np.median(ratio):.3f}")
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        _save(options, world, results, gains, share, ratio, checks)


def _short(result: Mapping[str, Any]) -> str:
    chosen = {name: some["chosen"] for name, some in result["validation"].items()}
    rewards = {name: round(some["reward"], 2) for name, some in result["test"].items()}
    return f"{result['seconds']:.0f} s; chosen {chosen}; {rewards}; validation {result['validation']}"


def _save(
    options: Options,
    world: World,
    results: Sequence[Mapping[str, Any]],
    gains: Mapping[str, Sequence[float]],
    share: Sequence[float],
    ratio: Sequence[float],
    checks: Mapping[str, bool],
) -> None:
    def row(metric: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
        notes = f"seeds {', '.join(map(str, options.seeds))}: {', '.join(f'{v:.4g}' for v in values)}"
        interval = (float(np.min(values)), float(np.max(values)))
        return {"metric": metric, "value": float(np.median(values)), "interval": interval, "notes": notes} | more

    twin = {"baseline": "dpo", "baseline_value": float(np.median(gains["dpo"]))}
    betas = "; ".join(
        f"{name}: {', '.join(str(r['validation'][name]['chosen']) for r in results)}"
        for name in results[0]["validation"]
    )
    main_row = row(
        "gain of GenARM (alpha 1) over the base, in standard deviations of its reward", gains["genarm alpha 1"]
    )
    rows = [
        row("share of the DPO twin's gain", share),
        row("tokens a second, guided over unguided", ratio),
        *(row(f"gain in base deviations, {arm}", some, **twin) for arm, some in gains.items() if arm != "base"),
    ]
    for key, what in (
        ("tokens", "tokens a response"),
        ("allowed", f"share of responses that {'ended' if options.full else 'the grammar allows'}"),
    ):
        rows += [row(f"{what}, {arm}", [r["test"][arm][key] for r in results]) for arm in gains]
    small = "The bounds are those of the SmolLM2 run (--full); of a small world the specification asks a gain above 0. "
    if options.full and (known := Path("results/genarm.json")).exists():
        before = read_json(known)  # the small world's figure stays, with its own origin
        if "SmolLM2" not in before["world"]:
            keep = ("metric", "value", "interval", "baseline", "baseline_value", "notes")
            rows.append({k: before[k] for k in (*keep, "world", "seeds", "command", "commit", "date")})
    save_result(
        "genarm",
        **{k: main_row[k] for k in ("metric", "value", "interval")},
        **twin,
        bound="; ".join(checks),
        reached=all(checks.values()),
        world=world.name if options.full else f"{world.name}, 2-layer LM",
        seeds=options.seeds,
        notes="medians of the seeds, interval: least and greatest. "
        + ("" if options.full else small)
        + f"Chosen on validation prompts, by seed: {betas}. "
        + "; ".join(f"{c}: {'yes' if g else 'no'}" for c, g in checks.items()),
        rows=rows,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
