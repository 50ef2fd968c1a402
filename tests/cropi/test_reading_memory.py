"""What the readers take beside the size of a file: four times it at most, and what reads row by row a fixed room."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from data.make_formats import records
from support import fuzz

from benchmarks.lib.made_files import lines as lines_file
from benchmarks.reading_memory import KINDS, MIB, converted, measure
from cropi import bulk
from cropi.bulk import check_bulk
from cropi.data import lines
from cropi.data.readers import read
from cropi.errors import CropiError, RecordError

# What is read row by row takes the room of some rows, whatever the file's size; a table's rows come in batches. Of
# pickles the bytes are held, and numbers of what refers to what in them.
ROWS, BATCHES, WHOLE, PICKLED = (0, 14), (1, 96), (4, 16), (2, 10)
MOST = {
    "records, JSON array": ROWS, "a row a response, JSON lines": ROWS, "records of text, parquet": BATCHES,
    "NeMo-RL": ROWS, "TRL": ROWS, "slime": PICKLED, "vLLM, pickle": PICKLED, "verl, DataProto": WHOLE,
    "a selection": WHOLE, "a trainer's dataset, JSON lines": ROWS, "a trainer's dataset, JSON array": ROWS,
}  # fmt: skip

# As lines: in a file of parquet as small as this a batch would hide what the rest takes.
TRL = replace(
    KINDS["TRL"], name="c.jsonl", write=lines_file, read=partial(converted, options=("--source", "trl"))
)
ALL = KINDS | {"TRL": TRL}


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is read from /proc")
@pytest.mark.parametrize("name", MOST)
def test_readers_take_no_more_than_they_should(name: str) -> None:
    times, room = MOST[name]
    with warnings.catch_warnings(), fuzz.folder() as folder:
        warnings.simplefilter("ignore")
        size, most = measure(ALL[name], folder, 6 * MIB)
    assert most <= times * size + room * MIB, f"{most / MIB:.1f} MiB for {size / MIB:.1f} MiB"


def test_values_that_take_far_more_than_their_text_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bytes of JSON are a list of 64: a record of 256 MiB would take 6 GB."""
    check_bulk(b"[]," * (bulk.SMALL // 3), "x")  # nothing so small takes more than a gigabyte
    monkeypatch.setattr(bulk, "SMALL", 2**16)
    monkeypatch.setattr(lines, "SMALL", 2**16)
    monkeypatch.setattr(bulk, "LARGEST", 2**21)
    many = b'{"id": "a", "prompt": "p", "responses": ["x", "y"], "rewards": [0, 1], "more": [%s]}' % (
        b"[]," * 2**16 + b"[]"
    )
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"id": "b", "prompt": "p", "responses": ["x", "y"], "rewards": [0, 1]}\n' + many)
    with pytest.raises(RecordError, match="t.jsonl:2: its values may take .* GiB of memory, more than"):
        list(read(path))
    assert [group.id for group in read(path, skip_bad=True)] == ["b"]
    path.write_bytes(b"[" + many + b"]")
    with pytest.raises(CropiError, match=r"t.jsonl\[0\]: its values may take"):
        list(read(path))
    long = records()[0] | {"answer": "x" * 2**22}  # larger, and one value
    path.write_text(json.dumps(long) + "\n")
    assert [group.id for group in read(path)] == [long["id"]]
