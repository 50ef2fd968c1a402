"""Rows in other forms than a record: a row a response, conversations, other columns, no ids, prompts alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data.make_formats import records
from support.made_data import write_lines

from cropi.cli import main
from cropi.data.readers import HashedIds, read
from cropi.errors import CropiError, RecordError
from cropi.options import Sketching
from cropi.rollouts.options import Prompting
from cropi.trainers.dumps import auto


def made(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [group.to_record() for group in read(source, **options)]


TEXT = [{"prompt": f"{i}+1=", "response": str(k), "reward": float(k == i + 1), "answer": str(i + 1)}
        for i in range(3) for k in range(4)]  # fmt: skip


def test_rows_of_one_response_are_grouped_by_their_prompt_where_there_is_no_id() -> None:
    with pytest.warns(HashedIds, match="no 'id'.*give ids for a curriculum"):
        got = made(TEXT)
    assert [(r["prompt"], r["responses"], r["rewards"]) for r in got] == [
        (f"{i}+1=", list("0123"), [float(k == i + 1) for k in range(4)]) for i in range(3)
    ]
    names = [record["id"] for record in got]
    assert len(set(names)) == 3 and all(name.startswith("text-") for name in names)
    with pytest.warns(HashedIds):
        assert [record["id"] for record in made(TEXT[::-1])] == names[::-1], "ids follow content, not order"
    with pytest.warns(HashedIds):
        changed = [record["id"] for record in made([row | {"answer": "x"} for row in TEXT])]
    assert not set(changed) & set(names), "two prompts of one text and other answers are two prompts"


def test_records_without_ids_get_the_hash_of_their_content(tmp_path: Path) -> None:
    rows = [{key: value for key, value in record.items() if key != "id"} for record in records()]
    path = tmp_path / "t.jsonl"
    write_lines(path, rows)
    with pytest.warns(HashedIds) as said:
        ids = [group.id for group in read(path)]
    assert {one.filename for one in said} == {__file__}, "the line that called"
    with pytest.warns(HashedIds):
        assert ids == [group.id for group in read(rows)] and len(set(ids)) == 6
    write_lines(path, [*rows, rows[0]])
    with pytest.raises(RecordError, match="two records have the same prompt and answer: give them ids"):
        list(read(path))
    write_lines(path, [*rows, records()[0]])
    with pytest.raises(RecordError, match="this record has an 'id', and those before it have none"):
        list(read(path))
    write_lines(path, [*records()[:2], rows[3]])
    with pytest.raises(RecordError, match="the key 'id' is missing"):
        list(read(path))


def test_conversations_with_a_reward_are_split_where_the_assistant_first_speaks() -> None:
    def talk(i: int, k: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": f"{i}?"},
                    {"role": "assistant", "content": str(k)}]  # fmt: skip
        return {"id": i, "messages": messages, "reward": k}

    got = made([talk(i, k) for k in range(2) for i in range(2)])
    assert [record["prompt"][-1]["content"] for record in got] == ["0?", "1?"] and got[0]["rewards"] == [0, 1]
    assert got[0]["responses"] == [[{"role": "assistant", "content": str(k)}] for k in range(2)]
    for other in ({"id": 2, "prompt": "2?", "response": "3", "reward": 1.0}, talk(2, 0) | {"messages": None}):
        with pytest.raises(RecordError, match=r"records\[1\]: there are no 'messages', and the first row"):
            made([talk(0, 1), other])
        assert len(made([talk(0, 1), other, talk(0, 0)], skip_bad=True)) == 1
    apart = [{"id": 2, "prompt": "2?", "response": str(k), "reward": k} for k in range(2)]
    with pytest.raises(
        RecordError, match=r"records\[1\]: the row is a conversation .* holds its response apart"
    ):
        made([apart[0], talk(0, 1), apart[1]])
    assert [record["id"] for record in made([apart[0], talk(0, 1), apart[1]], skip_bad=True)] == ["2"]
    # Nor are messages that end in a user's, beside a response that is missing.
    asked = {"messages": [*talk(0, 0)["messages"], {"role": "user", "content": "?"}], "reward": 1.0}
    with pytest.raises(RecordError, match=r"responses\[1\] must be a string, got None"):
        made([asked | {"response": "x"}, asked | {"response": None}])
    # They are no conversation where the first row's is missing: they would give way to a part of the prompt.
    with pytest.raises(RecordError, match=r"records\[1\]: the response stands apart from 'messages'"):
        made([asked | {"response": None}, asked | {"response": "x"}])
    # What else is said of a response makes no response of it.
    (group,) = made([talk(0, 1) | {"truncated": True}, talk(0, 0) | {"truncated": False}])
    assert group["truncated"] == [True, False] and len(group["responses"]) == 2


@pytest.mark.parametrize("form", ["lines", "table", "columns"])
@pytest.mark.parametrize("name", ["response", "reward", "response and reward"])
def test_a_first_row_without_its_response_or_reward_is_one_bad_row(
    name: str, form: str, tmp_path: Path
) -> None:
    """A table's null told no form: all rows were bad, or the file was refused in spite of skip_bad."""
    names = name.split(" and ")
    rows = [
        {"id": "x", **TEXT[0], **dict.fromkeys(names)},
        *({"id": row["prompt"], **row} for row in TEXT),
    ]
    path, columns = tmp_path / f"t.{'parquet' if form == 'table' else 'jsonl'}", None
    if form == "table":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "columns":
        columns = {name: f"other {name}" for name in names}
        write_lines(path, [{columns.get(key, key): row[key] for key in row} for row in rows])
    else:
        write_lines(path, rows)
    groups = read(auto.opened([path], skip_bad=True, columns=columns), skip_bad=True, columns=columns)
    assert [(group.id, group.size) for group in groups] == [(f"{i}+1=", 4) for i in range(3)]
    assert [
        str(error).split(";")[0] for error in groups.bad if f"the key '{names[-1]}s' is missing" in str(error)
    ]
    with pytest.raises(RecordError, match=f"(:1|row 0): the key '{names[-1]}s' is missing"):
        list(read(path, columns=columns))


@pytest.mark.parametrize("form", ["lines", "table"])
def test_a_first_record_without_responses_and_rewards_is_one_bad_record(form: str, tmp_path: Path) -> None:
    """The file was refused as one of prompts, in spite of skip_bad; one of such rows alone is one."""
    none = {"id": "x", "prompt": "p", "responses": None, "rewards": None}
    rows = [none, {**none, "id": "y", "responses": ["a", "b"], "rewards": [0.0, 1.0]}]
    path = tmp_path / f"t.{'parquet' if form == 'table' else 'jsonl'}"
    for some, ids in ((rows, ["y"]), (rows[:1], None)):
        if form == "table":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)
        else:
            write_lines(path, some)
        if ids is None:
            with pytest.raises(CropiError, match="these are prompts without responses"):
                read(auto.opened([path], skip_bad=True), skip_bad=True)
        else:
            groups = read(auto.opened([path], skip_bad=True), skip_bad=True)
            assert [group.id for group in groups] == ids and len(groups.bad) == 1


def test_rows_of_one_prompt_that_disagree() -> None:
    rows = [row | {"id": row["prompt"]} for row in TEXT]
    for change, words in (
        ({"answer": "other"}, "has another 'answer'"),
        ({"prompt": "other"}, "has another 'prompt'"),
        ({"temperature": 0.5}, "has another 'temperature'"),
    ):
        with pytest.raises(RecordError, match=words):
            made([*rows[:3], rows[3] | change])
        assert len(made([*rows[:3], rows[3] | change, *rows[4:]], skip_bad=True)) == 2
    with pytest.raises(RecordError, match="are of several policies .step"):
        made([row | {"step": i} for i, row in enumerate(rows)])
    ids = [row | {"response_ids": [1, 2], "logprobs": [-1.0, -1.0]} for row in rows]
    with pytest.raises(
        RecordError, match="some responses to this prompt have 'logprobs', and some have none"
    ):
        made([*ids[:3], {key: value for key, value in ids[3].items() if key != "logprobs"}])


def test_columns_that_vary_between_the_responses_of_a_prompt_are_not_the_prompts() -> None:
    rows = [row | {"id": row["prompt"], "finish": i, "level": 3} for i, row in enumerate(TEXT)]
    assert all("finish" not in record and record["level"] == 3 for record in made(rows))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p"}, "these are prompts without responses"),
        ({"question": "p", "answer": "a"}, "these are prompts without responses"),
        ({"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": "1"}}, "`cropi rollout`"),
        ({"prompt": "p", "completion": "c"}, "a row a response needs 'reward', and has none"),
        (
            {"prompt": "p", "easy": {"accuracy": 0.5}, "made": {"responses": ["c"], "scores": [1]}},
            "--columns responses=made.responses,rewards=made.scores",
        ),
        (
            {"prompt": "p", "made": [{"response": "c", "reward": 1}]},
            "frame.explode('made')), and name --columns response=made.response,reward=made.reward",
        ),
        ({"prompt": "p", "response": "c", "score": 1}, "did you mean --columns reward=score?"),
        ({"prompt": "p", "output": "c", "reward": 1}, "did you mean --columns response=output?"),
        ({"q": "p", "outs": ["c"], "score": [1]}, "'rewards' is missing; did you mean --columns rewards=score?"),
        ({"id": 1, "prompt": "p", "respones": ["c"], "rewards": [1]}, "did you mean --columns responses=respones?"),
        (
            {"id": 1, "prompt": [{"role": "assistant", "content": "c"}], "reward": 1},
            "has none; where 'prompt' is a conversation with the response, call it 'messages'",
        ),
    ],
)  # fmt: skip
def test_rows_of_no_known_form_say_what_is_missing(row: dict[str, Any], words: str) -> None:
    with pytest.raises(CropiError) as caught:
        made([row])
    assert words in str(caught.value) and "records[0]" in str(caught.value)


def test_columns_are_named_and_misnamed() -> None:
    rows = [
        {"q": {"text": row["prompt"]}, "out": row["response"], "score": row["reward"], "note": None}
        for row in TEXT
    ]
    with pytest.warns(HashedIds):
        got = made(rows, columns="prompt=q.text, response=out, reward=score, note=")
    assert got[0]["prompt"] == "0+1=" and got[0]["rewards"] == [0.0, 1.0, 0.0, 0.0] and "note" not in got[0]
    table = pyarrow.Table.from_pylist(rows)
    with pytest.warns(HashedIds):
        assert (
            made(table, columns={"prompt": "q.text", "response": "out", "reward": "score", "task": "note"})
            == got
        )
    names = "id=n, messages=talk, reward=score, finish_reason=end"
    talks = [
        {"n": 0, "talk": [{"role": "user", "content": "0+1="}, {"role": "assistant", "content": row["response"]}],
         "score": row["reward"], "end": ("stop", "length")[k % 2]} for k, row in enumerate(TEXT[:4])
    ]  # fmt: skip
    for source in (talks, pyarrow.Table.from_pylist(talks)):
        (group,) = read(source, columns=names)  # other names of fields are names, too
        assert group.truncated == [False, True] * 2 and group.rewards == [0.0, 1.0, 0.0, 0.0]
        assert group.prompt == [{"role": "user", "content": "0+1="}] and not group.extra
    for columns, words in (
        ("prompt", "NAME=COLUMN,... is expected"),
        ("prmpt=q", "'prmpt' is not part of a record; did you mean 'prompt'?"),
        ("prompt=qq,response=out,reward=score", "there is no column 'qq' for 'prompt'"),
    ):
        with pytest.raises(CropiError, match=words):
            made(rows, columns=columns)


def test_columns_as_a_dictionary_are_the_same_option_as_its_text() -> None:
    """So that a store of one goes on with the other."""
    named = {"prompt": "q", "task": None}
    for options in (Sketching, Prompting):
        assert options(columns=named).columns == options(columns="prompt=q,task=").columns == "prompt=q,task="


@pytest.mark.parametrize("kind", ["memory", "lines", "table"])
def test_reasons_of_engines_say_what_was_cut(tmp_path: Path, kind: str) -> None:
    """No end token is appended to what a limit has cut."""

    def given(rows: list[dict[str, Any]]) -> Any:
        if kind == "memory":
            return rows
        path = tmp_path / "t"
        if kind == "lines":
            return write_lines(path, rows)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    plain = {"id": "a", "prompt": "p", "responses": ["x", "y", "z"], "rewards": [1.0, 0.0, 0.0]}
    (group,) = read(given([plain | {"finish_reasons": ["length", "stop", None]}]))
    assert group.truncated == [True, False, False] and not group.extra
    said = {"truncated": [False, False, True]}
    (group,) = read(given([plain | said | {"finish_reasons": ["length", "stop", None]}]))
    assert group.truncated == said["truncated"]
    rows = [{"id": "a", "prompt": "p", "response": str(k), "reward": float(k), "finish_reason": reason}
            for k, reason in enumerate(("stop", "length"))]  # fmt: skip
    (group,) = read(given(rows))
    assert group.truncated == [False, True]
    (group,) = read(given([row | {"truncated": True} for row in rows]))
    assert group.truncated == [True, True], "what is said outright counts"
    with pytest.raises(
        RecordError, match=r"the end of responses\[1\] is 'abort', so that it may be only a part"
    ):
        list(read(given([plain | {"finish_reasons": ["stop", "abort", "stop"]}])))
    exact = {"id": "a", "prompt_ids": [1], "response_ids": [[2], [3]], "rewards": [1.0, 0.0]}
    (group,) = read(given([exact | {"finish_reasons": ["stop", "abort"]}]))
    assert group.truncated is None


def test_tables_with_columns_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted whether or not ``--source`` names them; what is left out is counted, and all of it is an error."""
    rows = [
        {"ID": f"q{i // 2}", "Frage": f"{i // 2}+1=", "Antwort": str(i), "Note": float(i % 2)}
        for i in range(6)
    ]
    rows[5]["Frage"] = "another one"
    table, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "convert",
        str(table),
        "--out",
        str(out),
        "--columns",
        "id=ID,prompt=Frage,response=Antwort,reward=Note",
    ]
    for source in ([], ["--source", "records"]):
        assert main([*words, *source]) == 2
        assert "another row with the id 'q2', at " in capsys.readouterr().err
        assert main([*words, *source, "--skip-bad"]) == 0
        assert "left out      1 sample: 1 by form" in capsys.readouterr().out
        assert [(group.id, group.responses) for group in read(out)] == [
            ("q0", ["0", "1"]), ("q1", ["2", "3"])
        ]  # fmt: skip
        out.unlink()
    table.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    assert main([*words, "--skip-bad"]) == 2 and not out.exists()
    assert "no usable sample is left (1 left out); the first: " in capsys.readouterr().err
