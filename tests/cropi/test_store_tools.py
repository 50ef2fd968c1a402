"""Stores merged, joined to larger shards, exported, and read as one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import json_lines
from test_store import DIM, MANIFEST, content, fill, vector

from cropi.cli import main
from cropi.errors import CropiError
from cropi.ranking.influence import influence
from cropi.store import SketchStore, export, merge
from cropi.store.compact import due
from cropi.store.parts import part_path, take_parts
from cropi.store.rows import RowInfo
from cropi.store.shards import Shard, shard_number


def part(path: Path, numbers: range, **changes: Any) -> SketchStore:
    """A finished store of prompts ``p<number>``; every fifth has no sketch."""
    with SketchStore.create(path, MANIFEST | changes, shard_rows=3, shard_bytes=4000) as store:
        for i in numbers:
            skipped = i % 5 == 4
            row = RowInfo(f"p{i:03d}", "skipped" if skipped else "ok", set="v" if i % 2 else "w", tokens=i)
            store.add(row, None if skipped else vector(i))
        store.finish()
    return SketchStore.open(path)


def test_small_shards_are_joined_as_they_come(tmp_path: Path) -> None:
    """Never more than a few dozen files, each of them at least as large as asked for but the last ones; same rows."""
    with SketchStore.create(tmp_path / "s", MANIFEST, shard_rows=1, shard_bytes=40_000) as store:
        for i in range(140):
            store.add(RowInfo(f"p{i:03d}"), vector(i))
            assert len(store.files()) <= 64 + 6
        sizes = [shard.size for shard in store.files()]
        assert sizes[0] >= 40_000 and len(sizes) < 70
        rows = [row.id for kept, _ in store.shards() for row in kept]
        assert rows == [f"p{i:03d}" for i in range(140)], "the order of the rows stays"
        store.finish()
    sizes = [shard.size for shard in SketchStore.open(tmp_path / "s").files()]
    assert len(sizes) == 2 and sizes[0] >= 40_000 > sizes[1]
    assert len(os.listdir(tmp_path / "s")) == 2 * 2 + 2, "what was joined is removed"
    assert all(torch.equal(v, vector(int(name[1:]))) for name, v in content(tmp_path / "s").items())


def test_parts_are_found_where_their_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script may go to another folder meanwhile: the parts of a relative path were not found, and none was taken."""
    monkeypatch.chdir(tmp_path)
    with SketchStore.create("s", MANIFEST) as whole:
        fill(part_path(Path("s"), 0), 4, MANIFEST)
        (tmp_path / "other").mkdir()
        monkeypatch.chdir("other")
        assert take_parts(whole) == 4
    assert len(content(tmp_path / "s")) == sum(row.status == "ok" for row in whole.rows()) > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4", "int1"])
def test_compacting_keeps_every_stored_number(tmp_path: Path, dtype: str) -> None:
    fill(tmp_path / "s", 22, MANIFEST | {"dtype": dtype})
    before, rows = content(tmp_path / "s"), SketchStore.open(tmp_path / "s").rows()
    with SketchStore.resume(tmp_path / "s", shard_bytes=3000) as store:
        assert store.compact() == (6, 2 if dtype.startswith("int") else 3)
        assert store.compact()[0] == store.compact()[1], "there is nothing left to do"
    after = SketchStore.open(tmp_path / "s")
    got = content(tmp_path / "s")
    assert list(got) == list(before) and all(torch.equal(got[name], before[name]) for name in before)
    assert [(row.id, row.tokens, row.norm) for row in after.rows()] == [
        (r.id, r.tokens, r.norm) for r in rows
    ]
    for shard in after.files():
        assert set(load_file(shard.path)) == set(shard.tensors), "any reader of safetensors reads it"


def test_a_kill_between_joining_and_removing_leaves_every_row_once(tmp_path: Path) -> None:
    """The files before and after together: what a kill after the commit leaves."""
    fill(tmp_path / "s", 12)
    before = content(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "old")
    with SketchStore.resume(tmp_path / "s") as store:
        assert store.compact() == (3, 1)
    for old in (tmp_path / "old").glob("shard-*"):
        shutil.copy(old, tmp_path / "s")
    (tmp_path / "s" / "shard-00001.safetensors").unlink()  # and killed while it removed them
    (tmp_path / "s" / "shard-00002.safetensors.sha256").unlink()
    assert list(content(tmp_path / "s")) == list(before)
    fill(tmp_path / "s", 0)
    names = sorted(name for name in os.listdir(tmp_path / "s") if name.startswith("shard"))
    assert names == ["shard-00003.safetensors", "shard-00003.safetensors.sha256"]
    # A shard that has the number of one that is gone, and other rows, is not dropped in silence.
    fill(tmp_path / "more", 1)
    with SketchStore.create(tmp_path / "more", MANIFEST) as store:
        store.add(RowInfo("new"), vector(0))
    for name in ("shard-00001.safetensors", "shard-00001.safetensors.sha256"):
        shutil.copy(tmp_path / "more" / name, tmp_path / "s")
    with pytest.raises(CropiError, match="shard-00001.* holds other prompts than the one that took over"):
        SketchStore.open(tmp_path / "s")


def test_no_room_to_join_shards_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> Any:
        raise CropiError("cannot write: no space left on device")

    with SketchStore.create(tmp_path / "s", MANIFEST, shard_rows=2) as store:
        for i in range(5):
            store.add(RowInfo(f"p{i:03d}"), vector(i))
        monkeypatch.setattr("cropi.store.store.join_blocks", full)
        store.finish()
        with pytest.raises(CropiError, match="no space left"):
            store.compact()
    assert len(content(tmp_path / "s")) == 5 and SketchStore.open(tmp_path / "s").expected == 5


def test_a_store_under_a_relative_path_is_read_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    part(Path("store"), range(3))
    opened = SketchStore.open("store")
    monkeypatch.chdir("other")
    assert len(opened.to_numpy()[1]) == 3 and opened.verify() == 1
    # Shards are joined, and the small ones removed, under such a path too.
    monkeypatch.chdir(tmp_path)
    part(Path("many"), range(40))
    assert len(list(Path("many").glob("*.safetensors"))) == SketchStore.open("many").verify() < 11
    # A job that goes on there keeps what it has made.
    before = content(Path("many"))
    with SketchStore.resume("many") as again:
        assert len(again) == 40 and again.verify()
    assert content(Path("many")).keys() == before.keys()
    # And writes there, wherever the script has gone.
    with SketchStore.resume("many", shard_bytes=1) as again:
        monkeypatch.chdir("other")
        for i in range(40, 44):
            again.add(RowInfo(f"p{i:03d}"), vector(i))
            again.flush()
        again.finish()
    assert not list(Path().iterdir()) and again.verify() and content(tmp_path / "many").keys() > before.keys()
    monkeypatch.chdir(tmp_path)
    with SketchStore.resume("many") as again:
        assert again.compact()[1] >= 1 and len(again) == again.expected == 44
    assert len(content(Path("many"))) == len(before) + 4 and SketchStore.open("many").verify()


def test_a_reader_of_a_store_that_is_compacted_says_so(tmp_path: Path) -> None:
    fill(tmp_path / "s", 12)
    reader = SketchStore.open(tmp_path / "s")
    with SketchStore.resume(tmp_path / "s") as store:
        store.compact()
    with pytest.raises(
        CropiError, match="shard-00000.* is gone: another process compacted or removed the store"
    ):
        list(reader.shards())


def test_merged_stores_hold_every_row_with_its_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        part(tmp_path / "a", range(0, 20)),
        part(tmp_path / "b", range(20, 33), trajectories="ff", set="v"),
    ]
    line = f"store merge {tmp_path}/out {tmp_path}/a {tmp_path}/b --shard-bytes 2000"
    assert main(line.split()) == 0 and "33 prompts of 2 stores" in capsys.readouterr().out
    out = SketchStore.open(tmp_path / "out")
    joined = SketchStore.join(parts)
    assert [(r.id, r.status, r.set) for r in out.rows()] == [(r.id, r.status, r.set) for r in joined.rows()]
    assert all(torch.equal(v, vector(int(name[1:]))) for name, v in content(tmp_path / "out").items())
    assert out.manifest["prompts"] == 33 and out.manifest["merged"] == [None, "ff"]
    assert (
        out.manifest["trajectories"] is out.manifest["set"] is None
        and out.manifest["spec"] == MANIFEST["spec"]
    )
    files = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "out").glob("shard*"))
    assert main(line.split()) == 0, "a second time changes nothing"
    assert files == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "out").glob("shard*"))
    assert main(["store", "verify", str(tmp_path / "out"), str(tmp_path / "a")]) == 0
    assert "with 33 prompts are intact" in capsys.readouterr().out
    # Stopped half-way and with other sizes: the rows that are there are not copied again.
    cut = merge(tmp_path / "cut", parts, shard_bytes=2000)
    last = max((shard.path for shard in cut.files()), key=shard_number)
    last.unlink(), Path(f"{last}.sha256").unlink()
    assert 0 < len(SketchStore.open(tmp_path / "cut")) < 33
    again = merge(tmp_path / "cut", parts)
    assert [row.id for row in again.rows()] == [row.id for row in out.rows()]
    assert all(torch.equal(v, vector(int(name[1:]))) for name, v in content(tmp_path / "cut").items())


def test_other_stores_are_not_merged_into_a_merged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where another process has merged its own between the look at the folder and the lock."""
    a, b, c = (part(tmp_path / name, range(i, i + 9)) for name, i in (("a", 0), ("b", 9), ("c", 20)))
    merge(tmp_path / "out", [a, b])
    before = content(tmp_path / "out")
    for stores in ([a, c], [a]):
        with pytest.raises(
            CropiError, match="out holds the prompt 'p009', which none of the stores .*new folder"
        ):
            merge(tmp_path / "out", stores)
    assert content(tmp_path / "out").keys() == before.keys()
    SketchStore.open(tmp_path / "out").check_finished()
    monkeypatch.setattr("cropi.store.merging.is_there", lambda path: False)
    with pytest.raises(CropiError, match="out holds the prompt 'p009'"):
        merge(tmp_path / "out", [a, c])
    assert content(tmp_path / "out").keys() == before.keys()
    merge(tmp_path / "out", [a, b]).check_finished()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    one = part(tmp_path / "a", range(0, 6), estimator={"name": "cropi"})
    other = {
        "spec": ({"spec": {"dim": DIM, "seed": 3}}, "spec.seed = 0 in the first, 3 in the second"),
        "model": ({"model": {"dtype": "float32", "weights": "bb"}}, "model.weights = 'aa' in the first"),
        "estimator": (
            {"estimator": {"name": "ppo"}},
            "estimator.name = 'cropi' in the first, 'ppo' in the second",
        ),
        "dtype": ({"dtype": "int8"}, "dtype = 'float32' in the first, 'int8' in the second"),
    }
    for name, (change, message) in other.items():
        made = part(tmp_path / name, range(6, 9), **{"estimator": {"name": "cropi"}} | change)
        with pytest.raises(CropiError, match=message):
            merge(tmp_path / "out", [one, made])
    one = SketchStore.open(tmp_path / "a")
    with pytest.raises(CropiError, match="holds the prompt 'p005', and so does another store"):
        merge(tmp_path / "out", [one, part(tmp_path / "twice", range(5, 8), estimator={"name": "cropi"})])
    with pytest.raises(CropiError, match="is one of the stores that are merged"):
        merge(tmp_path / "a", [one])
    with SketchStore.create(
        tmp_path / "half", MANIFEST | {"prompts": 3, "estimator": {"name": "cropi"}}
    ) as store:
        store.add(RowInfo("z"), vector(1))
    with pytest.raises(CropiError, match="holds 1 of 3 prompts"):
        merge(tmp_path / "out", [one, tmp_path / "half"])
    assert not (tmp_path / "out").exists(), "nothing was written before"


def test_influence_reads_several_stores_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part(tmp_path / "a", range(0, 20)), part(tmp_path / "b", range(20, 40))
    part(tmp_path / "v", range(50, 60))
    words = f"influence --valid {tmp_path}/v --out {tmp_path}/s.parquet --draws 0 --train"
    assert main([*words.split(), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    whole = part(tmp_path / "whole", range(0, 40))
    from cropi.ranking.table import read_scores

    got, want = read_scores(tmp_path / "s.parquet"), influence(whole, [SketchStore.open(tmp_path / "v")])
    assert got.ids == want.ids
    np.testing.assert_array_equal(got.table, want.table)
    assert got.meta["train"]["paths"] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    capsys.readouterr()
    assert main([*words.split(), str(tmp_path / "a"), str(tmp_path / "whole")]) == 2
    assert "whole holds the prompt 'p000', and so does another store" in capsys.readouterr().err
    with pytest.raises(CropiError, match="cannot be compared: stage = '0' in the first, '1' in the second"):
        SketchStore.join([whole, part(tmp_path / "later", range(40, 45), stage="1")])
    with pytest.raises(CropiError, match="no store"):
        SketchStore.join([])


def test_export_to_numpy_and_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part(tmp_path / "s", range(0, 23), dtype="float16")
    want = content(tmp_path / "s")
    line = f"store export {tmp_path}/s --out {tmp_path}"
    assert main(f"{line}/x.npy".split()) == 0
    matrix = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = json_lines(tmp_path / "x.npy.rows.jsonl")
    assert [row["id"] for row in rows] == sorted(want) and [row["row"] for row in rows] == list(
        range(len(want))
    )
    assert matrix.dtype == np.float32 and np.array_equal(
        matrix, torch.stack([want[r["id"]] for r in rows]).numpy()
    )
    part(tmp_path / "before", range(23, 30), dtype="float16")
    both = SketchStore.join([SketchStore.open(tmp_path / "before"), SketchStore.open(tmp_path / "s")])
    ids, held = both.to_numpy()  # in order of id, and not of the files
    want_both = want | content(tmp_path / "before")
    assert ids == sorted(want_both) and held.dtype == np.float32
    assert np.array_equal(held, torch.stack([want_both[name] for name in ids]).numpy())
    assert main(f"{line}/y --to parquet --normalise".split()) == 0
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "y").to_pydict()
    for name, vector_ in zip(table["id"], table["sketch"], strict=True):
        np.testing.assert_allclose(vector_, (want[name] / want[name].norm()).numpy(), rtol=1e-6)
    assert table["set"][table["id"].index("p003")] == "v" and len(table["id"]) == len(want)
    assert main(f"{line}/x.csv".split()) == 2
    assert (
        "x.csv: its ending names none of the formats npy, parquet; change it, or give --to"
        in capsys.readouterr().err
    )
    assert main(f"{line}/z.npy --to parquet".split()) == 2 and not (tmp_path / "z.npy").exists()
    assert "z.npy: what is written is no .npy; give a path that ends in .parquet" in capsys.readouterr().err
    with pytest.raises(CropiError, match="to must be one of npy, parquet, got 'csv'"):
        export(SketchStore.open(tmp_path / "before"), tmp_path / "x.npy", to="csv")
    with SketchStore.create(tmp_path / "none", MANIFEST) as store:
        store.add(RowInfo("z", "skipped"))
    with pytest.raises(CropiError, match="holds no sketch"):
        export(SketchStore.open(tmp_path / "none"), tmp_path / "z.npy")


def test_which_shards_are_due() -> None:
    def shards(*sizes: int) -> list[Shard]:
        return [
            Shard(Path(f"shard-{n:05d}"), [], [], {}, {}, (0,) if size < 0 else ())
            for n, size in enumerate(sizes)
        ]

    assert due(shards(*[1] * 63), 100) == [] and len(due(shards(*[1] * 64), 100)) == 64
    assert len(due(shards(*[-1] * 63, *[1] * 64), 100)) == 64
    assert len(due(shards(*[-1] * 64, *[1] * 64), 100)) == 128
