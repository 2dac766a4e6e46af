"""Classifiers of appropriateness: logistic regression on n-grams, whose evidence stands on characters, or on MiniLM's
sentence vectors. Both are called with texts, and say P(appropriate) of each; `load` reads what `save` wrote."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pertoken.core.embed import TextEncoder
from pertoken.core.record import read_json, write_json

FILE = "appropriateness"
BLOCKS = ("word", "char")
_WORD = re.compile(r"\b\w\w+\b")
Gram = tuple[str, int, int]


def grams(text: str) -> dict[str, list[Gram]]:
    """n-grams of a text in lower case, and the characters that each covers: words 1-2, characters 2-5 (runs of white
    space are one)."""
    low = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    words = [(m.group(), *m.span()) for m in _WORD.finditer(low)]
    pairs = [(f"{a} {b}", start, end) for (a, start, _), (b, _, end) in itertools.pairwise(words)]
    kept = [i for i, c in enumerate(low) if not (c.isspace() and i and low[i - 1].isspace())]
    line = "".join(" " if low[i].isspace() else low[i] for i in kept)
    sizes = [(n, i) for n in range(2, 6) for i in range(len(line) - n + 1)]
    chars = [(line[i : i + n], kept[i], kept[i + n - 1] + 1) for n, i in sizes]
    return {"word": words + pairs, "char": chars}


@dataclass(frozen=True)
class NGramClassifier:
    """Logistic regression on TF-IDF of word 1-2 and character 2-5 grams, each block of unit length.

    Attributes:
        weights: of each block, n-gram -> (idf, coefficient).
        bias: the log-odds of a text without a known n-gram.
    """

    weights: dict[str, dict[str, tuple[float, float]]]
    bias: float

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """P(appropriate), (N,)."""
        return np.array([1 / (1 + np.exp(-self.bias - self.evidence(t).sum())) for t in texts])

    def evidence(self, text: str) -> np.ndarray:
        """What each character adds to the log-odds of appropriate, (characters,): an n-gram's share is spread evenly
        over those that it covers. The log-odds are `bias` and their sum."""
        edges = np.zeros(len(text) + 1)
        for block, found in grams(text).items():
            known = self.weights[block]
            found = [g for g in found if g[0] in known]
            tf = Counter(g for g, *_ in found)
            norm = np.sqrt(sum((n * known[g][0]) ** 2 for g, n in tf.items()))
            for gram, start, end in found:
                share = known[gram][0] * known[gram][1] / norm / (end - start)
                edges[start] += share
                edges[end] -= share
        return edges[:-1].cumsum()

    def split(self, text: str) -> tuple[float, np.ndarray]:
        """P(appropriate), and what of it each character earned: the path integral of the sigmoid from the empty text
        (P = sigmoid(bias)) to this one, along which all evidence grows alike. They sum to P - sigmoid(bias)."""
        evidence = self.evidence(text)
        total = evidence.sum()
        at = lambda z: 1 / (1 + np.exp(-z))
        slope = at(self.bias) * at(-self.bias)
        slope = (at(self.bias + total) - at(self.bias)) / total if abs(total) > 1e-9 else slope
        return float(at(self.bias + total)), evidence * slope

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on."""
        said = repr((sorted((b, sorted(w.items())) for b, w in self.weights.items()), self.bias))
        return {"type": "NGramClassifier", "weights": hashlib.blake2b(said.encode(), digest_size=12).hexdigest()}

    def save(self, folder: str | Path) -> Path:
        """One JSON file."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        told = {"features": "ngrams", "bias": self.bias, "weights": self.weights}
        return write_json(Path(folder) / f"{FILE}.json", told).parent


@dataclass(frozen=True)
class SentenceClassifier:
    """Logistic regression on sentence vectors; nothing of it stands on tokens."""

    coefficients: np.ndarray
    bias: float
    encoder: Any = field(default_factory=TextEncoder)
    """Texts -> vectors (N, H)."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """P(appropriate), (N,)."""
        logits = np.asarray(self.encoder(list(texts)), np.float64).reshape(len(texts), -1) @ self.coefficients
        return 1 / (1 + np.exp(-logits - self.bias))

    def save(self, folder: str | Path) -> Path:
        """One JSON file; the encoder by its name."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        told = {"features": "minilm", "bias": self.bias, "coefficients": self.coefficients.tolist()}
        return write_json(Path(folder) / f"{FILE}.json", told | {"encoder": getattr(self.encoder, "name", None)}).parent


Classifier = NGramClassifier | SentenceClassifier


def fit_classifier(
    texts: Sequence[str],
    inappropriate: Sequence[bool],
    features: str = "ngrams",
    *,
    c: float = 3.0,
    balanced: bool = True,
    encoder: Any = None,
) -> Classifier:
    """Fit a classifier to labelled texts.

    Args:
        features: ``ngrams`` (those in two or more texts) or ``minilm``.
        c: inverse strength of the L2 penalty. balanced: both classes weigh alike, so P is of even odds beforehand.
        encoder: for minilm; default: all-MiniLM.

    Raises:
        ValueError: unknown features; labels of one class only, or not one a text.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("fitting a classifier needs scikit-learn: pip install 'pertoken[classifiers]'") from error
    good = [not label for label in inappropriate]
    if len(good) != len(texts) or len(set(good)) != 2:
        raise ValueError(f"{len(texts)} texts, labels {set(good)} for {len(good)}; give one a text, and both classes")
    if features not in ("ngrams", "minilm"):
        raise ValueError(f"features={features!r} is not one of ngrams, minilm")
    weight = "balanced" if balanced else None
    if features == "minilm":
        encoder = encoder or TextEncoder()
        found = LogisticRegression(C=c, class_weight=weight, max_iter=2000).fit(encoder(list(texts)), good)
        return SentenceClassifier(found.coef_[0].astype(np.float64), float(found.intercept_[0]), encoder)
    from scipy.sparse import hstack

    cut = [grams(t) for t in texts]
    tables, known = [], []
    for block in BLOCKS:
        counted = TfidfVectorizer(analyzer=lambda found, b=block: [g for g, *_ in found[b]], min_df=2)
        tables.append(counted.fit_transform(cut))
        known.append((counted.get_feature_names_out().tolist(), counted.idf_.tolist()))
    found = LogisticRegression(C=c, class_weight=weight, solver="liblinear", random_state=0)
    found.fit(hstack(tables).tocsr(), good)
    coefficients, weights = found.coef_[0].tolist(), {}
    for block, (names, idf) in zip(BLOCKS, known, strict=True):
        own, coefficients = coefficients[: len(names)], coefficients[len(names) :]
        weights[block] = {n: (i, w) for n, i, w in zip(names, idf, own, strict=True)}
    return NGramClassifier(weights, float(found.intercept_[0]))


def load_classifier(folder: str | Path, encoder: Any = None) -> Classifier:
    """What `save` wrote.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / f"{FILE}.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no classifier ({FILE}.json); save one: fit_classifier(...).save({folder!r})")
    told = read_json(path)
    if told["features"] == "minilm":
        encoder = encoder or (TextEncoder(told["encoder"]) if told["encoder"] else None)
        return SentenceClassifier(np.array(told["coefficients"]), told["bias"], encoder or TextEncoder())
    weights = {b: {g: (float(i), float(w)) for g, (i, w) in known.items()} for b, known in told["weights"].items()}
    return NGramClassifier(weights, told["bias"])


def macro_f1(truth: Sequence[bool], said: Sequence[bool]) -> float:
    """Mean of the two classes' F1; a class that is neither there nor said has 0."""
    t, p = np.asarray(truth, bool), np.asarray(said, bool)
    hits = [(2 * (t & p).sum(), t.sum() + p.sum()), (2 * (~t & ~p).sum(), (~t).sum() + (~p).sum())]
    return float(np.mean([h / n if n else 0.0 for h, n in hits]))
