"""Work that is killed by SIGKILL at random instants, again and again, until it gets through.

    OMP_NUM_THREADS=1 python tests/support/kills.py FOLDER 100 [place ...]

Every place is work that writes. It runs in a child, is killed at a random instant of the time that it takes, and starts
again; after each kill what it had stored must be there, every row once and with the right bits, and files either
absent or whole. When it gets through, the result must be that of work that nobody disturbed; then it begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cropi.cli import main
from cropi.model.policy import Policy
from cropi.ranking.table import read_scores
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store import SketchStore, merge
from cropi.store.rows import RowInfo
from cropi_kernels import SketchSpec
from support import made_curriculum
from support.made_data import make_model, make_records, make_tokenizer, write_lines

DIM = 64
MANIFEST = {"spec": {"dim": DIM}, "stage": "0", "model": {"weights": "made up"}, "dtype": "float16"}


@dataclass(frozen=True)
class Place:
    """``work`` is done in a folder that ``prepare`` made; ``state`` is what is stored at any instant."""

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    state: Callable[[Path], dict[str, Any]]


def rows_of(store: Path) -> dict[str, Any]:
    """Every row with its bits; a row that comes twice is an error."""
    if not (store / "manifest.json").exists():
        return {}
    found: dict[str, Any] = {}
    opened = SketchStore.open(store)
    for rows, table in opened.shards():
        for row, vector in zip(rows, table, strict=True):
            assert row.id not in found, f"{row.id} is there twice"
            found[row.id] = row.status, row.norm, hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    return {row.id: found.get(row.id, (row.status, row.reason)) for row in opened.rows()}


def files_of(*names: str) -> Callable[[Path], dict[str, Any]]:
    """The whole bytes of files, where they are."""
    return lambda folder: {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if (folder / name).exists()
    }


def scores_of(folder: Path) -> dict[str, Any]:
    """The numbers of a score table, if it is there, and the selection; the table's metadata names the folder."""
    found = files_of("selected.jsonl")(folder)
    if (folder / "scores.parquet").exists():
        scores = read_scores(folder / "scores.parquet")
        found["scores"] = hashlib.sha256(repr(scores.ids).encode() + scores.table.tobytes()).hexdigest()
    return found


def fill(path: Path, name: str, count: int, **sizes: int) -> None:
    """A store of made-up rows."""
    with SketchStore.create(path, MANIFEST, **sizes) as store:
        for i in range(count):
            vector = torch.randn(DIM, generator=torch.Generator().manual_seed(i)) + 0.3
            sets = "x" if i % 2 else "y"
            store.add(
                RowInfo(f"{name}{i:04d}", set=sets, norm=float(vector.norm())), None if i % 7 == 6 else vector
            )


def _stores(folder: Path) -> None:
    for name in ("a", "b", "v"):
        fill(folder / name, name, 60, shard_rows=4)


def _sketch(folder: Path) -> None:
    job = SketchJob([folder / "t.jsonl"], folder / "out", SketchSpec(dim=512), shard_rows=1, shard_bytes=20_000,
                    tokens_per_batch=60)  # fmt: skip
    sketch(Policy(make_model(), make_tokenizer()), job, progress=False)


def _command(line: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        assert main([word.replace("@", str(folder)) for word in line.split()]) == 0

    return work


def _store(folder: Path) -> None:
    """Rows that are there are left out, as a job does; small shards are joined on the way."""
    with SketchStore.create(folder / "out", MANIFEST, shard_rows=1, shard_bytes=3000) as store:
        for i in range(60):
            if f"p{i:04d}" not in store:
                store.add(RowInfo(f"p{i:04d}"), torch.randn(DIM, generator=torch.Generator().manual_seed(i)))
        store.finish()


def _compact(folder: Path) -> None:
    with SketchStore.resume(folder / "a", shard_bytes=4000) as store:
        store.compact()
    with SketchStore.resume(folder / "a") as store:
        store.compact()


def _merge(folder: Path) -> None:
    merge(folder / "out", [folder / "a", folder / "b"], shard_bytes=4000)


def _curriculum(folder: Path) -> None:
    assert (
        main(["curriculum", str(made_curriculum.config(folder, folder / "out", trainer=_quiet(folder)))]) == 0
    )


def _quiet(folder: Path) -> str:
    return f"{sys.executable} {folder / 'nudge.py'} {{model}} {{selected}} {{stage}} {{out}} {folder}/calls"


def _stages(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): [json.loads(line)["id"] for line in path.read_text().splitlines()]
        for path in sorted((folder / "out").glob("stage-*/selected.jsonl"))
    }


_SCORES = "influence --train @/a @/b --valid @/v --draws 0 --out @/scores.parquet"
PLACES = {
    "sketch": Place(lambda folder: _records(folder), _sketch, lambda folder: rows_of(folder / "out")),
    "store": Place(lambda folder: None, _store, lambda folder: rows_of(folder / "out")),
    "merge": Place(_stores, _merge, lambda folder: rows_of(folder / "out")),
    "compact": Place(_stores, _compact, lambda folder: rows_of(folder / "a")),
    "influence": Place(_stores, _command(_SCORES), scores_of),
    "select": Place(
        lambda folder: (_stores(folder), _command(_SCORES)(folder))[0],
        _command("select --scores @/scores.parquet --out @/selected.jsonl --fraction 0.2 --table 0"),
        scores_of,
    ),
    "export": Place(_stores, _command("store export @/a --out @/x.npy"), files_of("x.npy", "x.npy.rows.jsonl")),
    "curriculum": Place(lambda folder: (made_curriculum.make_folder(folder), None)[1], _curriculum, _stages),
}  # fmt: skip


def _records(folder: Path) -> None:
    write_lines(folder / "t.jsonl", make_records(24))


def run(name: str, folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """At least so many kills in one place; gives their number, and how often the work got through.

    Raises:
        AssertionError: something was lost, twice, or not what undisturbed work stores.
    """
    place, rng = PLACES[name], random.Random(f"{name}-{seed}")
    folder.mkdir(parents=True)
    whole = folder / "whole"
    whole.mkdir()
    place.prepare(whole)
    prepared, seconds = folder / "prepared", float("inf")
    shutil.copytree(whole, prepared)
    for _ in range(2):  # the first one loads from a cold disk
        shutil.rmtree(whole)
        shutil.copytree(prepared, whole)
        begin = time.monotonic()
        assert _child(partial(place.work, whole), None) == 0, f"{name}: the work fails"
        seconds = min(seconds, time.monotonic() - begin)
    want = place.state(whole)
    assert want
    count = through = 0
    while count < kills:
        here = folder / f"here-{through}"
        shutil.copytree(prepared, here)
        held: dict[str, Any] = place.state(here)
        while True:
            # Now and then it gets the time that it needs: work that starts anew would never end.
            status = _child(
                partial(place.work, here), None if rng.random() < 0.15 else rng.random() * seconds
            )
            now = place.state(here)
            assert held.keys() <= now.keys(), (
                f"{name}: lost {sorted(held.keys() - now.keys())} by kill {count}"
            )
            assert all(want.get(key) == value for key, value in now.items()), (
                f"{name}: other bits by kill {count}"
            )
            held = now
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"{name}: the work failed after {count} kills"
            count += 1
        assert held == want, f"{name}: not everything is there"
        left = [path for path in here.rglob(".*.tmp") if "out" in path.parts]
        assert not left, f"{name}: {left} stayed behind"
        through += 1
        shutil.rmtree(here)
    return count, through


def _child(work: Callable[[], None], seconds: float | None) -> int:
    """Run in a forked child, with all that it starts; killed after so many seconds. Its exit status, or minus the
    signal."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:] or PLACES:
        begun = time.monotonic()
        killed, done = run(name, Path(sys.argv[1]) / name, int(sys.argv[2]))
        seconds = time.monotonic() - begun
        print(f"{name}: {killed} kills, {done} times through, nothing lost ({seconds:.0f} s)", flush=True)
