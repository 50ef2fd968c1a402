"""Tables in which dictionaries and runs stand for far more than the file has: refused, or unfolded in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data.make_formats import records

from cropi.data import coded, tables
from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.table import read_scores, write_scores
from cropi.store.rows import RowInfo
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.rows import rows_of_dump

ROWS = 2000
WORDS = "unfold to more than 400 times its size .*write it without dictionaries"
LONG = "x" * 100_000


def text(where: str) -> pyarrow.Table:
    """200 MB in some hundred kB: one text in every row."""
    values: dict[str, Any] = {
        "alone": LONG, "list": [LONG], "struct": {"a": LONG}, "messages": [{"role": "user", "content": LONG}]
    }  # fmt: skip
    held = pyarrow.array([values[where]]).take(pyarrow.array(np.zeros(8, dtype=np.int64)))
    column = pyarrow.chunked_array([held] * (ROWS // 8))
    return pyarrow.table({"id": [f"p{i}" for i in range(ROWS)], "responses": [["a", "b"]] * ROWS,
                          "rewards": [[0, 1]] * ROWS, "prompt": column})  # fmt: skip


def zeros() -> pyarrow.Table:
    values = pyarrow.array(np.zeros(10_000_000, dtype=np.int64))
    return pyarrow.table({"id": ["a"], "tokens": pyarrow.ListArray.from_arrays([0, len(values)], values)})


def parquet(path: Path, table: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**30)


def stream(path: Path, table: pyarrow.Table) -> None:
    """Arrow's own form, with a dictionary beside the batches."""
    column = table.column("prompt").unify_dictionaries()
    coded_column = pyarrow.DictionaryArray.from_arrays(np.zeros(ROWS, dtype=np.int32), column.chunk(0)[:1])
    table = table.set_column(3, "prompt", coded_column)
    with pyarrow.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table)


READERS: dict[str, Callable[[Path], Any]] = {
    "records": lambda path: list(read(path)), "dataset": read_dataset,
    "dump": lambda path: list(rows_of_dump(path, Left())),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("where", ["alone", "list", "struct", "messages"])
def test_a_text_in_every_row_is_refused(
    where: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.parquet"
    parquet(path, text(where))
    assert path.stat().st_size < ROWS * len(LONG) / 1000
    made: list[int] = []
    monkeypatch.setattr(tables, "rows_of_batch", lambda batch: made.append(batch.nbytes) or iter(()))
    monkeypatch.setattr(tables, "table_groups", lambda batch, *rest: made.append(batch.nbytes) or [])
    with pytest.raises(CropiError, match=f"t.parquet.*{WORDS}"):
        READERS[reader](path)
    assert all(size < 2 * coded.PART for size in made)  # of what was read before
    if reader != "dataset" and where == "alone":
        stream(tmp_path / "t.arrow", text(where))
        with pytest.raises(CropiError, match=f"t.arrow.*{WORDS}"):
            READERS[reader](tmp_path / "t.arrow")


@pytest.mark.parametrize("reader", READERS)
def test_runs_of_zeros_are_refused(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet(path, zeros())
    assert path.stat().st_size < 100_000
    with pytest.raises(CropiError, match=WORDS):
        READERS[reader](path)


def test_a_score_table_with_one_text_in_every_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    infos = [RowInfo(f"p{i}", task=LONG, pass_rate=0.5, tokens=9, norm=1.0) for i in range(ROWS)]
    write_scores(path, Scores(infos, ["a"], np.zeros((ROWS, 1)), {}))
    assert path.stat().st_size < ROWS * len(LONG) / 1000
    with pytest.raises(CropiError, match=WORDS):
        read_scores(path)


@pytest.mark.parametrize("where", ["alone", "list", "struct", "messages"])
def test_coded_columns_within_the_limit_are_what_they_were(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could be too large, and is not, is unfolded in parts; a large table stays on the disk."""
    monkeypatch.setattr(coded, "LARGEST_RATIO", 1)
    monkeypatch.setattr(coded, "RATIO_FROM", 2**24)
    monkeypatch.setattr(coded, "PART", 2**16)
    table = pyarrow.Table.from_pylist([records()[i % 6] | {"id": f"p{i}"} for i in range(300)])
    table = table.append_column("more", text(where).column("prompt")[:300].combine_chunks().slice(0, 300).take(
        pyarrow.array([0 if i % 30 == 0 else None for i in range(300)], pyarrow.int64())))  # fmt: skip
    path = tmp_path / "t.parquet"
    parquet(path, table)
    assert coded.opened(path)[0].schema_arrow != table.schema
    assert read_dataset(path).equals(table)
    assert [group.to_record() for group in read(path)] == [
        {key: value for key, value in row.items() if value is not None} for row in table.to_pylist()
    ]
    monkeypatch.setattr(coded, "LARGE", 0)
    monkeypatch.setattr(coded, "RATIO_FROM", 2**40)
    assert read_dataset(path).equals(table)
