"""Rows that are written while passes go on: the same rows, and every error of the disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from test_store import MANIFEST, content, vector

from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.sketching import behind
from cropi.sketching.behind import Behind
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.rows import RowInfo
from cropi.store.store import SketchStore
from cropi_kernels import GradientSketcher, SketchSpec


def new_store(path: Path) -> SketchStore:
    return SketchStore.create(path, MANIFEST, shard_rows=1)


def add(held: Behind | SketchStore, numbers: range) -> None:
    for i in numbers:
        held.add(RowInfo(f"p{i:03d}"), vector(i))


class Disk:
    """A disk whose syncs wait until ``open`` is set, and then fail with ``error``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.error, self._sync = threading.Event(), 0, os.fsync
        self.open.set()
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, file: int) -> None:
        assert self.open.wait(10)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self._sync(file)


def test_the_disk_is_behind_by_so_many_rows_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    monkeypatch.setattr(behind, "MOST_ROWS", 3)
    with new_store(tmp_path / "s") as store, Behind(store) as held:
        disk.open.clear()
        add(held, range(3))  # nobody waits
        assert len(SketchStore.open(tmp_path / "s")) == 0
        fourth = threading.Thread(target=add, args=(held, range(3, 4)))
        fourth.start()
        fourth.join(0.2)
        assert fourth.is_alive()
        disk.open.set()
        fourth.join()
        held.wait()
        assert len(SketchStore.open(tmp_path / "s")) == 4
        add(held, range(4, 20))
    with new_store(tmp_path / "other") as store:
        add(store, range(20))
    found, want = content(tmp_path / "s"), content(tmp_path / "other")
    assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)


def test_rows_are_copied(tmp_path: Path) -> None:
    with new_store(tmp_path / "s") as store, Behind(store) as held:
        buffer = torch.ones(store.dim)
        for i in range(20):
            held.add(RowInfo(f"p{i}"), buffer.fill_(i))
    assert {key: float(row[0]) for key, row in content(tmp_path / "s").items()} == {
        f"p{i}": i for i in range(20)
    }


@pytest.mark.parametrize("how", ["at the end", "by a later call", "beside another error"])
def test_a_full_disk_ends_the_work_in_words_and_no_row_is_lost(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    words, rows = "no space left on device; free some space", 2
    if how == "beside another error":
        words, rows = "a pass failed", 1
    with new_store(tmp_path / "s") as store:
        with pytest.raises((CropiError, RuntimeError), match=words), Behind(store) as held:
            disk.error = errno.ENOSPC
            disk.open.clear()  # else the first row's error may be raised by the call that adds the second
            add(held, range(rows))
            disk.open.set()
            if how == "by a later call":
                held.wait()
                raise AssertionError("nothing was raised")
            if how == "beside another error":
                raise RuntimeError("a pass failed")
        assert len(store) == 0
        disk.error = 0
    assert sorted(content(tmp_path / "s")) == [f"p{i:03d}" for i in range(rows)]


@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_passes_go_on_while_the_disk_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, passes = Disk(monkeypatch), list[int]()
    compute: Callable[..., Any] = GradientSketcher.policy_gradient

    def counting(*args: Any, **options: Any) -> Any:
        passes.append(1)
        # Of the pass before there is a row, and it is not on the disk before three more passes have gone by.
        (disk.open.clear if len(passes) in (2, 3, 4) else disk.open.set)()
        return compute(*args, **options)

    monkeypatch.setattr(GradientSketcher, "policy_gradient", counting)
    job = SketchJob(
        [write_lines(tmp_path / "t.jsonl", make_records(24))], tmp_path / "s", SketchSpec(dim=512), shard_rows=1,
        tokens_per_batch=60, verify=False, behaviour_check="off",
    )  # fmt: skip
    sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    assert len(passes) > 5 and len(SketchStore.open(tmp_path / "s")) == 24
