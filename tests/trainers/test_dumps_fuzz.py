"""Damaged dumps: whatever stands in a file, it ends in a result that reads, or in a short error that names the file.

Structure-aware: whole dumps in which some places are replaced, removed or repeated. The same 300 inputs for each kind
of file in every run; ``CROPI_FUZZ`` is another number, of other inputs in every run.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import fuzz
from support.made_dumps import KINDS, made, write

from cropi.data.readers import read_trajectories
from cropi.errors import CropiError
from cropi.trainers.dumps import nemo_rl, slime, verl
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import group_rollouts, write_groups

INPUTS = 300
TEXTS = (
    "",
    "x",
    "0",
    "nan",
    "\ud800",
    "\u202e\x1b[31m",
    "é" * 50,
    "y" * 10_000,
    "aborted",
    "a_0_1",
    "a_0_0",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    5,
    2**31,
    2**63,
    -(2**70),
    10**400,
    0.0,
    0.5,
    1e31,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.binary(max_size=4)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


def cyclic() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def doubled() -> list[Any]:
    """2^40 parts, if every path is followed."""
    value: list[Any] = [1]
    for _ in range(40):
        value = [value, value]
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(500):
        value = [value]
    return value


ARRAYS = st.sampled_from([
    torch.tensor(3), torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.tensor([1.5, math.nan]), torch.zeros(0),
    torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.bfloat16),
    torch.zeros(2, 3, 4), np.array(3), np.arange(3), np.zeros((2, 2)), np.array([None, {"x": 1}], dtype=object),
    np.float32(math.nan), np.int8(3), np.bool_(True), np.array(["a", "b"]), 1j, {1, 2}, cyclic, doubled, deep,
]).map(lambda value: value() if callable(value) else value)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield from places(inner, (*path, key))


def holds(holder: Any, key: Any) -> bool:
    """Whether ``places`` leads to ``key`` inside; a change before may have put something else there."""
    if isinstance(holder, dict):
        return key in holder
    return isinstance(holder, list) and isinstance(key, int) and key < len(holder)


def mutate(content: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """``content`` with one place replaced, removed or repeated; as it is, if the place is gone by now."""
    if not path:
        return value
    holder = content
    for key in path[:-1]:
        if not holds(holder, key):
            return content
        holder = holder[key]
    key = path[-1]
    if not holds(holder, key):
        return content
    if how == "remove":
        del holder[key]
    elif how == "repeat" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif how == "wrap":
        holder[key] = [holder[key]]
    elif how == "swap" and isinstance(holder, dict):
        holder[key] = holder[next(iter(holder))]
    else:
        holder[key] = value
    return content


HOW = st.sampled_from(["put", "put", "put", "remove", "repeat", "wrap", "swap"])
READERS: dict[str, Callable[..., Any]] = {
    "slime": slime.read_dump, "nemo-rl": nemo_rl.read_dump, "verl": verl.read_dump, "verl text": verl.read_dump,
}  # fmt: skip


def ends_well(kind: str, path: Path, id_key: str | None) -> str:
    """What came of a file: "read", or "refused" in words."""
    outcome = "refused"
    for skip_bad in (False, True):
        left, out = Left(skip_bad), path.parent / "out.jsonl"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rollouts = READERS[kind](path, Reading(id_key=id_key, temperature=0.7), left)
                write_groups(out, group_rollouts(rollouts, left=left))
        except CropiError as error:
            text = str(error)
            assert len(text) - len(str(path)) * text.count(str(path)) < 2000, len(text)
            assert str(path) in text or "holds no rollout" in text, text
            assert text.isprintable(), text
            continue
        assert sum(group.size for group in read_trajectories(out)) > 0
        outcome = "read"
    return outcome


@pytest.mark.parametrize("kind", KINDS)
def test_whole_dumps_are_read(kind: str, tmp_path: Path) -> None:
    assert ends_well(kind, write(tmp_path / KINDS[kind][0], made(kind)), KINDS[kind][3]) == "read"


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_dumps_end_in_words(kind: str, tmp_path: Path) -> None:
    ways = list(places(made(kind)))
    values = PLAIN if KINDS[kind][0].endswith("jsonl") else st.one_of(PLAIN, ARRAYS)
    outcomes = set()

    @fuzz.inputs(INPUTS)
    @given(
        st.lists(st.tuples(st.sampled_from(ways), HOW, values), min_size=1, max_size=3),
        st.sampled_from([KINDS[kind][3], None]),
    )
    def run(changes: list[tuple[tuple[Any, ...], str, Any]], id_key: str | None) -> None:
        content = made(kind)
        for path, how, value in changes:
            content = mutate(content, path, how, value)
        file = tmp_path / KINDS[kind][0]
        if file.suffix == ".pt":
            torch.save(content, file)
        else:
            lines = content if isinstance(content, list) else [content]
            try:
                file.write_text("".join(f"{json.dumps(line, default=repr)}\n" for line in lines))
            except (ValueError, TypeError):  # a number of too many digits
                return
        outcomes.add(ends_well(kind, file, id_key))

    run()
    assert outcomes == {"read", "refused"}, "the changes are too small or too large to say anything"


class Batch:
    """What a DataProto looks like; pickled as one, by its name."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return self.state


@pytest.mark.long
def test_damaged_batches_of_verl_end_in_words(tmp_path: Path) -> None:
    import io
    import sys
    import types

    prompts = torch.tensor([[0, 5, 6], [0, 5, 6], [7, 8, 9], [7, 8, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]] * 2 + [[1, 1, 1, 1, 1, 1]] * 2)
    table = {
        "prompts": prompts, "responses": torch.tensor([[10, 1, 0]] * 2 + [[11, 12, 1]] * 2), "attention_mask": mask,
        "response_mask": mask[:, 3:], "old_log_probs": torch.full((4, 3), -0.5),
        "token_level_scores": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]] * 2),
    }  # fmt: skip
    other = {
        "extra_info": [{"index": k // 2} for k in range(4)], "reward_model": [{"ground_truth": "g"}] * 4,
        "data_source": ["sums"] * 4,
    }  # fmt: skip
    module = types.ModuleType("verl")
    module.Batch = Batch  # type: ignore[attr-defined]
    Batch.__module__ = "verl"
    (tmp_path / "6").mkdir()
    path = tmp_path / "6" / "gen_batch.dp"
    outcomes = set()
    ways = list(places([table, other, {"temperature": 0.9}]))

    @fuzz.inputs(INPUTS)
    @given(
        st.lists(st.tuples(st.sampled_from(ways), HOW, st.one_of(PLAIN, ARRAYS)), max_size=3),
        st.integers(0, 20),
    )
    def run(changes: list[tuple[tuple[Any, ...], str, Any]], broken: int) -> None:
        import copy

        content: Any = copy.deepcopy([table, other, {"temperature": 0.9}])
        for way, how, value in changes:
            content = mutate(content, way, how, value)
        if isinstance(content, list) and len(content) == 3:
            buffer = io.BytesIO()
            torch.save(content[0], buffer)
            held = buffer.getvalue()
            content = (held[: -100 * broken] if broken < 3 and broken else held, *content[1:])
        sys.modules["verl"] = module
        try:
            path.write_bytes(pickle.dumps(Batch(content)))
        finally:
            del sys.modules["verl"]
        outcomes.add(ends_well("verl", path, "extra_info.index"))

    run()
    assert outcomes == {"read", "refused"}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_end_in_words(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / KINDS[kind][0], made(kind))
    whole = file.read_bytes()

    @fuzz.inputs(INPUTS // 2, share=0.25)
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=6), st.booleans(), st.booleans())
    def run(at: int, data: bytes, cut: bool, inside: bool) -> None:
        if inside and b"data.pkl" in whole:  # half of the changes fall into the pickle
            at = whole.index(b"data.pkl") + at % 1500
        file.write_bytes(whole[:at] + data + (b"" if cut else whole[at + len(data) :]))
        ends_well(kind, file, KINDS[kind][3])

    run()
