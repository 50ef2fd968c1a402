"""Which races that racecheck reports are in what this project wrote: its output is read from stdin and written on.

In Triton's warp-specialized kernels, the first warps hand the others their work and its arguments in shared memory:
they write, all warps pass ``barrier.sync 1``, the others read, and all pass it again before anything is written there.
The PTX of 3.6 and 3.7 has it in this order. racecheck reports races there all the same, at lines of the kernel's own
body, which does nothing else in shared memory but to initialise barriers; what the groups of warps compute has lines of
its own, in other functions. Reports from the bodies of these kernels alone are counted, and every other one ends with
status 9.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

OPS = Path(__file__).resolve().parents[2] / "cropi_kernels" / "ops"
KERNELS = {
    "turns_kernel": OPS / "linear_logprob" / "triton_turns.py",
    "slab_turns_kernel": OPS / "sketch_linear" / "triton_turns.py",
    "slab_stay_kernel": OPS / "sketch_linear" / "triton_stay.py",
}
ACCESS = re.compile(r"(?:Read|Write) access at ([^\s+]+)\+0x[0-9a-f]+(?: in ([^\s:]+):(\d+))?")


def body(path: Path, kernel: str) -> range:
    """The lines of a kernel."""
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines, 1) if line.startswith(f"def {kernel}("))
    inside = (n for n, line in enumerate(lines[start:], start + 1) if line and line[0] not in " )")
    return range(start, next(inside, len(lines) + 1))


def reports(lines: Iterable[str]) -> Iterator[list[tuple[str, str, int]]]:
    """Of each race that is reported: (kernel, file, line) of all accesses, line 0 where none is known."""
    found: list[tuple[str, str, int]] = []
    for line in lines:
        if "Race reported between" in line and found:
            yield found
            found = []
        if line.startswith("====") and (access := ACCESS.search(line)):
            found.append((access[1], access[2] or "", int(access[3] or 0)))
    if found:
        yield found


def hands_over(report: list[tuple[str, str, int]]) -> bool:
    return all(
        kernel in KERNELS and file == KERNELS[kernel].name and line in body(KERNELS[kernel], kernel)
        for kernel, file, line in report
    )


def main() -> int:
    lines = []
    for line in sys.stdin:
        sys.stdout.write(line)
        lines.append(line)
    found = list(reports(lines))
    others = [report for report in found if not hands_over(report)]
    for report in others:
        print("not where work is handed over:", *(f"{k} {f}:{n}" for k, f, n in report))
    summed = any("RACECHECK SUMMARY" in line for line in lines)
    where = "where Triton hands warps their work"
    print(f"========= SUMMARY: {len(found)} reports of races, {len(others)} of them not {where}")
    return 9 if others or not summed else 0


if __name__ == "__main__":
    sys.exit(main())
