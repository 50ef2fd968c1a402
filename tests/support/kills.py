"""Work that is killed by SIGKILL at random instants, again and again, until it gets through.

    OMP_NUM_THREADS=1 python tests/support/kills.py FOLDER 100 SEED [place ...]

Every place is work that writes. It runs in a child, is killed at a random instant of the time that it takes, and starts
again; after each kill what it had stored must be there, every row once and with the right bits, and files either
absent or whole. When it gets through, the result must be that of work that nobody disturbed; then it begins anew.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.places import PLACES, each, ready


def run(name: str, folder: Path, kills: int, seed: int = 0) -> tuple[int, int]:
    """At least so many kills in one place; gives their number, and how often the work got through.

    Raises:
        AssertionError: something was lost, twice, or not what undisturbed work stores.
    """
    place, rng = PLACES[name], random.Random(f"{name}-{seed}")
    prepared, whole = ready(place, folder)
    seconds = float("inf")
    for _ in range(2):
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(prepared, whole)
        status, took = _child(partial(place.work, whole), None)
        assert status == 0, f"{name}: the work fails"
        seconds = min(seconds, took)
    want = place.state(whole)
    assert want
    count = through = 0
    while count < kills:
        here = folder / f"here-{through}"
        shutil.copytree(prepared, here)
        held: dict[str, Any] = place.state(here)
        first = True
        while True:
            # Now and then it gets the time that it needs: work that starts anew would never end.
            status, took = _child(
                partial(place.work, here), None if rng.random() < 0.15 else rng.random() * seconds
            )
            now = place.state(here)
            assert held.keys() <= now.keys(), (
                f"{name}: lost {sorted(held.keys() - now.keys())} by kill {count}"
            )
            assert all(want.get(key) == value for key, value in now.items()), (
                f"{name}: other bits by kill {count}"
            )
            held = now
            if status == 0:
                if first:
                    seconds = min(seconds, took)  # other work may have slowed the first runs
                break
            first = False
            assert status == -signal.SIGKILL, f"{name}: the work failed after {count} kills"
            count += 1
        assert held == want, f"{name}: not everything is there"
        left = [path for path in here.rglob(".*.tmp") if "out" in path.parts]
        assert not left, f"{name}: {left} stayed behind"
        through += 1
        shutil.rmtree(here)
    return count, through


def _child(work: Callable[[], None], seconds: float | None) -> tuple[int, float]:
    """Run in a forked child, with all that it starts; killed after so many seconds. Its exit status, or minus the
    signal, and how long it took."""
    begin = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        status = 1
        try:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    ended = os.pidfd_open(pid)
    if not select.select([ended], [], [], seconds)[0]:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begin


if __name__ == "__main__":

    def tried(name: str, folder: Path) -> tuple[str, list[str]]:
        killed, done = run(name, folder, int(sys.argv[2]), int(sys.argv[3]))
        return f"{killed} kills, {done} times through, nothing lost", []

    each(sys.argv[4:] or PLACES, Path(sys.argv[1]), tried)
