"""Parquet files: large ones stay on the disk, equal numbers count in memory, damaged ones end in words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data.make_formats import records
from test_odd_tables import ROWS as ODD
from test_odd_tables import TYPES, WRITERS

from cropi.data import parquet, tables
from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.errors import CropiError


@pytest.mark.parametrize("kind", ["as it is", "dictionaries", "dictionaries in lists", "empty chunks"])
def test_a_large_table_stays_on_the_disk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, table = tmp_path / "t.parquet", TYPES[kind](pyarrow.Table.from_pylist(ODD))
    WRITERS["parquet of small groups"](table, path)
    small = read_dataset(path)
    monkeypatch.setattr(parquet, "LARGE", 0)
    monkeypatch.setattr(parquet, "PART", 64)
    held = pyarrow.total_allocated_bytes()
    large = read_dataset(path)
    assert pyarrow.total_allocated_bytes() - held < 1000  # its bytes are mapped, and all batches gone
    assert large.num_rows == 7 and large.schema == small.schema
    assert large.to_pylist() == small.to_pylist() == table.to_pylist()


def test_lists_of_equal_numbers_are_read_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of ones: 4,096 rows in one batch would be 67 million Python objects."""
    path, rows = tmp_path / "t.parquet", 64
    ones = pyarrow.array(np.ones(rows * 16_384, dtype=np.int64))
    lists = pyarrow.ListArray.from_arrays(
        pyarrow.array(range(0, len(ones) + 1, 16_384), pyarrow.int32()), ones
    )
    pyarrow.parquet.write_table(pyarrow.table({"mask": lists}), path)
    assert path.stat().st_size < 100_000
    sizes: list[int] = []
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**20)
    monkeypatch.setattr(
        tables, "rows_of_batch", lambda batch: sizes.append(batch.num_rows) or [{}] * batch.num_rows
    )
    assert sum(1 for _ in tables.rows_of_table_file(path, "parquet")) == rows
    assert sizes == [7] * 9 + [1]


def test_long_rows_behind_short_ones_are_read_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a batch was told by the first rows: 4,096 masks of 16,384 ones stood in memory at once."""
    path, lengths = tmp_path / "t.parquet", np.array([2] * 64 + [16_384] * 64)
    ends = pyarrow.array(np.cumsum([0, *lengths]), pyarrow.int32())
    ones = pyarrow.array(np.ones(lengths.sum(), dtype=np.int64))
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(128), "mask": pyarrow.ListArray.from_arrays(ends, ones)}), path
    )
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**20)
    monkeypatch.setattr(tables, "AT_ONCE", 8)
    given, parts = list[Any](), tables._parts
    monkeypatch.setattr(tables, "_parts", lambda batch, first: given.append(batch) or parts(batch, first))
    read_rows = [row for _, _, row in tables.rows_of_table_file(path, "parquet")]
    assert [(row["id"], len(row["mask"])) for row in read_rows] == list(enumerate(lengths.tolist()))
    # The short ones are put together.
    assert [batch.num_rows for batch in given] == [64] + [8] * 8
    assert max(batch.nbytes for batch in given) < 1.1 * 8 * 8 * 16_384


def put(table: Any, path: Path, form: str) -> None:
    if form == "parquet":
        return pyarrow.parquet.write_table(table, path)
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    return None


@pytest.mark.parametrize("form", ["parquet", "arrow file"])
def test_dictionaries_count_as_the_texts_that_stand_in_rows(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long text in all rows took its length times 4,096 at once, and many texts made batches of single rows."""
    path, sizes, places = tmp_path / "t", list[int](), pyarrow.array(range(1000), pyarrow.int32())
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**16)
    monkeypatch.setattr(
        tables, "rows_of_batch", lambda batch: sizes.append(batch.num_rows) or [{}] * batch.num_rows
    )
    one = pyarrow.array(np.zeros(1000, np.int32))
    for texts, of, want in ((["x" * 8188], one, 8), ([f"{i:0>252}" for i in range(1000)], places, 250)):
        held = pyarrow.DictionaryArray.from_arrays(of, texts)
        lists = pyarrow.ListArray.from_arrays(pyarrow.array(range(1001), pyarrow.int32()), held)
        for column in (held, lists):
            put(pyarrow.table({"prompt": column}), path, form)
            sizes.clear()
            assert sum(1 for _ in tables.rows_of_table_file(path, form)) == 1000
            assert 0.7 * want <= max(sizes) <= 1.1 * want


@pytest.mark.parametrize("form", ["parquet", "arrow file"])
def test_some_rows_of_views_of_texts(form: str, tmp_path: Path) -> None:
    """As Polars writes into Arrow files. Rows are taken by number where a choice is written."""
    path, view = tmp_path / f"t.{form.split()[0]}", pyarrow.string_view()
    kind = pyarrow.schema({
        "id": view, "prompt": view, "responses": pyarrow.large_list(view), "rewards": pyarrow.list_(pyarrow.float64())
    })  # fmt: skip
    rows = [
        {"id": f"p{i}", "prompt": "of more than 12 bytes", "responses": ["a", "b"], "rewards": [0.0, 1.0]}
        for i in range(9)
    ]
    table = pyarrow.Table.from_pylist(rows, kind)
    if form != "parquet":  # whose categories are no views
        names = pyarrow.DictionaryArray.from_arrays([0, 1, None] * 3, pyarrow.array(["t0", "t1"], view))
        pairs = pyarrow.StructArray.from_arrays([names], names=["in"])
        table = table.append_column("task", names).append_column("more", pairs)
    put(table, path, form)
    tasks = [None, None] if form == "parquet" else ["t0", "t1"]
    assert [(group.id, group.prompt, group.task) for group in read(path).take(["p3", "p7"])] == [
        ("p3", rows[3]["prompt"], tasks[0]), ("p7", rows[7]["prompt"], tasks[1]),
    ]  # fmt: skip


def test_views_of_one_text_are_made_plain_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polars writes a text that all rows have once: 20,000 rows of a file of 0.5 MB took 954 MiB at once."""
    text, count = b"x" * 1000, 2000
    views = np.zeros((count, 4), np.int32)
    # The length, the first four letters, and the place: all in the first buffer, where it begins.
    views[:, 0], views[:, 1] = len(text), int.from_bytes(text[:4], "little")
    shared = pyarrow.Array.from_buffers(
        pyarrow.string_view(), count, [None, pyarrow.py_buffer(views.tobytes()), pyarrow.py_buffer(text)]
    )
    put(
        pyarrow.table({"id": [*map(str, range(count))], "prompt": shared}), tmp_path / "t.arrow", "arrow file"
    )
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**16)
    pool = pyarrow.proxy_memory_pool(usual := pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        sizes = [batch.num_rows for _, batch in tables._arrow(tmp_path / "t.arrow", tables.ARROW_FILE)]
    finally:
        pyarrow.set_memory_pool(usual)
    assert pool.max_memory() < 2**18
    assert sum(sizes) == count and max(sizes) == 64
    for some in (shared, shared.slice(7, 5), shared[:0], pyarrow.array([None, "é", "b" * 20], shared.type)):
        texts = [(text or "").encode() for text in some.to_pylist()]
        assert parquet._plain_bytes(some) == sum(map(len, texts)) + 8 * len(texts)


def test_changed_bytes_end_in_words(tmp_path: Path) -> None:
    path, drawn, ends = tmp_path / "t.parquet", random.Random(0), list[str]()
    table = pyarrow.Table.from_pylist([records()[i % 6] | {"id": f"p{i}"} for i in range(50)])
    pyarrow.parquet.write_table(table, path, data_page_size=200, write_batch_size=8)
    right = path.read_bytes()
    for _ in range(200):
        data = bytearray(right)
        for _ in range(drawn.choice((1, 1, 4))):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        path.write_bytes(data)
        for reader in (read_dataset, lambda path: list(read(path))):
            try:
                reader(path)
                ends.append("read")
            except CropiError as error:
                assert "t.parquet" in str(error) and len(str(error)) < 2000
                ends.append("words")
    assert set(ends) == {"read", "words"}
