"""AWRS: checks a token, time against masking the vocabulary, and the distribution that comes out.

(a) 50 patterns (below; none was left out) with the embedded SmolLM2-135M-Instruct, the prompt giving the pattern alone
    or three texts that match as well. Checks (calls of the constraint) a step of a particle (the first step of a text
    to its last; with one particle nothing is shared), and the tokens that the estimator looks at, most of which need no
    check where there are many. Bounds: at most 100 and at most 10 checks in the mean.
(b) On every 8th of these steps, with the same weights and the same check: the time of the step without the model,
    against checking every token of the vocabulary, renormalising and drawing. Bound: at most a tenth.
(c) Toy languages of ten texts and at most six tokens, small enough to enumerate: the first of seeds 0, 1, ... whose
    total mass is at least 0.005 and from whose target locally constrained decoding is further than 0.2 (total
    variation, both exact). 10,000 runs of 5 particles, each final particle counting its weight / 5: total variation to
    the target. Bound: below 0.03.

What (a) taught. Tokens come in an order that is sampling without replacement, and whoever samples like that looks at
1 + sum_v p(v) / (p(v) + Z) tokens in the mean, v over the refused ones, before one of the allowed mass Z comes. Nearly
always Z is above 0.01, which means a few dozen at most. But where a pattern ends and the model does not want to, Z is
1e-5 to 1e-11: thousands of tokens, or all, have more mass than what is allowed, and up to 48,000 are looked at. One
step in twenty-five makes the mean (the median is 3), and more particles or other noise change nothing about it. What
these looks need not be is checks: the tokens begin in a few hundred ways, and what begins like a refused piece is
refused. So much was found on fifteen other patterns; of the 219 and 125 tokens that are looked at in the mean, 10 and 6
are checked. `--remedies` prints, for the fifty, that a parser that says only yes or no needs half as many checks again
(15 and 9, still within the bounds), that a budget of 64 rejects and a top-p of 0.95 need fewer at the price of texts (4
or 5 of 10 end, instead of 8), and that at a temperature of 0.7 more are looked at, not fewer: it takes mass from the
unlikely, which is what these ends are.

    python examples/awrs.py              one toy language, one particle, twelve tokens: three minutes
    python examples/awrs.py --full       three toy languages, five particles a pattern
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro

from pertoken.core.decode import LMGuide
from pertoken.core.lm import load
from pertoken.core.particles import Particles, smc
from pertoken.core.rollout import Sampling
from pertoken.generate._constrained import ConstrainedSampler
from pertoken.generate._constraints import Grammar, Predicate
from pertoken.results import save_result

PATTERNS = {  # and three texts that match
    r"\d{4}-\d{2}-\d{2}": "2021-03-14 1999-12-31 2024-07-01",
    r"\d{2}:\d{2}": "12:30 09:15 23:59",
    r"(\d{1,3}\.){3}\d{1,3}": "192.168.0.1 10.0.0.7 127.0.0.1",
    r"#[0-9a-f]{6}": "#ff0000 #00ff7f #1a2b3c",
    r"[a-z]+@[a-z]+\.(com|org|net)": "anna@mail.com info@site.org bob@home.net",
    r"https?://[a-z]+\.com(/[a-z]+)?": "http://example.com https://shop.com/cart https://news.com/sport",
    r"\(\d{3}\) \d{3}-\d{4}": "(415) 555-0199|(212) 555-1234|(800) 555-4321",
    r"[A-Z]{2}\d{4}": "AB1234 QX9087 LM5521",
    r"\$\d+\.\d{2}": "$19.99 $5.00 $120.50",
    r"\d+%": "50% 7% 100%",
    r"(Mr|Mrs|Ms|Dr)\. [A-Z][a-z]+": "Mr. Smith|Dr. Jones|Mrs. Brown",
    r"[A-Z][a-z]+, [A-Z]{2}": "Austin, TX|Boston, MA|Denver, CO",
    r"v\d+\.\d+\.\d+": "v1.0.0 v2.13.4 v0.9.12",
    r"[a-z]+_[a-z]+": "user_name file_path max_size",
    r"[a-z]+-[a-z]+-[a-z]+": "state-of-art day-by-day up-to-date",
    r"(yes|no|maybe)": "yes no maybe",
    r"(red|green|blue) (car|house|tree)": "red car|green house|blue tree",
    r"(Monday|Tuesday|Wednesday|Thursday|Friday)": "Monday Wednesday Friday",
    r"\d{1,2} (January|February|March|April|May|June) \d{4}": "4 March 2020|17 June 1998|1 January 2000",
    r"[01]{8}": "01100101 11110000 00001111",
    r"0x[0-9A-F]{4}": "0x1F3A 0xBEEF 0x00FF",
    r"[aeiou]+": "aei oua eio",
    r"[bcdfg]{3,6}": "bcd fgdc ddgbf",
    r"(ab)+": "ab abab ababab",
    r"a+b+": "ab aaabb aabbb",
    r"[A-Z]{3}-\d{3}": "ABC-123 XYZ-987 QRS-456",
    r"@[a-z0-9_]{3,10}": "@anna @john_doe @user42",
    r"#[A-Za-z]+": "#Summer #music #TravelLife",
    r"[a-z]+\.(py|txt|md)": "main.py notes.txt readme.md",
    r"/[a-z]+/[a-z]+": "/usr/bin /home/ann /var/log",
    r"[A-Z][a-z]+ [A-Z][a-z]+": "John Smith|Mary Jones|Peter Brown",
    r"[A-Z][a-z]+ is a [a-z]+\.": "Paris is a city.|Rex is a dog.|Gold is a metal.",
    r"The [a-z]+ (runs|sleeps|eats)\.": "The dog runs.|The cat sleeps.|The bird eats.",
    r"\d+ \+ \d+ = \d+": "1 + 2 = 3|10 + 5 = 15|7 + 7 = 14",
    r"[a-z] < [a-z]": "a < b|x < y|m < n",
    r"\[\d+(, \d+)*\]": "[1, 2, 3]|[42]|[7, 8]",
    r"\{[a-z]+: \d+\}": "{age: 30}|{size: 7}|{count: 12}",
    r"<[a-z]+></[a-z]+>": "<b></b>|<div></div>|<p></p>",
    r"SELECT [a-z]+ FROM [a-z]+": "SELECT name FROM users|SELECT age FROM people|SELECT id FROM items",
    r"def [a-z]+\(\):": "def main():|def run():|def test():",
    r"[A-Z]+=[a-z0-9]+": "HOME=anna PORT=8080 MODE=fast",
    r"\d+ (km|m|cm)": "5 km|100 m|30 cm",
    r"-?\d+\.\d+": "3.14 -0.5 2.718",
    r"\d+(st|nd|rd|th)": "1st 22nd 13th",
    r"[A-Z]\. [A-Z][a-z]+": "J. Smith|A. Turing|M. Curie",
    r"(ha){2,4}!": "haha! hahaha! hahahaha!",
    r"[a-z]{5}": "apple house green",
    r"é[a-zé]+": "été école élan",
    r"(😀|😎){1,3}": "😀 😎😎 😀😎",
    r"[^a-zA-Z\s]{4}": "1234 !?42 #9#9",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the example."""

    particles: int = 1
    """Of each pattern."""
    max_tokens: int = 12
    languages: int = 1
    runs: int = 10_000
    """Of each toy language."""
    every: int = 8
    """Masking is timed on one step of so many."""
    patterns: int = 50
    """The first so many."""
    remedies: bool = False
    """The four other settings of (a), too: two minutes more each."""
    seed: int = 0
    full: bool = False
    """Three toy languages, five particles a pattern, 32 tokens."""
    save: bool = False
    """Write results/awrs.json."""


# ---- (a), (b): patterns


def examples_of(texts: str) -> list[str]:
    return texts.split("|") if "|" in texts else texts.split(" ")


def prompt_of(pattern: str, examples: Sequence[str]) -> str:
    """What the model is asked."""
    asked = f"Write one string that matches the regular expression ^{pattern}$ and nothing else."
    return asked + "".join(f"\nExample: {e}" for e in examples)


@dataclass(kw_only=True, eq=False)
class Timed(ConstrainedSampler):
    """The sampler, timed, and masking beside it on one step of `every`."""

    every: int = 8
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """Of a step and of masking, where both were timed."""
    looked: list[tuple[float, float]] = field(default_factory=list)
    """Checks and tokens looked at, a step of a particle."""
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def step(self, state: Any, logw_NV: torch.Tensor, draws: Sequence[np.random.Generator]) -> Any:
        """As it is."""
        before, nodes = dict(self.counts), list(state.nodes)
        begin = time.perf_counter()
        out = super().step(state, logw_NV, draws)
        spent = (time.perf_counter() - begin) / len(nodes)
        self.looked += [tuple((self.counts[k] - before[k]) / len(nodes) for k in ("calls", "looks"))] * len(nodes)
        if self.every and len(self.looked) // len(nodes) % self.every == 0:
            begin = time.perf_counter()
            self.masked(nodes[0].state, logw_NV[0])
            self.seconds.append((spent, time.perf_counter() - begin))
        return out

    def masked(self, state: Any, logw: torch.Tensor) -> int:
        """The next token by masking: every token of the vocabulary is checked."""
        allowed = np.zeros(len(logw), bool)
        for token in range(len(logw)):
            piece = self.piece(token)
            allowed[token] = state.complete() if token in self.stops else bool(piece) and state.allows(piece)
        p = np.where(allowed, logw.double().exp().numpy(), 0.0)
        return int(np.searchsorted(np.cumsum(p), self.rng.random() * p.sum()))


@dataclass(frozen=True)
class YesOrNo:
    """A constraint whose parser does not say where it stopped."""

    given: Any

    @property
    def name(self) -> str:
        return self.given.name

    def start(self) -> YesOrNo:
        return YesOrNo(self.given.start())

    def allows(self, piece: bytes) -> bool:
        return self.given.allows(piece)

    def complete(self) -> bool:
        return self.given.complete()

    def after(self, piece: bytes) -> YesOrNo:
        return YesOrNo(self.given.after(piece))


ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "yes or no": {},
    "budget 64": {"max_rejects": 64},
    "top_p 0.95": {"sampling": Sampling(top_p=0.95)},
    "temperature 0.7": {"sampling": Sampling(temperature=0.7)},
}


def run_patterns(options: Options, patterns: dict[str, str], arm: str = "default") -> dict[str, Any]:
    """Checks and looks of each pattern with and without examples, and pairs of times."""
    lm = load("smollm2")
    guide, stops = LMGuide(lm=lm), sorted(lm.stop_ids)
    found: dict[str, Any] = {"without": [], "with": [], "seconds": [], "ended": [], "texts": []}
    for place, (pattern, texts) in enumerate(list(patterns.items())[: options.patterns]):
        examples = examples_of(texts)
        assert len(examples) == 3 and all(re.fullmatch(pattern, e) for e in examples), pattern
        constraint: Any = Grammar.regex(pattern)
        constraint = YesOrNo(constraint) if arm == "yes or no" else constraint
        every = options.every if arm == "default" else 0
        for name, shown in (("without", []), ("with", examples)):
            sampler = Timed(constraint=constraint, piece=lm.view.piece, stops=stops, every=every, **ARMS[arm])
            settings = Particles(particles=options.particles, max_tokens=options.max_tokens)
            drawn = smc(
                guide, prompt_of(pattern, shown), sampler, settings, stops=stops, seed=options.seed, place=place
            )
            found[name].append(np.array(sampler.looked))
            found["seconds"] += sampler.seconds
            found["ended"] += drawn.finished
            best = max(drawn.posterior(sampler.text).items(), key=lambda item: item[1], default=(b"(none)", 0))[0]
            found["texts"].append((pattern, name, best.decode("utf8", "replace"), *found[name][-1].mean(0)))
    return found


# ---- (c): toy languages


@dataclass(frozen=True)
class Toy:
    """A Markov chain over eight one-letter tokens and a terminator (id 0), and a language of ten texts."""

    logp: torch.Tensor
    texts: tuple[tuple[int, ...], ...]
    vocabulary: int = 9

    @classmethod
    def of(cls, seed: int) -> Toy:
        """The toy of a seed: chains of softmaxed normals x 1.5, texts of 2 to 5 tokens that begin alike by pairs."""
        rng = np.random.default_rng(seed)
        logits = torch.from_numpy(rng.normal(size=(9, 9)) * 1.5)
        texts: set[tuple[int, ...]] = set()
        while len(texts) < 10:
            stem = rng.integers(1, 9, rng.integers(1, 4)).tolist()
            texts |= {(*stem, *rng.integers(1, 9, rng.integers(1, 3)).tolist()) for _ in range(2)}
        return cls(logits.log_softmax(-1), tuple(sorted(texts)[:10]))

    def start(self, prompts: Sequence[Any]) -> Any:
        return SimpleNamespace(last=torch.zeros(len(prompts), dtype=torch.long))

    def step(self, state: Any, last_ids: torch.Tensor | None) -> torch.Tensor:
        state.last = state.last if last_ids is None else last_ids
        return self.logp[state.last]

    def reorder(self, state: Any, index: torch.Tensor) -> None:
        state.last = state.last[index]

    def constraint(self) -> Predicate:
        """Of its texts."""
        texts = {bytes(y) for y in self.texts}
        prefixes = {t[:n] for t in texts for n in range(len(t) + 1)}
        return Predicate(prefix=prefixes.__contains__, complete=texts.__contains__)

    def exact(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Target and locally constrained distribution over the texts, and their total mass."""
        mass, local = np.ones(len(self.texts)), np.ones(len(self.texts))
        for i, y in enumerate(self.texts):
            for t, (a, b) in enumerate(zip((0, *y), (*y, 0), strict=True)):
                p = self.logp[a].exp().numpy()
                may = {(*z, 0)[t] for z in self.texts if z[:t] == y[:t]}
                mass[i] *= p[b]
                local[i] *= p[b] / sum(p[v] for v in may)
        return mass / mass.sum(), local, float(mass.sum())


def toys(count: int) -> Iterator[tuple[int, Toy]]:
    """The first seeds that qualify."""
    seed = -1
    while count:
        seed += 1
        toy = Toy.of(seed)
        target, local, mass = toy.exact()
        if mass >= 0.005 and np.abs(target - local).sum() / 2 > 0.2:
            count -= 1
            yield seed, toy


def shares(toy: Toy, runs: int, particles: int, **how: Any) -> np.ndarray:
    """Share of each text in the summed weights of all runs."""
    place, out = {y: i for i, y in enumerate(toy.texts)}, np.zeros(len(toy.texts))
    constraint = toy.constraint()
    for seed in range(runs):
        sampler = ConstrainedSampler(constraint=constraint, piece=_letter, stops=(0,), **how)
        settings = Particles(particles=particles, max_tokens=6)
        drawn = smc(toy, None, sampler, settings, stops=(0,), seed=seed)
        for y, w in zip(drawn.tokens, drawn.logw, strict=True):
            if w > -np.inf:
                out[place[tuple(y)]] += np.exp(w) / particles
    return out / out.sum()


def _letter(token: int) -> bytes:
    return bytes([token]) if token else b""


def main(options: Options) -> None:
    """Measure, print beside the baselines, and write the result if asked to."""
    if options.full:
        options = Options(particles=5, languages=3, max_tokens=32, full=True, save=options.save, seed=options.seed)
    tv: list[tuple[int, float, float, float]] = []
    print("(c) toy language   AWRS-SMC to target   locally constrained (sampled)   (exact)")
    for seed, toy in toys(options.languages):
        target, local, _ = toy.exact()
        awrs = np.abs(shares(toy, options.runs, 5) - target).sum() / 2
        lcd = np.abs(shares(toy, options.runs // 5, 1, proper_weights=False) - target).sum() / 2
        tv.append((seed, float(awrs), float(lcd), float(np.abs(local - target).sum() / 2)))
        print(f"{seed:16}{awrs:21.4f}{lcd:32.4f}{tv[-1][3]:10.4f}", flush=True)
    found = run_patterns(options, PATTERNS)
    for pattern, name, text, checks, looks in found["texts"]:
        print(f"{pattern:<58}{name:<9}{checks:8.1f}{looks:9.1f}  {text!r}")
    means = {name: np.concatenate(found[name]).mean(0) for name in ("without", "with")}
    rng, ends = np.random.default_rng(options.seed), {}
    for name in means:  # patterns are resampled, with all of their steps
        picks = rng.integers(0, len(found[name]), (2000, len(found[name])))
        sums = np.array([[x[:, 0].sum(), len(x)] for x in found[name]])[picks].sum(1)
        ends[name] = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975]).tolist()
    arms = {"default": found}
    if options.remedies:
        arms |= {arm: run_patterns(options, PATTERNS, arm) for arm in ARMS if arm != "default"}
    print("(a)                           checks a token [95 %]   median   most   looked at   ended")
    others = []
    for arm, some in arms.items():
        for name in means:
            a = np.concatenate(some[name])
            between = "[{:.1f}, {:.1f}]".format(*ends[name]) if arm == "default" else ""
            print(
                f"{arm:<16}{name:<9}{a[:, 0].mean():9.1f} {between:<17}{np.median(a[:, 0]):7.0f}{a[:, 0].max():7.0f}"
                f"{a[:, 1].mean():12.1f}{np.mean(some['ended']):8.2f}"
            )
            others.append((arm, name, float(a[:, 0].mean()), float(np.mean(some["ended"]))))
    times = np.array(found["seconds"])
    if not len(times):
        raise ValueError("no step was compared with masking; lower --every, or take more patterns or tokens")
    ratio = float(times[:, 0].sum() / times[:, 1].sum())
    ours, masking = 1000 * times.mean(0)
    print(f"(b) {len(times)} steps: {ours:.2f} ms, masking {masking:.1f} ms: {ratio:.4f}")
    worst = max(row[1] for row in tv)
    checks, looks = ({name: float(mean[k]) for name, mean in means.items()} for k in (0, 1))
    reached = checks["without"] <= 100 and checks["with"] <= 10 and ratio <= 0.1 and worst < 0.03
    print(f"all bounds: {'reached' if reached else 'missed'}; {np.mean(found['ended']):.0%} of the particles ended")
    if options.save:
        vocabulary = 49152
        rows = [
            {
                "metric": "checks per generated token, three examples in the prompt (less is better)",
                "value": checks["with"],
                "interval": ends["with"],
                "baseline": "masking the vocabulary",
                "baseline_value": vocabulary,
                "bound": "at most 10",
                "reached": checks["with"] <= 10,
            },
            *(
                {
                    "metric": f"tokens looked at per generated token, {name} examples (most need no check)",
                    "value": looks[name],
                    "baseline": "masking the vocabulary",
                    "baseline_value": vocabulary,
                }
                for name in looks
            ),
            *(
                {
                    "metric": f"checks per generated token, {arm}, {name} examples; {ended:.0%} of the texts ended",
                    "value": value,
                    "baseline": "default",
                    "baseline_value": checks[name],
                }
                for arm, name, value, ended in others[2:]
            ),
            {
                "metric": "time of a step without the model / of masking with the same check",
                "value": ratio,
                "bound": "at most 0.1",
                "reached": ratio <= 0.1,
            },
        ]
        for seed, awrs, lcd, _ in tv:
            rows.append(
                {
                    "metric": f"total variation to the target, toy language {seed}, {options.runs} runs of 5 particles",
                    "value": awrs,
                    "baseline": "locally constrained decoding",
                    "baseline_value": lcd,
                    "bound": "below 0.03",
                    "reached": awrs < 0.03,
                }
            )
        save_result(
            "awrs",
            metric="checks per generated token, the prompt giving the pattern alone (less is better)",
            value=checks["without"],
            interval=ends["without"],
            baseline="masking the vocabulary",
            baseline_value=vocabulary,
            bound="at most 100; with three examples at most 10; a tenth of masking's time; toy language below 0.03",
            reached=reached,
            world=f"{len(found['with'])} patterns, SmolLM2-135M-Instruct, {options.particles} particles",
            seeds=[options.seed],
            notes="Intervals: bootstrap over patterns. Time: one step of "
            f"{options.every}, the same weights and check for both.",
            rows=rows,
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
