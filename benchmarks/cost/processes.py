"""Each mode in a process of its own, and the processes in turns.

In one process the modes share a heap, and the free blocks that one mode leaves cause page faults of another: the same
step's ratio to the frozen one was 1.05 in some processes and 1.15 in others. In a process of its own, each mode has
the heap that it would have alone; because they take turns, slow periods of the machine affect all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable

from benchmarks.cost.timing import Cost, rotated

# Rounds after which all processes are started anew: addresses, and with them speeds, differ by process.
FRESH = 2


class Worker:
    """A process that runs one mode on the micro-batches it is asked for."""

    def __init__(self, args: argparse.Namespace, mode: str, env: dict[str, str]) -> None:
        self._process = _start(args, f"serve: {mode}", env)
        self.n_batches = int(self._line())

    def cost(self, i: int) -> Cost:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{i}\n")
        self._process.stdin.flush()
        return Cost(*json.loads(self._line()))

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with status {self._process.wait()}: {self._process.args!r}")
        return line


def in_turns(args: argparse.Namespace, modes: list[str], env: dict[str, str]) -> dict[str, list[Cost]]:
    """A cost per round for each mode: all micro-batches, each taken by every mode before the next one.

    Micro-batches differ in size (the last one is what is left over), so not their ratios are averaged but their costs
    are summed.
    """
    costs: dict[str, list[Cost]] = {mode: [] for mode in modes}
    workers: dict[str, Worker] = {}
    try:
        for r in range(args.rounds):
            if r % FRESH == 0:
                _close(workers.values())
                workers = {mode: Worker(args, mode, env) for mode in modes}
                for worker in workers.values():
                    worker.cost(0)  # warm-up
            parts: dict[str, list[Cost]] = {mode: [] for mode in modes}
            for i in range(workers[modes[0]].n_batches):
                for mode in rotated(modes, r + i):
                    parts[mode].append(workers[mode].cost(i))
            for mode in modes:
                costs[mode].append(Cost.total(parts[mode]))
    finally:
        _close(workers.values())
    return costs


def peak(args: argparse.Namespace, mode: str, env: dict[str, str]) -> int:
    """Bytes resident at the peak of the mode's steps."""
    process = _start(args, f"memory: {mode}", env)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a process ended with status {process.returncode}: {process.args!r}")
    return int(out.splitlines()[-1])


def _start(args: argparse.Namespace, part: str, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.cost", "--part", part]
    for name in ("groups", "tokens", "model", "data"):
        command += [f"--{name}", str(getattr(args, name))]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    )


def _close(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.close()
