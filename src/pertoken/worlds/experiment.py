"""Experiments in a world: pairs sampled from a reference model, as groups whose ids are the sampled ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.data import Example, Group
from ..core.lm import LM, load
from ..core.rollout import Sampling, sample
from ..core.trace import Trace
from .grammar import GRAMMARS, Grammar, prompts, to_text, train_lm


def group_of(chosen: Trace, rejected: Trace, prompt: Any, scores: tuple[float, float], row: int, source: str) -> Group:
    """A pair as a group: the traces' own ids, never encoded again."""
    example = Example(
        prompt=prompt, responses=(chosen.text, rejected.text), kind="pair", scores=scores, row=row, source=source
    )
    return Group(example=example, prompt_ids=chosen.prompt_ids, traces=(chosen, rejected))


def best_and_worst(
    traces: Sequence[Sequence[Trace]], score: Callable[[str], float], margin: float, source: str
) -> tuple[list[Group], dict[str, int]]:
    """Best and worst of each prompt's samples, as pairs; the first of equals wins.

    Args:
        traces: samples of each prompt.
        score: text -> reward. margin: least difference of a pair; equal scores never make one.
        source: what the examples say they come from.

    Returns:
        The pairs, in order; how many samples were dropped (``empty``, ``score not finite``) and how many prompts gave
        no pair (``fewer than two different``, ``margin``).
    """
    groups: list[Group] = []
    lost = dict.fromkeys(("empty", "score not finite", "fewer than two different", "margin"), 0)
    for drawn in traces:
        unique: dict[tuple[int, ...], Trace] = {}
        for trace in drawn:
            if trace.text.strip():
                unique.setdefault(trace.completion_ids, trace)
            else:
                lost["empty"] += 1
        scored = [(float(score(t.text)), t) for t in unique.values()]
        finite = [(s, t) for s, t in scored if math.isfinite(s)]
        lost["score not finite"] += len(scored) - len(finite)
        if len(finite) < 2:
            lost["fewer than two different"] += 1
            continue
        (high, best), (low, worst) = (pick(finite, key=lambda one: one[0]) for pick in (max, min))
        if high == low or high - low < margin:
            lost["margin"] += 1
            continue
        prompt = best.meta.get("prompt", best.prompt_text)
        groups.append(group_of(best, worst, prompt, (high, low), len(groups), source))
    return groups, lost


@dataclass(frozen=True)
class GrammarPairs:
    """Pairs of a grammar world.

    Attributes:
        grammar, base: the language, and the folder of the LM that was trained on it (start and reference of every arm).
        train, held_out: pairs on training and on held-out prompts. prompts: ids of the held-out prompts.
    """

    grammar: Grammar
    base: str
    train: list[Group]
    held_out: list[Group]
    prompts: list[tuple[int, ...]]

    def policy(self) -> LM:
        """A fresh copy of the base model."""
        return load(self.base, device="cpu", attention="sdpa")

    def truth(self, trace: Trace) -> np.ndarray:
        """True credit of each completion token (a token is a word here; special ones earn nothing)."""
        words = [piece.decode("utf8").strip() or "<eos>" for piece in trace.completion_pieces]
        return self.grammar.credit(words)

    def truths(self) -> list[np.ndarray]:
        """Of every held-out completion, in order."""
        return [self.truth(t) for g in self.held_out for t in g.traces]


def grammar_pairs(
    preset: str = "lexicon64",
    *,
    n_train: int = 400,
    n_held_out: int = 200,
    samples: int = 4,
    margin: float = 1.0,
    max_new_tokens: int = 40,
    seed: int = 0,
    held_out_seed: int | None = None,
    progress: bool = True,
) -> GrammarPairs:
    """Sample pairs from the language model of a grammar; prompts repeat, with other samples, until there are enough.

    Args:
        preset: the grammar. n_train, n_held_out: pairs on training and on held-out prompts (0: none are drawn).
        samples: completions a prompt, of which the best and the worst make its pair if they differ by `margin`.
        seed: of the sampling. held_out_seed: of the held-out pairs, where it is another.

    Raises:
        ValueError: the samples differ too little to give the pairs that were asked for.
    """
    grammar = GRAMMARS[preset]
    base = str(train_lm(grammar, seed=0, progress=progress))
    lm = load(base, device="cpu", attention="sdpa")
    split = prompts(grammar)
    sides = {}
    for side, wanted in (("train", n_train), ("test", n_held_out)):
        groups: list[Group] = []
        for turn in range(8):
            if len(groups) >= wanted:
                break
            asked = [split[side][i % len(split[side])] for i in range(2 * (wanted - len(groups)))]
            sampling = Sampling(max_new_tokens=max_new_tokens)
            where = (seed if side == "train" or held_out_seed is None else held_out_seed) * 1000
            where += turn * 2 + (side == "test")
            drawn = sample(lm, asked, samples, sampling, seed=where, batch=512)
            groups += best_and_worst(drawn, grammar.score, margin, f"grammar-{preset}")[0]
        if len(groups) < wanted:
            raise ValueError(f"{preset} gave {len(groups)} pairs of {wanted}; lower the margin ({margin})")
        sides[side] = groups[:wanted]
    ids = [lm.encode_prompt(p) for p in split["test"]]
    return GrammarPairs(grammar, base, sides["train"], sides["test"], ids)


def labelled_pairs(
    preset: str = "slots45", *, n_train: int = 800, n_held_out: int = 200, seed: int = 0, progress: bool = True
) -> GrammarPairs:
    """Pairs of a grammar's own texts after one prompt: chosen are positive ones, rejected negative ones. Prompts
    repeat, with other texts, until there are enough."""
    grammar = GRAMMARS[preset]
    base = str(train_lm(grammar, seed=0, progress=progress))
    lm, split = load(base, device="cpu", attention="sdpa"), prompts(grammar)
    sides: list[list[Group]] = []
    for number, (side, wanted) in enumerate((("train", n_train), ("test", n_held_out))):
        rng = np.random.default_rng([seed, number])
        sides.append([])
        while len(sides[-1]) < wanted:
            prompt = split[side][len(sides[-1]) % len(split[side])]
            words = [grammar.complete(prompt, rng, polarity) for polarity in ("positive", "negative")]
            if words[0] != words[1]:
                scores = grammar.score(words[0]), grammar.score(words[1])
                traces = [lm.trace(prompt, to_text(said)) for said in words]
                sides[-1].append(group_of(*traces, prompt, scores, len(sides[-1]), f"grammar-{preset}"))
    return GrammarPairs(grammar, base, *sides, [lm.encode_prompt(p) for p in split["test"]])


def development_pairs(
    world: GrammarPairs, n: int = 200, *, samples: int = 4, seed: int = 1, progress: bool = True
) -> list[Group]:
    """Pairs to choose options on: on training prompts, of another draw, none with a response that is trained on.

    Raises:
        ValueError: the draw repeats so many training responses that fewer than n pairs are left.
    """
    known = {t.completion_ids for g in world.train for t in g.traces}
    drawn = grammar_pairs(
        world.grammar.name, n_train=n + n // 10, n_held_out=0, samples=samples, seed=seed, progress=progress
    )
    new = [g for g in drawn.train if not any(t.completion_ids in known for t in g.traces)]
    if len(new) < n:
        raise ValueError(f"{len(drawn.train) - len(new)} pairs of seed {seed} repeat training responses; try another")
    return new[:n]


def class_conditional(preset: str, *, progress: bool = True) -> tuple[LM, LM]:
    """LMs trained on positive and on negative text of a grammar: they stand in for T-REG's better and worse prompts."""
    folders = [train_lm(GRAMMARS[preset], seed=0, polarity=p, progress=progress) for p in ("positive", "negative")]
    better, worse = (load(f, device="cpu", attention="sdpa") for f in folders)
    return better, worse
