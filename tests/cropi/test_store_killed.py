"""Stores whose writers are killed at any instant, or run out of space."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

# Runs in one process that forks a child per kill, so that torch is imported once. Every child writes rows and dies
# before its n-th file operation, or after a random time; what it had reported must be there afterwards.
KILLER = """
import os, random, signal, sys, time
sys.path[:0] = sys.path_extra = {path!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_store as t
from cropi import atomic
from cropi.store import shards
from cropi.store import store as s

target, total = Path(sys.argv[1]), 300  # more than any child can finish before it is killed
OPERATIONS = [(os, "fsync"), (os, "replace"), (os, "unlink")]
OPERATIONS += [(atomic, "write_parts"), (Path, "mkdir"), (Path, "unlink")]

def die_before(n):
    count = [0]
    for owner, name in OPERATIONS:
        def wrapped(*a, real=getattr(owner, name), **k):
            count[0] += 1
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        setattr(owner, name, wrapped)

def half_written(n):  # the n-th write leaves half a file behind
    real, count = atomic.write_parts, [0]
    def wrapped(path, parts):
        count[0] += 1
        if count[0] == n:
            data = b"".join(parts)
            real(path, [data[: len(data) // 2]])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, parts)
    atomic.write_parts = wrapped

def child(pipe):
    with s.SketchStore.create(target, t.MANIFEST, shard_rows=3, shard_bytes=20000) as store:
        for i in range(total):
            name = f"p{{i:03d}}"
            if name not in store:
                for safe in store.add(t.RowInfo(name), t.vector(i)):
                    os.write(pipe, (safe + "\\n").encode())
        for safe in store.flush():
            os.write(pipe, (safe + "\\n").encode())
        store.finish()

reported, kills, rng, n = set(), 0, random.Random(0), 0
while True:
    n += 1
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if n % 3 == 0:
                half_written(1 + n % 5)
            elif n % 3 == 1:
                die_before(1 + n % 19)
            child(writer)
            os._exit(0)
        except BaseException as error:
            print("child", n, repr(error), file=sys.stderr)
            os._exit(1)
    os.close(writer)
    if n % 3 == 2:
        time.sleep(rng.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    reported |= set(os.fdopen(reader).read().split())
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, f"child {{n}} failed"
        break
    kills += 1
    if (target / "manifest.json").exists():
        found = t.content(target)
        rows = [r.id for kept, _ in s.SketchStore.open(target).shards() for r in kept]
        assert len(rows) == len(set(rows)), "a row came twice"
        assert reported <= set(found), f"lost {{reported - set(found)}} after kill {{n}}"
        assert all(torch.equal(found[name], t.vector(int(name[1:]))) for name in found)
    assert n < 400
found = t.content(target)
assert set(found) == {{f"p{{i:03d}}" for i in range(total)}}, sorted(found)
assert reported <= set(found)
assert not [p for p in target.iterdir() if p.name.endswith(".tmp")], list(target.iterdir())
sizes = [p.stat().st_size for p in target.glob("*.safetensors")]
assert len(sizes) <= 300 * (4 * t.DIM + 256) / 20000 + 1 and len(list(target.glob("*.sha256"))) == len(sizes), sizes
print(kills)
"""


def test_killed_at_any_instant_it_resumes_and_loses_nothing_it_reported(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", KILLER.format(path=paths), str(tmp_path / "s")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10, "the store was hardly killed at all"


FULL = """
import resource, sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_store as t
target = Path(sys.argv[1])
store = t.SketchStore.create(target, t.MANIFEST, shard_rows=4)
for i in range(4):
    store.add(t.RowInfo(f"p{{i:03d}}"), t.vector(i))
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
try:
    for i in range(4, 8):
        store.add(t.RowInfo(f"p{{i:03d}}"), t.vector(i))
except t.CropiError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
before = len(t.content(target)), sorted(p.name for p in target.iterdir() if p.name.endswith((".tmp", ".safetensors")))
store.close()
print(before, len(t.content(target)))
"""


def test_a_full_disk_is_named_and_costs_no_finished_row(tmp_path: Path) -> None:
    """A file-size limit makes the write itself fail half-way, as a full disk does."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(path=paths), str(tmp_path / "s")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    message, counts = done.stdout.strip().split("\n")
    assert message.startswith(
        f"cannot write {tmp_path / 's' / 'shard-00001.safetensors'}: file too large; free some space"
    )
    assert counts == "(4, ['shard-00000.safetensors']) 8", (
        "the rows stay pending, and are written once there is room"
    )
