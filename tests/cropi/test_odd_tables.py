"""Odd tables that are legal, through every reader of rows: the rows in them, or an error that names the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.versions import needs
from test_long_values import NO_MODEL
from test_odd_files import TEXT, ended, plain

from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.rollouts.prompts import read_prompts
from cropi.trainers.dumps.recognise import recognise

pytestmark = pytest.mark.long
CRASHES = needs("pyarrow", "26", "it ends the process while it writes one of these tables")

ROWS = [
    {"id": f"p{i}", "prompt": f"{TEXT}{i}", "responses": ["a", TEXT], "rewards": [float(i), -0.0], "answer": str(i),
     "response_ids": [[1, 2 + i], [3]], "logprobs": [[-0.5, -0.25], [-1.0]], "task": "t",
     "prompt_ids": [5, 6, i]}
    for i in range(7)
]  # fmt: skip


def with_column(table: Any, name: str, values: Any) -> Any:
    return table.set_column(table.column_names.index(name), name, values)


def casted(table: Any, **kinds: Any) -> Any:
    for name, kind in kinds.items():
        table = with_column(table, name, table.column(name).cast(kind))
    return table


TEXTS = ("id", "prompt", "answer", "task")
A = pyarrow
# The same rows in other types.
TYPES: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda table: table,
    "large strings": lambda table: casted(table, **dict.fromkeys(TEXTS, A.large_string())),
    "views of strings": lambda table: casted(table, **dict.fromkeys(TEXTS, A.string_view())),
    "dictionaries": lambda table: casted(table, **dict.fromkeys(TEXTS, A.dictionary(A.int32(), A.string()))),
    "runs": lambda table: with_column(table, "task", A.chunked_array([A.RunEndEncodedArray.from_arrays([7], ["t"])])),
    "large lists": lambda table: casted(
        table, responses=A.large_list(A.large_string()), rewards=A.large_list(A.float64()),
        response_ids=A.large_list(A.large_list(A.int64())),
    ),
    "lists of one size": lambda table: casted(table, rewards=A.list_(A.float64(), 2), responses=A.list_(A.string(), 2)),
    "views of lists": lambda table: with_column(
        table, "rewards", A.chunked_array([A.ListViewArray.from_arrays(
            A.array(range(12, -1, -2), A.int32()), A.array([2] * 7, A.int32()),
            A.array([one for row in ROWS[::-1] for one in row["rewards"]]))])
    ),
    "small integers": lambda table: casted(table, response_ids=A.list_(A.list_(A.int8()))),
    "unsigned integers": lambda table: casted(table, response_ids=A.list_(A.list_(A.uint16()))),
    "float32": lambda table: casted(table, rewards=A.list_(A.float32()), logprobs=A.list_(A.list_(A.float32()))),
    "float16": lambda table: casted(table, rewards=A.list_(A.float16())),
    "decimals": lambda table: casted(table, rewards=A.list_(A.decimal128(12, 3))),
    "integers as rewards": lambda table: casted(table, rewards=A.list_(A.int32())),
    "dictionaries in lists": lambda table: with_column(
        table, "responses", A.chunked_array([A.ListArray.from_arrays(
            A.array(range(0, 15, 2), A.int32()), A.array(["a", TEXT] * 7).dictionary_encode())])
    ),
    "a column of nothing": lambda table: table.append_column("temperature", A.nulls(7)),
    "parts of a larger table": lambda table: A.concat_tables([table.slice(3), table]).slice(4),
    "many chunks": lambda table: A.concat_tables([table.slice(i, 1) for i in range(7)]),
    "empty chunks": lambda table: A.concat_tables([table[:0], table[:3], table[3:3], table[3:], table[:0]]),
}  # fmt: skip


def parquet(**options: Any) -> Callable[[Any, Path], None]:
    return lambda table, path: pyarrow.parquet.write_table(table, path, **options)


def groups_of_rows(table: Any, path: Path) -> None:
    with pyarrow.parquet.ParquetWriter(path, table.schema) as file:
        for part in (table[:0], table[:2], table[2:2], table[2:]):
            file.write_table(part)


def arrow(make: Callable[..., Any], **options: Any) -> Callable[[Any, Path], None]:
    def put(table: Any, path: Path) -> None:
        with make(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as file:
            for batch in table.to_batches(max_chunksize=2):
                file.write_batch(batch)
                file.write_batch(batch[:0])

    return put


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "parquet": parquet(), "parquet of small groups": parquet(row_group_size=2),
    "parquet of empty groups": groups_of_rows,
    "parquet 1.0": parquet(version="1.0"), "parquet of small pages": parquet(data_page_size=1, data_page_version="2.0"),
    "parquet without dictionaries": parquet(use_dictionary=False, compression="zstd"),
    "parquet without statistics": parquet(write_statistics=False, compression="none"),
    "arrow file": arrow(pyarrow.ipc.new_file), "arrow stream": arrow(pyarrow.ipc.new_stream),
    "packed arrow": arrow(pyarrow.ipc.new_stream, compression="zstd"),
}  # fmt: skip
TABLES: dict[str, Callable[[Any], Any]] = {
    "data.readers.read": lambda path: plain(list(read(path))),
    "data.export.read_dataset": lambda path: read_dataset(path).to_pylist(),
    "rollouts.prompts.read_prompts": lambda path: [
        (one.id, one.row, list(one.ids)) for one in read_prompts(path, NO_MODEL)[0]
    ],
    "trainers.dumps.recognise.recognise": recognise,
}


# Not read, and said: decimals as rewards, and pages of a few bytes, of which pyarrow's writer loses lists.
SAID = (
    "must be a finite number, got Decimal",
    "rows of the parquet file are not found",
    "expected length 7 but got",
)
DAMAGED = "the parquet file is damaged"


@CRASHES
@pytest.mark.parametrize("name", TABLES)
def test_the_same_rows_in_tables_of_other_types(name: str, tmp_path: Path) -> None:
    reader, path, wrong = TABLES[name], tmp_path / "t.parquet", {}
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, path)
    right = without(reader(path), None)
    for kind, change in TYPES.items():
        other = change(table)
        for way, put in WRITERS.items():
            try:
                put(other, path)
            except (pyarrow.ArrowException, NotImplementedError):
                continue  # not what such a file can hold
            told, found = ended(lambda: reader(path), path)
            by_name = name == "data.export.read_dataset" and "arrow" in way
            found = without(found, None)
            if found != right and not any(one in told for one in SAID) and not (by_name and DAMAGED in told):
                wrong[kind, way] = told or found
    assert not wrong


# Columns of types that JSON has no form of, or another one.
COLUMNS: dict[str, Any] = {
    "time": A.array([1], A.timestamp("ns", "UTC")), "date": A.array([1], A.date32()),
    "duration": A.array([1], A.duration("s")), "time of day": A.array([1], A.time32("s")),
    "bytes": A.array([b"\xff"]), "bytes of one size": A.array([b"ab"], A.binary(2)),
    "map": A.array([[("a", 1)]], A.map_(A.string(), A.int8())), "empty struct": A.array([{}], A.struct([])),
    "struct": A.array([{"a": None, "b": [{"c": 1}]}]), "decimal": A.array([Decimal("1.50")]), "nothing": A.nulls(1),
    "uuid": A.ExtensionArray.from_storage(A.uuid(), A.array([bytes(16)], A.binary(16))), "truth": A.array([True]),
    "tensor": A.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, 2, 2))),
    "large number": A.array([2**64 - 1], A.uint64()), "months": A.array([(1, 2, 3)], A.month_day_nano_interval()),
    "NaN": A.array([math.nan]), "half": A.array([1.5], A.float16()),
}  # fmt: skip


@CRASHES
@pytest.mark.parametrize("name", TABLES)
def test_rows_beside_a_column_of_another_type(name: str, tmp_path: Path) -> None:
    reader, path, wrong = TABLES[name], tmp_path / "t.parquet", {}
    table = pyarrow.Table.from_pylist(ROWS[:1])
    pyarrow.parquet.write_table(table, path)
    right = without(reader(path), "level")
    for kind, column in COLUMNS.items():
        for way, put in WRITERS.items():
            try:
                put(table.append_column("level", column), path)
            except (pyarrow.ArrowException, NotImplementedError):
                continue
            told, found = ended(lambda: reader(path), path)
            if not told and without(found, "level") != right:
                wrong[kind, way] = found
    assert not wrong


def without(value: Any, name: str | None) -> Any:
    """The rows without a column; None: without what is empty."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key != name and (name or one is not None)}
        return {key: without(one, name) for key, one in kept.items()}
    return type(value)(without(one, name) for one in value) if isinstance(value, (list, tuple)) else value
