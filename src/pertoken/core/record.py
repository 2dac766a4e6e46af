"""Provenance beside every number, and JSON files that are whole or absent.

A result says what it was computed from (model identities, data hash, seed, method versions) and on what (package
versions, commit, machine, command), so that a reader can get it again. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

_PACKAGES = ("torch", "transformers", "numpy")
_NOT_CONTENT = ("source", "row")  # where a row was read from: the same rows in another file are the same data


def provenance(
    *,
    models: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int | Sequence[int] | None = None,
    methods: Mapping[str, int] | None = None,
    data: str | Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a result was computed from and on, as a JSON object.

    Args:
        models: role (policy, reference...) -> `LM.identity()`.
        seed: the seed or seeds.
        methods: catalog slug -> version of its numbers.
        data: `data_hash` of the examples, or one a named part (train, test...).
        extra: anything else, under its own keys.

    Returns:
        The arguments that were given, and ``versions``, ``git`` (commit and dirty flag of the working folder's
        repository, None without one), ``machine``, ``date`` (UTC, ISO 8601) and ``command``. The home folder is
        written ``~`` wherever it stands.

    Raises:
        ValueError: `extra` uses a key that provenance itself fills, or a value is not JSON (NaN included).
    """
    from .. import __version__

    found: dict[str, Any] = {
        "models": {role: dict(identity) for role, identity in (models or {}).items()},
        "seed": seed,
        "methods": dict(methods or {}),
        "data": data,
    }
    found = {key: value for key, value in found.items() if value is not None and value != {}}
    found["versions"] = {"pertoken": __version__, "python": platform.python_version(), **_versions()}
    found["git"] = git_state()
    found["machine"] = _machine()
    found["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    found["command"] = " ".join(sys.argv)
    taken = sorted(set(found) & set(extra or {}))
    if taken:
        raise ValueError(f"provenance fills {', '.join(taken)} itself; put yours under another key of extra")
    return json.loads(_shorten_home(canonical_json({**found, **(extra or {})})))


def git_state(folder: str | Path = ".", of: Sequence[str] = ()) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the repository that `folder` lies in; None if there is none, no commit or no git.

    With `of`, only changes under these paths of the repository make it dirty.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--", *(f":/{path}" for path in of))
    return {"commit": commit, "dirty": changes is None or bool(changes)}


def data_hash(examples: Iterable[Any]) -> str:
    """32 hex digits of the content of examples, in order; where they were read from does not count.

    Args:
        examples: `Example`s, other dataclass instances, or JSON-like dicts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        # not dataclasses.asdict: it copies deeply, and extra columns may hold what cannot be copied
        fields = example if isinstance(example, Mapping) else vars(example)
        content = {key: value for key, value in fields.items() if key not in _NOT_CONTENT}
        # extra columns may hold dates or bytes: their text stands for them
        digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def canonical_json(obj: Any) -> str:
    """One text for equal content: sorted keys, no spaces. Paths, numpy values and dataclasses are written plainly.

    Raises:
        ValueError: NaN, infinity or something that is not JSON, with the path of its key.
    """
    return _dumps(obj, sort_keys=True, separators=(",", ":"))


def write_json(path: str | Path, obj: Any) -> Path:
    """Write `obj` as indented JSON; the file is whole or, if anything fails, what it was before.

    Raises:
        ValueError: NaN, infinity or something that is not JSON, with the path of its key; nothing is written then.
    """
    text = _dumps(obj, indent=2) + "\n"
    with whole_file(path) as out:
        out.write(text.encode("utf-8"))
    return Path(path)


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold JSON; names the file and the line.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); restore the file or remove it"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); restore the file or remove it") from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that gets its name only when the block ends well and the bytes are on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile: its files are closed to other users, and a result is for everybody
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _dumps(obj: Any, **layout: Any) -> str:
    try:
        return json.dumps(obj, allow_nan=False, ensure_ascii=False, default=_plain, **layout)
    except (ValueError, TypeError) as error:
        where, what = _first_bad(obj) or ("the object", str(error))
        raise ValueError(f"{where} is {what}, which JSON does not hold; replace or remove it") from error


def _plain(value: Any) -> Any:
    """What json itself does not know: numpy scalars and arrays (anything with `tolist`), paths, dataclasses."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(f"a {type(value).__name__}")


def _first_bad(obj: Any, path: str = "") -> tuple[str, str] | None:
    """Key path and description of the first value that JSON cannot hold."""
    if obj is None or isinstance(obj, str | bool | int):
        return None
    if isinstance(obj, float):
        return None if math.isfinite(obj) else (path or "the value", str(float(obj)))
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            if not isinstance(key, str | int | float | bool | None):
                return f"a key of {path or 'the object'}", f"a {type(key).__name__}"
            if bad := _first_bad(value, f"{path}.{key}" if path else str(key)):
                return bad
        return None
    if isinstance(obj, list | tuple):
        found = (_first_bad(value, f"{path}[{i}]") for i, value in enumerate(obj))
        return next((bad for bad in found if bad), None)
    try:
        return _first_bad(_plain(obj), path)
    except TypeError as error:
        return path or "the object", str(error)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": platform.system(),
        "release": platform.release(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""),
    }
    torch = sys.modules.get("torch")  # ask it only if somebody has loaded it: loading it here would take seconds
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _git(folder: str | Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a working tree too slow to ask: the number stands without it
    return done.stdout.strip() if done.returncode == 0 else None


def _shorten_home(text: str) -> str:
    """`text` (JSON) with ``~`` for the home folder, where a path begins with it."""
    home = json.dumps(str(Path.home()), ensure_ascii=False)[1:-1]
    return text if home == "/" else re.sub(rf'(?<![\w.~/-]){re.escape(home)}(?=["/\s:,])', "~", text)
