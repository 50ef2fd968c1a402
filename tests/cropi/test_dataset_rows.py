"""A trainer's dataset in JSON, of which one row at a time is in memory: its rows, its errors, what is made of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cropi.data import lines, rows_out, spilled
from cropi.data.export import check_export, chosen_dataset, export, read_dataset
from cropi.data.identity import dataset_ids
from cropi.data.prompt_ids import column_values
from cropi.data.spilled import Rows
from cropi.errors import CropiError

ROWS = [
    {"id": 7, "prompt": "é\u2028\U0001f600", "extra_info": {"index": "a", "more": [1, 2.5, None]}},
    {"id": 2**70, "prompt": "\ud800", "extra_info": None, "x": -0.0, "y": 5e-324, "": True},
    {"prompt": [{"role": "user", "content": "1+1="}], "id": 1, "z": {"a": {"b": [[], {}]}}},
]


def lines_at(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def array_at(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


FORMS: dict[str, Callable[[Path, list[Any]], Path]] = {".jsonl": lines_at, ".json": array_at}


@pytest.mark.parametrize("ending", FORMS)
@pytest.mark.parametrize("small", [0, spilled.SMALL], ids=["file", "memory"])
def test_rows_are_what_json_says(
    ending: str, small: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled, "SMALL", small)
    monkeypatch.setattr(lines, "_CHUNK", 7)
    path = FORMS[ending](tmp_path / f"d{ending}", ROWS)
    got = read_dataset(path)
    assert repr(list(got)) == repr(ROWS) and len(got) == 3
    assert [repr(got[i]) for i in (2, 0, -1)] == [repr(ROWS[i]) for i in (2, 0, -1)]
    assert repr(list(got.taken([1, 1, 0]))) == repr([ROWS[1], ROWS[1], ROWS[0]])
    path.write_text('[{"a": NaN, "a": -Infinity}]' if ending == ".json" else '{"a": NaN, "a": -Infinity}')
    assert list(read_dataset(path)) == [{"a": -float("inf")}]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("d.jsonl", b'{"id": 1}\n\n{"id": 2\n', "d.jsonl:3 is not JSON: Expecting ',' delimiter: line 2 column 1"),
        ("d.jsonl", b'{"id": 1}\n[2]\n', r"d.jsonl:2 is \[2\], but a dataset should hold objects, one per prompt"),
        ("d.jsonl", b'{"id": "\xff"}\n', "d.jsonl:1 is not JSON: 'utf-8' codec can't decode"),
        ("d.jsonl", b" \n\n", "d.jsonl holds no row"),
        ("d.json", b'[{"id": 1}, {"id": ]', r"d.json\[1\] is not JSON.*: Expecting value; "),
        ("d.json", b'[{"id": 1}, "x"]', r"d.json\[1\] is 'x', but a dataset should hold objects, one per prompt"),
        ("d.json", b'[{"id": 1} {"id": 2}]', "d.json: a comma or ] is expected after element 0, got '{'"),
        ("d.json", b'[{"id": 1}', "d.json: a comma or ] is expected after element 0"),
        ("d.json", b'[{"id": 1}] {"id": 2}', "d.json goes on after the end of its JSON array"),
        ("d.json", b'{"id": 1}\n2', "d.json:2 is 2, but a dataset should hold objects, one per prompt"),
        ("d.json", b'[{"id": "\xff"}]', "d.json: not UTF-8 text"),
        ("d.json", b"[]", "d.json holds no row"),
        ("d.json", b"", "d.json holds no row"),
        ("d.json", b'[{"id": 1}, {"id": %s}]' % (b"[" * 10**5), r"d.json\[1\] is not readable as JSON"),
        ("d.jsonl", b'{"id": 1}\n{"id": %s}' % (b"[" * 10**5), "d.jsonl:2 is not JSON: maximum recursion depth"),
    ],
)  # fmt: skip
def test_what_is_not_rows_is_named_by_its_place(name: str, text: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(CropiError, match=f"^dataset: .*{words}"):
        read_dataset(path)


def test_datasets_without_a_row_are_named(tmp_path: Path) -> None:
    """An empty folder or table was an IndexError; a folder without dataset_info.json a FileNotFoundError."""
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    empty, out = datasets.Dataset.from_dict({"id": []}), tmp_path / "out.jsonl"
    empty.save_to_disk(tmp_path / "saved")
    empty.to_parquet(tmp_path / "d.parquet")
    held = [tmp_path / "saved", tmp_path / "d.parquet", empty, pa.table({"id": []}), []]
    for dataset, name in zip(
        held, ("saved", "d.parquet", "the Dataset", "the Table", "the list"), strict=True
    ):
        with pytest.raises(CropiError, match=f"^dataset: .*{name} holds no row; give the dataset"):
            export(out, ["a"], dataset=dataset)
    datasets.DatasetDict({}).save_to_disk(tmp_path / "splits")
    with pytest.raises(CropiError, match="splits holds a dictionary of datasets without a split"):
        read_dataset(tmp_path / "splits")
    datasets.Dataset.from_dict({"id": ["a"]}).save_to_disk(tmp_path / "part")
    (tmp_path / "part/dataset_info.json").unlink()
    with pytest.raises(CropiError, match="part: datasets cannot load this folder .'Directory"):
        read_dataset(tmp_path / "part")
    (tmp_path / "part/dataset_info.json").write_text("[]")
    with pytest.raises(CropiError, match="part: datasets cannot load this folder .*has no attribute"):
        read_dataset(tmp_path / "part")
    with pytest.raises(CropiError, match=r"^dataset: there is no file \.; it is a folder"):
        read_dataset("")


@pytest.mark.parametrize("ending", FORMS)
def test_brackets_in_one_another_are_rows_or_words(ending: str, tmp_path: Path) -> None:
    """At the depth that Python's own reader takes, what keeps the row may take less."""
    path = tmp_path / f"d{ending}"
    for depth in range(900, 1000, 3):
        row = f'{{"id": {"[" * depth}1{"]" * depth}}}'
        path.write_text(f"[{row}]" if ending == ".json" else row)
        try:
            assert list(read_dataset(path))
        except CropiError as error:
            assert "d.json" in str(error)


@pytest.mark.parametrize("ending", FORMS)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_chosen_rows_are_those_of_a_list(ending: str, format: str, tmp_path: Path) -> None:
    rows = [{"id": i, "q": f"q{i}", "n": i if i % 2 else i / 4, "o": {"a": i}} for i in range(20)]
    rows[13]["late"], rows[3]["o"] = [[1], []], {"b": "x"}
    path, places = FORMS[ending](tmp_path / f"d{ending}", rows), [13, 3, 0, 19]
    out = tmp_path / f"out.{format}"
    check_export(format, dataset=path)
    assert export(out, [str(place) for place in places], format=format, dataset=path) == 4
    chosen = [rows[place] for place in places]
    if format == "jsonl":
        assert out.read_text() == "".join(json.dumps(row) + "\n" for row in chosen)
    else:
        expected = rows_out.table_of(chosen)
        assert pyarrow.parquet.read_table(out).equals(expected) and expected.num_columns == 5


@pytest.mark.long
def test_a_chosen_dataset_has_the_rows_of_a_list(tmp_path: Path) -> None:
    rows = [{"id": i, "q": [f"q{i}"]} for i in range(9)]
    got = chosen_dataset(["8", "0"], dataset=lines_at(tmp_path / "d.jsonl", rows))
    assert got.data.table.equals(rows_out.table_of([rows[8], rows[0]]))


def outcome(check: Callable[[Any], Any], rows: Any) -> str:
    try:
        check(rows)
    except CropiError as error:
        return str(error)
    return ""


def test_a_check_by_parts_says_what_the_table_of_all_rows_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that grow wider, structures with other fields, columns that come late, what has no common type."""
    monkeypatch.setattr(rows_out, "PART", 3)
    some = (
        1,
        2.5,
        2**63,
        -(2**70),
        True,
        "x",
        None,
        [],
        [1],
        ["x"],
        {},
        {"a": 1},
        {"a": [None]},
        {"b": {}},
        "\ud800",
    )
    drawn, said = random.Random(0), list[str]()
    for _ in range(400):
        of = drawn.sample(some, drawn.choice((1, 1, 2, 3)))
        rows = [{key: drawn.choice(of) for key in "ab" if drawn.random() < 0.8} for _ in range(8)]
        said.append(outcome(rows_out.table_of, rows))
        assert outcome(rows_out.check_table, Rows(rows)) == outcome(rows_out.table_of, Rows(rows)) == said[-1]
        if not said[-1]:
            assert rows_out.table_of(Rows(rows)).equals(rows_out.table_of(rows))
    assert said.count("") > 100 and len(set(said)) > 20


def test_several_columns_are_found_in_one_pass() -> None:
    rows = [{"id": 1, "a": {"b": {"c": 2}}, "a.d": 3}, {"id": 4, "a": None}, {"a": {"b": 5}}]
    names = ("id", "a.b.c", "a.d", "x", "x.y", "a.z")
    wanted = [[1, 4, None], [2, None, None], [3, None, None], None, None, [None] * 3]
    kept = Rows(rows)
    passes: list[int] = []
    assert column_values(kept, *names) == (["id", "a", "a.d"], wanted)
    kept._kept.get = passes.append  # type: ignore[assignment, method-assign]
    column_values(kept, *names)
    assert passes == list(kept._places[:1]) + list(kept._places)
    table = pyarrow.table({
        "id": [1, 4, None], "a.d": [3, None, None], "a": pyarrow.array([{"b": {"c": 2}}, None, {"b": None}])
    }).slice(0, 3)  # fmt: skip
    assert column_values(table, *names) == (["id", "a.d", "a"], wanted)
    assert column_values(table.slice(1), "id", "a.b.c", "id.x")[1] == [[4, None], [None, None], [None, None]]
    ids = dataset_ids(Rows([{"id": 3, "uid": "x"}, {"id": 1, "uid": "y"}]), "d", None)
    assert (ids.column, ids.names) == ("id", ["3", "1"])
