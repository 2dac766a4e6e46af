"""50 updates of a tiny model by each training method: `python -m tests.golden.regenerate [slug ...]` writes the files.

Float64, one thread, AdamW at 1e-3 without weight decay or clipping, on four fixed groups of random ids; the reference
is the starting checkpoint. A file changes only when the method's numbers do: say why in CHANGELOG.md and raise the
`version` of its row.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.catalog import Method, about, method, methods
from pertoken.core.lm import LM
from tests.contracts.harness import make_groups, objective_pass, state_of, without_dropout
from tests.methods.one_pass import exact_lm

FOLDER = Path(__file__).parent
STEPS, RATE = 50, 1e-3


def rows() -> list[Method]:
    """The training methods whose module is there."""
    return [row for row in methods() if row.room == "train" and importlib.util.find_spec(row.path.partition(":")[0])]


def fixed_lm(seed: int) -> LM:
    """The tiny GPT-2 with weights of numpy's generator, whose numbers are the same on every processor."""
    lm, rng = exact_lm(), np.random.default_rng(seed)
    with torch.no_grad():
        for _, p in sorted(lm.model.named_parameters()):
            if p.ndim == 2:
                p.copy_(torch.from_numpy(rng.normal(0.0, 0.3, tuple(p.shape))))
    return lm


def trajectory(row: Method) -> dict[str, Any]:
    """Mean loss and gradient norm of every update, with the method's defaults."""
    objective = method(row.slug)()
    groups, policy = make_groups(objective, n=4, seed=7), fixed_lm(0)
    state = without_dropout(copy.deepcopy(state_of(objective)))
    models = {name: fixed_lm(0 if name == "reference" else sum(name.encode())) for name in objective.stats}
    models["policy"] = policy
    weights = [p for m in (policy.model, state) if m is not None for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    out: dict[str, Any] = {"slug": row.slug, "version": row.version, "loss": [], "grad_norm": []}
    for _ in range(STEPS):
        found = objective_pass(objective, groups, models=models, state=state)
        grads = found.grads / found.count
        for p, grad in zip(weights, grads.split([p.numel() for p in weights])):
            p.grad = grad.view_as(p)
        optimizer.step()
        out["loss"].append(found.sum / found.count)
        out["grad_norm"].append(float(grads.norm()))
    return out


def main(slugs: list[str]) -> None:
    """Write the trajectories of these methods, or of all."""
    torch.set_num_threads(1)
    for row in [about(slug) for slug in slugs] or rows():
        path = FOLDER / f"{row.slug}.json"
        path.write_text(json.dumps(trajectory(row), indent=0) + "\n", encoding="utf8")
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
