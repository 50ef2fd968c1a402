"""Work whose files cannot be written: a full disk, a quota, no inode, a read-only folder, no descriptor, a bad device.

    OMP_NUM_THREADS=1 python tests/support/faults.py FOLDER SHARE [place[:fault] ...]

Every operation of every place (support/places.py) fails once: it, or it and all that follow. SHARE is the part of them
that is tried, 1 for all; 0 tries one operation by two of the faults, others at every place. The work must end in words
that name the file and the remedy, or with the right result; what was stored must be there, with the right bits; no half
file may have a final name; and the same work, done again, must give the result of undisturbed work. It is
``faults.cpp`` that makes the operations fail, below Python.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

MAKE, OPEN, READ, WRITE, SYNC, RENAME, FOLDER, REMOVE, CUT = (1 << bit for bit in range(9))
GROW = MAKE | WRITE | SYNC | RENAME | FOLDER


@dataclass(frozen=True)
class Fault:
    """The operations that fail, with which error, and whether one alone does."""

    kinds: int
    error: int
    once: bool = False


FAULTS = {
    "full": Fault(GROW, errno.ENOSPC),
    "quota": Fault(GROW, errno.EDQUOT, once=True),
    "inodes": Fault(MAKE | FOLDER, errno.ENOSPC),
    "read-only": Fault(MAKE | OPEN | RENAME | FOLDER | REMOVE | CUT, errno.EROFS),
    "descriptors": Fault(MAKE | OPEN | READ, errno.EMFILE),
    "device": Fault(READ | WRITE | SYNC | RENAME | REMOVE | CUT, errno.EIO, once=True),
}
REMEDY = re.compile(r"; (free some space|give a path|give another --out|raise the limit|see to the disk)")


def begin(folder: Path) -> None:
    """Build what stands before the C library, and start this program again with it, unless that was done."""
    if "faults.so" in os.environ.get("LD_PRELOAD", ""):
        return
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": str(library)})


def attempt(work: Any, folder: Path, fault: Fault, first: int, keeps: Path | None = None) -> dict[str, Any]:
    """Do the work in a forked child whose operations fail from the first on (0: none does); how it ended.

    What a power cut could not take is put into the folder ``keeps``.
    """
    from cropi.errors import CropiError
    from support.places import Failed

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        faults = ctypes.CDLL(None)
        ended: dict[str, Any]
        try:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
            below = str(folder).encode()
            number = ctypes.c_long(first or sys.maxsize)
            kept = str(keeps or "").encode()
            faults.faults_arm(below, fault.kinds, fault.error, number, fault.once, kept)
            work(folder)
            ended = {"how": "done", "text": ""}
        except (CropiError, Failed) as error:
            ended = {"how": "error", "text": str(error)}
        except BaseException:
            ended = {"how": "crash", "text": traceback.format_exc()}
        ended |= {"counted": faults.faults_counted(), "failed": faults.faults_failed()}
        os.write(writer, json.dumps(ended).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(text or '{"how": "crash", "text": "the process ended", "failed": 1}')
    return found


def problem(place: Any, folder: Path, want: dict[str, Any], held: Any, ended: Any, fault: Fault) -> str:
    """What is wrong with how disturbed work ended, and with what it left behind; "" if nothing is."""
    text = ended["text"]
    if ended["how"] == "crash":
        return f"it crashed: {text}"
    if ended["how"] == "error":
        if not ended["failed"]:
            return f"it failed undisturbed: {text}"
        if str(folder) not in text or not REMEDY.search(text) or "Errno" in text or "Traceback" in text:
            return f"the message does not name file and remedy: {text}"
    now = place.state(folder)
    if not held.keys() <= now.keys():
        return f"lost {sorted(held.keys() - now.keys())}"
    if other := [key for key, value in now.items() if want.get(key) != value]:
        return f"other bits in {other[:3]}"
    if ended["how"] == "done" and now != want:
        return f"it ended well and has not stored {sorted(want.keys() - now.keys())[:3]}"
    # A folder can only be emptied where it can be opened; the next call does it.
    left = [str(path) for path in folder.rglob(".*.tmp") if not (path.is_dir() and fault.kinds & OPEN)]
    return f"{left} stayed behind" if left and not fault.kinds & REMOVE else ""


def run(
    name: str, folder: Path, share: float, only: str = "", seed: int = 0
) -> tuple[Counter[str], list[str]]:
    """A share of the faults of one place; how often they ended how, and what was wrong."""
    from support.places import PLACES, WRITTEN, ready

    places = PLACES | WRITTEN
    place, number, rng = places[name], [*places].index(name), random.Random(f"{name}-{seed}")
    prepared, here = ready(place, folder)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    kinds = [only] if only else [*FAULTS]
    if not share:
        kinds = [[*FAULTS][(number + step) % len(FAULTS)] for step in (0, 3)]
    for kind in kinds:
        fault = FAULTS[kind]
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(prepared, here)
        quiet = attempt(place.work, here, fault, 0)
        assert quiet["how"] == "done", f"{name}: the work fails: {quiet['text']}"
        want, held, total = place.state(here), place.state(prepared), quiet["counted"]
        assert want and total, (name, kind)
        chosen = sorted(rng.sample(range(1, total + 1), max(1, round(share * total))))
        for first in chosen:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(prepared, here)
            ended = attempt(place.work, here, fault, first)
            counts[ended["how"]] += 1
            found = problem(place, here, want, held, ended, fault)
            if not found:
                again = attempt(place.work, here, fault, 0)
                found = again["text"] and f"it does not go on: {again['text']}"
                found = found or ("" if place.state(here) == want else "it goes on to another result")
                left = list(map(str, here.rglob(".*.tmp")))
                found = found or (f"{left} stayed behind for good" if left else "")
            if found:
                wrong.append(f"{name}, {kind}, operation {first} of {total}: {found}")
                print(wrong[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return counts, wrong


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    begin(target)
    from support.places import PLACES, WRITTEN, each

    def tried(name: str, folder: Path) -> tuple[str, list[str]]:
        place, _, only = name.partition(":")
        ends, wrong = run(place, folder, float(sys.argv[2]), only)
        return f"{ends.total()} faults, {dict(ends)}", wrong

    sys.exit(bool(each(sys.argv[3:] or PLACES | WRITTEN, target, tried)))
