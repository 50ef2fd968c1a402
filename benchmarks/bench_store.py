"""What stores cost: influence from disk beside plain reading, and opening a store of many shards.

    python -m benchmarks.bench_store --rows 50000 100000 [--dim 4096] [--dtype float16] [--folder /big/disk]

Targets: influence reads at least at 70 % of the bandwidth that plain reading of the same files has in the same run,
from the disk and from the page cache alike, takes less than 1 GB, and twice the rows take twice the time; a store of
5,000 shards opens in 0.3 s. Every measure is a process of its own, the best of three; the files are removed at the
end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib import script

SETS, PER_SET = 8, 8


def manifest(dim: int, dtype: str) -> dict[str, Any]:
    """Of made-up sketches."""
    return {
        "spec": {"dim": dim},
        "stage": "0",
        "model": {"weights": "made up"},
        "dtype": dtype,
        "parameters": {},
    }


def make(folder: Path, rows: int, dim: int, dtype: str) -> None:
    """A training store of ``rows`` sketches and a validation store of 8 sets, with a direction in common."""
    import torch

    from cropi.store.codec import encode
    from cropi.store.rows import RowInfo
    from cropi.store.store import SketchStore

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(dim, generator=generator)
    drawn = (1 << 24) // dim  # 64 MiB of them
    with SketchStore.create(folder / "train", manifest(dim, dtype)) as store:
        for first in range(0, rows, drawn):
            count = min(drawn, rows - first)
            table = encode(torch.randn(count, dim, generator=generator) + 0.2 * common, dtype)
            infos = [
                RowInfo(f"train-{first + i:08d}", pass_rate=0.5, tokens=1000, norm=1.0, row=i)
                for i in range(count)
            ]
            store.append(infos, table)
        store.compact()
    with SketchStore.create(folder / "valid", manifest(dim, dtype)) as store:
        for i in range(SETS * PER_SET):
            store.add(RowInfo(f"v{i}", set=f"set {i % SETS}"), torch.randn(dim, generator=generator) + common)


def forget(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.glob("shard-*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_reading(folder: Path) -> None:
    """Every byte of the training store, into one buffer."""
    buffer = bytearray(1 << 21)
    for path in sorted((folder / "train").glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def influence(folder: Path, pairs: bool = False) -> None:
    """Scores of all training prompts against all sets."""
    from cropi.ranking.influence import influence as score
    from cropi.store.store import SketchStore

    scores = score(SketchStore.open(folder / "train"), [SketchStore.open(folder / "valid")], pairs=pairs)
    assert scores.usable.all() and len(scores.sets) == SETS


def influence_and_pairs(folder: Path) -> None:
    """The same, and the products with every validation prompt, which uncertainty is made from."""
    influence(folder, pairs=True)


def influence_and_draws(folder: Path) -> None:
    """All that `cropi influence` does before it writes: the choice is made again 200 + 50 (sets + 1) times."""
    from cropi import pipeline
    from cropi.options import Influence
    from cropi.store.store import SketchStore

    scores = pipeline.score(
        SketchStore.open(folder / "train"), [SketchStore.open(folder / "valid")], Influence()
    )
    assert scores.p_selected is not None


def opening(folder: Path) -> None:
    """The headers alone."""
    from cropi.store.store import SketchStore

    SketchStore.open(folder)


def many_shards(folder: Path, count: int) -> None:
    """A store that a job wrote in so many pieces of four rows: its shards are not joined."""
    import torch

    from cropi.store.codec import encode
    from cropi.store.manifest import job_fingerprint
    from cropi.store.rows import RowInfo
    from cropi.store.shards import write_shard
    from cropi.store.store import SketchStore

    with SketchStore.create(folder, manifest(64, "float32")) as store:
        job = job_fingerprint(store.manifest)
    for n in range(count):
        rows = [RowInfo(f"p{n}-{i}", norm=0.5, row=i) for i in range(4)]
        write_shard(folder / f"shard-{n:05d}.safetensors", rows, encode(torch.ones(4, 64), "float32"), job)


MEASURES: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (plain_reading, influence, influence_and_pairs, influence_and_draws, opening)
}


def run(name: str, folder: Path) -> None:
    """One measure, in this process; prints its seconds and its memory."""
    import torch  # the set-up is not timed

    import cropi.ranking.influence  # noqa: F401

    torch.ones(1).sum()
    begin, busy = time.perf_counter(), time.process_time()
    MEASURES[name](folder)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "busy": busy, "memory": memory}))


def measured(name: str, folder: Path, *, cold: bool = False) -> dict[str, float]:
    """The best of three processes."""
    found = []
    for _ in range(3):
        if cold:
            forget(folder / "train")
        words = [sys.executable, "-m", "benchmarks.bench_store", "--measure", name, "--folder", str(folder)]
        found.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
    return dict(min(found, key=lambda one: one["seconds"]))


def main() -> None:
    """Make, measure, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 100_000])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--shards", type=int, default=5000)
    parser.add_argument("--folder", type=script.folder)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        run(args.measure, args.folder)
        return
    print(
        "| rows | GB | from | plain reading, GB/s | influence, GB/s | share | seconds | CPU seconds | memory, GB |"
    )
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            make(folder, rows, args.dim, args.dtype)
            size = sum(path.stat().st_size for path in (folder / "train").iterdir()) / 1e9
            for cold in (True, False):
                reading = measured("plain_reading", folder, cold=cold)
                for measure in ("influence", "influence_and_pairs", "influence_and_draws"):
                    found = measured(measure, folder, cold=cold)
                    source = "disk" if cold else "cache"
                    source += measure.removeprefix("influence").replace("_and_", ", with ")
                    print(
                        f"| {rows} | {size:.2f} | {source} "
                        f"| {size / reading['seconds']:.2f} | {size / found['seconds']:.2f} "
                        f"| {reading['seconds'] / found['seconds']:.0%} | {found['seconds']:.2f} | {found['busy']:.2f} "
                        f"| {found['memory']:.2f} |",
                        flush=True,
                    )
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        many_shards(Path(name) / "s", args.shards)
        found = measured("opening", Path(name) / "s")
        print(f"\nOpening {args.shards} shards: {found['seconds']:.2f} s, {found['busy']:.2f} CPU seconds")


if __name__ == "__main__":
    main()
