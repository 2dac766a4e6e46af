"""The array cache: what is put comes back, and neither interruptions, damage nor other writers break it."""

from __future__ import annotations

import json
import multiprocessing
import threading
import warnings

import numpy as np
import pytest

from pertoken.core import cache as cache_module
from pertoken.core.cache import ArrayCache, Shelf, cache_folder, key_of, remember


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return ArrayCache(tmp_path).context({"model": "m", "dtype": "float32"})


def again(shelf: Shelf) -> Shelf:
    """The same shelf as another process sees it."""
    return Shelf(shelf.folder, shelf.identity)


def ragged(n: int, dtype=np.float32) -> list[np.ndarray]:
    return [np.arange(i, 2 * i, dtype=dtype) for i in range(n)]


def assert_holds(shelf: Shelf, keys, arrays) -> None:
    for got, want in zip(shelf.get_many(keys), arrays, strict=True):
        assert got is not None and got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_arrays_come_back_mapped_with_their_dtype_and_shape(shelf):
    arrays = [*ragged(4), np.ones((2, 3), np.float16), np.zeros(5, np.float64), np.array([True, False])]
    keys = [f"k{i}" for i in range(len(arrays))]
    shelf.put_many(keys, arrays)
    for one in (shelf, again(shelf)):
        assert_holds(one, keys, arrays)
        assert len(one) == len(keys)
        assert one.get_many(["k1", "unknown"])[1] is None
        got = one.get_many(["k3"])[0]
        assert got is not None and isinstance(got, np.memmap) and not got.flags.writeable


def test_only_empty_arrays(shelf):
    shelf.put_many(["a", "b"], [np.zeros(0, np.float32)] * 2)
    assert_holds(again(shelf), ["a", "b"], [np.zeros(0, np.float32)] * 2)


def test_nothing_is_made_before_something_is_put(tmp_path):
    shelf = ArrayCache(tmp_path / "cache").context({"a": 1})
    assert shelf.get_many(["k"]) == [None]
    shelf.put_many([], [])
    assert not (tmp_path / "cache").exists()


def test_contexts_do_not_mix(tmp_path):
    cache = ArrayCache(tmp_path)
    a = cache.context({"model": "a", "dtype": "float32"})
    a.put_many(["k"], [np.ones(1)])
    assert cache.context({"model": "b", "dtype": "float32"}).get_many(["k"]) == [None]
    assert_holds(
        cache.context({"dtype": "float32", "model": "a"}), ["k"], [np.ones(1)]
    )  # the order of keys is no content
    assert json.loads((a.folder / "identity.json").read_text()) == {"model": "a", "dtype": "float32"}
    with pytest.raises(ValueError, match="scale is nan"):
        cache.context({"scale": float("nan")})


def test_a_known_key_can_be_put_again(shelf):
    shelf.put_many(["k"], [np.zeros(2)])
    shelf.put_many(["k"], [np.ones(3)])
    assert_holds(shelf, ["k"], [np.ones(3)])


def test_what_cannot_be_kept_is_refused(shelf):
    for keys, arrays, message in (
        (["a"], [], "1 keys for 0 arrays"),
        (["a"], [np.float32(1)], "at least one axis"),
        (["a"], [np.array(["x"])], "dtype <U1"),
        (["a"], [np.array([None])], "dtype object"),
    ):
        with pytest.raises(ValueError, match=message):
            shelf.put_many(keys, arrays)
    assert not shelf.folder.exists()


def test_keys_tell_prompt_from_completion_and_extras():
    same = key_of((1, 2), (3,)), key_of(np.array([1, 2], np.int32), [3])
    assert same[0] == same[1] and len(same[0]) == 32
    others = [key_of((1,), (2, 3)), key_of((1, 2, 3), ()), key_of((1, 2), (3,), "x"), key_of((1, 2), (3,), "x", 1)]
    assert len({same[0], *others}) == 5


def test_an_interrupted_write_leaves_no_shard(shelf, monkeypatch):
    shelf.put_many(["a"], [np.ones(3)])

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module, "write_json", killed)  # between the array and its index
    with pytest.raises(KeyboardInterrupt):
        shelf.put_many(["b"], [np.ones(4)])
    monkeypatch.undo()
    monkeypatch.setattr(cache_module.np, "save", killed)  # while the array is written
    with pytest.raises(KeyboardInterrupt):
        shelf.put_many(["c"], [np.ones(5)])
    monkeypatch.undo()
    assert not list(shelf.folder.glob(".*"))
    (shelf.folder / ".shard-1234.npy.1-ab.part").write_bytes(b"half")  # what a power cut leaves
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = again(shelf)
        assert other.get_many(["a", "b", "c"])[1:] == [None, None]
        other.put_many(["b"], [np.ones(4)])
    assert_holds(again(shelf), ["a", "b"], [np.ones(3), np.ones(4)])


@pytest.mark.parametrize("damage", ["index", "index type", "index bounds", "array cut", "array gone"])
def test_a_broken_shard_is_named_ignored_and_computed_again(shelf, damage):
    shelf.put_many(["a", "b"], [np.ones(300), np.zeros(2)])
    shelf.put_many(["c"], [np.ones(1)])
    index = next(p for p in shelf.folder.glob("shard-*.json") if '"a"' in p.read_text())
    array = index.with_suffix(".npy")
    if damage == "index":
        index.write_text('{"a": [0')
    elif damage == "index type":
        index.write_text("[1, 2]")
    elif damage == "index bounds":
        index.write_text('{"a": [0, 9999]}')
    elif damage == "array cut":
        array.write_bytes(array.read_bytes()[:400])
    else:
        array.unlink()
    with pytest.warns(RuntimeWarning, match=index.stem):
        other = again(shelf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert other.get_many(["a", "b"]) == [None, None]
    assert_holds(other, ["c"], [np.ones(1)])
    other.put_many(["a", "b"], [np.ones(300), np.zeros(2)])  # equal content has the same name, so this mends it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_holds(again(shelf), ["a", "b", "c"], [np.ones(300), np.zeros(2), np.ones(1)])


def _write(folder, worker: int) -> None:
    shelf = ArrayCache(folder).context({"m": 1})
    for step in range(10):
        shelf.put_many(
            [f"w{worker}s{step}", f"shared{step}"], [np.full(5, worker * 100.0 + step), np.full(3, float(step))]
        )


def _all_written(folder) -> None:
    shelf = ArrayCache(folder).context({"m": 1})
    for worker in range(2):
        assert_holds(shelf, [f"w{worker}s{s}" for s in range(10)], [np.full(5, worker * 100.0 + s) for s in range(10)])
    assert_holds(shelf, [f"shared{s}" for s in range(10)], [np.full(3, float(s)) for s in range(10)])
    assert not list(shelf.folder.glob(".*"))


def test_two_processes_write_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path, w)) for w in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    _all_written(tmp_path)


def test_two_threads_write_at_once(tmp_path):
    workers = [threading.Thread(target=_write, args=(tmp_path, w)) for w in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    _all_written(tmp_path)


def test_a_reader_sees_what_others_put_later(shelf):
    reader = again(shelf)
    assert reader.get_many(["a"]) == [None]
    shelf.put_many(["a"], [np.ones(2)])
    assert_holds(reader, ["a"], [np.ones(2)])


def test_remember_computes_what_is_missing_once_and_in_order(shelf):
    asked: list[list[int]] = []

    def compute(items: list[int]) -> list[np.ndarray]:
        asked.append(list(items))
        return [np.full(i, float(i)) for i in items]

    def get(items: list[int], **options) -> list[list[float]]:
        return [a.tolist() for a in remember(shelf, items, str, compute, **options)]

    assert get([2, 1, 2]) == [[2, 2], [1], [2, 2]]
    assert get([1, 3, 2]) == [[1], [3, 3, 3], [2, 2]]
    assert get([3, 1]) == [[3, 3, 3], [1]]
    assert asked == [[2, 1], [3]]
    get(list(range(4, 9)), chunk=2)
    assert asked[2:] == [[4, 5], [6, 7], [8]]
    with pytest.raises(ValueError, match="gave 0 arrays for 1 items"):
        remember(shelf, [50], str, lambda items: [])


def test_remember_keeps_what_was_computed_before_an_interruption(shelf):
    def compute(items: list[int]) -> list[np.ndarray]:
        if 3 in items:
            raise KeyboardInterrupt
        return [np.full(2, float(i)) for i in items]

    with pytest.raises(KeyboardInterrupt):
        remember(shelf, [1, 2, 3], str, compute, chunk=1)
    assert_holds(again(shelf), ["1", "2"], [np.full(2, 1.0), np.full(2, 2.0)])


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path and ArrayCache().folder.parent == tmp_path
    monkeypatch.setenv("PERTOKEN_CACHE", "")
    assert cache_folder().parts[-2:] == (".cache", "pertoken")
