"""Captions and their rewrites: a small language of real English words in which a rewriter can keep or drop the topic.

A prompt is a short caption with four content words (" a tiny fox reading near the castle :"); a rewrite says it again
and adds words of style (" a tiny fox reading near the castle , golden light , ornate ."). One rewrite in ten of the
language is about something else, as a language model's now and then are. Words are tokens; what was asked for and what
was kept can be read off the words, and a sentence encoder knows them all.

`planted_pairs` makes the preferences of the Sem-DPO specification: a third of a prompt's candidates are rich rewrites
of OTHER prompts, and a judge of style, which never looks at the prompt, chooses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.data import Group
from ..core.lm import LM, load
from ..core.rollout import Sampling, sample
from ..core.trace import Trace
from .experiment import best_and_worst
from .grammar import Grammar, prompts, train_lm

_STYLES = {  # each kind at most once, in this order
    "LIGHT": "golden light | soft light | misty | glowing",
    "ART": "oil painting | watercolour | photograph | fine sketch",
    "DETAIL": "sharp focus | vivid colours | intricate | ornate",
    "MOOD": "dramatic | cinematic | elegant | majestic",
}

CAPTIONS = Grammar(
    name="captions",
    slots={"LOOK": "LOOK", "WHO": "WHO", "DOING": "DOING", "PLACE": "PLACE"},
    rules={
        "LOOK": "tiny | old | young | black | white | brown | hungry | lonely | wet | sleepy",
        "WHO": "dog | cat | horse | bear | fox | owl | girl | boy | farmer | soldier | nurse | king | monk | robot"
        " | pirate | baker",
        "DOING": "running | sleeping | eating | reading | waiting | dancing | swimming | singing",
        "PLACE": "beach | forest | kitchen | street | desert | garden | harbour | market | library | castle | bridge"
        " | station",
        "PROMPT": "a =LOOK =WHO =DOING near the =PLACE :",
        "COMPLETION": "9 SAME TAIL | 1 OTHER TAIL",
        "SAME": "8 a =LOOK =WHO =DOING near the =PLACE | 1 a =WHO =DOING near the =PLACE"
        " | 1 a =LOOK =WHO near the =PLACE",
        "OTHER": "8 a LOOK WHO DOING near the PLACE | 1 a WHO DOING near the PLACE | 1 a LOOK WHO near the PLACE",
        "TAIL": "4 . | 4 , LIGHT . | 3 , LIGHT , ART . | 2 , LIGHT , ART , DETAIL ."
        " | 1 , LIGHT , ART , DETAIL , MOOD .",
        **_STYLES,
    },
    lexicon=dict.fromkeys(" ".join(_STYLES.values()).replace(" | ", " ").split(), 1.0),
    model={"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 288},
    steps=1000,
    batch=32,
    learning_rate=3e-3,
    context=128,
)


def words_of(text: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def style_score(text: str) -> float:
    """The judge: different words, and once more each that is of style. It does not see the prompt."""
    words = set(words_of(text))
    return len(words) + len(words & CAPTIONS.lexicon.keys())


def content_words(prompt: str) -> list[str]:
    """What a caption is about: look, who, doing, place."""
    return list(CAPTIONS._prompts[tuple(prompt.split())].values())


def kept(prompt: str, rewrite: str) -> float:
    """Share of the prompt's content words that the rewrite has."""
    wanted, there = content_words(prompt), set(words_of(rewrite))
    return sum(word in there for word in wanted) / len(wanted)


@dataclass(frozen=True)
class CaptionPairs:
    """Pairs with planted drift.

    Attributes:
        train: pairs on training prompts. development, test: prompts without pairs, to rewrite.
        planted: share of the chosen responses that were written for another prompt.
        lost: samples and prompts that gave no pair, by reason.
    """

    train: list[Group]
    development: list[str]
    test: list[str]
    planted: float
    lost: dict[str, int]


def caption_lm(progress: bool = True) -> LM:
    """The small rewriter, trained on the language: start and reference of every arm."""
    return load(str(train_lm(CAPTIONS, seed=0, progress=progress)), device="cpu", attention="sdpa")


def planted_pairs(
    lm: LM,
    n_train: int = 480,
    n_test: int = 300,
    *,
    own: int = 4,
    others: int = 2,
    ask: Callable[[str], Any] = lambda prompt: prompt,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> CaptionPairs:
    """Sample rewrites of each training prompt, add rich ones of others, and pair the best and the worst by style.

    Args:
        lm: the rewriter. ask: a caption -> what it is asked (text or messages).
        n_train, n_test: captions to make pairs of, and of either set to evaluate with.
        own, others: samples of a caption's own, and how many of other captions' (their richest) stand beside them.
    """
    split, rng = prompts(CAPTIONS), np.random.default_rng(seed)
    order = [split["train"][i] for i in rng.permutation(len(split["train"]))]
    test = [split["test"][i] for i in rng.permutation(len(split["test"]))[:n_test]]
    asked = order[:n_train]
    drawn = sample(lm, [ask(p) for p in asked], own, sampling or Sampling(max_new_tokens=32), seed=seed, batch=512)
    groups, lost = best_and_worst(plant(lm, asked, drawn, others, rng), style_score, 1.0, "captions")
    planted = np.mean([bool(g.traces[0].meta.get("planted")) for g in groups])
    return CaptionPairs(groups, order[n_train : n_train + n_test], test, float(planted), lost)


def plant(
    lm: LM, asked: Sequence[str], drawn: Sequence[Sequence[Trace]], others: int, rng: np.random.Generator
) -> list[list[Trace]]:
    """Each prompt's samples and, after the same prompt, the richest sample of `others` further prompts, marked
    ``planted``; the ids stay as they were drawn."""
    out = []
    for i, (prompt, own) in enumerate(zip(asked, drawn, strict=True)):
        elsewhere = [j for j in rng.permutation(len(asked)) if j != i][:others]
        foreign = [max(drawn[j], key=lambda t: style_score(t.text)) for j in elsewhere]
        moved = [t.with_prompt(own[0].prompt_ids, lm.view) for t in foreign]
        marked = [(t, {"prompt": prompt}) for t in own] + [(t, {"prompt": prompt, "planted": True}) for t in moved]
        out.append([dataclasses.replace(t, meta=t.meta | more) for t, more in marked])
    return out
