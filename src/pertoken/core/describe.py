"""Options as JSON, for hashes and records: what makes two runs the same run, and two scorers the same scorer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_LARGE = 64  # numbers of an array beyond which its hash stands for it


def describe(thing: Any) -> Any:
    """What a value is, as JSON that differs wherever its numbers may.

    Things with a method ``identity()`` (models, encoders, fitted scorers) are what it says; dataclasses and plain
    objects are their type, its code and their fields; functions their code, defaults and the values they hold on to or
    read from their module; arrays and tensors their contents.

    Raises:
        ValueError: an object that cannot be told from another one of its type.
    """
    return _describe(thing, ())


def _describe(thing: Any, inside: tuple[int, ...]) -> Any:
    if thing is None or isinstance(thing, (int, float, str, bool)):
        return thing
    if id(thing) in inside:
        return "itself"
    within = (*inside, id(thing))
    again = lambda part: _describe(part, within)
    if isinstance(thing, (type, types.ModuleType, types.BuiltinFunctionType, types.GenericAlias)):
        return getattr(thing, "__qualname__", None) or str(thing)
    if callable(getattr(thing, "identity", None)):
        return again(thing.identity())
    if dataclasses.is_dataclass(thing):
        fields = {f.name: again(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
        return {"type": type(thing).__name__, **fields}
    if isinstance(thing, Mapping):
        return {str(k): again(v) for k, v in thing.items()}
    if isinstance(thing, (set, frozenset)):
        return sorted(map(again, thing), key=str)
    if isinstance(thing, (list, tuple)):
        return [again(v) for v in thing]
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, bytes):
        return hashlib.blake2b(thing, digest_size=16).hexdigest()
    if hasattr(thing, "tolist"):
        return _array(thing)
    if isinstance(thing, re.Pattern):
        return [thing.pattern, thing.flags]
    if isinstance(thing, functools.partial):
        return [again(thing.func), again(thing.args), again(thing.keywords)]
    if inspect.ismethod(thing):
        return [again(thing.__func__), again(thing.__self__)]
    if inspect.isfunction(thing):
        code = thing.__code__
        cells = [c.cell_contents for c in thing.__closure__ or ()]
        read = [thing.__globals__[n] for n in _names(code) if _is_data(thing.__globals__.get(n))]
        defaults = [again(thing.__defaults__), again(thing.__kwdefaults__)]
        return [thing.__qualname__, _code(code), defaults, again(cells), again(read)]
    if hasattr(thing, "state_dict"):  # a torch module
        return {"type": type(thing).__qualname__, "weights": {k: _array(v) for k, v in thing.state_dict().items()}}
    if hasattr(thing, "__dict__"):
        does = (getattr(type(thing), name, None) for name in ("__call__", "score", "prefer"))
        code = [_code(f.__code__) for f in does if inspect.isfunction(f)]
        return {"type": type(thing).__qualname__, "code": code, **{k: again(v) for k, v in vars(thing).items()}}
    text = repr(thing)
    if " at 0x" in text:
        raise ValueError(
            f"one {type(thing).__qualname__} cannot be told from another, so nothing computed with it can be kept; "
            "give it a method identity() that returns what its numbers depend on, as JSON"
        )
    return [type(thing).__qualname__, text]


def _is_data(thing: Any) -> bool:
    """Whether a function that reads this from its module depends on what it is, and not on its name alone."""
    plain = (int, float, str, bytes, tuple, list, dict, set, frozenset, np.ndarray)
    return isinstance(thing, plain) or inspect.isfunction(thing)


def _array(x: Any) -> Any:
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x).numpy()
    x = np.asarray(x)
    if x.dtype == object or x.size <= _LARGE:
        return x.tolist()
    return [str(x.dtype), list(x.shape), hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=16).hexdigest()]


def _names(code: types.CodeType) -> list[str]:
    """Names that code, and code within it, looks up outside of itself."""
    inner = [name for c in code.co_consts if inspect.iscode(c) for name in _names(c)]
    return sorted({*code.co_names, *inner})


def _code(code: types.CodeType) -> str:
    """Hash of what a function does, wherever it is written."""
    constants = [_code(c) if inspect.iscode(c) else repr(c) for c in code.co_consts]
    return hashlib.blake2b(repr((code.co_code, constants, code.co_names)).encode(), digest_size=8).hexdigest()
