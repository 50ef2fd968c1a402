"""A store's sketches times a few directions, by threads that read a block each: right, the same bits, damage named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.stores import sketches_of

from cropi.errors import CropiError
from cropi.ranking.products import in_order, products
from cropi.store import shards
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore

DIM, ROWS = 128, 150


@pytest.fixture(params=["float32", "float16", "int4"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SketchStore:
    """Three shards of many blocks, ids in no order, every seventh prompt without a sketch."""
    monkeypatch.setattr(shards, "_STORED", 700)
    manifest = {"spec": {"dim": DIM}, "stage": "0", "dtype": request.param}
    ids = random.Random(0).sample([f"p{i:03d}" for i in range(ROWS)], ROWS)
    generator = torch.Generator().manual_seed(0)
    with SketchStore.create(tmp_path / "s", manifest, shard_rows=50) as made:
        for i, name in enumerate(ids):
            sketch = torch.randn(DIM, generator=generator)
            made.add(RowInfo(name), None if i % 7 == 6 else sketch)
    opened = SketchStore.open(tmp_path / "s")
    assert len(opened.files()) == 3 and sum(1 for _ in opened.unread()) > 10
    return opened


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_every_prompt_gets_its_products_with_any_number_of_threads(store: SketchStore, threads: Any) -> None:
    directions = torch.randn(3, DIM, generator=torch.Generator().manual_seed(1))
    sketches = sketches_of(store)
    seen = []
    for count in (1, 2, 5):
        threads(count)
        rows, table, last = in_order(store, directions, lambda dots, lengths: np.c_[dots, lengths], 4, 2)
        seen.append((table.tobytes(), last.tobytes()))
        assert [row.id for row in rows] == sorted(f"p{i:03d}" for i in range(ROWS))
        for row, values, kept in zip(rows, table, last, strict=True):
            if row.row is None:
                assert row.id not in sketches and np.isnan(values).all() and np.isnan(kept).all()
                continue
            x, wide = sketches[row.id].double(), directions.double()
            bound = (128 / 8 + 6) * 2.0**-24
            assert (abs(values[:3] - (wide @ x).numpy()) <= bound * (wide.abs() @ x.abs()).numpy()).all()
            assert abs(values[3] - float(x.norm())) <= bound * float(x.norm())
            assert (kept == values[1:3].astype(np.float32)).all()
    assert seen[0] == seen[1] == seen[2]


def test_products_are_made_of_some_rows_at_a_time(
    store: SketchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All products of a block with 100,000 directions would take gigabytes: values are made of a few rows' of them."""
    directions, most = torch.randn(7, DIM, generator=torch.Generator().manual_seed(1)), 0

    def highest(dots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        nonlocal most
        most = max(most, dots.size)
        return dots.max(axis=1, keepdims=True)

    whole = in_order(store, directions, highest, 1, 2)
    assert most == 7 * max(len(block.rows) for block in store.unread())
    monkeypatch.setattr("cropi.ranking.products._MOST_PRODUCTS", 7)
    most = 0
    parts = in_order(store, directions, highest, 1, 2)
    assert whole[0] == parts[0] and [x.tobytes() for x in whole[1:]] == [x.tobytes() for x in parts[1:]]
    assert most == 7


def test_many_directions_are_taken_in_turns(store: SketchStore) -> None:
    directions = torch.randn(2100, DIM, generator=torch.Generator().manual_seed(1))
    for (_, whole, lengths), (_, first, _), (_, last, _) in zip(
        *(products(store, part) for part in (directions, directions[:1000], directions[1000:])), strict=True
    ):
        assert whole.tobytes() == np.concatenate([first, last], axis=1).tobytes() and len(lengths) == len(
            whole
        )


def test_damage_in_any_block_is_named(store: SketchStore, threads: Any) -> None:
    threads(2)
    shard, directions = store.files()[1], torch.ones(1, DIM)
    whole = shard.path.read_bytes()
    for held in shard.tensors.values():
        for place in (held.begin, (held.begin + held.end) // 2, held.end - 1):
            shard.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CropiError, match=f"{shard.path.name}.*its checksum does not match"):
                list(products(store, directions))
    shard.path.write_bytes(whole[:-1])
    with pytest.raises(CropiError, match=f"{shard.path.name}.*shorter than its header says"):
        list(products(store, directions))
    shard.path.write_bytes(whole)
    assert sum(len(rows) for rows, _, _ in products(store, directions)) == ROWS - ROWS // 7


def test_a_shard_that_goes_while_it_is_read_is_named(store: SketchStore, threads: Any) -> None:
    threads(2)
    reading = products(store, torch.ones(1, DIM))
    next(reading)
    store.files()[-1].path.unlink()
    with pytest.raises(CropiError, match=f"the shard {store.files()[-1].path} is gone"):
        list(reading)
