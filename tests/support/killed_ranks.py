"""Four processes share a job; one of them is killed at a random instant, and the job goes on with another number.

    python tests/support/killed_ranks.py FOLDER TRIALS SEED

Prints one JSON object a trial, and one of two launchers that start the same job at once. The processes are forked from
this one, which has imported everything; nobody ends the others when one dies, as a launcher would, so that they have to
find out.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
torch.set_num_threads(1)

from cropi.distributed import ranks  # noqa: E402
from cropi.distributed.team import Team  # noqa: E402
from cropi.model.policy import Policy  # noqa: E402
from cropi.sketching.job import SketchJob  # noqa: E402
from cropi.sketching.run import sketch  # noqa: E402
from cropi.store.manifest import MANIFEST  # noqa: E402
from cropi.store.parts import part_paths  # noqa: E402
from cropi.store.store import SketchStore  # noqa: E402
from cropi_kernels import SketchSpec  # noqa: E402
from support.made_data import make_model, make_records, make_tokenizer, write_lines  # noqa: E402

WORLD, SILENCE = 4, 4.0


def job(folder: Path, out: str) -> SketchJob:
    return SketchJob(
        [folder / "t.jsonl"], folder / out, SketchSpec(dim=1024), shard_rows=2, tokens_per_batch=40,
        behaviour_check="off", verify=False,
    )  # fmt: skip


def start(policy: Policy, folder: Path, out: str, world: int) -> tuple[list[int], int]:
    """Fork the processes of a job; each ends with status 0 (done), 3 (an error in words) or 4 (any other).

    Gives their ids, and that of the process that keeps the list of work, which stands for a launcher's. This process
    itself starts no thread: a fork could copy a lock that a thread holds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = os.fork()
    if not server:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while store:
            time.sleep(60)
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 4
        try:
            client = dist.TCPStore("127.0.0.1", port, is_master=False)
            team = Team(client, rank, world, silence=SILENCE)
            with team.telling():
                summary = ranks.sketch(team, policy, job(folder, out), progress=False)
            if rank == 0:
                counts = summary.resumed, summary.sketched + summary.skipped.total() + len(summary.failed)
                (folder / f"{out}.counts").write_text(json.dumps(counts))
            status = 0
        except ValueError as error:
            (folder / f"{out}-{rank}.error").write_text(str(error))
            status = 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return children, server


def wait(children: list[int], server: int) -> list[int]:
    """Their statuses."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    return statuses


def finished(out: Path) -> set[str]:
    """The prompts whose rows are on the disk."""
    stores = [path for path in (out, *part_paths(out)) if (path / MANIFEST).exists()]
    return {row.id for path in stores for row in SketchStore.open(path).rows()}


def content(path: Path) -> dict[str, Any]:
    store = SketchStore.open(path)
    store.check_finished()
    vectors = {
        row.id: vector.numpy().tobytes() for rows, part in store.shards() for row, vector in zip(rows, part)
    }
    return {
        row.id: (row.status, row.reason, row.norm, row.extra, vectors.get(row.id)) for row in store.rows()
    }


def trial(policy: Policy, folder: Path, name: str, seconds: float, rng: random.Random) -> dict[str, Any]:
    victim, after = rng.randrange(WORLD), rng.uniform(0, 0.8 * seconds)
    children, server = start(policy, folder, name, WORLD)
    time.sleep(after)
    os.kill(children[victim], signal.SIGKILL)
    statuses = wait(children, server)
    kept = finished(folder / name)
    parts = len(part_paths(folder / name))
    world = rng.choice([1, 2, 3, 5])
    assert set(wait(*start(policy, folder, name, world))) == {0}
    resumed, computed = json.loads((folder / f"{name}.counts").read_text())
    return {
        "victim": victim, "after": after, "statuses": statuses, "kept": len(kept), "parts": parts, "world": world,
        "resumed": resumed, "computed": computed, "left": len(part_paths(folder / name)),
        "equal": content(folder / name) == pickle.loads((folder / "whole.pickle").read_bytes()),
    }  # fmt: skip


def twice(policy: Policy, folder: Path) -> dict[str, Any]:
    """Two launchers start the processes of one job at the same time."""
    both = [start(policy, folder, "twice", WORLD) for _ in range(2)]
    return {
        "statuses": sorted(wait(*one) for one in both),
        "said": (folder / "twice-0.error").read_text(),
        "equal": content(folder / "twice") == pickle.loads((folder / "whole.pickle").read_bytes()),
    }


def main() -> None:
    folder, trials, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    write_lines(folder / "t.jsonl", make_records(60))
    policy = Policy(make_model(), make_tokenizer())
    sketch(policy, job(folder, "whole"), progress=False)
    (folder / "whole.pickle").write_bytes(pickle.dumps(content(folder / "whole")))
    gc.freeze()  # a child that collects garbage would go through all modules
    begun = time.monotonic()
    assert set(wait(*start(policy, folder, "quiet", WORLD))) == {0}
    seconds = time.monotonic() - begun
    for i in range(trials):
        print(json.dumps(trial(policy, folder, f"cut-{i}", seconds, rng) | {"whole": 60}), flush=True)
    print(json.dumps(twice(policy, folder)))


if __name__ == "__main__":
    main()
