"""Stores whose files are changed anywhere and sealed again, as a damaged disk never leaves them but a hand or another
program may: each is read, or ends in words."""

from __future__ import annotations

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import fuzz
from support.places import fill
from support.sealed_files import put_summed

from cropi.errors import CropiError
from cropi.options import Selecting
from cropi.ranking.influence import influence
from cropi.ranking.selection import select
from cropi.ranking.selection_files import write_selection
from cropi.ranking.table import SCORES, read_scores, write_scores
from cropi.report.folder import _run
from cropi.report.html import _composition, _policy
from cropi.store import shards
from cropi.store.manifest import MANIFEST, job_fingerprint, manifest_text
from cropi.store.store import SketchStore

pytestmark = pytest.mark.long

INPUTS = 3_000


def read_all(path: Path) -> None:
    """Everything that is read of a store."""
    store = SketchStore.open(path)
    for _, sketches in store.shards():
        assert sketches.ndim == 2
    store.verify()
    repr(store), store.dim, store.groups, len(store)
    scores = influence(store, [store])
    write_scores(path.parent / SCORES, scores)
    selected = path.parent / "selected.jsonl"
    chosen = select(read_scores(path.parent / SCORES), Selecting(fraction=0.5))
    write_selection(selected, scores, chosen)
    _run(scores, chosen, store), _policy(scores, np.arange(1))
    _composition(scores, np.arange(len(scores)), np.arange(1))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    fill(tmp_path / "store", "p", 3)
    return tmp_path / "store"


def test_any_manifest_is_read_or_ends_in_words(made: Path) -> None:
    file, (shard,) = made / MANIFEST, made.glob("shard-*.safetensors")
    right = json.loads(file.read_text())
    right.pop("checksum")
    right |= {"groups": [{"name": "a", "patterns": ["*"]}], "share": {"number": 1, "count": 1, "prompts": 3}}
    places = list(fuzz.ways(right))
    content, data = taken_apart(shard.read_bytes())

    def one(rng: random.Random) -> str:
        changed = fuzz.changed(rng, copy.deepcopy(right), places)
        text = json.dumps(changed)
        if isinstance(changed, dict):
            text = manifest_text(changed)
            mine = copy.deepcopy(content)
            mine["header"]["__metadata__"]["job"] = job_fingerprint(changed)
            put_summed(shard, sealed(mine, data))
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        return fuzz.outcome(partial(read_all, made))

    ends = fuzz.run(INPUTS, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["taken"] > 100), ends


def test_any_header_of_a_shard_is_read_or_ends_in_words(made: Path) -> None:
    (file,) = made.glob("shard-*.safetensors")
    right, data = taken_apart(file.read_bytes())
    places = [way for way in fuzz.ways(right) if len(way) > 1]

    def one(rng: random.Random) -> str:
        put_summed(file, sealed(fuzz.changed(rng, copy.deepcopy(right), places), data))
        return fuzz.outcome(partial(read_all, made))

    ends = fuzz.run(INPUTS, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["taken"] > 10), ends


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("seal", "the checksum of its header does not match"),
        ("job", "belongs to another store"),
        ("checks", "its header cannot be read"),
    ],
)
def test_a_shard_that_lacks_what_is_checked_is_refused(made: Path, missing: str, words: str) -> None:
    (file,) = made.glob("shard-*.safetensors")
    content, data = taken_apart(file.read_bytes())
    put_summed(file, sealed(copy.deepcopy(content), data))
    read_all(made)
    content.pop(missing, None)
    content["header"]["__metadata__"].pop(missing, None)
    whole = sealed(content, data)
    put_summed(file, whole if missing != "seal" else whole.replace(b'"seal"', b'"note"', 1))
    with pytest.raises(CropiError, match=words):
        read_all(made)


def taken_apart(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a shard, with what is JSON inside of it, and the tensors' bytes."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    inside = {key: json.loads(header["__metadata__"].pop(key)) for key in ("rows", "checks")}
    del header["__metadata__"]["seal"]
    return {"header": header, **inside}, whole[8 + size :]


def sealed(content: dict[str, Any], data: bytes) -> bytes:
    header = content["header"]
    about = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(about, dict):
        about = {"job": about}
    about |= {key: json.dumps(content[key]) for key in ("rows", "checks") if key in content}
    rest = json.dumps(about)[1:] + ", " + json.dumps(header)[1:]
    return shards._sealed(rest.encode("utf-8", "surrogatepass")) + data
