"""Made-up records, right and broken in every place: each ends in a group, or in an error with file and field."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fuzz
from support.fuzz import anything, text

from cropi.data.export import read_dataset
from cropi.data.fast import RecordReader
from cropi.data.identity import dataset_ids
from cropi.data.keys import ALIASES, FIELDS, REFUSED
from cropi.data.readers import read
from cropi.data.records import PromptGroup, parse_record
from cropi.errors import CropiError, RecordError

INPUTS = 10_000
RENAMED = (*ALIASES, "score", "output", "question")
ADDED = (*FIELDS, *ALIASES, *REFUSED, "reward", "response", "step")


def token(rng: random.Random) -> int:
    return rng.randint(0, 150_000)


def messages(rng: random.Random) -> list[dict[str, Any]]:
    made = []
    for _ in range(rng.randint(0, 3)):
        message: dict[str, Any] = {"role": rng.choice(["user", "system", "assistant", "tool"])}
        if rng.random() < 0.5:
            message["content"] = text(rng) if rng.random() < 0.5 else anything(rng)
        if rng.random() < 0.3:
            message["tool_calls"] = anything(rng)
        made.append(message)
    return made


def good(rng: random.Random) -> dict[str, Any]:
    """A record that is right."""
    count = rng.randint(1, 3)

    def each(make: Callable[[random.Random], Any]) -> list[Any]:
        return [make(rng) for _ in range(count)]

    record: dict[str, Any] = {
        "id": text(rng) if rng.random() < 0.5 else rng.randint(-(10**20), 10**20),
        "rewards": each(
            lambda rng: rng.randint(-5, 5) if rng.random() < 0.5 else rng.uniform(-1, 1) * 10 ** rng.randint(-9, 9)
        ),
        "prompt": text(rng, 1) if rng.random() < 0.5 else [{"role": "user", "content": "q"}],
    }  # fmt: skip
    if rng.random() < 0.5:
        record["response_ids"] = each(lambda rng: [token(rng) for _ in range(rng.randint(1, 4))])
        if rng.random() < 0.5:
            record["logprobs"] = [[rng.uniform(-50, 0) for _ in ids] for ids in record["response_ids"]]
        if rng.random() < 0.5:
            record["loss_mask"] = [[1] * len(ids) for ids in record["response_ids"]]
    else:
        record["responses"] = each(lambda rng: text(rng, 1))
    more: dict[str, Callable[[], Any]] = {
        "prompt_ids": lambda: [token(rng) for _ in range(rng.randint(1, 3))], "answer": lambda: anything(rng),
        "temperature": lambda: rng.uniform(0.1, 2), "task": lambda: text(rng, 0, 3), "level": lambda: anything(rng),
        "extra": lambda: anything(rng), "set": lambda: "v",
    }  # fmt: skip
    return record | {name: make() for name, make in more.items() if rng.random() < 0.25}


def broken(rng: random.Random) -> dict[str, Any]:
    """A record with one or two values replaced, at any depth, or keys added, renamed or taken away."""
    record = good(rng)
    for _ in range(rng.randint(1, 2)):
        kind = rng.choice(["inside", "inside", "add", "rename", "messages"])
        if kind == "inside":
            places = [way for way in fuzz.ways(record) if way]
            record = fuzz.changed(rng, record, places) if places else record
        elif kind == "add":
            record[rng.choice(ADDED)] = anything(rng)
        elif kind == "rename" and record:
            record[rng.choice(RENAMED)] = record.pop(rng.choice(sorted(record)))
        elif kind == "messages":
            record["prompt"] = messages(rng)
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


def test_a_key_that_cannot_be_learnt_leaves_the_reader_as_it_was() -> None:
    """Beside one that can: the decoder knew nothing of it, and every record after that was a traceback."""
    reader, plain = RecordReader(), {"id": "a", "prompt": "q", "responses": ["r"], "rewards": [1]}
    assert outcome(reader, text_of(plain | {"level": 1, 'quo"ted': 2}))[0] is not None
    group, words = outcome(reader, text_of(plain))
    assert group is not None and group.to_record() == plain, words


def test_logprobs_are_floats_whatever_was_written() -> None:
    """An integer that floats do not hold exactly was kept as it is by one way of parsing alone."""
    values = [[-(3**90), -(2**53) - 1, -2.5]]
    record = {"id": "a", "prompt": "q", "rewards": [1], "response_ids": [[1, 2, 3]], "logprobs": values}
    for line in (record, record | {"loss_mask": [[1, 1, 1]]}):
        group = check(text_of(line))
        assert group is not None and group.logprobs == [[float(value) for value in values[0]]]
        assert {type(value) for value in group.logprobs[0]} == {float}


@pytest.mark.long
def test_right_records_are_read_to_what_they_hold() -> None:
    def one(rng: random.Random) -> bool:
        record = good(rng)
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            assert check(text_of(record)) is None, "half a character"
            return False
        group = check(text_of(record))
        if group is None:  # an answer may hold an infinity or a number beyond limits
            return False
        known = group.to_record()
        for key in ("rewards", "response_ids", "logprobs", "loss_mask", "prompt_ids", "responses", "prompt"):
            if key in record:
                assert known[key] == record[key], key
        assert group.id == str(record["id"])
        return True

    ends = fuzz.run(INPUTS, one)
    assert fuzz.repeats() or ends[True] > 0.4 * ends.total(), ends


@pytest.mark.long
def test_broken_records_end_in_a_group_or_in_words() -> None:
    ends = fuzz.run(INPUTS, lambda rng: check(text_of(broken(rng))) is None)
    assert fuzz.repeats() or min(ends[True], ends[False]) > 0.05 * ends.total(), ends


@pytest.mark.long
def test_broken_text_ends_in_a_group_or_in_words() -> None:
    def one(rng: random.Random) -> bool:
        line = bytearray(text_of(good(rng)))
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(line))
            if rng.random() < 0.5 and len(line) > 4:
                del line[place : place + rng.randint(1, 4)]
            else:
                odd = [rng.randbytes(rng.randint(0, 3)), b"\\ud83d", b"NaN", b"[" * 99]
                line[place:place] = rng.choice(odd)
        return check(bytes(line)) is None

    ends = fuzz.run(INPUTS, one)
    assert fuzz.repeats() or min(ends[True], ends[False]) > 0.02 * ends.total(), ends


@pytest.mark.long
def test_lists_and_files_of_anything_end_in_groups_or_in_words() -> None:
    def row(rng: random.Random) -> Any:
        made = rng.choice([good, broken, anything])(rng)
        return None if isinstance(made, str) else made  # a name of a file

    def one(rng: random.Random, path: Path) -> str:
        rows, skip_bad = [row(rng) for _ in range(rng.randint(1, 4))], rng.random() < 0.5
        source: Any = rows
        if rng.random() < 0.5:
            source = path
            path.write_bytes(b"\n".join(map(text_of, rows)))
        try:
            groups = read(source, skip_bad=skip_bad, name="rows")
            kept = list(groups)
        except CropiError as error:
            assert (str(path) if source is path else "rows") in str(error)
            assert len(str(error).encode("utf-8", "replace")) < 2000
            return "words"
        assert len({group.id for group in kept}) == len(kept)
        assert skip_bad or not groups.bad
        return "groups"

    with warnings.catch_warnings(), fuzz.folder() as folder:
        warnings.simplefilter("ignore")
        ends = fuzz.run(INPUTS, lambda rng: one(rng, folder / "fuzz.jsonl"))
    assert fuzz.repeats() or min(ends["words"], ends["groups"]) > 0.1 * ends.total(), ends


def test_any_dataset_has_prompt_ids_or_ends_in_words() -> None:
    """What a trainer's rows must hold so that selected prompts are found again."""
    right = [
        {"id": f"p{i}", "prompt": f"{i}+1=", "extra_info": {"index": i}, "index": i, "uid": str(i)} for i in range(3)
    ]  # fmt: skip
    records = [
        PromptGroup("p1", "1+1=", None, []),
        PromptGroup("p0", [{"role": "user", "content": "x"}], None, []),
    ]
    places = list(fuzz.ways(right))
    with fuzz.folder() as folder:
        file = folder / "d.json"

        def one(rng: random.Random) -> str:
            rows = fuzz.changed(rng, copy.deepcopy(right), places)
            file.write_text(json.dumps(rows))
            key = rng.choice((None, "id", "extra_info.index", "uid", "x", ""))
            try:
                ids = dataset_ids(read_dataset(file), file, key, records if rng.random() < 0.5 else ())
            except CropiError as error:
                assert str(file) in str(error) and len(str(error).encode("utf-8", "surrogatepass")) < 2000, (
                    error
                )
                return "words"
            assert len(set(ids.names)) == len(ids) == len(rows)
            return "ids"

        ends = fuzz.run(INPUTS, one)
    assert fuzz.repeats() or min(ends["words"], ends["ids"]) > INPUTS / 20, ends
