"""Exports of awkward rows: the columns of all rows, the right row for every id, words where a format lacks a value."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.commands import json_lines
from support.made_data import make_records, write_lines

from cropi.data import rows_out
from cropi.data.export import check_export, export
from cropi.data.readers import read
from cropi.errors import CropiError


def table_at(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(rows_out.columns_of(rows)), path)
    return path


def read_back(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return list(pyarrow.parquet.read_table(path).to_pylist())
    return json_lines(path)


# ----------------------------------------------------------------------------------------------------- columns
def test_columns_that_only_later_records_have_are_kept(tmp_path: Path) -> None:
    records = [
        record | ({"hint": f"h{i}", "extra": {"a": i}} if i else {})
        for i, record in enumerate(make_records(4))
    ]
    records[3]["extra"] = {"b": "x"}
    path = write_lines(tmp_path / "t.jsonl", records)
    ids = [record["id"] for record in records]
    export(tmp_path / "out.parquet", ids, format="parquet", trajectories=[path])
    got = read_back(tmp_path / "out.parquet")
    assert [row["hint"] for row in got] == [None, "h1", "h2", "h3"]
    assert [row["extra"] for row in got] == [
        None,
        {"a": 1, "b": None},
        {"a": 2, "b": None},
        {"a": None, "b": "x"},
    ]
    named = write_lines(tmp_path / "d.jsonl", [{"id": i, **({"later": i} if i else {})} for i in range(3)])
    export(tmp_path / "d.parquet", ["0", "2"], format="parquet", dataset=named)
    assert read_back(tmp_path / "d.parquet") == [{"id": 0, "later": None}, {"id": 2, "later": 2}]


def test_the_reward_function_sees_columns_that_only_later_records_have() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"id": "a", "prompt": "p"}, {"id": "b", "prompt": "q", "hint": "h"}]
    dataset = datasets.Dataset.from_dict(rows_out.columns_of(rows))
    assert dataset.column_names == ["id", "prompt", "hint"] and dataset["hint"][:] == [None, "h"]


# ----------------------------------------------------------------------------------------------------- identity
def two_ids() -> list[dict[str, Any]]:
    """A dataset whose ``id`` counts in the other direction than ``extra_info.index``, by which rollouts are known."""
    return [
        {"id": 5 - i, "extra_info": {"index": i}, "prompt": [{"role": "user", "content": f"q{i}"}]}
        for i in range(6)
    ]


def rollouts(tmp_path: Path, key: str) -> Path:
    rows = [
        {"id": row["id"] if key == "id" else row["extra_info"]["index"], "prompt": row["prompt"],
         "responses": ["a", "b"], "rewards": [1, 0]} for row in two_ids()
    ]  # fmt: skip
    return write_lines(tmp_path / f"{key}.jsonl", rows)


@pytest.mark.parametrize("key", ["id", "extra_info.index"])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_are_those_of_the_prompts_whichever_column_holds_the_id(
    tmp_path: Path, key: str, suffix: str
) -> None:
    rows = two_ids()
    data = tmp_path / f"data{suffix}"
    _ = table_at(data, rows) if suffix == ".parquet" else write_lines(data, rows)
    records = rollouts(tmp_path, key)
    export(tmp_path / "out.jsonl", ["1", "4"], dataset=data, trajectories=[records])
    wanted = [5 - 1, 5 - 4] if key == "id" else [1, 4]
    assert [row["extra_info"]["index"] for row in read_back(tmp_path / "out.jsonl")] == wanted
    with pytest.raises(CropiError, match="'id' and 'extra_info.index', which name different rows"):
        export(tmp_path / "no.jsonl", ["1", "4"], dataset=data)
    other = "extra_info.index" if key == "id" else "id"
    with pytest.raises(CropiError, match=f"by its column '{other}', row . is the prompt '1', but it holds"):
        export(tmp_path / "no.jsonl", ["1", "4"], dataset=data, trajectories=[records], id_key=other)
    assert not (tmp_path / "no.jsonl").exists()


def test_a_template_around_a_prompt_is_no_other_prompt(tmp_path: Path) -> None:
    """Dumps of slime and verl hold prompts as they were rendered, and their datasets hold the words alone."""
    data = write_lines(tmp_path / "data.jsonl", [{"id": i, "prompt": f"q{i}"} for i in range(3)])
    rows = [
        {
            "id": i,
            "prompt": f"<user>\nq{i}<end>",
            "responses": ["a", "b"],
            "rewards": [1, 0],
            "rendered": True,
        }
        for i in range(3)
    ]
    records = write_lines(tmp_path / "records.jsonl", rows)
    check_export("jsonl", trajectories=records, dataset=data, records=list(read(records)))
    export(tmp_path / "out.jsonl", ["2"], dataset=data, trajectories=records)
    assert read_back(tmp_path / "out.jsonl") == [{"id": 2, "prompt": "q2"}]
    for change in ({"rendered": None}, {"prompt": "<user>\nq9<end>"}):
        write_lines(records, [row | change for row in rows])
        with pytest.raises(CropiError, match="row 2 is the prompt '2', but it holds"):
            export(tmp_path / "no.jsonl", ["2"], dataset=data, trajectories=records)


def test_columns_that_agree_are_no_question(tmp_path: Path) -> None:
    rows = [{"id": i, "index": i, "question": f"q{i}"} for i in range(4)]
    export(tmp_path / "out.jsonl", ["3", "0"], dataset=write_lines(tmp_path / "d.jsonl", rows))
    assert read_back(tmp_path / "out.jsonl") == [rows[3], rows[0]]
    partly = [{"id": f"p{i}", "index": i} for i in range(4)]
    export(tmp_path / "b.jsonl", ["p3"], dataset=write_lines(tmp_path / "e.jsonl", partly))
    assert read_back(tmp_path / "b.jsonl") == [partly[3]]


# ----------------------------------------------------------------------------------------------------- awkward values
DAY = datetime.date(2026, 1, 31)


@pytest.mark.parametrize("case", ["big integer", "empty object", "empty inside", "mixed"])
def test_values_that_parquet_cannot_hold_are_named_before_the_work(tmp_path: Path, case: str) -> None:
    value: Any = {"big integer": 2**70, "empty object": {}, "empty inside": {"a": [{}]}, "mixed": "text"}[
        case
    ]
    first = {"empty object": {}, "empty inside": {"a": []}}.get(case, 1)
    records = [record | {"level": value if i else first} for i, record in enumerate(make_records(3))]
    path = write_lines(tmp_path / "t.jsonl", records)
    ids = [record["id"] for record in records]
    for call in (
        lambda: check_export("parquet", trajectories=[path]),
        lambda: export(tmp_path / "out.parquet", ids, format="parquet", trajectories=[path]),
    ):
        with pytest.raises(CropiError, match="format parquet: .*'level.*use jsonl") as caught:
            call()
        assert len(str(caught.value)) < 2000
    assert not (tmp_path / "out.parquet").exists()
    export(tmp_path / "out.jsonl", ids, trajectories=[path])
    assert [row["level"] for row in read_back(tmp_path / "out.jsonl")] == [
        record["level"] for record in records
    ]


def test_values_of_tables_that_json_has_other_forms_for(tmp_path: Path) -> None:
    at = datetime.datetime(2026, 1, 31, 12, 30)
    rows = [
        {
            "id": "a",
            "day": DAY,
            "at": at,
            "price": Decimal("1.50"),
            "score": float("nan"),
            "list": [DAY, None],
        }
    ]
    export(tmp_path / "out.jsonl", ["a"], dataset=table_at(tmp_path / "d.parquet", rows))
    assert read_back(tmp_path / "out.jsonl") == [
        {"id": "a", "day": "2026-01-31", "at": "2026-01-31T12:30:00", "price": 1.5, "score": None,
         "list": ["2026-01-31", None]}
    ]  # fmt: skip
    export(tmp_path / "out.parquet", ["a"], format="parquet", dataset=tmp_path / "d.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").schema == pyarrow.parquet.read_schema(
        tmp_path / "d.parquet"
    )


def test_bytes_and_infinities_need_parquet(tmp_path: Path) -> None:
    for value, words in (
        (b"\x00\xff", "bytes in its column 'x"), ({"y": [b"a"]}, r"bytes in its column 'x\.y'"),
        (datetime.timedelta(1), "durations in its column 'x'"),
    ):  # fmt: skip
        path = table_at(tmp_path / "d.parquet", [{"id": "a", "x": value}])
        with pytest.raises(CropiError, match=f"format jsonl: .*{words}"):
            check_export("jsonl", dataset=path)
        with pytest.raises(CropiError, match="format jsonl: .* JSON cannot hold"):
            export(tmp_path / "out.jsonl", ["a"], dataset=path)
        export(tmp_path / "out.parquet", ["a"], format="parquet", dataset=path)
        assert read_back(tmp_path / "out.parquet")[0]["x"] == value
    table_at(tmp_path / "d.parquet", [{"id": "a", "x": float("inf")}])
    with pytest.raises(CropiError, match="an infinity in 'x', which JSON cannot hold; use parquet"):
        export(tmp_path / "out.jsonl", ["a"], dataset=tmp_path / "d.parquet")
    assert not (tmp_path / "out.jsonl").exists()


def test_columns_of_more_than_two_gib_are_taken_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered: what matters is that nothing is put together, and that rows and schema are the same."""
    rows = [{"id": f"p{i}", "text": "x" * i, "ids": [i] * i} for i in range(50)]
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    table = pyarrow.parquet.read_table(path)
    places = [49, 3, 3, 0, 17]
    whole = rows_out.taken(table, places)
    monkeypatch.setattr(rows_out, "LARGEST_COLUMN", 100)
    cut = rows_out.taken(table, places)
    assert cut.to_pylist() == whole.to_pylist() == [rows[i] for i in places] and cut.schema == table.schema
    assert rows_out.taken(table, []).num_rows == 0
    export(tmp_path / "out.parquet", ["p9", "p1"], format="parquet", dataset=path)
    assert read_back(tmp_path / "out.parquet") == [rows[9], rows[1]]


def test_reward_functions_of_trainers_get_the_answer_of_a_solution(tmp_path: Path) -> None:
    """Beside a whole solution of GSM8K every response would be wrong."""
    answers = {
        "6 * 207 =\n#### 1,242": "1242",
        "#### -3.5": "-3.5",
        "1,242": "1,242",
        "a #### b\nc": "a #### b\nc",
    }
    given = [*answers, 7, ["7"], ["7", "8"]]
    wanted = [*answers.values(), "7", "7", '["7", "8"]']
    records = [record | {"answer": answer} for record, answer in zip(make_records(len(given)), given)]
    ids = [record["id"] for record in records]
    for form, path, key in (
        ("verl", tmp_path / "a.parquet", lambda row: row["reward_model"]["ground_truth"]),
        ("slime", tmp_path / "a.jsonl", lambda row: row["label"]),
        ("openrlhf", tmp_path / "b.jsonl", lambda row: row["label"]),
    ):
        export(path, ids, format=form, trajectories=records)
        assert list(map(key, read_back(path))) == wanted
