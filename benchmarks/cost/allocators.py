"""Time and memory of the steps, in processes of their own: what an allocator does to one must not reach the next."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.cost.steps import MODES
from benchmarks.cost.timing import Cost

# glibc gives the top of the heap back and faults it in again, or keeps it, by what happens to lie there: 0 to 90
# thousand page faults a step, for any mode. So both ends are measured as well: nothing given back, and a mapping of its
# own for every tensor, where the peak is live memory and everyone pays for the pages.
KEPT = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc as it is": {},
    "heap kept": KEPT,
    "a mapping per tensor": {"MALLOC_MMAP_THRESHOLD_": "65536"},
}


def in_process(args: argparse.Namespace, part: str, env: dict[str, str]) -> Any:
    """What ``--part`` prints, from a process of its own with an allocator of its own."""
    command = [sys.executable, "-m", "benchmarks.cost", "--part", part, "--rounds", str(args.rounds)]
    for name in ("groups", "tokens", "model", "data"):
        command += [f"--{name}", str(getattr(args, name))]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    return json.loads(result.stdout.splitlines()[-1])


def steps(args: argparse.Namespace) -> list[str]:
    lines = [
        "| step on the same micro-batches | allocator | median s | ratio to frozen, median (min - max) "
        "| processor time | page faults |",
        "|---|---|---|---|---|---|",
    ]
    for allocator, env in ALLOCATORS.items():
        costs = {name: [Cost(*c) for c in values] for name, values in in_process(args, "steps", env).items()}
        base = next(iter(costs.values()))
        for name, values in costs.items():
            ratios = [a.seconds / b.seconds for a, b in zip(values, base, strict=True)]
            processor = statistics.median(
                a.processor / b.processor for a, b in zip(values, base, strict=True)
            )
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
            seconds = statistics.median(c.seconds for c in values)
            faults = statistics.median(c.faults for c in values)
            lines.append(
                f"| {name} | {allocator} | {seconds:.2f} | {spread} | {processor:.3f} | {faults:.0f} |"
            )
    return lines


def memory(args: argparse.Namespace) -> list[str]:
    lines = ["| peak resident memory of a step, own process | allocator | MiB | ratio |", "|---|---|---|---|"]
    for allocator, env in ALLOCATORS.items():
        peaks = {name: in_process(args, f"memory: {name}", env) for name in MODES}
        base = next(iter(peaks.values()))
        lines += [
            f"| {name} | {allocator} | {kib / 1024:.0f} | {kib / base:.3f} |" for name, kib in peaks.items()
        ]
    return lines
