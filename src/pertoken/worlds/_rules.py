"""Weighted production rules as text: parse them, sample from them, and the exact probability of a text under them.

How a rule reads: `"NAME": "3 first choice | 1 second choice"`. Alternatives are separated by `|`; a leading number is
the weight (1 if absent), and its sign, if written, is the pole: a tilt multiplies the weight of `+3 ...` by exp(tilt)
and that of `-3 ...` by exp(-tilt). An alternative may be empty, but then writes its weight. UPPER CASE words are
symbols with a rule of their own, all others are words of the language. `=SLOT` is the word that the environment (the
prompt) put in SLOT, and `NAME<SLOT>` is the rule `NAME<that word>`. A rule whose name holds `±` stands for two rules,
one with + and one with -; in its text `±` is the same sign and `∓` the other one. Rules are not left-recursive.
"""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

Table = dict[str, tuple[list[float], list[tuple[str, ...]]]]  # symbol -> (cumulative probabilities, right-hand sides)


def parse(rules: Mapping[str, str], tilt: float = 0.0) -> Table:
    table: Table = {}
    for key, text in rules.items():
        for own, other in ("+-", "-+") if "±" in key else ("±∓",):
            weights, sides = [], []
            for alternative in text.replace("±", own).replace("∓", other).split("|"):
                head, *rest = alternative.split()
                weighted = head.lstrip("+-").replace(".", "", 1).isdigit()
                pole = {"+": 1, "-": -1}.get(head[0], 0) if weighted else 0
                weights.append((float(head.lstrip("+-")) if weighted else 1.0) * math.exp(pole * tilt))
                sides.append(tuple(rest if weighted else [head, *rest]))
            table[key.replace("±", own)] = (np.cumsum(weights) / np.sum(weights)).tolist(), sides
    used = {s for _, sides in table.values() for side in sides for s in side if s[0].isupper() and s[-1] != ">"}
    if used - table.keys():
        raise ValueError(f"no rule for {sorted(used - table.keys())}; add one for each to the grammar's rules")
    return table


def resolve(symbol: str, env: Mapping[str, str]) -> str:
    if symbol[0] == "=":
        return env[symbol[1:]]
    if symbol[-1] == ">" and symbol[-2].isupper():  # NAME<SLOT>; NAME<word> is a rule's name already
        name, slot = symbol[:-1].split("<")
        return f"{name}<{env[slot]}>"
    return symbol


def draw(cumulative: Sequence[float], rng: np.random.Generator) -> int:
    return min(bisect.bisect(cumulative, rng.random()), len(cumulative) - 1)  # the last sum may round below 1


def expand(table: Table, symbol: str, env: Mapping[str, str], rng: np.random.Generator) -> list[str]:
    """Sample the words of a symbol."""
    stack, words = [symbol], []
    while stack:
        symbol = resolve(stack.pop(), env)
        if symbol in table:
            cumulative, sides = table[symbol]
            stack.extend(reversed(sides[draw(cumulative, rng)]))
        else:
            words.append(symbol)
    return words


def inside(table: Table, symbol: str, env: Mapping[str, str], words: Sequence[str]) -> float:
    """Probability that the symbol yields exactly these words, summed over derivations (0 outside the language)."""

    @functools.cache
    def ends_of(symbol: str, start: int) -> Mapping[int, float]:  # end -> probability of words[start:end]
        symbol = resolve(symbol, env)
        if symbol not in table:
            return {start + 1: 1.0} if start < len(words) and words[start] == symbol else {}
        total: dict[int, float] = {}
        for p, side in zip(np.diff(table[symbol][0], prepend=0.0).tolist(), table[symbol][1], strict=True):
            ends = {start: p}
            for part in side:
                further: dict[int, float] = {}
                for middle, q in ends.items():
                    for end, r in ends_of(part, middle).items():
                        further[end] = further.get(end, 0.0) + q * r
                ends = further
            for end, q in ends.items():
                total[end] = total.get(end, 0.0) + q
        return total

    return ends_of(symbol, 0).get(len(words), 0.0)
