"""Time and memory of the steps under two allocators."""

from __future__ import annotations

import argparse
import statistics

from benchmarks.cost.processes import in_turns, peak
from benchmarks.cost.steps import MODES

# glibc gives the top of the heap back and faults it in again, or keeps it, by what happens to lie there: 0 to 90
# thousand page faults a step, for any mode. So the other end is measured as well: a mapping of its own for every
# tensor, where the peak is live memory and everyone pays for the pages.
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc as it is": {},
    "a mapping per tensor": {"MALLOC_MMAP_THRESHOLD_": "65536"},
}


def steps(args: argparse.Namespace) -> list[str]:
    lines = [
        "| all micro-batches | allocator | median s | ratio to frozen, median (min - max) "
        "| processor time | page faults |",
        "|---|---|---|---|---|---|",
    ]
    for allocator, env in ALLOCATORS.items():
        costs = in_turns(args, list(MODES), env)
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
        peaks = {name: peak(args, name, env) for name in MODES}
        base = next(iter(peaks.values()))
        lines += [
            f"| {name} | {allocator} | {size / 2**20:.0f} | {size / base:.3f} |"
            for name, size in peaks.items()
        ]
    return lines
