"""Tables that are checked column by column give the groups, and the errors, of the way row by row."""

from __future__ import annotations

import copy
import math
import pickle
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.made_data import make_tokenizer

from cropi.data import tables
from cropi.data.checks import LONGEST_ID
from cropi.data.columns import TableGroup
from cropi.data.readers import read
from cropi.data.records import PromptGroup
from cropi.data.scan import scan
from cropi.errors import CropiError, RecordError
from cropi.gradient.tokenize import Tokenize
from cropi.rollouts.prompts import read_prompts

HERE = Path(__file__).parents[1] / "data"


def rows() -> list[dict[str, Any]]:
    return [group.to_record() for group in read(HERE / "records.jsonl")]


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the two ways make of a file: the groups and what a scan says of them, or the error."""
    found: list[Any] = []
    for fast in (True, False):
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(tables, "table_groups", lambda *rest: None)
            try:
                groups = list(read(path, skip_bad=True))
                told = scan(read(path, skip_bad=True))
                told.bad = [str(error) for error in told.bad]  # type: ignore[misc]
            except CropiError as error:
                found.append(str(error))
                continue
            found.append(
                (groups, [group.to_record() for group in groups], [group.raw for group in groups], told)
            )
    return found


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def test_the_groups_are_the_same_and_nothing_is_made_early(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("records.parquet", "records.arrow", "stream.arrow"):
        fast, slow = both(HERE / name, monkeypatch)
        assert fast == slow and fast[1] == rows()
        groups = list(read(HERE / name))
        assert {type(group) for group in groups} == {TableGroup}
        told = scan(read(HERE / name))
        assert told.fingerprint and told.largest_id[0] == max(
            max(map(max, r["response_ids"])) for r in rows()
        )
        for group in groups:
            _ = group.lengths, group.largest, group.has_logprobs, group.size, group.rewards, group.prompt
            assert not {"response_ids", "logprobs", "loss_mask"} & set(vars(group))
            assert group.response_ids is group.response_ids  # made once
        plain = pickle.loads(pickle.dumps(groups[0]))
        assert type(plain) is PromptGroup and plain == groups[0] and replace(groups[0], id="x").id == "x"


CHANGES: dict[str, Any] = {
    "an id twice": lambda r: r[1].update(id="p0"),
    "no id": lambda r: r[2].update(id=None),
    "a blank id": lambda r: r[2].update(id="  "),
    "a long id": lambda r: r[2].update(id="x" * (LONGEST_ID + 1)),
    "no ids at all": lambda r: [row.pop("id") for row in r],
    "integers as ids": lambda r: [row.update(id=i) for i, row in enumerate(r)],
    "one reward more": lambda r: r[3]["rewards"].append(1.0),
    "a reward of nan": lambda r: r[3].update(rewards=[float("nan"), 0.0, 1.0]),
    "a huge reward": lambda r: r[3].update(rewards=[1e31, 0.0, 1.0]),
    "no rewards": lambda r: r[3].update(rewards=[]),
    "rewards of integers": lambda r: [row.update(rewards=[1, 0, 1]) for row in r],
    "a negative token": lambda r: r[3]["response_ids"][1].__setitem__(0, -1),
    "a huge token": lambda r: r[3]["prompt_ids"].__setitem__(0, 2**40),
    "tokens of floats": lambda r: [row.update(prompt_ids=[1.0, 2.0]) for row in r],
    "an empty response": lambda r: (r[3]["response_ids"].__setitem__(1, []), r[3]["logprobs"].__setitem__(1, []),
                                    r[3]["loss_mask"].__setitem__(1, [])),
    "a log-prob above zero": lambda r: r[3]["logprobs"][2].__setitem__(0, 0.5),
    "an infinite log-prob": lambda r: r[3]["logprobs"][2].__setitem__(0, float("-inf")),
    "a log-prob of nan where nothing is scored": lambda r: (r[3]["logprobs"][0].__setitem__(-1, float("nan")),
                                                           r[3]["loss_mask"][0].__setitem__(-1, 0)),
    "too few log-probs": lambda r: r[3]["logprobs"][2].pop(),
    "no log-probs": lambda r: r[3].update(logprobs=None),
    "a mask of zeros": lambda r: r[3]["loss_mask"].__setitem__(0, [0] * len(r[3]["response_ids"][0])),
    "a mask of twos": lambda r: r[3]["loss_mask"][0].__setitem__(0, 2),
    "a short mask": lambda r: r[3]["loss_mask"][0].pop(),
    "a mask of truth values": lambda r: [
        row.update(loss_mask=[[bool(x) for x in mask] for mask in row["loss_mask"]]) for row in r],
    "an empty prompt": lambda r: [row.update(prompt="", prompt_ids=None) for row in r],
    "messages": lambda r: [row.update(prompt=[{"role": "user", "content": "q"}]) for row in r],
    "messages without a role": lambda r: [row.update(prompt=[{"content": "q"}]) for row in r],
    "no texts": lambda r: [row.update(prompt=None, responses=None) for row in r],
    "a temperature of zero": lambda r: r[3].update(temperature=0.0),
    "an infinite temperature": lambda r: r[3].update(temperature=float("inf")),
    "a temperature nowhere": lambda r: [row.update(temperature=None) for row in r],
    "tools": lambda r: [row.update(tools=[{"name": "f"}]) for row in r],
    "an alias": lambda r: [row.update(completion_ids=row.pop("response_ids")) for row in r],
    "advantages": lambda r: [row.update(advantages=[0.0]) for row in r],
    "an object beside": lambda r: [row.update(info={"a": [1, None], "b": None}) for row in r],
    "sets in places": lambda r: r[0].update(set=None),
    "an answer of objects": lambda r: [row.update(answer={"x": [1]}) for row in r],
    "a truncated flag missing": lambda r: r[3].update(truncated=[True, None, False]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHANGES))
def test_both_ways_accept_and_refuse_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = rows()
    CHANGES[name](records)
    fast, slow = both(write(tmp_path / "t.parquet", records), monkeypatch)
    assert fast == slow


def test_random_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, fast_ones = random.Random(0), 0
    for _ in range(15):
        records = copy.deepcopy(rows())
        for change in rng.sample(list(CHANGES.values()), 2):
            try:
                change(records)
            except (AttributeError, KeyError, TypeError, IndexError):
                continue  # of what another change took away
        try:
            path = write(tmp_path / "t.parquet", records)
        except pyarrow.ArrowException:
            continue  # no table
        fast, slow = both(path, monkeypatch)
        assert fast == slow
        fast_ones += not isinstance(fast, str) and any(type(group) is TableGroup for group in fast[0])
    assert fast_ones


def test_ids_in_one_file_and_none_in_the_next(tmp_path: Path) -> None:
    with_ids = write(tmp_path / "a.parquet", rows())
    records = [{k: v for k, v in row.items() if k != "id"} for row in rows()]
    without = write(tmp_path / "b.parquet", records)
    for order in ((with_ids, without), (without, with_ids)):
        with pytest.raises(RecordError, match="the key 'id' is missing|those before it have none"):
            list(read(list(order)))


def test_infinity_in_half_precision_is_no_reward(tmp_path: Path) -> None:
    records = [{"id": f"p{i}", "prompt": "q", "responses": ["a", "b"]} for i in range(2)]
    table = pyarrow.Table.from_pylist(records)
    for last in (65504.0, math.inf):
        rewards = pyarrow.array([[0.5, 1.0], [0.0, last]], pyarrow.list_(pyarrow.float16()))
        path = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(table.append_column("rewards", rewards), path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            groups = list(read(path, skip_bad=True))
        assert [group.rewards for group in groups] == [[0.5, 1.0], [0.0, last]][: 1 + math.isfinite(last)]


def test_empty_values_that_a_table_adds_are_not_part_of_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table has a value in every row for each key of any row: ``{"a": 1}`` is ``{"a": 1, "x": None}`` there."""

    def calling(name: str, **arguments: Any) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}

    def record(i: int, call: dict[str, Any], **more: Any) -> dict[str, Any]:
        prompt = [{"role": "user", "content": "q"}, call, {"role": "tool", "content": "2", "name": "add"}]
        responses = [[call, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]] * 2
        held = {"id": f"p{i}", "prompt": prompt, "responses": responses, "rewards": [1.0, 0.0]}
        return held | {"beside": {"x": i, f"y{i}": None}} | more

    shape = {"type": "object", "properties": {"x": {"type": "number"}}}
    tools = [[{"type": "function", "function": held}] for held in ({"name": "stop"}, {"parameters": shape})]
    records = [
        record(0, calling("add", a=1, b=2), tools=None, chat_template_kwargs={"enable_thinking": False}),
        record(1, calling("turn", x={"up": 1.5})),
        record(2, calling("stop"), tools=tools[0]),
        record(3, calling("turn", x={"down": 0.5}), tools=tools[1]),
    ]
    plain = [
        {"id": one["id"], "prompt": one["prompt"], "rewards": [1, 0], "responses": ["a", "b"]}
        for one in records
    ]
    for given in (records, plain):
        expected = [group.to_record() | {"beside": None} for group in read(given)]
        for groups, found, *_ in both(write(tmp_path / "t.parquet", given), monkeypatch):
            assert [one | {"beside": None} for one in found] == expected and groups[3].tools == given[3].get(
                "tools"
            )
    chat = "{% for m in messages %}{{ m }}{% endfor %}"
    prompts, _ = read_prompts(tmp_path / "t.parquet", Tokenize(make_tokenizer(), 98, chat_template=chat))
    assert [one.row["prompt"] for one in prompts] == [one["prompt"] for one in records]
