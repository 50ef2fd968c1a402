"""How commands grow with the number of prompts: processor time and peak memory at several sizes.

    python -m benchmarks.bench_sizes [--prompts 100000 1000000] [--dim 512] [--dtype float16] [--longest 600]
                                     [--only select report] [--folder /big/disk]

It prints the table of docs/scaling.md. Every measure is a process of its own. The exponent is that of the largest and
the smallest size, each less the time that the same work takes for 1000 prompts, which is the time of starting: 1 is
linear. The stores are those of :func:`benchmarks.bench_store.make` (8 validation sets of 8 prompts); all files are
removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from benchmarks.lib import script

START = 1000  # prompts whose time is that of starting


def records(folder: Path, n: int) -> None:
    """JSON lines of two short responses a prompt, with token ids and log-probs."""
    from benchmarks.lib import made_files as made

    made.RESPONSES, made.TOKENS = 2, 8
    with open(folder / "r.jsonl", "w", encoding="utf-8") as file:
        for row in islice(made.records(), n):
            file.write(json.dumps(row) + "\n")


def neighbours(folder: Path) -> None:
    """The five nearest and the five most opposed of 64 validation prompts."""
    import cropi

    found = cropi.neighbours(
        cropi.SketchStore.open(folder / "train"), cropi.SketchStore.open(folder / "valid")
    )
    assert len(found) == 64


def selector(folder: Path) -> None:
    """A live selector's table, and 20 steps of 64 prompts."""
    import torch

    import cropi
    from cropi_kernels import SketchSpec

    n = len(cropi.SketchStore.open(folder / "train"))
    table = cropi.Selector(list(range(n)), SketchSpec(1024), dim=256, bits=4)
    table.refresh(torch.ones(8, 1024))
    for step in range(1, 21):
        table.update(table.next(64, step), torch.randn(64, 1024), step)
    assert int(table.seen.sum()) > 64


def batches(folder: Path) -> None:
    """Tokens of all records, cut into micro-batches: what a job does beside its passes."""
    from cropi.data.readers import read
    from cropi.gradient.batches import make_batches
    from cropi.gradient.estimators import ESTIMATORS
    from cropi.gradient.layout import Layout
    from cropi.gradient.tokenize import Tokenize

    groups = map(Tokenize(None, 2**20), read(folder / "r.jsonl"))
    made = make_batches(groups, ESTIMATORS["cropi"], Layout(False), budget=65_536, stored_behaviour=True)
    assert sum(sum(batch.finished) for batch in made) > 0


SCORES, CHOSEN = "{f}/run/scores.parquet", "{f}/run/selected.jsonl"
SELECT = f"select --scores {SCORES} --out {CHOSEN}"
INFLUENCE = "influence --train {f}/train --valid {f}/valid"
# In the order of the table; a command reads what those before it wrote.
COMMANDS = {
    "`cropi info` of the trajectories": "info {f}/r.jsonl",
    "`cropi influence --draws 0`": f"{INFLUENCE} --draws 0 --out {SCORES}",
    "`cropi influence`": f"{INFLUENCE} --out {SCORES}",
    "`cropi select`": SELECT,
    "`cropi select --method random`": f"{SELECT} --method random",
    "`cropi select --confidence 0.9`": f"{SELECT} --confidence 0.9",
    "`cropi select --dedup 0.95`": f"{SELECT} --dedup 0.95",
    "`cropi select --plot`": f"{SELECT} --plot {{f}}/scores.png",
    "`cropi report`": "report {f}/run",
    "`cropi store verify`": "store verify {f}/train",
    "`cropi store merge` of one store": "store merge {f}/merged {f}/train",
    "`cropi store export --to npy`": "store export {f}/train --out {f}/train.npy",
}
FUNCTIONS: dict[str, Callable[[Path], None]] = {
    "`cropi.neighbours` of 64 prompts": neighbours,
    "`Selector`: 20 steps of 64 prompts": selector,
    "tokens cut into micro-batches": batches,
}


NEEDED = ("`cropi influence`", "`cropi select`")  # write what others read


def pool(folder: Path, n: int, dim: int, dtype: str) -> None:
    """All files of a pool of n prompts."""
    from benchmarks.bench_store import make

    make(folder, n, dim, dtype)
    (folder / "run" / "sketches").mkdir(parents=True)
    for name in ("train", "valid"):
        os.symlink(folder / name, folder / "run" / "sketches" / name)
    records(folder, n)


def measured(name: str, folder: Path, *more: str) -> tuple[float, float]:
    """Processor seconds, and GB of the resident set at its peak, of a process of its own."""
    words = ["-m", "benchmarks.bench_sizes", "--measure", name, "--folder", str(folder), *more]
    if name in COMMANDS:
        words = ["-m", "cropi", *COMMANDS[name].format(f=folder).split(), "--quiet"]
    child = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{name} ended with {child.returncode}")
    shutil.rmtree(folder / "merged", ignore_errors=True)
    for path in folder.glob("train.npy*"):
        path.unlink()
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e6


def main() -> None:
    """Make, measure, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument(
        "--longest", type=float, default=math.inf, help="seconds; what would take longer is left out"
    )
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--folder", type=script.folder)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure == "pool":
        pool(args.folder, args.prompts[0], args.dim, args.dtype)
        return
    if args.measure:
        FUNCTIONS[args.measure](args.folder)
        return
    sizes = sorted(args.prompts)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folders = {n: Path(name) / str(n) for n in (START, *sizes)}
        for n, folder in folders.items():
            folder.mkdir()
            # A process of its own, too: the peak of one that is forked off begins with its parent's memory.
            measured("pool", folder, "--prompts", str(n), "--dim", str(args.dim), "--dtype", args.dtype)
        print("| |" + "".join(f" {n:,}: s | GB |" for n in sizes) + " exponent |")
        print("| --- |" + " ---: | ---: |" * len(sizes) + " ---: |")
        for work in (*COMMANDS, *FUNCTIONS):
            asked = not args.only or any(word in work for word in args.only)
            if asked or work in NEEDED:
                line = row(work, folders, sizes, args.longest)
                if asked:
                    print(line, flush=True)


def row(work: str, folders: Mapping[int, Path], sizes: Sequence[int], longest: float) -> str:
    """A line of the table."""
    start, _ = measured(work, folders[START])
    cells, times = [], dict[int, float]()
    for n in sizes:
        if times and n / max(times) * times[max(times)] > longest:
            cells.append("not measured | ")
            continue
        times[n], memory = measured(work, folders[n])
        cells.append(f"{times[n]:.1f} | {memory:.2f}")
    few, many = min(times), max(times)
    power = ""
    if many > few and min(times.values()) > 1.1 * start:
        power = f"{math.log((times[many] - start) / (times[few] - start)) / math.log(many / few):.1f}"
    return f"| {work} | {' | '.join(cells)} | {power} |"


if __name__ == "__main__":
    main()
