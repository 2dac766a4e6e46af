"""Measured figures: what an example or a benchmark writes to ``results/<slug>.json`` (schema: CONTRIBUTING.md)."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .core.record import git_state, write_json


def save_result(
    slug: str,
    *,
    metric: str,
    value: float,
    interval: Sequence[float] | None,
    baseline: str | None,
    baseline_value: float | None,
    bound: str,
    reached: bool | None,
    world: str,
    seeds: Sequence[int],
    notes: str = "",
    rows: Sequence[dict[str, Any]] = (),
    folder: str | Path = "results",
) -> Path:
    """Write a result with the commit it was run on and the command that ran; `world` is told the GPU, if one was used.

    Raises:
        ValueError: code has uncommitted changes, or there is no repository: the figure would belong to no commit.
    """
    state = git_state(Path(__file__).parent, of=("src", "examples", "benchmarks"))
    if state is None or state.get("dirty"):
        raise ValueError("a result names the commit it was measured on; commit your changes in the repository first")
    record = {
        "slug": slug,
        "metric": metric,
        "value": value,
        "interval": list(interval) if interval else None,
        "baseline": baseline,
        "baseline_value": baseline_value,
        "bound": bound,
        "reached": reached,
        "world": world + _accelerator(),
        "seeds": list(seeds),
        "command": "python " + " ".join([f"{Path(sys.argv[0]).parent.name}/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": state["commit"][:12],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "notes": notes,
    }
    return write_json(Path(folder) / f"{slug}.json", record | ({"rows": list(rows)} if rows else {}))


def _accelerator() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():  # there may be one that nothing was computed on
        return ""
    fast = torch.get_float32_matmul_precision() != "highest"
    return f"; {torch.cuda.get_device_name()}" + (", float32 products in TF32" if fast else "")
