"""What a parquet file stands for is told by its pages: bounds that hold, footers that lie, headers that are damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from cropi.data import coded
from cropi.data.export import read_dataset
from cropi.data.parquet_delta import total
from cropi.data.parquet_pages import parts_of
from cropi.data.readers import read
from cropi.errors import CropiError

WORDS = "unfold to more than 400 times its size"


def made() -> pyarrow.Table:
    """Texts that come again and texts that do not, in lists and structures, with nulls; numbers."""
    drawn = random.Random(0)
    texts = ["", "a", "b" * 50, "é" * 200, None, *(str(i) * drawn.randrange(30) for i in range(40))]
    rows = [
        {"a": drawn.choice(texts), "b": [drawn.choice(texts) for _ in range(drawn.randrange(4))],
         "c": {"d": drawn.choice(texts)} if i % 7 else None, "e": f"{i} {'z' * drawn.randrange(60)}", "n": [i] * 2
        }
        for i in range(300)
    ]  # fmt: skip
    return pyarrow.Table.from_pylist(rows)


TEXTS = ("a", "b.list.element", "c.d", "e")
DELTAS: dict[str, Any] = {
    "use_dictionary": False, "column_encoding": dict.fromkeys(TEXTS, "DELTA_BYTE_ARRAY"), "write_statistics": False
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"compression": name} for name in ("none", "snappy", "gzip", "zstd", "lz4", "brotli")},
    "pages": {"data_page_size": 100, "dictionary_pagesize_limit": 300, "write_batch_size": 8},
    "version 2": {"data_page_version": "2.0", "data_page_size": 500},
    "groups": {"row_group_size": 90}, "plain": {"use_dictionary": False}, "sums": {"write_page_checksum": True},
    **{f"deltas {name}": DELTAS | options for name, options in {
        "1": {}, "2": {"data_page_version": "2.0", "compression": "zstd"}, "unpacked": {"compression": "none"},
        "pages": {"data_page_size": 500, "data_page_version": "2.0"}}.items()},
}  # fmt: skip


LEVELS = {"a": 1, "b.list.element": 2, "c.d": 1, "e": 1, "n.list.element": 2}
DELTA_NAMES = [name for name in OPTIONS if name.startswith("deltas")]


def texts_of(column: Any) -> list[str]:
    """The texts in a column of any form."""
    if isinstance(column, str):
        return [column]
    inner = column.values() if isinstance(column, dict) else column if isinstance(column, list) else ()
    return [text for value in inner for text in texts_of(value)]


@pytest.mark.parametrize("name", OPTIONS)
def test_bounds_hold_and_longest_texts_are_found(name: str, tmp_path: Path) -> None:
    path, table = tmp_path / "t.parquet", made()
    pyarrow.parquet.write_table(table, path, **OPTIONS[name])
    groups, meta = parts_of(path), pyarrow.parquet.ParquetFile(path).metadata
    assert len(groups) == meta.num_row_groups
    begin = 0
    for g, group in enumerate(groups):
        rows = table.slice(begin, meta.row_group(g).num_rows)
        begin += rows.num_rows
        for c, part in enumerate(group):
            column = meta.row_group(g).column(c)
            assert part.values == column.num_values
            # The headers themselves are counted there, too.
            assert part.size <= column.total_uncompressed_size
            held = texts_of(rows.column(column.path_in_schema.partition(".")[0]).to_pylist())
            real, levels = sum(len(text.encode()) for text in held), LEVELS[column.path_in_schema]
            with open(path, "rb") as file:
                exact, quick = part.most(file, levels), part.most()
                assert real <= exact <= quick
                if part.deltas:  # each text once, and the pages
                    assert exact <= real + 4 * part.values + part.size < quick
                if part.dictionary and part.coded == part.values and held:
                    longest = max(len(text.encode()) for text in held)
                    assert part.dictionary.longest(file) == longest <= part.dictionary.longest()
    assert any(part.coded for group in groups for part in group) == (
        name != "plain" and name not in DELTA_NAMES
    )
    assert all(bool(group[c].deltas) == (name in DELTA_NAMES) for group in groups for c in range(4))


def test_ordinary_columns_are_read_plainly(tmp_path: Path) -> None:
    """Prompts of 400 letters, each for 20 responses: were each as long as the dictionary, they would take 8 GB."""
    path = tmp_path / "t.parquet"
    words = random.Random(0)
    prompts = ["".join(words.choices("abcdefgh ", k=400)) for _ in range(1000)]
    table = pyarrow.table({"prompt": prompts * 20, "response": [f"{i}" * 9 for i in range(20_000)]})
    pyarrow.parquet.write_table(table, path)
    part = parts_of(path)[0][0]
    with open(path, "rb") as bytes_:
        assert part.most() > coded._limit(path) > part.most(bytes_)
    file, schema, *_ = coded.opened(path)
    assert file.schema_arrow == schema == table.schema


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_that_begin_as_others_are_refused_where_they_take_too_much(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    options = DELTAS | {"column_encoding": {"prompt": "DELTA_BYTE_ARRAY"}, "data_page_version": version}
    text = pyarrow.array(["x" * 100_000]).take(pyarrow.array(np.zeros(8, dtype=np.int64)))
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": pyarrow.chunked_array([text] * 250)}), path, **options
    )
    for reader in (read_dataset, lambda path: list(read(path))):
        with pytest.raises(CropiError, match=WORDS):
            reader(path)
    words = random.Random(0)
    rows = sorted("".join(words.choices("ab", k=words.randrange(300))) for _ in range(5000))
    table = pyarrow.table({"prompt": rows})
    pyarrow.parquet.write_table(table, path, **options)
    monkeypatch.setattr(coded, "RATIO_FROM", 2**21)
    monkeypatch.setattr(coded, "LARGEST_RATIO", 1)
    assert parts_of(path)[0][0].most() > coded._limit(path)
    assert read_dataset(path).equals(table)


@pytest.mark.parametrize(
    "damage",
    ["", "80 01 04 c8 01", "80 01 00 c8 01 00", "80 01 04 c8 01 00 00 ff ff ff ff", "80 01 04 04 01",
     "ff ff ff ff 0f 01 04 00 00 00"],
)  # fmt: skip
def test_lengths_that_are_damaged(damage: str) -> None:
    with pytest.raises((ValueError, LookupError)):
        total(bytes.fromhex(damage))


def test_lengths_are_added_up() -> None:
    """The examples of the format's own description, and one of three values."""
    # Blocks of 128 in four parts, five values from 1, each 1 larger; then steps of -2, -2, -2, 1, 1, 1, 1 from 7.
    assert total(bytes.fromhex("80 01 04 05 02 02 00 00 00 00")) == 1 + 2 + 3 + 4 + 5
    steps = bytes.fromhex("80 01 04 08 0e 03 02 00 00 00") + bytes([0b11000000, 0b00111111, *[0] * 6])
    assert total(steps) == 7 + 5 + 3 + 1 + 2 + 3 + 4 + 5


# ------------------------------------------------------------------------------------------------ footers that lie
def number(value: int, size: int = 0) -> bytes:
    """A number as Thrift writes it, in so many bytes at least."""
    value, out = 2 * value, []
    while value > 127 or len(out) + 1 < size:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def lying(path: Path, old: int, new: int) -> None:
    """Another number in the footer."""
    data = path.read_bytes()
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    was = number(old)
    assert was in data[begin:]
    path.write_bytes(data[:begin] + data[begin:].replace(was, number(new, len(was))))


def repeated(path: Path) -> Any:
    """A text of 100 kB in 2000 rows; returns the footer's words on it."""
    text = pyarrow.array(["x" * 100_000]).take(pyarrow.array(np.zeros(8, dtype=np.int64)))
    table = pyarrow.table({"prompt": pyarrow.chunked_array([text] * 250)})
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30)
    return pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)


def runs(path: Path) -> Any:
    """A list of ten million zeros in one page: of several it reads those that the footer counts."""
    zeros = pyarrow.array(np.zeros(10_000_000, dtype=np.int64))
    table = pyarrow.table({"n": pyarrow.ListArray.from_arrays([0, len(zeros)], zeros)})
    pyarrow.parquet.write_table(
        table, path, compression="zstd", data_page_size=2**30, write_batch_size=len(zeros)
    )
    return pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)


LIES: dict[str, tuple[Callable[[Path], Any], Callable[[Any], tuple[int, int]], str]] = {
    "bytes": (repeated, lambda column: (column.total_uncompressed_size, 1), WORDS),
    "place": (repeated, lambda column: (column.data_page_offset, column.dictionary_page_offset), WORDS),
    "values": (runs, lambda column: (column.num_values, 1), WORDS),
    "no page": (repeated, lambda column: (column.dictionary_page_offset, 1), "its page cannot be read"),
    "behind": (repeated, lambda column: (column.dictionary_page_offset, 2**40), "damaged or was cut"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("reader", [read_dataset, lambda path: list(read(path))], ids=["dataset", "records"])
def test_a_footer_that_lies_hides_nothing(reader: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    make, change, words = LIES[name]
    path = tmp_path / "t.parquet"
    lying(path, *change(make(path)))
    with pytest.raises(CropiError, match=f"t.parquet.*{words}"):
        reader(path)


@pytest.mark.long
def test_a_page_of_one_letter_is_refused(tmp_path: Path) -> None:
    """Without a dictionary: what packs the page makes it small."""
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["x" * 10**8]}), path, compression="zstd", use_dictionary=False, write_statistics=False
    )  # fmt: skip
    assert path.stat().st_size < 20_000
    with pytest.raises(CropiError, match=WORDS):
        read_dataset(path)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, DELTAS], ids=["dictionaries", "deltas"])
def test_changed_bytes_are_parts_or_words(options: dict[str, Any], tmp_path: Path) -> None:
    path, drawn, ends = tmp_path / "t.parquet", random.Random(0), list[str]()
    pyarrow.parquet.write_table(made()[:50], path, data_page_size=200, write_batch_size=8, **options)
    right = path.read_bytes()
    for _ in range(400):
        data = bytearray(right)
        for _ in range(drawn.choice((1, 1, 4))):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        path.write_bytes(data)
        try:
            for part in (part for group in parts_of(path) for part in group):
                with open(path, "rb") as file:
                    assert 0 <= part.most(file, 1) <= part.most()
            ends.append("parts")
        except CropiError as error:
            assert "t.parquet: the parquet file is damaged or was cut: its " in str(error)
            ends.append(str(error)[-20:])
    assert len(set(ends)) == 3
