"""Twelve processes at once want to write into one place: nothing is lost, and where one alone may write, eleven are
refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_store import content, vector

from cropi.store.store import SketchStore

pytestmark = pytest.mark.long

WRITERS = """
import json, os, sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_store as t
from cropi.locks import locked_folder
from cropi.rollouts.file import RolloutFile

COUNT, folder = 12, Path(sys.argv[1])
t.fill(folder / "old", 8)
PLACES = {{
    "a new store": lambda: t.SketchStore.create(folder / "new", t.MANIFEST, shard_rows=1),
    "a store that is there": lambda: t.SketchStore.resume(folder / "old"),
    "a rollout": lambda: RolloutFile(folder / "r.jsonl", {{"n": 1}}).opened(),
    "a curriculum": lambda: locked_folder(folder / "c", "cropi curriculum"),
}}

def write(held):
    if isinstance(held, t.SketchStore):
        for i in range(8, 16):
            held.add(t.RowInfo(f"p{{i:03d}}"), t.vector(i))
    elif isinstance(held, RolloutFile):
        held.begin({{}})
        held.add({{"id": "a"}})

def child(place, starts, goes, told):
    os.read(starts, 1)  # the end of the pipe: all begin
    try:
        with place() as held:
            os.write(told, b"wrote\\n")
            os.read(goes, 1)  # the end of the pipe: all have tried
            write(held)
        os._exit(0)
    except t.CropiError as error:
        os.write(told, f"{{error}}\\n".encode())
        os._exit(0)

def contest(place):
    (starts, start), (goes, go), (hear, told) = os.pipe(), os.pipe(), os.pipe()
    pids = []
    for _ in range(COUNT):
        pid = os.fork()
        if pid == 0:
            for end in (start, go, hear):
                os.close(end)
            child(place, starts, goes, told)
        pids.append(pid)
    os.close(told)
    os.close(start)
    with os.fdopen(hear) as lines:
        said = [lines.readline().strip() for _ in range(COUNT)]
        os.close(go)
        said += lines.read().split("\\n")[:-1]
    for end in (starts, goes):
        os.close(end)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids), said
    return said

for name, place in PLACES.items():
    print(json.dumps([name, contest(place)]))
"""


def test_one_of_twelve_writers_is_let_in(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    words = [sys.executable, "-c", WRITERS.format(path=paths), str(tmp_path)]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = dict(map(json.loads, done.stdout.splitlines()))
    wanted = {
        "a new store": f"is writing to the store {tmp_path / 'new'}; wait for it",
        "a store that is there": f"is writing to the store {tmp_path / 'old'}; wait for it",
        "a rollout": f"another process writes {tmp_path / 'r.jsonl.part'}; wait for it",
        "a curriculum": f"{tmp_path / 'c'} is in use: by the `cropi curriculum` of process",
    }
    assert said.keys() == wanted.keys()
    for name, refusal in wanted.items():
        assert said[name].count("wrote") == 1, said[name]
        assert sum(refusal in line for line in said[name]) == 11, said[name]
    for name, first in (("new", 8), ("old", 0)):
        found = content(tmp_path / name)
        assert sorted(found) == [f"p{i:03d}" for i in range(first, 16)]
        assert all(torch.equal(row, vector(int(key[1:]))) for key, row in found.items())
        SketchStore.open(tmp_path / name).verify()
    assert len((tmp_path / "r.jsonl.part").read_text().splitlines()) == 2


# Of the places that one process at a time writes, test_one_of_twelve_writers_is_let_in tries the locks.
QUICK = ["influence", "select exports", "select saved"]
LONG = [
    "sketch", "store", "merge", "compact", "curriculum", "rollout", "select", "select plot", "export",
    "export parquet", "report", "convert",
]  # fmt: skip


@pytest.mark.parametrize("places", [QUICK, *([LONG] if "CROPI_KILLS" in os.environ else [])], ids=len)
def test_twelve_do_the_same_work_at_once(tmp_path: Path, places: list[str]) -> None:
    """In a process of its own, with one thread: it forks. ``CROPI_KILLS=1`` tries all places."""
    harness = Path(__file__).parents[1] / "support" / "crowds.py"
    words = [sys.executable, str(harness), str(tmp_path), "12", "1", *places]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(", 0 wrong") == len(places)
