"""A classification task for a frozen causal LM, asked through its next token: what a discrete prompt is judged by.

The text stands first and is computed once; prompts and the closing words are short branches after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..core.completions import completions_stats
from ..core.head import Head
from ..core.lm import LM

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Labelled texts and how they are asked.

    Attributes:
        texts, labels: labels are indices of `verbalizers`.
        verbalizers: one token each, with their leading space (``" negative"``).
        before, after: words around: before + text + prompt + after.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    verbalizers: tuple[str, ...]
    before: str = ""
    after: str = " Sentiment:"

    def __post_init__(self) -> None:
        missing = [v for i, v in enumerate(self.verbalizers) if i not in self.labels]
        if len(self.texts) != len(self.labels) or missing or len(self.verbalizers) < 2:
            raise ValueError(
                f"{len(self.texts)} texts, {len(self.labels)} labels, none of them {missing}: give each class"
            )
        if not set(self.labels) <= set(range(len(self.verbalizers))):
            raise ValueError(f"labels {sorted(set(self.labels))} for {len(self.verbalizers)} verbalizers: give indices")


class Asked:
    """A task on a model; logits are kept by prompt, and calls are counted.

    Args:
        lm: the frozen model.

    Raises:
        ValueError: a verbalizer that is not one token (says its tokens).
    """

    def __init__(self, lm: LM, task: Task):
        self.lm, self.task = lm, task
        self.prefixes = [self._ids(task.before + text) for text in task.texts]
        self.suffix = self._ids(task.after) if task.after else ()
        if not all(self.prefixes):
            raise ValueError(f"text {self.prefixes.index(())} has no token; leave it out")
        self.classes = []
        for word in task.verbalizers:
            ids = self._ids(word)
            if len(ids) != 1:
                cut = "|".join(p.decode("utf8", "replace") for p in lm.encode_completion(word, ended=False)[1])
                raise ValueError(f"verbalizer {word!r} is {len(ids)} tokens ({cut}); choose words of one token")
            self.classes.append(ids[0])
        self.labels = np.array(task.labels)
        self.evaluations, self.examples = 0, 0
        self._known: dict[Prompt, np.ndarray] = {}

    def _ids(self, text: str) -> Prompt:
        return tuple(self.lm.encode_completion(text, ended=False)[0])

    def logits(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Next-token logits of the verbalizers: (prompts, examples, classes), float64."""
        new = [p for p in dict.fromkeys(map(tuple, prompts)) if p not in self._known]
        most = 4096 if self.lm.device.type == "cpu" else 16384
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            ends = [(p + self.suffix, self.lm.view.pieces(p + self.suffix)) for p in part]
            texts = [self.lm.trace_of_ids(prefix, ()) for prefix in self.prefixes]
            traces = [
                replace(text, completion_ids=ids, completion_pieces=pieces) for text in texts for ids, pieces in ends
            ]  # of one text together: the packer computes it once
            found = completions_stats(self.lm, traces, frozenset({"hidden_end"}), max_tokens=most)
            hidden = torch.from_numpy(np.stack([f["hidden_end"] for f in found]))
            with self.lm.active() as causal, torch.no_grad():
                head = Head(causal)
                weight = next(causal.get_output_embeddings().parameters())
                rows = [head(h.to(weight))[:, self.classes].double().cpu() for h in hidden.split(256)]
            table = torch.cat(rows).numpy().reshape(len(self.prefixes), len(part), len(self.classes))
            for k, p in enumerate(part):
                self._known[p] = table[:, k]
            self.evaluations += len(part)
            self.examples += len(part) * len(self.prefixes)
        return np.stack([self._known[tuple(p)] for p in prompts])

    def accuracy(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Share of examples whose class is likelier than every other (a tie is wrong), (prompts,)."""
        logits, rows = self.logits(prompts), np.arange(len(self.labels))
        own = logits[:, rows, self.labels]
        logits[:, rows, self.labels] = -np.inf
        return (own > logits.max(-1)).mean(1)

    def log_likelihood(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Mean log-prob of the right class among the verbalizers, (prompts,)."""
        return rewards(self.logits(prompts), self.labels, "cross_entropy")

    def certainty(self, prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
        """Of the distribution over classes: its greatest probability, a mean over examples, and its entropy in nats,
        summed over them; (prompts,) each."""
        logp_PNC = log_softmax(self.logits(prompts))
        p_PNC = np.exp(logp_PNC)
        return p_PNC.max(-1).mean(1), -(p_PNC * np.maximum(logp_PNC, np.log(1e-300))).sum((1, 2))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = logits - logits.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


def rewards(logits_PNC: np.ndarray, labels_N: np.ndarray, kind: str, compat: bool = False) -> np.ndarray:
    """R of each prompt, (P,).

    Args:
        kind: ``cross_entropy`` (mean log-prob of the label), ``gap`` (mean of p_label - max other, times 200 if it is
            positive, else 180), ``entropy`` (minus the entropy of the class distribution, summed over examples).
        compat: the release's: probabilities go through another softmax (cross_entropy); a rival that ties with the
            label is hidden (gap).

    Raises:
        ValueError: another kind.
    """
    logp = log_softmax(np.asarray(logits_PNC, np.float64))
    p, rows = np.exp(logp), np.arange(logp.shape[1])
    if kind == "cross_entropy":
        return (log_softmax(p) if compat else logp)[:, rows, labels_N].mean(1)
    if kind == "entropy":
        return (p * np.maximum(logp, np.log(1e-300))).sum((1, 2))
    if kind != "gap":
        raise ValueError(f"reward={kind!r} is not one of cross_entropy, gap, entropy")
    own = p[:, rows, labels_N]
    is_label = np.zeros(p.shape, bool)
    is_label[:, rows, labels_N] = True
    hidden = (p == own[..., None]) if compat else is_label
    gap = own - np.where(hidden, -1.0, p).max(-1)
    return np.where(gap > 0, 200.0 * gap, 180.0 * gap).mean(1)


def divergence(logits_PNC: np.ndarray, empty_NC: np.ndarray) -> np.ndarray:
    """sum over examples and classes of p log(p / p_empty), probabilities held above 1e-12: (P,)."""
    p = np.maximum(np.exp(log_softmax(np.asarray(logits_PNC, np.float64))), 1e-12)
    q = np.maximum(np.exp(log_softmax(np.asarray(empty_NC, np.float64))), 1e-12)
    return (p * (np.log(p) - np.log(q))).sum((1, 2))


def calibrated(logits_NC: np.ndarray, unlabelled_MC: np.ndarray) -> np.ndarray:
    """Class logits normalised by mean and unbiased variance over unlabelled inputs.

    Raises:
        ValueError: a class whose logit does not vary.
    """
    variance: Any = np.var(unlabelled_MC, axis=0, ddof=1)
    if (variance <= 0).any():
        raise ValueError("a class has the same logit for all unlabelled texts; give other texts")
    return (logits_NC - unlabelled_MC.mean(0)) / np.sqrt(variance)
