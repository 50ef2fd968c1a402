"""The store: killed at any instant, damaged, full, locked, opened under other settings."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from cropi.errors import CropiError
from cropi.store import shards
from cropi.store.codec import DTYPES, decode, encode
from cropi.store.memory import MemoryStore
from cropi.store.rows import RowInfo, rows_from_json, rows_to_json
from cropi.store.store import SketchStore

DIM = 64
MANIFEST: dict[str, Any] = {
    "spec": {"dim": DIM, "seed": 0}, "hash_version": 1, "stage": "0", "model": {"dtype": "float32", "weights": "aa"},
    "parameters": {"covered": 10, "total": 10, "excluded": []}, "dtype": "float32", "notes": {"model": "here"},
}  # fmt: skip


def vector(i: int) -> torch.Tensor:
    return torch.randn(DIM, generator=torch.Generator().manual_seed(i))


def fill(path: Path, count: int, manifest: dict[str, Any] = MANIFEST, shard_rows: int = 4) -> None:
    with SketchStore.create(path, manifest, shard_rows=shard_rows) as store:
        for i in range(count):
            store.add(RowInfo(f"p{i:03d}", tokens=i, norm=float(vector(i).norm())), vector(i))


def content(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for rows, sketches in SketchStore.open(path).shards():
        found.update({row.id: sketch for row, sketch in zip(rows, sketches)})
    return found


def test_rows_come_back_with_what_is_known_of_them(tmp_path: Path) -> None:
    extra = {"ratio": 1.5}
    with SketchStore.create(tmp_path / "s", MANIFEST, shard_rows=2) as store:
        assert (
            store.add(RowInfo("b", set="v", task="sum", pass_rate=0.5, tokens=7, extra=extra), vector(1))
            == []
        )
        store.add(RowInfo("z", "skipped", "equal rewards"))
        assert store.add(RowInfo("a"), vector(2)) == ["b", "z", "a"], "a full shard is written at once"
        store.add(RowInfo("c", "failed", "NaN or infinity in its gradient"))
    store = SketchStore.open(tmp_path / "s")
    assert [row.id for row in store.rows()] == ["a", "b", "c", "z"] and len(store) == 4 and "c" in store
    by_id = {row.id: row for row in store.rows()}
    assert (by_id["b"].set, by_id["b"].task, by_id["b"].tokens, by_id["b"].extra) == ("v", "sum", 7, extra)
    assert (by_id["z"].status, by_id["z"].reason, by_id["z"].row) == ("skipped", "equal rewards", None)
    assert content(tmp_path / "s").keys() == {"a", "b"}
    assert torch.equal(content(tmp_path / "s")["a"], vector(2))
    checked = subprocess.run(
        "sha256sum -c *.sha256", shell=True, cwd=tmp_path / "s", capture_output=True, text=True
    )
    assert checked.returncode == 0 and checked.stdout.count(": OK") == store.verify() == 2


def test_shards_without_a_manifest_are_not_taken_over(tmp_path: Path) -> None:
    fill(tmp_path / "s", 5)
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(CropiError, match="holds shards but no manifest.json"):
        SketchStore.create(tmp_path / "s", MANIFEST | {"spec": {"dim": DIM, "seed": 1}})
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_each_dtype_is_within_its_bound(dtype: str) -> None:
    rows = torch.stack([vector(i) * 10.0 ** (i - 6) for i in range(12)] + [torch.zeros(DIM)]).repeat(1, 4)
    rows[:, 100] *= 1000  # one entry that would spoil a scale per row
    got = decode(encode(rows, dtype))
    largest = rows.abs().amax(1, keepdim=True)
    bound = {
        "float32": 0 * rows,
        "float16": rows.abs() * 2.0**-11
        + largest * 2.0**-25,  # half an ulp; subnormals below the row's scale
        "bfloat16": rows.abs() * 2.0**-8,
        "int8": (rows.view(13, -1, 128).abs().amax(2) / 254).repeat_interleave(128, dim=1),
        "int4": (rows.view(13, -1, 128).abs().amax(2) / 14).repeat_interleave(128, dim=1),
        "int1": torch.maximum(rows.abs(), rows.view(13, -1, 128).abs().mean(2).repeat_interleave(128, dim=1)),
    }[dtype]
    assert bool(((got - rows).abs() <= bound * (1 + 1e-5)).all())
    assert torch.equal(got[-1], rows[-1])
    assert decode(encode(rows[:0], dtype)).shape == (0, rows.shape[1]), "a shard of skipped prompts alone"
    assert torch.equal(decode(encode(rows[:, :3].contiguous(), "int8"))[-1], rows[-1, :3]), (
        "a dim below one block"
    )


def test_packed_entries_are_those_that_were_packed() -> None:
    """4 bits: round(x / scale) with scale max / 7; 1 bit: the sign times the mean magnitude of the block."""
    rows = torch.stack([vector(i) for i in range(5)]).repeat(1, 4)
    blocks = rows.view(5, 2, 128)
    four = (blocks.abs().amax(2, keepdim=True) / 7).float()
    torch.testing.assert_close(
        decode(encode(rows, "int4")), ((blocks / four).round() * four).view(5, 256), rtol=1e-6, atol=0
    )
    want = blocks.sign() * blocks.abs().mean(2, keepdim=True)
    torch.testing.assert_close(decode(encode(rows, "int1")), want.view(5, 256), rtol=1e-6, atol=0)
    assert encode(rows, "int4")["int4"].shape == (5, 128) and encode(rows, "int1")["int1"].shape == (5, 32)
    with pytest.raises(CropiError, match="dtype int4 needs a dim that is a multiple of 8, got 12; take int8"):
        MemoryStore(MANIFEST | {"spec": {"dim": 12}, "dtype": "int4"})


def test_what_is_reported_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut takes what was not synced: content before its rename, and the folder after the last one."""
    synced: dict[int, int] = {}  # size by inode, at its last sync
    renamed_since: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size
        if stat.S_ISDIR(found.st_mode):
            renamed_since.clear()

    def renaming(source: Path, target: Path) -> None:
        found = os.stat(source)
        assert synced.get(found.st_ino) == found.st_size, f"{target} is renamed before its content is synced"
        replace(source, target)
        renamed_since.append(str(target))

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    with SketchStore.create(tmp_path / "s", MANIFEST, shard_rows=2) as store:
        store.add(RowInfo("a"), vector(0))
        assert store.add(RowInfo("b"), vector(1)) == ["a", "b"]
        assert not renamed_since, "the folder is synced last"
    files = [path for path in (tmp_path / "s").iterdir() if path.name != ".lock"]
    assert len(files) == 3 and all(synced[path.stat().st_ino] == path.stat().st_size for path in files)


def test_same_job_is_continued_and_notes_may_differ(tmp_path: Path) -> None:
    fill(tmp_path / "s", 5)
    with SketchStore.create(tmp_path / "s", MANIFEST | {"notes": {"model": "elsewhere"}}) as store:
        assert len(store) == 5
        with pytest.raises(CropiError, match="already has the prompt 'p000'"):
            store.add(RowInfo("p000"), vector(0))
        store.add(RowInfo("new"), vector(9))
        with pytest.raises(CropiError, match="already has the prompt 'new'"):
            store.add(RowInfo("new"), vector(9))
        with pytest.raises(CropiError, match=r"shape \[64\] is expected, got \[3\]"):
            store.add(RowInfo("short"), torch.zeros(3))
        # Taken, it kept the rows beside it from being written.
        for name in (
            {"id": "b\ud83d"},
            {"set": "\udfff"},
            {"task": "x\ud800"},
            {"reason": "\ud800"},
            {"extra": {"a": "\udc00"}},
        ):
            with pytest.raises(CropiError, match="has half of a surrogate pair"):
                store.add(RowInfo(**{"id": "b"} | name), vector(1))
        with pytest.raises(CropiError, match=r"the extra .* of the prompt 'b' cannot be written as JSON"):
            store.add(RowInfo("b", extra={"a": vector(1)}), vector(1))
    assert len(SketchStore.open(tmp_path / "s")) == 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"spec": {"dim": DIM, "seed": 1}}, "spec.seed = 0, but this run has 1"),
        (
            {"model": {"dtype": "float32", "weights": "bb"}},
            "model.weights = 'aa' (model 'here'), but this run has 'bb'",
        ),
        ({"stage": "1"}, "stage = '0', but this run has '1'"),
        ({"dtype": "int8"}, "dtype = 'float32', but this run has 'int8'"),
        (
            {"trajectories": "ff"},
            "trajectories = None, but this run has 'ff'; give another --out, or run with the same files (new prompts",
        ),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    fill(tmp_path / "s", 2)
    with pytest.raises(CropiError, match=re.escape(named)):
        SketchStore.create(tmp_path / "s", MANIFEST | change)
    fill(tmp_path / "s", 2 - 2)  # the refusal has released the lock


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    fill(tmp_path / "s", 12)
    shard = tmp_path / "s" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    store = SketchStore.open(tmp_path / "s")
    for read in (store.verify, lambda: list(store.shards())):
        with pytest.raises(
            CropiError, match="shard-00001.safetensors is damaged: its checksum does not match"
        ):
            read()
    shard.write_bytes(whole[:100])
    with pytest.raises(CropiError, match="shard-00001.safetensors is damaged: its header cannot be read"):
        SketchStore.open(tmp_path / "s")
    # The remedy of the message: without the shard, its prompts alone are missing.
    shard.unlink()
    Path(f"{shard}.sha256").unlink()
    assert sorted({f"p{i:03d}" for i in range(12)} - set(content(tmp_path / "s"))) == [
        "p004",
        "p005",
        "p006",
        "p007",
    ]
    with SketchStore.create(tmp_path / "s", MANIFEST) as store:
        for i in range(4, 8):
            store.add(RowInfo(f"p{i:03d}"), vector(i))
    assert all(torch.equal(sketch, vector(int(name[1:]))) for name, sketch in content(tmp_path / "s").items())
    Path(f"{shard}".replace("00001", "00000") + ".sha256").unlink()
    with pytest.raises(CropiError, match="shard-00000.safetensors is damaged: its checksum file is missing"):
        SketchStore.open(tmp_path / "s")


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="there is no sketch store"):
        SketchStore.open(tmp_path / "none")
    (tmp_path / "run" / "sketches" / "math").mkdir(parents=True)
    (tmp_path / "run" / "sketches" / "math" / "manifest.json").write_text("{}")
    with pytest.raises(
        CropiError, match="is the folder of a run, .*give one that it holds: .*sketches/math$"
    ):
        SketchStore.open(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(CropiError, match="is not empty and holds no manifest.json"):
        SketchStore.create(tmp_path / "other", MANIFEST)
    with pytest.raises(CropiError, match="is a file; give a folder"):
        SketchStore.create(tmp_path / "other" / "thesis.tex", MANIFEST)
    with pytest.raises(CropiError, match="dtype must be one of float32, .*, int1, got 'int2'"):
        SketchStore.create(tmp_path / "new", MANIFEST | {"dtype": "int2"})
    fill(tmp_path / "s", 1)
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CropiError, match="store format 99; this release reads format 1"):
        SketchStore.open(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(CropiError, match="manifest.json is damaged"):
        SketchStore.open(tmp_path / "s")


def test_one_writer_at_a_time_and_readers_always(tmp_path: Path) -> None:
    fill(tmp_path / "s", 4)
    with SketchStore.create(tmp_path / "s", MANIFEST) as writer:
        with pytest.raises(CropiError, match=r"another process \(pid \d+\) is writing to the store"):
            SketchStore.create(tmp_path / "s", MANIFEST)
        writer.add(RowInfo("late"), vector(1))
        reader = SketchStore.open(tmp_path / "s")
        assert len(reader) == 4
        reader.add(RowInfo("no"), vector(1))
        with pytest.raises(CropiError, match="open for reading only"):
            reader.flush()
    assert len(SketchStore.open(tmp_path / "s")) == 5


def test_reading_order_does_not_depend_on_writing_order(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(20)]
    for seed, folder in enumerate(("one", "two")):
        shuffled = random.Random(seed).sample(names, len(names))
        with SketchStore.create(tmp_path / folder, MANIFEST, shard_rows=3 + seed) as store:
            for name in shuffled:
                store.add(RowInfo(name), vector(int(name[1:])))
    one, two = (SketchStore.open(tmp_path / folder) for folder in ("one", "two"))
    assert [row.id for row in one.rows()] == [row.id for row in two.rows()]


def test_shards_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    """The name of shard 100000 is longer, and comes before that of 99999."""
    store = tmp_path / "s"
    fill(store, 8)
    for old, new in (("00000", "99999"), ("00001", "100000")):
        for end in ("safetensors", "safetensors.sha256"):
            (store / f"shard-{old}.{end}").rename(store / f"shard-{new}.{end}")
    assert [rows[0].id for rows, _ in SketchStore.open(store).shards()] == ["p000", "p004"]
    (store / "shard-100000.safetensors.sha256").unlink()  # killed inside the last shard: no damage
    assert len(SketchStore.open(store)) == 4
    fill(store, 0)
    assert not (store / "shard-100000.safetensors").exists()
    (store / "shard-00000 (copy).safetensors").write_bytes(b"")
    with pytest.raises(CropiError, match="copy.*is not a shard of this store .*; take it out"):
        SketchStore.open(store)


def shard_of(folder: Path, number: int = 0) -> tuple[Path, Path]:
    path = folder / f"shard-{number:05d}.safetensors"
    return path, Path(f"{path}.sha256")


def copy_shard(source: Path, number: int, target: Path, new: int) -> None:
    for old, path in zip(shard_of(source, number), shard_of(target, new), strict=True):
        path.write_bytes(old.read_bytes())


@pytest.mark.parametrize(
    "change", [{"model": {"dtype": "float32", "weights": "bb"}}, {"trajectories": "ff"}, {"stage": "1"}]
)
def test_a_shard_of_another_store_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """With its own checksum beside it: sketches of other weights would be compared as if they were this model's."""
    fill(tmp_path / "s", 8)
    fill(tmp_path / "other", 8, MANIFEST | change)
    copy_shard(tmp_path / "other", 1, tmp_path / "s", 1)
    for opening in (SketchStore.open, lambda path: SketchStore.create(path, MANIFEST)):
        with pytest.raises(CropiError, match="shard-00001.* belongs to another store"):
            opening(tmp_path / "s")


def test_the_number_of_prompts_is_never_lowered(tmp_path: Path) -> None:
    """By a job with a smaller --limit; it would call an unfinished store whole."""
    for prompts, expected in ((5, 5), (2, 5), (7, 7)):
        with SketchStore.create(tmp_path / "s", MANIFEST | {"prompts": prompts}) as store:
            if "p000" not in store:
                store.add(RowInfo("p000"), vector(0))
        opened = SketchStore.open(tmp_path / "s")
        assert opened.expected == expected
        with pytest.raises(CropiError, match=f"holds 1 of {expected} prompts"):
            opened.check_finished()


def test_a_shard_twice_or_too_many_rows_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "s", 4, MANIFEST | {"prompts": 4})
    copy_shard(tmp_path / "s", 0, tmp_path / "s", 1)
    with pytest.raises(CropiError, match="shard-00001.* holds the prompt 'p000', and so does another shard"):
        SketchStore.open(tmp_path / "s")
    with SketchStore.create(tmp_path / "more", MANIFEST) as store:
        for i in range(4, 8):
            store.add(RowInfo(f"p{i:03d}"), vector(i))
    copy_shard(tmp_path / "more", 0, tmp_path / "s", 1)
    for opening in (SketchStore.open, lambda path: SketchStore.create(path, MANIFEST | {"prompts": 4})):
        with pytest.raises(CropiError, match="holds 8 prompts, but its manifest says 4: a shard of another"):
            opening(tmp_path / "s")


@pytest.mark.long
def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """Each edit of one byte is an error, or leaves everything that the manifest says as it was."""
    fill(tmp_path / "s", 2, MANIFEST | {"prompts": 2})
    file = tmp_path / "s" / "manifest.json"
    whole, before = file.read_bytes(), SketchStore.open(tmp_path / "s").manifest
    found = 0
    for place in range(len(whole)):
        for new in (whole[place] ^ 1, ord("0"), ord(" ")):
            if new == whole[place]:
                continue
            file.write_bytes(whole[:place] + bytes([new]) + whole[place + 1 :])
            try:
                manifest = SketchStore.open(tmp_path / "s").manifest
            except CropiError:
                found += 1
            else:  # spaces between values, and the checksum's own name
                assert {key: manifest[key] for key in before} == before, (place, new)
    assert found > 2 * len(whole), found


@pytest.mark.long
def test_every_byte_of_a_shard_of_skipped_prompts_counts(tmp_path: Path) -> None:
    """Such a shard has no sketches, so nobody reads the file whole: its header has a checksum of its own."""
    with SketchStore.create(tmp_path / "s", MANIFEST) as store:
        for i in range(3):
            store.add(RowInfo(f"p{i}", "skipped", "equal rewards", set="a", pass_rate=0.25))
    shard, _ = shard_of(tmp_path / "s")
    whole, before = shard.read_bytes(), SketchStore.open(tmp_path / "s").rows()
    # Readers of such files map what is behind the header as numbers of up to 8 bytes.
    assert all(len(shards._sealed(b" " * n)) % 8 == 0 for n in range(8))
    for place in range(len(whole)):
        for new in (whole[place] ^ 1, whole[place] ^ 2, ord("9")):
            shard.write_bytes(whole[:place] + bytes([new]) + whole[place + 1 :])
            try:
                rows = SketchStore.open(tmp_path / "s").rows()
            except CropiError:
                continue
            assert rows == before, (place, new)


def test_a_folder_that_is_removed_under_a_running_job_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(CropiError, match="was removed or replaced while this job writes to it"):
        with SketchStore.create(tmp_path / "s", MANIFEST, shard_rows=2) as store:
            store.add(RowInfo("a"), vector(0))
            shutil.rmtree(tmp_path / "s")
            fill(tmp_path / "s", 1)
            store.add(RowInfo("b"), vector(1))
    assert [row.id for row in SketchStore.open(tmp_path / "s").rows()] == ["p000"], "the other's is untouched"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(CropiError, match=r"the file system of .* gives no file locks \(No locks available\)"):
        SketchStore.create(tmp_path / "s", MANIFEST)


def test_a_status_is_one_string_however_many_rows_have_it() -> None:
    """A million rows are read: a string each would take 50 MB. One that is not known is read as it stands."""
    pytest.importorskip("msgspec")
    rows = [RowInfo("a", "ok"), RowInfo("b", "skipped", "equal rewards"), RowInfo("c", "ok")]
    read = rows_from_json(rows_to_json(rows))
    assert read == rows and read[0].status is read[2].status
    assert rows_from_json(rows_to_json(rows).replace("skipped", "other"))[1].status == "other"
