"""Options as JSON, for hashes and records: what makes two runs the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .protocols import FunctionScorer


def describe(thing: Any) -> Any:
    """A method's options as JSON: models, and what else has an `identity()`, by that; dataclasses by field, functions
    by their code and the constants that they hold on to (two lambdas are not one scorer)."""
    if not isinstance(thing, type) and callable(identity := getattr(thing, "identity", None)):
        return describe(identity())
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        fields = {f.name: describe(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"type": type(thing).__name__, **fields}
    if isinstance(thing, FunctionScorer):
        return {"type": type(thing).__name__, **{k: describe(v) for k, v in vars(thing).items()}}
    if isinstance(thing, Mapping):
        return {str(k): describe(v) for k, v in thing.items()}
    if isinstance(thing, (set, frozenset)):
        return sorted(map(describe, thing), key=str)
    if isinstance(thing, (list, tuple)):
        return [describe(v) for v in thing]
    if thing is None or isinstance(thing, (int, float, str, bool)):
        return thing
    if isinstance(thing, Path):
        return str(thing)
    if (tolist := getattr(thing, "tolist", None)) is not None:
        return describe(tolist())
    if inspect.ismethod(thing):
        return [describe(thing.__func__), describe(thing.__self__)]
    if inspect.isfunction(thing):
        cells = [c.cell_contents for c in thing.__closure__ or () if c.cell_contents is not thing]
        held = [type(v).__name__ if isinstance(v, (list, dict, set)) else describe(v) for v in cells]  # counters, memos
        return [thing.__qualname__, _code(thing.__code__), describe(thing.__defaults__), held]
    return getattr(thing, "__qualname__", None) or type(thing).__qualname__


def _code(code: Any) -> str:
    """Hash of what a function does, wherever it is written."""
    constants = [_code(c) if inspect.iscode(c) else repr(c) for c in code.co_consts]
    return hashlib.blake2b(repr((code.co_code, constants, code.co_names)).encode(), digest_size=8).hexdigest()
