"""Sem-DPO's acceptance figure: does a prompt rewriter that learns style from pairs stay with what it was asked for?

World: captions of real English words (" a tiny fox reading near the castle :") and a 2-layer rewriter trained to say
them again with words of style. A third of each prompt's candidates are the richest rewrites of OTHER prompts, and a
judge of style that never sees the prompt chooses: most winners are about something else. Every arm makes the same
updates on the same pairs in the same order; held-out captions are rewritten greedily. Consistency is the cosine of
all-MiniLM-L6-v2 between caption and rewrite, style the judge's score. MiniLM made the weights too, so the share of the
caption's four content words that the rewrite keeps is printed beside it. The control is DPO with every weight set to
mean(W) of a = 4: small weights alone keep a policy near its start. The learning rate is that of 2e-4 and 5e-4 at
which plain DPO, on development captions, writes all the style the judge rewards in whole sentences (at 5e-4 it
stammers, and Sem-DPO's lead is larger).

What was learned: a judge that pays for every word has all arms repeat "golden light" until the rewrite is full,
whatever its topic, and cosines say little. This one pays for different words, and the language has each kind of style
once.

    python examples/sem_dpo.py          three minutes, three seeds
    python examples/sem_dpo.py --full   SmolLM2 rewriting the same captions (about an hour)

Acceptance (specification), means of the seeds, a = 4: cosine at least 8 % above DPO's and 4 % above the control's,
style within 10 % of DPO's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from pertoken import catalog
from pertoken.core.compare import Arm, compare
from pertoken.core.embed import TextEncoder, cosines
from pertoken.core.lm import LM
from pertoken.core.loop import LoopConfig
from pertoken.core.rollout import Sampling, sample
from pertoken.results import save_result
from pertoken.train.dpo import DPO
from pertoken.train.sem_dpo import SemDPO, effective_sample_size, semantic_weights
from pertoken.worlds.captions import CaptionPairs, caption_lm, kept, planted_pairs, style_score, words_of

LOOP = LoopConfig(lr=2e-4, batch_size=16, steps=60, schedule="cosine")
MOST = 32  # tokens of a rewrite


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    seeds: tuple[int, ...] = (1, 2, 3)
    full: bool = False
    """SmolLM2 in place of the small rewriter."""
    split: Literal["test", "development"] = "test"
    """Captions that are rewritten; rates and updates were chosen on those of development."""
    lr: float = LOOP.lr
    """Learning rate of every arm."""
    updates: int = 60
    """Updates of every arm."""
    out: str = ""
    """Keep the runs here (default: a temporary folder)."""
    save: bool = False
    """Write results/sem-dpo.json."""


@dataclass(frozen=True)
class Constant:
    """A distance that is the same for every pair."""

    distance: float

    def __call__(self, prompts: Sequence[str], chosen: Sequence[str]) -> np.ndarray:
        """(N,)."""
        return np.full(len(prompts), self.distance)


@dataclass(frozen=True)
class Rewrites:
    """Figures of a trained rewriter's greedy rewrites."""

    prompts: list[str]
    encoder: TextEncoder
    ask: Callable[[str], Any]
    batch: int

    def __call__(self, lm: LM, reference: LM, seed: int) -> dict[str, Any]:
        """Means over the prompts: cosine, style, share of content words kept, share of words that are distinct."""
        greedy = Sampling(max_new_tokens=MOST, temperature=0.0)
        drawn = sample(lm, [self.ask(p) for p in self.prompts], 1, greedy, batch=self.batch)
        texts = [traces[0].text for traces in drawn]
        return {
            "cosine": float(cosines(self.encoder(self.prompts), self.encoder(texts)).mean()),
            "style": float(np.mean([style_score(t) for t in texts])),
            "kept": float(np.mean([kept(p, t) for p, t in zip(self.prompts, texts, strict=True)])),
            "distinct": float(np.mean([len(set(w)) / max(len(w), 1) for w in map(words_of, texts)])),
            "example": f"{self.prompts[0]} -> {texts[0]}",
        }


@dataclass(frozen=True)
class Setting:
    """What differs between the small rewriter and the real one."""

    name: str
    policy: Callable[[], LM]
    pairs: CaptionPairs
    ask: Callable[[str], Any]
    config: LoopConfig


def main(options: Options) -> None:
    """Run it and print the table."""
    out = Path(options.out or tempfile.mkdtemp(prefix="sem-dpo-"))
    setting = _smollm2() if options.full else _small(options)
    world, encoder = setting.pairs, TextEncoder()
    chosen = [(g.example.prompt, g.example.responses[0]) for g in world.train]
    weight = semantic_weights(SemDPO(encode=encoder).distances(*zip(*chosen, strict=True)), 4.0)
    print(
        f"{len(world.train)} pairs, {world.planted:.0%} of the winners planted; "
        f"a = 4: mean weight {weight.mean():.3f}, effective pairs {effective_sample_size(weight):.0f}"
    )
    arms = {
        "dpo": DPO(),
        **{f"sem-dpo {a:g}": SemDPO(a=a) for a in (1.0, 2.0, 4.0)},
        "mean weight": SemDPO(distance=Constant(-float(np.log(weight.mean())))),
    }
    asked = world.test if options.split == "test" else world.development
    evaluate = Rewrites(asked, encoder, setting.ask, setting.config.batch_size * 16)
    outcomes = compare(
        [Arm(name=n, slug="dpo" if n == "dpo" else "sem-dpo", objective=o) for n, o in arms.items()],
        setting.policy,
        world.train,
        [],
        setting.config,
        out,
        seeds=options.seeds,
        resolve=catalog.method,
        evaluate=evaluate,
        progress=options.full,
    )
    start = evaluate(setting.policy(), setting.policy(), 0)
    figures = {"start": [start], **{n: [o.figures for o in outcomes if o.arm == n] for n in arms}}
    columns = ("cosine", "style", "kept", "distinct")
    mean = {n: {c: float(np.mean([f[c] for f in fs])) for c in columns} for n, fs in figures.items()}
    print(f"\n{setting.name}, means of seeds {options.seeds}")
    print(f"{'arm':<14}" + "".join(f"{c:>10}" for c in columns))
    for name, m in mean.items():
        print(f"{name:<14}" + "".join(f"{m[c]:>10.4f}" for c in columns) + f"   {figures[name][-1]['example']}")
    sem, dpo, control = mean["sem-dpo 4"], mean["dpo"], mean["mean weight"]
    checks = {
        "cosine at least 8 % above DPO's": sem["cosine"] >= 1.08 * dpo["cosine"],
        "style within 10 % of DPO's": abs(sem["style"] / dpo["style"] - 1) <= 0.1,
        "cosine at least 4 % above DPO's with every weight at the mean": sem["cosine"] >= 1.04 * control["cosine"],
    }
    for check, good in checks.items():
        print(f"{'reached' if good else 'MISSED ':<8} {check}")
    if options.save:
        each = [f["cosine"] for f in figures["sem-dpo 4"]]
        others = [(n, c) for n in ("dpo", "mean weight", "sem-dpo 1", "sem-dpo 2") for c in ("cosine", "style", "kept")]
        labels = {"cosine": "cosine of caption and rewrite", "style": "style", "kept": "content words kept"}
        save_result(
            "sem-dpo",
            metric="MiniLM cosine of a held-out caption and its greedy rewrite, a = 4",
            value=sem["cosine"],
            interval=(min(each), max(each)),
            baseline="dpo",
            baseline_value=dpo["cosine"],
            bound="; ".join(checks),
            reached=all(checks.values()),
            world=setting.name,
            seeds=options.seeds,
            notes=f"interval: least and greatest of the seeds. {world.planted:.0%} of the winners planted; before "
            f"training: cosine {mean['start']['cosine']:.3f}, style {mean['start']['style']:.2f}; "
            + "; ".join(f"{c}: {'yes' if g else 'no'}" for c, g in checks.items()),
            rows=[
                {"metric": f"{labels[c]}, a = 4", "value": sem[c], "baseline": n, "baseline_value": mean[n][c]}
                for n, c in others
            ],
        )


def _small(options: Options) -> Setting:
    name = "captions world, a third of the candidates planted"
    config = dataclasses.replace(LOOP, lr=options.lr, steps=options.updates)
    return Setting(name, lambda: caption_lm(False), planted_pairs(caption_lm()), lambda prompt: prompt, config)


def _smollm2() -> Setting:
    """SmolLM2 rewrites the same captions as it was told to; its own rewrites are what is scored and planted."""
    from pertoken.core.lm import load

    told = (
        "Rewrite the caption as one rich prompt for a picture: say what the caption says, then add words of style such "
        "as golden light, cinematic, ornate. Answer with the prompt alone."
    )

    def ask(prompt: str) -> Any:
        return [{"role": "system", "content": told}, {"role": "user", "content": prompt.strip(" :")}]

    pairs = planted_pairs(load("smollm2"), 240, 100, ask=ask, sampling=Sampling(max_new_tokens=MOST))
    config = LoopConfig(lr=5e-6, batch_size=8, steps=60, schedule="cosine")
    return Setting(
        "captions rewritten by SmolLM2-135M-Instruct (dequantised Q4_1)", lambda: load("smollm2"), pairs, ask, config
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
