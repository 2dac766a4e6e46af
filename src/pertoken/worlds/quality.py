"""How well a credit finds the tokens that are known to deserve it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pertoken.core.credit import Credit


def credit_quality(credits: Sequence[Credit], truths: Sequence[np.ndarray]) -> dict[str, float]:
    """Compare credit with true labels, all traces pooled.

    Only tokens that are words count: left out are tokens that say no text (the terminator, whose value would swell the
    neutral spread) and tokens the policy did not emit.

    Args:
        credits: one a trace, over its completion.
        truths: one array of shape (T,) a trace; the sign of an entry is the token's label: positive, negative, neutral.

    Returns:
        ``auc`` = P(value on a positive token > value on a negative one), ties half; ``gap`` = mean on positive tokens
        - mean on negative ones; ``d_prime`` = gap / standard deviation on neutral tokens; ``n_pos``, ``n_neg``,
        ``n_neutral``.
        A figure whose tokens are missing (or whose neutral spread is 0) is nan.

    Raises:
        ValueError: a different number of credits and truths, or a truth of another length than its credit.
    """
    if len(credits) != len(truths):
        raise ValueError(f"{len(credits)} credits but {len(truths)} truths; give one truth a credit")
    values, labels = [np.zeros(0)], [np.zeros(0)]
    for i, (credit, truth) in enumerate(zip(credits, truths, strict=True)):
        if credit.over != "completion" or np.shape(truth) != credit.values.shape:
            raise ValueError(
                f"truth {i} has shape {np.shape(truth)} but its credit has {credit.values.shape} over {credit.over}; "
                "give one label a completion token"
            )
        counted = credit.trace.mask & np.array([bool(p) for p in credit.trace.completion_pieces], bool)
        values.append(credit.values[counted])
        labels.append(np.sign(truth)[counted])
    value, label = np.concatenate(values), np.concatenate(labels)
    pos, neg, neutral = value[label > 0], np.sort(value[label < 0]), value[label == 0]
    auc = gap = d_prime = float("nan")
    if len(pos) and len(neg):
        below, up_to = (np.searchsorted(neg, pos, side) for side in ("left", "right"))
        auc = float((below + up_to).mean() / 2 / len(neg))
        gap = float(pos.mean() - neg.mean())
        if len(neutral) > 1 and neutral.std() > 0:
            d_prime = gap / float(neutral.std())
    return {
        "auc": auc,
        "gap": gap,
        "d_prime": d_prime,
        "n_pos": len(pos),
        "n_neg": len(neg),
        "n_neutral": len(neutral),
    }
