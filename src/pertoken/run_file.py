"""YAML run files: the options of a run, as the command line has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    data = yaml.safe_load(path.read_text("utf8"))
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no mapping of options; write NAME: VALUE lines under method: and run:")
    data.pop("name", None)
    return merged(default, data, str(path))


def write_run_file(path: Path, slug: str, options: Any) -> Path:
    """Write options so that ``--config`` gives the same run again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"name": slug, **_plain(options)}, sort_keys=False, allow_unicode=True), "utf8")
    return path


def merged(options: Any, data: Mapping[str, Any], where: str) -> Any:
    """Options (nested dataclasses) with the values of a mapping.

    Raises:
        ValueError: a name that the options do not have; `where` says in what.
    """
    known = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    changes: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(f"{where}: there is no option {key!r}; options here: {', '.join(known)}")
        nested = dataclasses.is_dataclass(known[name]) and isinstance(value, Mapping)
        value = tuple(value) if isinstance(value, list) and isinstance(known[name], tuple) else value
        changes[name] = merged(known[name], value, f"{where}: {key}") if nested else value
    return dataclasses.replace(options, **changes)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (int, float, str, bool)) else str(value)
