"""Limits against input that never ends, short messages, and records that are read again by their places."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from data.make_formats import HERE, records
from support.made_data import save_policy

from cropi.cli import main
from cropi.data import lines, opened, tables
from cropi.data.readers import read
from cropi.data.share import Share
from cropi.errors import CropiError, RecordError


def made(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [group.to_record() for group in read(source, **options)]


# ----------------------------------------------------------------------------------------------------- limits
def test_a_packed_bomb_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(80):
            file.write(b" " * 2**20)
    with pytest.raises(CropiError, match="unpacks to more than 400 times its size .*unpack it yourself"):
        list(read(path, skip_bad=True))


def test_a_line_and_an_element_without_end_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 2**20)
    (tmp_path / "t.jsonl").write_bytes(b'{"id": "' + b"x" * 2**21)
    with pytest.raises(CropiError, match="t.jsonl:1 is longer than 1 MiB"):
        list(read(tmp_path / "t.jsonl"))
    (tmp_path / "t.json").write_bytes(b'[{"id": "' + b"x" * 2**23)
    with pytest.raises(CropiError, match=r"t.json\[0\] is not JSON, or longer than 1 MiB"):
        list(read(tmp_path / "t.json"))
    assert opened.LONGEST_LINE == 256 * 2**20


@pytest.mark.parametrize("key", ["answer", "level", "tools", "prompt"])
def test_deep_nesting_and_long_numbers_are_bad_records(key: str, tmp_path: Path) -> None:
    deep = "[" * 70 + "]" * 70
    plain = {k: v for k, v in records()[0].items() if k != key}
    path = tmp_path / "t.jsonl"
    for value in (deep, "[" * 5000 + "]" * 5000, "1" * 5000, '{"a":' * 70 + "1" + "}" * 70):
        line = json.dumps(plain)[:-1] + f', "{key}": {value}}}'
        path.write_text(f"{json.dumps(records()[1])}\n{line}\n")
        with pytest.raises(RecordError, match="nested deeper than 64|not readable as JSON") as caught:
            list(read(path))
        assert len(str(caught.value)) < 2000 and "t.jsonl:2" in str(caught.value)
        assert [group.id for group in read(path, skip_bad=True)] == ["p1"]


def test_messages_stay_short_whatever_a_record_holds(tmp_path: Path) -> None:
    long = "y" * 10**6
    good = records()[0]
    for change in (
        {"id": long}, {"id": [long]}, {"rewards": [long, 1, 2]}, {"rewards": long}, {"responses": [[long], "b"]},
        {"prompt": {long: long}}, {"temperature": long}, {"response_ids": [[long], [1], [2]]},
        {"truncated": [long] * 3, "response_ids": None, "logprobs": None, "loss_mask": None},
        {"logprobs": [[long], [1], [2]]}, {"task": [long]}, {long: 1, "rewards": None}, {"tools": long},
        {"rewards": [10**4000, 1, 2]}, {"loss_mask": [[long], [1], [2]]}, {"prompt": [{"role": long}]},
        {"id": "x" * 4000, "rewards": [None, 1, 2]}, {"prompt_ids": [10**4000]},
    ):  # fmt: skip
        (tmp_path / "t.jsonl").write_text(json.dumps(good | change) + "\n")
        with pytest.raises(RecordError) as caught:
            list(read(tmp_path / "t.jsonl"))
        assert len(str(caught.value).encode()) < 2000 and "t.jsonl:1" in str(caught.value), list(change)


@pytest.mark.long
def test_yaml_aliases_of_aliases_are_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    for text in (bomb, "a: &a [*a]\n"):
        (tmp_path / "c.yaml").write_text(text)
        assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 2
        assert "holds more than 10000 values once its aliases are filled in" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("[" * 5000)
    assert main(["run", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "not valid YAML" in capsys.readouterr().err


def test_deep_toml_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets, which the parser gives up on, and dotted keys, which it does not."""
    path = tmp_path / "c.toml"
    for text, words in {
        "a = " + "[" * 5000 + "]" * 5000: "not valid TOML",
        "x." * 500 + "y = 1": "nested deeper than 64",
        f"[{'.'.join('a' * 500)}]\nb = 1": "nested deeper than 64",
        "a = " + "9" * 5000: "not valid TOML",
    }.items():
        path.write_text(text)
        assert main(["run", "--config", str(path)]) == 2
        told = capsys.readouterr().err
        assert words in told and str(path) in told and len(told) < 2000


# ----------------------------------------------------------------------------------------------------- places
def test_records_are_taken_by_their_places(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(b"\xef\xbb\xbf" + b"\n".join(json.dumps(r).encode() for r in records()[:3]))
    two.write_bytes(b"\n" + b"\r\n".join(json.dumps(r).encode() for r in records()[3:]))
    wanted = ["p4", "p0", "p5", "p2"]
    for source in ([one, two], HERE / "records.parquet", records(), [HERE / "records.jsonl.gz"]):
        before = [group.to_record() for group in read(source).take(wanted)]  # by a full pass
        list(read(source))
        after = [group.to_record() for group in read(source).take(wanted)]  # by places, where lines have any
        assert before == after == [records()[int(name[1])] for name in wanted]
        with pytest.raises(CropiError, match="1 selected prompts are not in .*, for example 'p9'"):
            list(read(source).take(["p0", "p9"]))
        assert [group.id for group in read(source).take(["p9", "p1"], missing_ok=True)] == ["p1"]


def test_places_are_read_where_the_lines_are_and_not_through_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes((HERE / "records.jsonl").read_bytes())
    list(read(path))

    def fail(*words: Any) -> Any:
        raise AssertionError("a full pass")

    monkeypatch.setattr("cropi.data.sources.lines_of", fail)
    assert [group.raw for group in read(path).take(["p3"])] == [json.dumps(records()[3], ensure_ascii=False)]
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(AssertionError, match="a full pass"):
        list(read(path).take(["p3"]))


@pytest.mark.parametrize("form", ["parquet", "arrow file", "arrow stream"])
def test_of_a_table_only_the_rows_that_are_wanted_are_made(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t"

    def write(count: int) -> None:
        table = pyarrow.Table.from_pylist([records()[i % 6] | {"id": f"p{i}"} for i in range(count)])
        if form == "parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=8)
            return
        kind = pyarrow.ipc.new_file if form == "arrow file" else pyarrow.ipc.new_stream
        with kind(path, table.schema) as file:
            file.write_table(table, max_chunksize=8)

    write(40)
    every = {group.id: group.to_record() for group in read(path)}
    numbers: list[int] = []
    columns = tables.table_groups

    def made_of(batch: Any, name: str, some: Any) -> Any:
        numbers.extend(some)
        return columns(batch, name, some)

    monkeypatch.setattr(tables, "table_groups", made_of)
    taken = list(read(path).take(["p33", "p2", "p3"]))
    assert numbers == [2, 3, 33]
    assert [group.where for group in taken] == [f"{path}, row {n}" for n in (33, 2, 3)]
    assert [group.to_record() for group in taken] == [every[name] for name in ("p33", "p2", "p3")]
    share = Share(read(path), ["p2", "p39"], None)  # that of one process
    assert [group.to_record() for group in share] == [every["p2"], every["p39"]]
    assert numbers == [2, 3, 33, 2, 39]
    write(41)
    assert [group.id for group in read(path).take(["p40"])] == ["p40"] and len(numbers) == 5 + 41


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json"])
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path, name: str) -> None:
    ids = [[(7 * t) % 50_000 for t in range(500)] for _ in range(4)]
    record = {"id": "", "prompt": "p", "response_ids": ids, "logprobs": [[-t / 500 for t in range(500)]] * 4,
              "rewards": [0, 1, 0, 1]}  # fmt: skip

    def peak(count: int) -> int:
        rows = (json.dumps(record | {"id": f"p{i}"}) for i in range(count))
        text = f"[{','.join(rows)}]" if name == "t.json" else "\n".join(rows)
        path = tmp_path / f"{count}-{name}"
        path.write_bytes(gzip.compress(text.encode(), 1) if name.endswith(".gz") else text.encode())
        del text, rows
        tracemalloc.start()
        try:
            assert sum(1 for _ in read(path)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(150), peak(600)  # more than what is read ahead
    assert many < few + 450 * 1000, (few, many)  # an id and its place take far less than a record's 150 kB


def test_a_table_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_ROWS", 2)
    sizes: list[int] = []
    whole = tables.rows_of_batch
    monkeypatch.setattr(tables, "rows_of_batch", lambda batch: sizes.append(batch.num_rows) or whole(batch))
    columns = tables.table_groups
    monkeypatch.setattr(
        tables, "table_groups", lambda batch, *rest: sizes.append(batch.num_rows) or columns(batch, *rest)
    )
    for name in ("records.parquet", "records.arrow", "stream.arrow", "saved"):
        sizes.clear()
        assert made(HERE / name) == records()
        assert max(sizes) == 2 and sum(sizes) == 6


def test_both_ways_of_parsing_give_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = list(read(HERE / "records.jsonl"))
    monkeypatch.setattr("cropi.data.fast._msgspec", lambda: None)
    assert list(read(HERE / "records.jsonl")) == fast


def test_show_tokens_marks_what_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    save_policy(tmp_path / "model", chat=True)
    record = {"id": "a", "prompt": "hi", "prompt_ids": [10, 11], "response_ids": [[12, 13, 14, 15]], "rewards": [1],
              "loss_mask": [[1, 0, 0, 1]]}  # fmt: skip
    text = {"id": "b", "prompt": "hi", "responses": ["yo"], "rewards": [0.5]}
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(record)}\n{json.dumps(text)}\n")
    assert main(["info", str(tmp_path / "t.jsonl"), "--show-tokens", "2"]) != 0
    capsys.readouterr()
    words = ["info", str(tmp_path / "t.jsonl"), "--show-tokens", "2", "--model", str(tmp_path / "model")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "prompt a (" in shown and "2 tokens, 2 tokens scored (stored token ids)" in shown
    assert "    scored  '*'\n    read    '+,'\n    scored  '-'\n" in shown
    assert "  prompt    '<user>hi\\n>'\n  response 0, reward 0.5\n    scored  'yo<eos>'" in shown
