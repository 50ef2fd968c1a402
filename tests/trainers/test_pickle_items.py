"""Lists in pickles that are made item by item: equal to what the whole pickle holds, whatever stands in them."""

from __future__ import annotations

import io
import pickle
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cropi.errors import CropiError
from cropi.trainers.dumps import pickle_items
from cropi.trainers.dumps.pickled import items_of, load_dump
from cropi.trainers.dumps.unpickle import Reader

TEXTS = ["key", "a\n", "(", "e.", "\x94", *("x" * size for size in (0, 1, 46, 47, 48, 255, 256, 66_000))]
NUMBERS = [None, True, 0, 255, 256, 65_535, 65_536, -1, 2**31, 2**70, -(2**2000), 0.5]
SHARED: list[Any] = ["shared", {"k": [1]}]


def value(rng: random.Random, depth: int = 0) -> Any:
    some = partial(range, rng.randrange(5))
    plain = [
        lambda: rng.choice(NUMBERS), lambda: rng.choice(TEXTS), lambda: rng.choice(TEXTS).encode(),
        lambda: bytearray(b"abc"), lambda: SHARED, lambda: {1, "z"}, lambda: frozenset({2}),
        lambda: [rng.randrange(70_000) for _ in range(rng.choice([0, 1, 99, 100, 101, 1000, 1001, 2500]))],
    ]  # fmt: skip
    nested = [
        lambda: [value(rng, depth + 1) for _ in some()], lambda: tuple(value(rng, depth + 1) for _ in some()),
        lambda: {f"k{i}": value(rng, depth + 1) for i in some()}, own,
    ]  # fmt: skip
    return rng.choice(plain + nested * (depth < 4))()


def own() -> list[Any]:
    held: list[Any] = [1]
    held.append(held)
    return held


def filled(held: Any) -> tuple[Any, bool]:
    """The list with its items in place of what stands for them, and whether anything did."""
    if len(held) == 1 and isinstance(held[0], pickle_items.PickleItems):
        assert repr(list(held[0])) == repr(again := list(held[0]))
        return again, True
    return held, False


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_items_are_what_the_whole_pickle_holds(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_items, "SMALL", 0)
    rng, split = random.Random(protocol), 0
    for trial in range(12):
        sizes = (1001,) if trial == 0 else range(2, 12)
        items = [value(rng) for _ in range(rng.choice(sizes))]
        for held in (items, {"n": 7, "items": items, "m": "z"}, {"few": [1, 2], "t": ("x", [1, 2]), "items": items},
                     ("x", 1, items), {"items": items}):  # fmt: skip
            data = pickle.dumps(held, protocol)
            got, whole = pickle_items.load(data, Reader), Reader(io.BytesIO(data)).load()
            if isinstance(got, dict):
                got["items"], some = filled(got["items"])
            else:
                got, some = filled(got)
            split += some
            assert repr(got) == repr(whole)  # lists may hold themselves
    # Not split: tables of one value, tuples, lists of one item, and tables behind which an item is referred to.
    assert split > 20


def test_an_item_that_is_damaged_or_names_code_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickle_items, "SMALL", 0)
    path = tmp_path / "x.pkl"
    for bad, words in ((print, "it calls builtins.print"), (2.5, "is not a dump")):
        data = pickle.dumps([{"a": [i, "x"]} for i in range(5)] + [bad])
        # In place of the number, an entry of the memo that there is not.
        path.write_bytes(data.replace(pickle.dumps(2.5)[-10:-1], b"j\xff\xff\xff\0" + b"NNNN"))
        held = load_dump(path, "a dump", by_items=True)
        items = items_of(held, path, "a dump")
        assert [next(items)["a"][0] for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(CropiError, match=words):
            next(items)


def test_a_large_pickle_that_is_made_at_once_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_items, "SMALL", 0)
    monkeypatch.setattr(pickle_items, "LARGE", 0)
    held = {"samples": [{"a": 1}, {"a": 2}], "a": 3}  # "a" refers to the list's item
    with pytest.warns(UserWarning, match="may take .* GiB; dump such a list, or write JSON lines"):
        assert pickle_items.load(pickle.dumps(held), Reader) == held


def test_a_trusted_pickle_may_hold_an_array(tmp_path: Path) -> None:
    """It is held to the number by which torch's old files begin; the comparison of an array is an array."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(np.arange(3)))
    assert load_dump(path, "an array", allow_pickle=True).tolist() == [0, 1, 2]
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_dump(tmp_path / "old.pt", "a dictionary", allow_pickle=True) == {"a": 1}
