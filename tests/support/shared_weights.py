"""`cropi sketch` on processes that share one copy of the weights, one of them killed or interrupted on the way.

    python tests/support/shared_weights.py FOLDER

Prints one JSON object: by job the statuses of its processes, and what the stores hold beside that of one process. The
processes are forked from this one, which has imported everything; each writes what it says to a file of its own.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

warnings.simplefilter("ignore")
torch.set_num_threads(1)

from transformers.distributed import DistributedConfig  # noqa: E402, F401

from cropi.cli import main as cropi  # noqa: E402
from cropi.distributed import sharding  # noqa: E402
from cropi.sketching.passes import Passes  # noqa: E402
from cropi.store.store import SketchStore  # noqa: E402
from support.made_data import make_records, save_policy, write_lines  # noqa: E402
from support.stores import content, equal  # noqa: E402

sharding.BLAME_SECONDS = 1.0
IDLE = "idle passes"


def words(folder: Path, out: str) -> list[str]:
    return [
        "sketch", "--model", str(folder / "m"), "--trajectories", str(folder / "t.jsonl"), "--out", str(folder / out),
        "--dim", "1024", "--tokens-per-batch", "40", "--no-progress", "--device", "cpu",
    ]  # fmt: skip


def run(
    folder: Path, out: str, world: int, *more: str, after: tuple[int, int, int] | None = None
) -> list[int]:
    """The statuses of a job's processes. ``after`` (rank, passes, signal): what is sent to a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            status = 70
            try:
                said = os.open(folder / f"{out}-{rank}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1)
                os.dup2(said, 2)
                _watch(None if after is None or after[0] != rank else after[1:])
                status = cropi([*words(folder, out), *more])
            finally:
                sys.stdout.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _watch(sent: tuple[int, int] | None) -> None:
    """Say how many passes were idle, and send a signal to this process after some that were not."""
    gradient, idle, passes = Passes._gradient, Passes.idle, 0

    def computing(self: Passes, *given: Any) -> Any:
        nonlocal passes
        passes += 1
        if sent is not None and passes == sent[0]:
            os.kill(os.getpid(), sent[1])
        return gradient(self, *given)

    def idling(self: Passes) -> None:
        print(IDLE, file=sys.stderr, flush=True)
        idle(self)

    Passes._gradient, Passes.idle = computing, idling  # type: ignore[method-assign]


def apart(one: Path, other: Path) -> float:
    """The largest difference of two stores' sketches of a prompt, in units of its length; inf: other rows."""
    a, b = content(one), content(other)
    if a.keys() != b.keys() or any((a[name][-1] is None) != (b[name][-1] is None) for name in a):
        return float("inf")
    pairs = [(a[name][-1], b[name][-1]) for name in a if a[name][-1] is not None]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def said(folder: Path, out: str, ranks: int) -> list[str]:
    return [(folder / f"{out}-{rank}.said").read_text() for rank in range(ranks)]


def main() -> None:
    folder, found = Path(sys.argv[1]), {}
    # Of a tied weight transformers' plan makes the embeddings' and the head's parameter in two units.
    save_policy(folder / "m", tie_word_embeddings=True)
    write_lines(folder / "t.jsonl", make_records(40))
    # In this process: what a command imports is then there for all that are forked.
    assert cropi([*words(folder, "whole"), "--no-verify"]) == 0
    gc.freeze()  # a child that collects garbage would go through all modules
    killed = run(folder, "fsdp", 2, "--fsdp", after=(1, 6, signal.SIGKILL))
    lost = said(folder, "fsdp", 1)[0]
    resumed = run(folder, "fsdp", 4, "--fsdp", "2", "--no-verify")
    found["fsdp"] = {
        "killed": killed, "lost": lost, "resumed": resumed,
        "equal": equal(content(folder / "whole"), content(folder / "fsdp")),
        "idle": sum(text.count(IDLE) for text in said(folder, "fsdp", 4)),
        "left": [path.name for path in (folder / "fsdp").glob("part-*")],
    }  # fmt: skip
    stopped = run(folder, "tensor", 2, "--tensor-parallel", "2", after=(1, 4, signal.SIGINT))
    kept = len(SketchStore.open(folder / "tensor"))
    found["tensor"] = {
        "stopped": stopped, "kept": kept, "resumed": run(folder, "tensor", 2, "--tensor-parallel", "2", "--no-verify"),
        "apart": apart(folder / "tensor", folder / "whole"), "said": said(folder, "tensor", 2),
    }  # fmt: skip
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
