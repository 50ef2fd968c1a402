"""Several processes of one job, each a rank of a process group, on this machine."""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.once import once


def on_ranks(worker: Path, *words: str, ranks: int = 2, seconds: float = 900) -> list[Any]:
    """What every rank of ``worker`` prints last, read as JSON; the worker finds RANK, WORLD_SIZE and MASTER_ADDR.

    The ranks are forks of one process that has imported what they need, six seconds of processor time a rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = dict(
        os.environ, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
        PYTHONPATH=str(Path(__file__).parents[1]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        started = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, folder, str(worker), *words],
            env=common, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _, said = started.communicate(timeout=seconds)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
        failed = [path.read_text() for path in sorted(Path(folder).glob("*.failed"))]
        assert not failed and not started.returncode, (failed or [said])[0][-3000:]
        return [
            json.loads((Path(folder) / f"{rank}.out").read_text().splitlines()[-1]) for rank in range(ranks)
        ]


def fork_ranks(folder: Path, worker: str) -> None:
    """Every rank with files of its own for what it prints; ``RANK.failed`` are the errors of one that failed."""
    runpy.run_path(worker, run_name="imported")
    importlib.import_module("transformers.models.llama.modeling_llama")  # else as the first model is made
    gc.freeze()  # a rank that collects garbage would go through all modules
    children = {}
    for rank in range(int(os.environ["WORLD_SIZE"])):
        child = os.fork()
        if child:
            children[child] = rank
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        for to, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{end}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), to)
        runpy.run_path(worker, run_name="__main__")
        sys.stdout.flush()
        # To take apart all that was imported is half a second a rank.
        os._exit(0)
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status:
            (folder / f"{rank}.err").rename(folder / f"{rank}.failed")


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


if __name__ == "__main__":
    _, place, *sys.argv = sys.argv
    fork_ranks(Path(place), sys.argv[0])
