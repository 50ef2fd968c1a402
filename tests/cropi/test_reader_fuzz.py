"""Made-up records, right and broken in every place: each ends in a group, or in an error with file and field."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import fuzz

from cropi.data.fast import RecordReader
from cropi.data.keys import ALIASES, FIELDS, REFUSED
from cropi.data.readers import read
from cropi.data.records import PromptGroup, parse_record
from cropi.errors import CropiError, RecordError

pytestmark = pytest.mark.long

INPUTS = 500

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 100), st.integers(-(10**40), 10**40), st.floats(), st.text(max_size=6),
    st.sampled_from(["", "\ud83d", "\ufeff", "\x00", "2024-01-01", 10**400, 1e308, -0.0, "x" * 5000]),
)  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)  # fmt: skip
token = st.integers(0, 150_000)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "tool"])},
        optional={"content": st.one_of(st.text(max_size=5), anything), "tool_calls": anything},
    ),
    max_size=3,
)


@st.composite
def good(draw: st.DrawFn) -> dict[str, Any]:
    """A record that is right."""
    count = draw(st.integers(1, 3))

    def each(strategy: Any) -> Any:
        return draw(st.lists(strategy, min_size=count, max_size=count))

    record: dict[str, Any] = {"id": draw(st.one_of(st.text(max_size=4), st.integers()))}
    record["rewards"] = each(st.one_of(st.integers(-5, 5), st.floats(-1e9, 1e9)))
    record["prompt"] = draw(
        st.one_of(st.text(min_size=1, max_size=5), st.just([{"role": "user", "content": "q"}]))
    )
    if draw(st.booleans()):
        record["response_ids"] = each(st.lists(token, min_size=1, max_size=4))
        if draw(st.booleans()):
            record["logprobs"] = [[draw(st.floats(-50, 0)) for _ in ids] for ids in record["response_ids"]]
        if draw(st.booleans()):
            record["loss_mask"] = [[1] * len(ids) for ids in record["response_ids"]]
    else:
        record["responses"] = each(st.text(min_size=1, max_size=5))
    for name, strategy in (
        ("prompt_ids", st.lists(token, min_size=1, max_size=3)), ("answer", anything),
        ("temperature", st.floats(0.1, 2)),
        ("task", st.text(max_size=3)), ("level", anything), ("extra", anything), ("set", st.just("v")),
    ):  # fmt: skip
        if draw(st.integers(0, 3)) == 0:
            record[name] = draw(strategy)
    return record


@st.composite
def broken(draw: st.DrawFn) -> dict[str, Any]:
    """A record with one or two values replaced, at any depth, or keys added, renamed or taken away."""
    record = draw(good())
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["replace", "inside", "remove", "add", "rename", "messages"]))
        key = draw(st.sampled_from(sorted(record))) if record else "id"
        if kind == "replace":
            record[key] = draw(anything)
        elif kind == "inside" and isinstance(record.get(key), list) and record[key]:
            place = draw(st.integers(0, len(record[key]) - 1))
            inner = record[key][place]
            if isinstance(inner, list) and inner and draw(st.booleans()):
                inner[draw(st.integers(0, len(inner) - 1))] = draw(anything)
            else:
                record[key][place] = draw(anything)
        elif kind == "remove":
            record.pop(key, None)
        elif kind == "add":
            name = draw(st.sampled_from([*FIELDS, *ALIASES, *REFUSED, "reward", "response", "step"]))
            record[name] = draw(anything)
        elif kind == "rename" and key in record:
            record[draw(st.sampled_from([*ALIASES, "score", "output", "question"]))] = record.pop(key)
        elif kind == "messages":
            record["prompt"] = draw(messages)
    return record


def text_of(record: Any) -> bytes:
    return json.dumps(record).encode()


def outcome(parse: Any, line: bytes) -> tuple[PromptGroup | None, str]:
    try:
        return parse(line, "f.jsonl:7"), ""
    except RecordError as error:
        return None, str(error)


def check(line: bytes) -> PromptGroup | None:
    """Both ways of parsing agree; an error names the place and stays short."""
    slow, words = outcome(parse_record, line)
    reader = RecordReader()
    outcome(reader, line)  # learns the extra keys
    fast, other = outcome(reader, line)
    assert words == other
    if slow is None:
        assert words.startswith("f.jsonl:7") and ";" in words and len(words.encode()) < 2000
        return None
    assert fast == slow, (fast, slow)
    assert parse_record(json.dumps(slow.to_record()).encode(), slow.where).to_record() == slow.to_record()
    return slow


@fuzz.inputs(INPUTS)
@given(good())
def test_right_records_are_read_to_what_they_hold(record: dict[str, Any]) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        assert check(text_of(record)) is None, "half a character"
        return
    group = check(text_of(record))
    if group is not None:  # an answer may hold an infinity or a number beyond limits
        known = group.to_record()
        for key in ("rewards", "response_ids", "logprobs", "loss_mask", "prompt_ids", "responses", "prompt"):
            if key in record:
                assert known[key] == record[key], key
        assert group.id == str(record["id"])


@fuzz.inputs(INPUTS)
@given(broken())
def test_broken_records_end_in_a_group_or_in_words(record: dict[str, Any]) -> None:
    check(text_of(record))


@fuzz.inputs(INPUTS)
@given(good(), st.data())
def test_broken_text_ends_in_a_group_or_in_words(record: dict[str, Any], data: st.DataObject) -> None:
    line = bytearray(text_of(record))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(line) - 1))
        if data.draw(st.booleans()):
            del line[place : place + data.draw(st.integers(1, 4))]
        else:
            line[place:place] = data.draw(
                st.one_of(st.binary(max_size=3), st.sampled_from([b"\\ud83d", b"NaN", b"[" * 99]))
            )
        if not line:
            break
    check(bytes(line))


@fuzz.inputs(INPUTS // 2, share=0.5)
@given(
    st.lists(
        st.one_of(good(), broken(), anything.filter(lambda v: not isinstance(v, str))), min_size=1, max_size=4
    )
)
def test_lists_and_files_of_anything_end_in_groups_or_in_words(
    tmp_path_factory: Any, rows: list[Any]
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "fuzz.jsonl"
    path.write_bytes(b"\n".join(map(text_of, rows)))
    for source, start in ((rows, "rows"), (path, str(path))):
        for skip_bad in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    groups = read(source, skip_bad=skip_bad, name="rows")
                    kept = list(groups)
                except CropiError as error:
                    assert start in str(error) and len(str(error).encode("utf-8", "replace")) < 2000
                else:
                    assert len({group.id for group in kept}) == len(kept)
                    assert skip_bad or not groups.bad
