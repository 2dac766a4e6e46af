"""Content-hashed arrays on disk: reference log-probs, hidden states, judgements. Computed once, memory-mapped after.

A cache has one shelf a *context* (what the numbers depend on: model identity, method version), a shelf has shards. One
`put_many` writes one shard a dtype: ``shard-<hash>.npy`` with the arrays end to end, then ``shard-<hash>.json`` with
``{key: [offset, length]}``. Both get their names only when they are whole, the index last, so a reader never sees half
a shard, and writers need no lock: a shard's name is the hash of what is in it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .record import canonical_json, read_json, whole_file, write_json

Item = TypeVar("Item")


def cache_folder() -> Path:
    """``$PERTOKEN_CACHE``, or ``~/.cache/pertoken``. It need not exist yet."""
    return Path(os.environ.get("PERTOKEN_CACHE") or Path.home() / ".cache" / "pertoken").expanduser()


def key_of(prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray, *extra: Any) -> str:
    """32 hex digits that stand for a prompt, a completion and anything else (JSON values) that a number depends on."""
    prompt, completion = np.asarray(prompt_ids, np.int64), np.asarray(completion_ids, np.int64)
    lengths = np.array([len(prompt), len(completion)], np.int64)  # they say where one part ends and the next begins
    digest = hashlib.blake2b(lengths.tobytes() + prompt.tobytes() + completion.tobytes(), digest_size=16)
    if extra:
        digest.update(canonical_json(extra).encode())
    return digest.hexdigest()


class ArrayCache:
    """A folder of shelves, one a context. The folder is made when something is first put."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else cache_folder() / "arrays"

    def context(self, identity: Mapping[str, Any]) -> Shelf:
        """The shelf of the numbers that depend on `identity` (and on the keys).

        Raises:
            ValueError: `identity` is not JSON.
        """
        digest = hashlib.blake2b(canonical_json(identity).encode(), digest_size=12).hexdigest()
        return Shelf(self.folder / digest, identity)


class Shelf:
    """The arrays of one context, by key. Safe to share between threads and processes that write at the same time.

    A put makes a file or two, so put hundreds of arrays at a time (`remember` does).
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.folder, self.identity = folder, dict(identity)
        self._where: dict[str, tuple[str, int, int]] = {}  # key -> shard, offset, length
        self._flat: dict[str, np.ndarray] = {}
        self._seen: set[str] = set()
        self._refresh()

    def __len__(self) -> int:
        """How many keys are known to this process."""
        return len(self._where)

    def get_many(self, keys: Sequence[str]) -> list[np.ndarray | None]:
        """The array of each key, memory-mapped and read-only, as it was put; None for a key that nobody has put."""
        if any(key not in self._where for key in keys):
            self._refresh()
        out: list[np.ndarray | None] = []
        for key in keys:
            found = self._where.get(key)
            if found is None:
                out.append(None)
                continue
            shard, offset, length = found
            out.append(self._flat[shard][offset : offset + length])
        return out

    def put_many(self, keys: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
        """Store `arrays` under `keys`; what is put under a known key is seen by this process from now on.

        Args:
            keys: one an array (`key_of`).
            arrays: numbers of shape (T,) or (T, ...), T differing between arrays; dtype and trailing shape are kept.

        Raises:
            ValueError: lengths that disagree, an array without an axis, or one that does not hold numbers.
        """
        if len(keys) != len(arrays):
            raise ValueError(f"{len(keys)} keys for {len(arrays)} arrays; give one each")
        alike: dict[tuple[str, tuple[int, ...]], dict[str, np.ndarray]] = {}
        for key, array in zip(keys, arrays, strict=True):
            array = np.asarray(array)
            if array.ndim == 0 or array.dtype.kind not in "biuf":
                raise ValueError(
                    f"array {key} has dtype {array.dtype} and shape {array.shape}; "
                    "the cache keeps numbers with at least one axis (bfloat16: turn it into float32)"
                )
            alike.setdefault((array.dtype.str, array.shape[1:]), {})[key] = array
        if alike and not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", self.identity)
        for group in alike.values():
            self._write(group)

    def _write(self, group: dict[str, np.ndarray]) -> None:
        flat = np.concatenate(list(group.values()))
        ends = np.cumsum([len(a) for a in group.values()]).tolist()
        index = {key: [end - len(a), len(a)] for (key, a), end in zip(group.items(), ends, strict=True)}
        digest = hashlib.blake2b(canonical_json([flat.dtype.str, flat.shape, index]).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(flat).view(np.uint8).data)
        name = f"shard-{digest.hexdigest()}"
        with whole_file(self.folder / f"{name}.npy") as out:
            np.save(out, flat, allow_pickle=False)
        write_json(self.folder / f"{name}.json", index)
        self._open(name)

    def _refresh(self) -> None:
        """Open the shards that other writers have finished since."""
        if self.folder.is_dir():
            for name in sorted(p.stem for p in self.folder.glob("shard-*.json")):
                if name not in self._seen:
                    self._open(name)

    def _open(self, name: str) -> None:
        self._seen.add(name)
        try:
            index: dict[str, list[int]] = read_json(self.folder / f"{name}.json")
            flat = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            where = {key: (name, int(offset), int(length)) for key, (offset, length) in index.items()}
            if any(offset < 0 or length < 0 or offset + length > len(flat) for _, offset, length in where.values()):
                raise ValueError("its index points outside of its array")
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            warnings.warn(
                f"ignoring the broken shard {self.folder / name}.npy/.json ({error}); its numbers are computed again. "
                "Remove both files to be rid of this warning",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        self._flat[name] = flat
        self._where |= where


def remember(
    shelf: Shelf,
    items: Sequence[Item],
    key: Callable[[Item], str],
    compute_missing: Callable[[list[Item]], Sequence[np.ndarray]],
    *,
    chunk: int = 4096,
) -> list[np.ndarray]:
    """The array of each item, in order: from the shelf where it is there, else computed and put there.

    Args:
        shelf: where to look and to put.
        items: anything; items with one key are computed once.
        key: an item's key (`key_of`).
        compute_missing: arrays of the items it is given, one each, in order. Not called when nothing is missing.
        chunk: how many missing items are computed between two puts: what an interruption can lose.

    Raises:
        ValueError: `compute_missing` gave another number of arrays than it was given items.
    """
    keys = [key(item) for item in items]
    found = dict(zip(keys, shelf.get_many(keys), strict=True))
    missing = list({k: item for k, item in zip(keys, items, strict=True) if found[k] is None}.items())
    for start in range(0, len(missing), chunk):
        wanted = missing[start : start + chunk]
        arrays = list(compute_missing([item for _, item in wanted]))
        if len(arrays) != len(wanted):
            raise ValueError(
                f"compute_missing gave {len(arrays)} arrays for {len(wanted)} items; give one each, in order"
            )
        names = [k for k, _ in wanted]
        shelf.put_many(names, arrays)
        found.update(zip(names, shelf.get_many(names), strict=True))
    whole = [found[k] for k in keys]
    assert all(array is not None for array in whole)
    return [array for array in whole if array is not None]
