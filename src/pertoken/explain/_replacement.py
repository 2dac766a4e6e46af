"""What may stand in a token's place: samplers of replacements, and soft faithfulness metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.bytes import ByteView
from ..core.head import Head
from ..core.lm import LM
from ..core.packing import evaluating
from ..core.rollout import decoding

Replace = Callable[[int, np.random.Generator], Tensor]
"""(B, generator) -> ids (B, t): a replacement for every position of every probe."""


def replacer(name: str) -> Callable[[LM, tuple[int, ...]], Replace]:
    """A sampler by its name.

    Raises:
        ValueError: another name.
    """
    known = {"uniform": _of_pools(_any), "shape": _of_pools(shape), "inferential": inferential}
    known["postag"] = _of_pools(_part_of_speech)
    if name not in known:
        raise ValueError(f"sampler={name!r} is not one of {', '.join(known)}")
    return known[name]


def _any(piece: bytes) -> str:
    return ""


def shape(piece: bytes) -> str:
    """A token's shape: leading space, then the kind of its characters."""
    text = piece.decode("utf8", "replace")
    word, lead = text.lstrip(), " " if text[:1].isspace() else ""
    if not word:
        return "space"
    if any(c.isdigit() for c in word):
        return f"{lead}digit"
    if not any(c.isalpha() for c in word):
        return f"{lead}punctuation" if "�" not in word else "bytes"
    return lead + ("upper" if word.isupper() and len(word) > 1 else "title" if word[0].isupper() else "lower")


def _part_of_speech(piece: bytes) -> str:
    """The tag of a token alone.

    Raises:
        ImportError: NLTK or its tagger's data are not there.
    """
    try:
        import nltk

        text = piece.decode("utf8", "replace").strip()
        return (" " if piece[:1] == b" " else "") + (nltk.pos_tag([text])[0][1] if text else "space")
    except (ImportError, LookupError) as error:
        raise ImportError(
            "sampler=postag needs NLTK: pip install nltk, then nltk.download('averaged_perceptron_tagger_eng'); "
            "sampler=shape needs nothing"
        ) from error


def _of_pools(kind: Callable[[bytes], str]) -> Callable[[LM, tuple[int, ...]], Replace]:
    """Uniform draws among the ids of a token's kind, never the token itself (where it is alone in its kind: any id)."""

    def make(lm: LM, ids: tuple[int, ...]) -> Replace:
        pools, every = _pools(lm.view, Head(lm.causal).vocabulary, kind)
        own = []
        for i in ids:
            pool = pools.get(kind(lm.view.piece(i)), every)
            pool = pool if len(pool) > 1 or (len(pool) and pool[0] != i) else every
            at = int(np.searchsorted(pool, i))
            own.append((pool, at, at < len(pool) and bool(pool[at] == i)))

        def replace(n: int, rng: np.random.Generator) -> Tensor:
            out = np.empty((n, len(ids)), np.int64)
            for place, (pool, at, inside) in enumerate(own):
                drawn = rng.integers(0, len(pool) - inside, n)
                out[:, place] = pool[drawn + (inside & (drawn >= at))]
            return torch.from_numpy(out)

        return replace

    return make


@lru_cache(maxsize=8)
def _pools(view: ByteView, vocabulary: int, kind: Callable[[bytes], str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    usable = [i for i in range(min(view.size, vocabulary)) if i not in view.special_ids and view.piece(i)]
    by_kind: dict[str, list[int]] = {}
    for i in usable:
        by_kind.setdefault(kind(view.piece(i)), []).append(i)
    return {name: np.array(pool) for name, pool in by_kind.items()}, np.array(usable)


@torch.no_grad()
def inferential(lm: LM, ids: tuple[int, ...]) -> Replace:
    """What the model itself expects at each place after what stands before it, special tokens left out; the first
    token is kept. Where that is the token itself, its second choice."""
    with lm.active() as causal, evaluating(causal), decoding(causal):
        hidden = causal.base_model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).last_hidden_state
        head = Head(causal)
        logits = head(hidden[0, :-1]).cpu()
    usable = torch.zeros(head.vocabulary, dtype=torch.bool)
    usable[_pools(lm.view, head.vocabulary, _any)[1]] = True
    best = logits.masked_fill(~usable, -torch.inf).topk(2, -1).indices
    own = torch.tensor(ids)
    chosen = torch.cat([own[:1], torch.where(best[:, 0] == own[1:], best[:, 1], best[:, 0])])
    return lambda n, rng: chosen.expand(n, -1)


class MaskedReplacer:
    """Replacements by a masked language model: what it expects where a token's text is masked, after re-tokenising; the
    first id of its best guess that is not the token itself.

    Args:
        model, tokenizer: a transformers masked LM and its tokenizer.
        top: guesses to look through.
    """

    def __init__(self, model: Any, tokenizer: Any, top: int = 8):
        if tokenizer.mask_token is None:
            raise ValueError("this tokenizer has no mask token; give a masked language model")
        self.model, self.tokenizer, self.top = model.eval(), tokenizer, top

    @torch.no_grad()
    def __call__(self, lm: LM, ids: tuple[int, ...]) -> Replace:
        """See `replacer`."""
        pieces, chosen = lm.view.pieces(ids, at_start=True), list(ids)
        for place, (own, piece) in enumerate(zip(ids, pieces, strict=True)):
            lead = " " if piece[:1] == b" " else ""
            before, after = (b"".join(part).decode("utf8", "replace") for part in (pieces[:place], pieces[place + 1 :]))
            text = before + lead + self.tokenizer.mask_token + after
            found = self.tokenizer(text, return_tensors="pt", truncation=True).to(self.model.device)
            where = (found["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()
            if own in lm.view.special_ids or not len(where):
                continue
            for guess in self.model(**found).logits[0, int(where[0])].topk(self.top).indices.tolist():
                text = self.tokenizer.decode([guess]).strip()
                made = lm.tokenizer.encode(lead + text, add_special_tokens=False) if text else []
                if made and made[0] != own:
                    chosen[place] = made[0]
                    break
        fixed = torch.tensor(chosen)
        return lambda n, rng: fixed.expand(n, -1)


def distance(p: Tensor, q: Tensor) -> Tensor:
    """The release's D = sum_v (sqrt p_v - sqrt q_v)^2 / sqrt 2, in [0, sqrt 2] (no outer root)."""
    return (p.double().sqrt() - q.double().sqrt()).square().sum(-1) / 2**0.5


@torch.no_grad()
def soft_faithfulness(
    lm: LM,
    ids: Sequence[int],
    scores: Sequence[float],
    *,
    rng: np.random.Generator,
    samples: int = 8,
    rescale: bool = True,
) -> dict[str, float]:
    """Soft-NS and Soft-NC of an attribution of the next token.

    Each dimension of a token's embedding is kept with probability score (sufficiency) or 1 - score (comprehensiveness):
    Soft-NS = max(0, Suff - Suff_0) / (1 - Suff_0), Soft-NC = Comp / (1 - Suff_0), with Suff = 1 - D, Comp = D, and
    Suff_0 where all embeddings are 0.

    Args:
        scores: (t,), 0 or more. samples: Bernoulli masks that are averaged.
        rescale: divide scores by their maximum, as softmax scores shrink with t.

    Returns:
        ``soft_ns`` and ``soft_nc``; NaN (skip and count it) where 1 - Suff_0 is below 1e-9.
    """
    weights = np.asarray(scores, np.float64)
    if len(weights) != len(ids) or (weights < 0).any() or not np.isfinite(weights).all():
        raise ValueError(f"{len(weights)} scores for {len(ids)} tokens; give one each, 0 or more")
    if rescale and weights.max() > 0:
        weights = weights / weights.max()
    with lm.active() as causal, evaluating(causal), decoding(causal):
        embedded = causal.get_input_embeddings()(torch.tensor([list(ids)], device=lm.device))

        def predicted(embeddings: Tensor) -> Tensor:
            hidden = causal.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, -1]
            return Head(causal)(hidden).softmax(-1)

        full = predicted(embedded)
        nothing = 1 - float(distance(predicted(torch.zeros_like(embedded)), full)[0])
        keep = torch.from_numpy(np.clip(weights, 0, 1)).to(embedded)[None, :, None]
        found = []
        for probability in (keep, 1 - keep):
            uniform = rng.random((samples, *embedded.shape[1:]))
            masks = torch.from_numpy(uniform).to(embedded) < probability
            found.append(float(distance(predicted(torch.where(masks, embedded, 0.0)), full).mean()))
    room = 1 - nothing
    if room < 1e-9:
        return {"soft_ns": float("nan"), "soft_nc": float("nan")}
    return {"soft_ns": max(0.0, (1 - found[0]) - nothing) / room, "soft_nc": found[1] / room}
