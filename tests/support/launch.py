"""Several processes of one job, each a rank of a process group, on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.once import once


def on_ranks(worker: Path, *words: str, ranks: int = 2, seconds: float = 900) -> list[Any]:
    """What every rank of ``worker`` prints last, read as JSON; the worker finds RANK, WORLD_SIZE and MASTER_ADDR."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(
        os.environ, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
        PYTHONPATH=str(Path(__file__).parents[1]),
    )  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(worker), *words],
            env=dict(common, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        done = [rank.communicate(timeout=seconds) for rank in started]
    finally:
        for rank in started:
            rank.kill()
    failed = [err for rank, (_, err) in zip(started, done) if rank.returncode]
    assert not failed, failed[0][-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


def as_rank(find: Callable[[], Any]) -> None:
    """What such a worker does: ``find`` in the process group, and print it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        print(json.dumps(find()), flush=True)
    finally:
        dist.destroy_process_group()


def found_on_ranks(factory: pytest.TempPathFactory, name: str, worker: Path, *words: str) -> list[Any]:
    """`on_ranks`, once for all processes of a test run."""

    def make(folder: Path) -> None:
        (folder / "found.json").write_text(json.dumps(on_ranks(worker, *words)))

    found: list[Any] = json.loads((once(factory, name, make) / "found.json").read_text())
    return found
