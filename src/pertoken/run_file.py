"""YAML run files: the options of a run, as the command line has them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml


def without_config(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """Take ``--config FILE`` out of the words."""
    words = list(words)
    if "--config" not in words:
        return words, None
    at = words.index("--config")
    if at + 1 == len(words):
        raise ValueError("--config needs a file")
    path = Path(words[at + 1])
    return words[:at] + words[at + 2 :], path


def read_run_file(path: Path, default: Any) -> Any:
    """`default` (nested dataclasses) with the values that a YAML file names.

    Raises:
        ValueError: no such file, no mapping, or a name that the options do not have.
    """
    if not path.exists():
        raise ValueError(f"there is no run file {path}")
    data = _loaded(path.read_text("utf8"), str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no mapping of options; write NAME: VALUE lines under method: and run:")
    data.pop("name", None)
    return merged(default, data, str(path))


def write_run_file(path: Path, slug: str, options: Any) -> Path:
    """Write options so that ``--config`` gives the same run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"name": slug, **_plain(options)}, sort_keys=False, allow_unicode=True), "utf8")
    return path


def value_of(text: str, where: str) -> Any:
    """An option's value from a command line, read as YAML.

    Raises:
        ValueError: it cannot be read; `where` says what it is of.
    """
    value = _loaded(text, where)
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)  # to YAML, 1e-3 is a text
    return float(value) if number else value


def merged(options: Any, data: Mapping[str, Any], where: str) -> Any:
    """Options (nested dataclasses) with the values of a mapping.

    Raises:
        ValueError: as `checked`.
    """
    return dataclasses.replace(options, **checked(options, data, where))


def checked(options: Any, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of a mapping as the fields of those options, each of its field's type.

    Raises:
        ValueError: a name that the options do not have, or a value of another type than the option's; `where` says in
            what.
    """
    known = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    hints, changes = typing.get_type_hints(type(options)), dict[str, Any]()
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{where}: there is no option {key!r}; options here: {', '.join(known)}")
        if dataclasses.is_dataclass(known[name]) and isinstance(value, Mapping):
            changes[name] = merged(known[name], value, f"{where}: {key}")
            continue
        value = tuple(value) if isinstance(value, list) and isinstance(known[name], tuple) else value
        try:
            changes[name] = _fitted(value, hints[name])
        except (ValueError, OverflowError) as error:
            hint, of = hints[name], f"{where}: {key}"
            if dataclasses.is_dataclass(hint):
                raise ValueError(f"{of}={value!r} is a group of options; give them by their names") from error
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            quoted = ", in quotes" if hint is str and value is not None else ""
            raise ValueError(f"{of}={value!r} is no {wanted}; give one{quoted}") from error
    return changes


def _fitted(value: Any, hint: Any) -> Any:
    """A value that YAML read as an option of that type: a list as a tuple, 1e-3 (which is text to YAML) as a number,
    and off (which is false to YAML) as the word.

    Raises:
        ValueError, OverflowError: it is none.
    """
    origin, among = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        exact = [kind for kind in among if kind is type(value)]  # text stays text where both text and numbers will do
        for kind in (*exact, *among):
            try:
                return _fitted(value, kind)
            except (ValueError, OverflowError):
                continue
        raise ValueError(value)
    if origin is Literal:
        words = ("on", "yes", "true") if value is True else ("off", "no", "false") if value is False else ()
        for word in (value, *words):
            if any(word == one and type(word) is type(one) for one in among):
                return word
        raise ValueError(value)
    if value is None and hint is type(None):
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = (among[0],) * len(value) if among[1:] == (...,) else among
        return tuple(_fitted(v, kind) for v, kind in zip(value, kinds, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {_fitted(k, among[0]): _fitted(v, among[1]) for k, v in value.items()}
    if hint in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = float(value) if isinstance(value, str) else value
        if hint is int and number != int(number):
            raise ValueError(value)
        return int(number) if hint is int else float(number)  # 1 and 1.0 are one option, also in a stage's key
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type):
        fits = isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
    else:
        fits = callable(value) if origin is Callable else origin not in (tuple, dict)
    if not fits:
        raise ValueError(value)
    return value


def _loaded(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}; mend what YAML cannot read") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (int, float, str, bool)) else str(value)
