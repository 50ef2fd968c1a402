"""Damaged dumps: whatever stands in a file, it ends in rollouts that read, or in a short error that names the file.

Whole dumps of every trainer and engine in which some places are replaced, removed or repeated, or some bytes.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import random
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from support import fuzz
from support.made_dumps import KINDS, MORE, made, write

from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.trainers import values
from cropi.trainers.dumps import pickle_items
from cropi.trainers.dumps.auto import read_rollouts
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import group_rollouts, write_groups

ALL = KINDS | MORE
# Inputs of each kind of file: 10,000 for each reader in every run, of which verl's has three kinds of files and the
# readers behind `--source auto` share theirs.
INPUTS = {"slime": 7_500, "nemo-rl": 7_500, "verl": 2_500, "verl text": 2_500} | dict.fromkeys(MORE, 900)
BATCHES, BYTES = (
    2_500,
    {"slime": 2_500, "nemo-rl": 2_500, "verl": 1_250, "verl text": 1_250} | dict.fromkeys(MORE, 350),
)


@pytest.fixture(autouse=True)
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles as small as these are read item by item, too, as larger ones are; and a value of 10,000 parts is too
    large: to count those of `doubled` up to the million of which users are told was half of the time."""
    monkeypatch.setattr(pickle_items, "SMALL", 0)
    monkeypatch.setattr(values, "LARGEST", 10_000)


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


ARRAYS: tuple[Any, ...] = (
    torch.tensor(3), torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.tensor([1.5, float("nan")]),
    torch.zeros(0), torch.zeros(2, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 3, 4), np.array(3), np.arange(3), np.zeros((2, 2)),
    np.array([None, {"x": 1}], dtype=object), np.float32("nan"), np.int8(3), np.bool_(True), np.array(["a", "b"]), 1j,
    {1, 2}, b"", b"\xff\x00", cyclic, doubled, deep,
)  # fmt: skip


def any_object(rng: random.Random) -> Any:
    """What a pickle may hold: JSON's types, arrays, and lists that hold themselves."""
    value = rng.choice(ARRAYS) if rng.random() < 0.4 else fuzz.anything(rng)
    return value() if callable(value) else value


def ends_well(kind: str, path: Path, id_key: str | None, skip_bad: bool, written: bool) -> str:
    """What came of a file: "read", or "refused" in words. ``written``: the rollouts are written, and read back."""
    left, out = Left(skip_bad), path.parent / "out.jsonl"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rollouts = read_rollouts(path, kind.split()[0], Reading(id_key=id_key, temperature=0.7), left)
            groups = list(group_rollouts(rollouts, left=left))
            if written:
                write_groups(out, groups)
    except CropiError as error:
        text = str(error)
        assert len(text) - len(str(path)) * text.count(str(path)) < 2000, len(text)
        assert str(path) in text or "holds no rollout" in text, text
        assert text.isprintable(), text
        return "refused"
    assert sum(group.size for group in (read(out) if written else groups)) > 0
    return "read"


def ended(rng: random.Random, kind: str, path: Path, id_key: str | None) -> str:
    """`ends_well` with what a user may choose; every twentieth is written too."""
    return ends_well(
        kind, path, rng.choice([id_key, None]), skip_bad=rng.random() < 0.5, written=rng.random() < 0.05
    )


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """That files are on the disk is the store's tests' to say, and takes longer than all else here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize("kind", ALL)
def test_whole_dumps_are_read(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / ALL[kind][0], made(kind))
    for skip_bad in (False, True):
        assert ends_well(kind, path, ALL[kind][3], skip_bad, written=True) == "read"


UNWRITABLE = (
    ValueError, TypeError, AttributeError, OverflowError, KeyError, RecursionError, pyarrow.ArrowException,
)  # fmt: skip


def put(path: Path, content: Any) -> bool:
    """Write a changed dump; whether a file of its kind can hold it."""
    try:
        if path.suffix == ".pt":
            torch.save(content, path)
        elif path.suffix == ".parquet":
            write(path, content)
        else:
            lines = content if isinstance(content, list) else [content]
            path.write_text(
                "".join(f"{json.dumps(line, default=repr)}\n" for line in lines), encoding="utf-8"
            )
    except UNWRITABLE:
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("kind", ALL)
def test_damaged_dumps_end_in_words(kind: str) -> None:
    places = list(fuzz.ways(made(kind)))
    value = any_object if ALL[kind][0].endswith(".pt") else fuzz.anything

    def one(rng: random.Random, folder: Path) -> str:
        path = folder / ALL[kind][0]
        if not put(path, fuzz.changed(rng, made(kind), places, value)):
            return "cannot be written"
        return ended(rng, kind, path, ALL[kind][3])

    with fuzz.folder() as folder:
        ends = fuzz.run(INPUTS[kind], functools.partial(one, folder=folder))
    assert fuzz.repeats() or min(ends["read"], ends["refused"]) > 0.02 * ends.total(), ends


class Batch:
    """What a DataProto looks like; pickled as one, by its name."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return self.state


def batch() -> list[Any]:
    """The state of a DataProto: its table, what stands beside it, and its notes."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]] * 2 + [[1, 1, 1, 1, 1, 1]] * 2)
    table = {
        "prompts": torch.tensor([[0, 5, 6], [0, 5, 6], [7, 8, 9], [7, 8, 9]]),
        "responses": torch.tensor([[10, 1, 0]] * 2 + [[11, 12, 1]] * 2), "attention_mask": mask,
        "response_mask": mask[:, 3:], "old_log_probs": torch.full((4, 3), -0.5),
        "token_level_scores": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]] * 2),
    }  # fmt: skip
    other = {
        "extra_info": [{"index": k // 2} for k in range(4)], "reward_model": [{"ground_truth": "g"}] * 4,
        "data_source": ["sums"] * 4,
    }  # fmt: skip
    return [table, other, {"temperature": 0.9}]


@pytest.mark.long
def test_damaged_batches_of_verl_end_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("verl")
    module.Batch = Batch  # type: ignore[attr-defined]
    monkeypatch.setattr(Batch, "__module__", "verl")
    whole = batch()
    places = list(fuzz.ways(whole))

    def one(rng: random.Random, path: Path) -> str:
        content: Any = copy.deepcopy(whole)
        if rng.random() < 0.9:
            content = fuzz.changed(rng, content, places, any_object)
        try:
            if isinstance(content, list) and len(content) == 3:
                buffer = io.BytesIO()
                torch.save(content[0], buffer)
                held = buffer.getvalue()
                content = (held[: -100 * rng.randint(1, 2)] if rng.random() < 0.1 else held, *content[1:])
            with monkeypatch.context() as known:
                known.setitem(sys.modules, "verl", module)  # while it is pickled alone
                path.write_bytes(pickle.dumps(Batch(content)))
        except UNWRITABLE:
            return "cannot be written"
        return ended(rng, "verl", path, "extra_info.index")

    with fuzz.folder() as folder:
        (folder / "6").mkdir()
        ends = fuzz.run(BATCHES, functools.partial(one, path=folder / "6" / "gen_batch.dp"))
    assert fuzz.repeats() or min(ends["read"], ends["refused"]) > 0.02 * ends.total(), ends


@pytest.mark.long
@pytest.mark.parametrize("kind", ALL)
def test_damaged_bytes_end_in_words(kind: str) -> None:
    def one(rng: random.Random, path: Path, whole: bytes) -> str:
        # Half of the changes fall into the pickle, where there is one.
        pickled = whole.find(b"data.pkl") if rng.random() < 0.5 else -1
        within = (pickled, pickled + 1500) if pickled >= 0 else (0, len(whole))
        path.write_bytes(fuzz.damaged(rng, whole, *within))
        return ended(rng, kind, path, ALL[kind][3])

    with fuzz.folder() as folder:
        path = write(folder / ALL[kind][0], made(kind))
        fuzz.run(BYTES[kind], functools.partial(one, path=path, whole=path.read_bytes()))
