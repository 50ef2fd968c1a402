"""Files that are changed anywhere and sealed again, as a damaged disk never leaves them but a hand or another program
may: each is read, or ends in words. Of stores this is test_store_fuzz.py."""

from __future__ import annotations

import copy
import json
import random
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support import fuzz, sealed_files
from support.sealed_files import Kind, made_scores, put_summed

from cropi.cli import info
from cropi.curriculum.learnt import nothing_learnt, read_training
from cropi.errors import CropiError
from cropi.options import Selecting
from cropi.ranking import selection_files, table
from cropi.ranking.selection import select
from cropi.ranking.selector import Selector
from cropi.ranking.uncertainty import Uncertainty
from cropi.report import folder as folders
from cropi_kernels import SketchSpec

pytestmark = pytest.mark.long


# ------------------------------------------------------------------------------------------------ tables of scores
COLUMNS = (
    lambda rng, n: pyarrow.array([None] * n),
    lambda rng, n: pyarrow.array([whole_text(rng) or None for _ in range(n)], pyarrow.string()),
    lambda rng, n: pyarrow.array(["same"] * n).dictionary_encode(),
    lambda rng, n: pyarrow.array([rng.choice((None, 0.5, -1e308, np.nan, np.inf)) for _ in range(n)]),
    lambda rng, n: pyarrow.array([rng.choice((None, 0, -3, 2**62)) for _ in range(n)], pyarrow.int64()),
    lambda rng, n: pyarrow.array([2**64 - 1] * n, pyarrow.uint64()),
    lambda rng, n: pyarrow.array([0.25] * n, pyarrow.float32()),
    lambda rng, n: pyarrow.array([True, None] * (n // 2), pyarrow.bool_()),
    lambda rng, n: pyarrow.array([[1.0], None] * (n // 2), pyarrow.list_(pyarrow.float64())),
    lambda rng, n: pyarrow.array([{"a": 1}] * n),
    lambda rng, n: pyarrow.array([b"\xff"] * n),
    lambda rng, n: pyarrow.array([0] * n, pyarrow.timestamp("us")),
    lambda rng, n: pyarrow.array(["1" * 300] * n).cast(pyarrow.large_string()),
)  # fmt: skip


def whole_text(rng: random.Random) -> str:
    return fuzz.text(rng).encode("utf-8", "replace").decode()


def changed_table(rng: random.Random, whole: Any, meta: Any) -> Any:
    """One to three columns of another kind, renamed, left out, or there twice; or other rows."""
    for _ in range(rng.randint(1, 3)):
        if not whole.num_columns:
            break
        place, how = rng.randrange(whole.num_columns), rng.randrange(7)
        name = whole.column_names[place]
        if how == 0:
            whole = whole.remove_column(place)
        elif how == 1:
            other = rng.choice(
                [*whole.column_names, "score[]", "score[\ud800]".encode("utf-8", "replace").decode(), "x"]
            )
            whole = whole.rename_columns(
                [*whole.column_names[:place], other, *whole.column_names[place + 1 :]]
            )
        elif how == 2:
            whole = whole.append_column(name, whole.column(place))
        elif how == 3:
            whole = rng.choice(
                (
                    whole.slice(0, 0),
                    pyarrow.concat_tables([whole, whole]),
                    pyarrow.concat_tables([whole.slice(0, 1)] * 12),
                )
            )
        elif whole.num_rows == 12:
            whole = whole.set_column(place, name, rng.choice(COLUMNS)(rng, 12))
    text = json.dumps(meta)
    kinds = {"cropi": text, "cropi_sha256": table._sealed(whole.schema, whole.num_rows, text)}
    return whole.replace_schema_metadata(kinds)


def test_any_table_of_scores_is_read_or_ends_in_words(tmp_path: Path) -> None:
    file, scores = tmp_path / table.SCORES, made_scores()
    table.write_scores(file, scores)
    selection_files.write_selection(
        tmp_path / "selected.jsonl", scores, select(scores, Selecting(fraction=0.25))
    )
    right, whole = scores.meta, pyarrow.parquet.read_table(file)
    places = list(fuzz.ways(right))
    # What is wrong with a table that can be read is said of the option that asks for it.
    names = (
        file.name,
        "selected.jsonl",
        "the scores have no",
        "the scores hold no",
        "leave out per",
        "weights: ",
    )

    def one(rng: random.Random) -> str:
        meta = fuzz.changed(rng, copy.deepcopy(right), places) if rng.random() < 0.5 else right
        other = changed_table(rng, whole, meta)
        pyarrow.parquet.write_table(other, file, write_page_checksum=True)
        return fuzz.outcome(partial(read_all, file), *names)

    ends = fuzz.run(500, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["taken"] > 15), ends


def read_all(file: Path) -> None:
    scores = table.read_scores(file)
    for options in (
        {},
        {"confidence": 0.9},
        {"method": "learnability"},
        {"per": "task"},
        {"method": "p_selected"},  # the last one has weights
    ):
        chosen = select(scores, Selecting(fraction=0.25, **options))
        assert len(set(chosen.ids)) == len(chosen.ids)
    selection_files.write_selection(file.parent / "other.jsonl", scores, chosen)
    repr(scores), scores._repr_html_(), str(Uncertainty.of(scores)), chosen.weights
    info._scores(file)
    folders.report_folder(file.parent)


# ------------------------------------------------------------------------------------------------ JSON
def training(folder: Path) -> Kind:
    """What a trainer says of its training: another one is left out, with a warning."""
    right = {"reward": [0.2, 0.1], "equal_rewards": [0.1, 0.99], "steps": [1, 9]}

    def back() -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = read_training(folder)
        assert bool(found) != bool(told)
        nothing_learnt([{"stage": 0, **found}])
        if told:
            raise CropiError(str(told[0].message))

    file = folder / "training.json"
    return Kind(file, right, lambda values: put_summed(file, json.dumps(values).encode()), back)


KINDS = (*sealed_files.KINDS, training)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_values_are_read_or_end_in_words(kind: Callable[[Path], Kind]) -> None:
    with fuzz.folder() as folder:
        made = kind(folder)
        made.put(made.right)
        made.back()
        places = list(fuzz.ways(made.right))

        def one(rng: random.Random) -> str:
            made.put(fuzz.changed(rng, copy.deepcopy(made.right), places))
            return fuzz.outcome(made.back, *(made.names or (str(folder),)))

        ends = fuzz.run(400, one)
    assert fuzz.repeats() or (ends["words"] > 40 and ends["taken"] > 10), ends


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_values_inside_one_another_without_end(kind: Callable[[Path], Kind], tmp_path: Path) -> None:
    """Python's reader of JSON gives up below a thousand brackets."""
    made = kind(tmp_path)
    deep = b"[" * 100_000
    if made.file.suffix == ".part":
        deep += b"\t%08x\n" % zlib.crc32(deep)
    put_summed(made.file, deep)
    assert fuzz.outcome(made.back, *(made.names or (str(tmp_path),))) == "words"


# ------------------------------------------------------------------------------------------------ a selector
def test_any_state_of_a_selector_is_taken_or_ends_in_words() -> None:
    spec = SketchSpec(dim=64)

    def selector() -> Selector:
        return Selector(["a", "b", "c"], spec, dim=64, bits=16)

    made = selector()
    made.update(["a", "b"], torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), 1)
    made.refresh(torch.ones(2, 64), ["x", "y"])
    right = made.state_dict()
    places = list(fuzz.ways(right))

    def value(rng: random.Random) -> Any:
        if rng.random() < 0.5:
            return fuzz.anything(rng)
        kinds = (torch.float32, torch.float64, torch.int64, torch.int8, torch.bool)
        return torch.zeros([rng.randint(0, 4) for _ in range(rng.randint(0, 3))], dtype=rng.choice(kinds))

    def back(state: Any) -> None:
        other = selector()
        other.load_state_dict(state)
        other.update(["c"], torch.ones(1, 64), other.step + 1)
        other.scores(["a"]), other.next(2, other.step)

    names = ("the state", "a state of a Selector", "the pool")

    def one(rng: random.Random) -> str:
        return fuzz.outcome(partial(back, fuzz.changed(rng, copy.deepcopy(right), places, value)), *names)

    ends = fuzz.run(600, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["taken"] > 5), ends
