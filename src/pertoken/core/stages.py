"""Named, hashed, resumable preparation stages: a helper model, relabelled data, token rewards.

A stage makes one folder out of declared inputs. The folder's name carries the hash of these inputs, and it gets that
name only when it is whole: a stage that was interrupted leaves nothing that could be taken for its result, and one that
was made is never made again.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .record import canonical_json, read_json, whole_file, write_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_count = itertools.count()


class Stages:
    """The stages of one run.

    Attributes:
        folder: where the artefacts are.
        records: of each `run` so far, in order, what its ``stage.json`` says and whether it was ``reused``
            (`seconds` are those of its making either way, so that costs can be added up).
    """

    def __init__(self, folder: str | Path, report: Callable[[str], None] | None = None):
        """`report` is given one line a stage."""
        self.folder = Path(folder)
        self.records: list[dict[str, Any]] = []
        self._report = report or (lambda line: None)

    def run(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """The artefact of a stage: the finished folder if there is one, else made now.

        Args:
            name: letters, digits, dots, hyphens and underscores.
            inputs: all that the artefact depends on, as JSON (model identities, data hash, options, versions, seed).
            make: fills the empty folder it is given. It must not rely on that folder's name, which changes.

        Returns:
            ``<folder>/<name>-<hash of the inputs>``, holding what `make` wrote and ``stage.json``.

        Raises:
            ValueError: a name of other characters; inputs that are not JSON; `make` wrote a ``stage.json`` itself.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"stage name {name!r}: use letters, digits, dots, hyphens and underscores")
        text = canonical_json(inputs)
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        artefact = self.folder / f"{name}-{digest}"
        if self._reuse(name, artefact):
            return artefact
        self._report(f"{name}: preparing")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep(artefact.name)
        part = self.folder / f".{artefact.name}.{_host()}.{os.getpid()}.{next(_count)}.part"
        part.mkdir()
        start = time.perf_counter()
        try:
            make(part)
            if (part / "stage.json").exists():
                raise ValueError(f"stage {name} wrote a stage.json of its own; give that file another name")
            record = {"stage": name, "hash": digest, "inputs": inputs, "seconds": time.perf_counter() - start}
            write_json(part / "stage.json", record | {"version": _version()})
            if artefact.exists() and not (artefact / "stage.json").exists():
                shutil.rmtree(artefact)  # half a copy by other hands: nothing of ours gets this name unfinished
            try:
                part.rename(artefact)
            except OSError:
                if self._reuse(name, artefact):  # another process was first, with the same inputs
                    return artefact
                raise
        finally:  # also for KeyboardInterrupt; after the rename there is nothing left to remove
            shutil.rmtree(part, ignore_errors=True)
        self.records.append(read_json(artefact / "stage.json") | {"reused": False})
        self._report(f"{name}: made in {self.records[-1]['seconds']:.1f} s")
        return artefact

    def _reuse(self, name: str, artefact: Path) -> bool:
        if not (artefact / "stage.json").exists():
            return False
        self.records.append(read_json(artefact / "stage.json") | {"reused": True})
        self._report(f"{name}: already made ({artefact.name})")
        return True

    def _sweep(self, name: str) -> None:
        """Remove what makers of this stage left that were killed on this machine: a helper model can be gigabytes."""
        for part in self.folder.glob(f".{name}.{_host()}.*.part"):
            pid = int(part.name.split(".")[-3])
            if not _alive(pid):
                shutil.rmtree(part, ignore_errors=True)


def save_ragged(path: str | Path, arrays: Sequence[np.ndarray]) -> Path:
    """Write a list of 1-D arrays of one dtype as an ``.npz`` (``values`` end to end, ``lengths``), whole or absent.

    Raises:
        ValueError: a path without ``.npz``, an array that is not 1-D numbers, or arrays of several dtypes.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}: ragged arrays are kept as .npz; give the file that ending")
    arrays = [np.asarray(a) for a in arrays]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or array.dtype.kind not in "biuf":
            raise ValueError(f"array {i} has shape {array.shape} and dtype {array.dtype}; give 1-D arrays of numbers")
        if array.dtype != arrays[0].dtype:
            raise ValueError(f"array {i} is {array.dtype}, the first is {arrays[0].dtype}; give arrays of one dtype")
    values = np.concatenate(arrays) if arrays else np.zeros(0)
    with whole_file(path) as out:
        np.savez(out, values=values, lengths=np.array([len(a) for a in arrays], np.int64))
    return path


def load_ragged(path: str | Path) -> list[np.ndarray]:
    """What `save_ragged` wrote: same order, lengths and dtype.

    Raises:
        ValueError: the file holds something else; names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            values, lengths = stored["values"], stored["lengths"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} does not hold ragged arrays ({error}); make it again") from error
    if int(lengths.sum()) != len(values):
        raise ValueError(f"{path}: {len(values)} values for lengths that add up to {lengths.sum()}; make it again")
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process, so it lives
        return True
    return True


def _version() -> str:
    from .. import __version__

    return __version__
