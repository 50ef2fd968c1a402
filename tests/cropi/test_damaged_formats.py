"""Files of every format that were cut, changed or written oddly: called damaged, or read; never half read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data.make_formats import HERE, records

from cropi.data.export import read_dataset
from cropi.data.readers import read
from cropi.errors import CropiError


@pytest.mark.parametrize("name", [
    "records.parquet", "records.arrow", "stream.arrow", "records.jsonl.gz", "records.jsonl.zst", "records.jsonl.bz2",
    "records.jsonl.xz", "array.json",
])  # fmt: skip
def test_a_file_that_was_cut_is_called_damaged(tmp_path: Path, name: str) -> None:
    data = (HERE / name).read_bytes()
    for size in (len(data) // 2, len(data) - 9):
        (tmp_path / name).write_bytes(data[:size])
        with pytest.raises(CropiError, match="damaged|cut|is not JSON|comma or"):
            list(read(tmp_path / name))


def test_a_stream_of_arrow_ends_as_its_file_does(tmp_path: Path) -> None:
    """pyarrow itself reads a stream that was cut between two batches, and the first of two that follow each other."""
    table, path, ends = pyarrow.Table.from_pylist(records()), tmp_path / "r.arrow", list[int]()
    with open(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        for start in range(0, len(table), 4):
            ends.append(file.tell())
            stream.write_table(table.slice(start, 4))
        ends.append(file.tell())
    whole = path.read_bytes()
    assert [group.to_record() for group in read(path)] == records()
    for data, words in (
        (whole[: ends[1]], "after row 4 .its end is missing"),
        (whole[: ends[-1]], f"after row {len(table)} .its end is missing"),
        (whole[: ends[1]] + bytes(8), "after row 4 .* bytes stand behind its end"),
        (whole + whole, f"after row {len(table)} .{len(whole)} bytes stand behind its end"),
    ):
        path.write_bytes(data)
        with pytest.raises(CropiError, match=words):
            list(read(path))


def test_a_saved_data_set_that_was_cut_is_damaged(tmp_path: Path) -> None:
    """datasets itself loads the rows that are left."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (the extra 'trl')")
    datasets.Dataset.from_list(records()).save_to_disk(str(tmp_path / "d"))
    (file,) = (tmp_path / "d").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-8])
    for reader in (read, read_dataset):
        with pytest.raises(
            CropiError,
            match=f"arrow stream file .* after row {len(records())} .its end is missing, as where",
        ):
            list(reader(tmp_path / "d"))


def test_pages_of_parquet_are_compared_with_their_checksums(tmp_path: Path) -> None:
    """Where their writer gave them some, as Spark does."""
    path, table = tmp_path / "r.parquet", pyarrow.Table.from_pylist(records())
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression="none")
    assert [group.to_record() for group in read(path)] == records()
    first, whole = records()[0]["id"].encode(), path.read_bytes()
    path.write_bytes(whole.replace(first, b"?" * len(first), 1))
    for reader in (read, read_dataset):
        with pytest.raises(CropiError, match="damaged or was cut.*CRC checksum"):
            list(reader(path))


def test_offsets_of_arrow_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    """pyarrow reads where they point to: rows of other bytes, or the end of the process."""
    text = pyarrow.array(["one", "other"])
    offsets = pyarrow.array([0, 5, 3], pyarrow.int32()).buffers()[1]
    wrong = pyarrow.StringArray.from_buffers(2, offsets, text.buffers()[2])
    table = pyarrow.table(
        {"id": ["a", "b"], "prompt": wrong, "responses": [["x", "y"]] * 2, "rewards": [[0.0, 1.0]] * 2}
    )
    for make, form in ((pyarrow.ipc.new_stream, "stream"), (pyarrow.ipc.new_file, "file")):
        with make(str(tmp_path / "r.arrow"), table.schema) as file:
            file.write_table(table)
        with pytest.raises(CropiError, match=f"the arrow {form} .*is damaged or was cut after row 0"):
            list(read(tmp_path / "r.arrow"))


def test_values_of_arrow_that_are_odd_are_no_damage(tmp_path: Path) -> None:
    """Arrow for JavaScript writes moments as days with a time."""
    table, numbers = pyarrow.Table.from_pylist(records()), pyarrow.array([10**12 + 1] * len(records()))
    for kind in (pyarrow.date64(), pyarrow.time64("us")):
        odd = pyarrow.Array.from_buffers(kind, len(table), numbers.buffers())
        held = table.append_column("x", odd).append_column("y", pyarrow.StructArray.from_arrays([odd], ["x"]))
        with pyarrow.ipc.new_stream(str(tmp_path / "r.arrow"), held.schema) as file:
            file.write_table(held)
        assert len(list(read(tmp_path / "r.arrow"))) == len(records())


def test_a_window_of_zstd_that_is_too_large_is_no_damage(tmp_path: Path) -> None:
    """A frame without the content's size, with a window of 2 GiB, and one raw block, as `zstd --long=31` writes from a
    pipe."""
    line = json.dumps(records()[0]).encode()
    block = (len(line) << 3 | 1).to_bytes(3, "little") + line
    (tmp_path / "r.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\x88" + block)  # of 128 MiB
    assert [group.to_record() for group in read(tmp_path / "r.jsonl.zst")] == records()[:1]
    (tmp_path / "r.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + block)
    with pytest.raises(CropiError, match="with a window above 128 MiB, .* without --long"):
        list(read(tmp_path / "r.jsonl.zst"))
