"""All that an estimator can do, with its probability: its draws are replayed along every branch."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np


class Branching:
    """A source of the estimators whose draws follow a script, and are recorded where the script ends.

    After a run, `probability` is that of its path and `branches` are the scripts of the paths not taken on the way.
    """

    def __init__(self, p, script, defer=False, cap=10):
        self.p, self.script, self.defer, self.cap, self.at = list(p), script, defer, cap, 0
        self.deferred = []
        self.probability, self.branches = 1.0, []

    def choose(self, options):
        """An option of (value, probability)."""
        options = list(options)
        chosen = self.script[self.at] if self.at < len(self.script) else 0
        if self.at >= len(self.script):
            for other in range(1, len(options)):
                if self.probability * options[other][1] > 1e-13:
                    self.branches.append([*self.script, *[0] * (self.at - len(self.script)), other])
        self.at += 1
        value, probability = options[chosen]
        self.probability *= probability
        return value

    @property
    def rest(self):
        return sum(self.p)

    def draw(self):
        rest = self.rest
        return self.choose((v, p / rest) for v, p in enumerate(self.p) if p > 0) if rest > 0 else -1

    def weight(self, token):
        return self.p[token]

    def reject(self, token):
        self.p[token] = 0.0

    def phantoms(self):
        """0, 1, ... hits of rejected tokens; `cap` and more, which must be as many as the budget, are one branch. With
        `defer` none, and 1 - R is noted: without a budget they matter only in sum."""
        if self.defer:
            self.deferred.append(self.rest)
            return 0.0
        gone, stay = 1 - self.rest, self.rest
        options = [(float(k), stay * gone**k) for k in range(self.cap)]
        return self.choose([*options, (float(self.cap), gone**self.cap)])


def outcomes(estimator: Callable, p, **options) -> Iterator[tuple]:
    """(what it returns, probability, the source) of every path of ``estimator(source)``."""
    scripts = [[]]
    while scripts:
        source = Branching(p, scripts.pop(), **options)
        found = estimator(source)
        scripts += source.branches
        yield found, source.probability, source


@lru_cache
def sums_of_geometrics(rests, longest=400):
    """Probabilities that phantoms of these 1 - R add up to 0, 1, ..."""
    out = np.eye(1, longest)[0]
    for rest in rests:
        out = np.convolve(out, rest * (1 - rest) ** np.arange(longest))[:longest]
    return out
