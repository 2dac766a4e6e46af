"""pertoken: reward, credit and control at the level of the token.

Names are loaded when they are first used, so ``import pertoken`` is instant and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "load": "core.lm:load",
    "LM": "core.lm:LM",
    "Trace": "core.trace:Trace",
    "Credit": "core.credit:Credit",
    "Critique": "core.credit:Critique",
    "combine": "core.credit:combine",
    "pack": "core.packing:pack",
    "token_stats": "core.stats:token_stats",
    "Needs": "core.stats:Needs",
    "Stats": "core.stats:Stats",
    "sample": "core.rollout:sample",
    "fit": "core.loop:fit",
    "align": "api:align",
    "TrainOptions": "api:TrainOptions",
    "LoopConfig": "core.loop:LoopConfig",
    "method": "catalog:method",
    "methods": "catalog:methods",
    "about": "catalog:about",
    "show": "show",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pertoken' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
