"""Processes that do the same work in the same folder at the same time.

    OMP_NUM_THREADS=1 python tests/support/crowds.py FOLDER 12 ROUNDS [place ...]

They start together, from what there was before the work. Each must end with its work done, or in words; nothing may be
stored that undisturbed work does not store, nothing may be left half, and one at least must have done its work. In
places with one writer (WRITERS) the others must be refused.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from cropi.errors import CropiError
from cropi.sealed import check_sums
from support.places import PLACES, WRITTEN, Failed, Place, each, ready

# One process writes at a time; a trainer's own log is nothing that two trainers write.
WRITERS = {"sketch", "store", "merge", "compact", "curriculum", "rollout"}
PLACES = {name: place for name, place in (PLACES | WRITTEN).items() if name != "rollout log"}


def crowd(place: Place, folder: Path, count: int) -> list[str]:
    """How so many forked processes end that begin at once: "" with the work done, or what they said."""
    starts, start = os.pipe()
    readers = []
    for _ in range(count):
        reader, told = os.pipe()
        if os.fork() == 0:
            os.close(start)
            os.read(starts, 1)  # the end of the pipe: all begin
            text = ""
            try:
                sys.stdout = open(os.devnull, "w", encoding="utf-8")
                place.work(folder)
            except (CropiError, Failed) as error:
                text = f"said: {error}"
            except BaseException:
                text = traceback.format_exc()
            os.write(told, json.dumps(text).encode())
            os._exit(0)
        os.close(told)
        readers.append(reader)
    os.close(starts)
    os.close(start)
    found = []
    for reader in readers:
        with os.fdopen(reader) as pipe:
            found.append(json.loads(pipe.read() or '"it ended"'))
        os.wait()
    return found


def run(name: str, folder: Path, count: int, rounds: int) -> tuple[Counter[str], list[str]]:
    """How often the processes of one place ended how, and what was wrong."""
    place, ends, wrong = PLACES[name], Counter[str](), list[str]()
    prepared, here = ready(place, folder)
    shutil.copytree(prepared, here)
    place.work(here)
    want = place.state(here)
    assert want, name
    for number in range(rounds):
        shutil.rmtree(here)
        shutil.copytree(prepared, here)
        found = crowd(place, here, count)
        for text in found:
            ends["words" if text.startswith("said: ") else "crash" if text else "done"] += 1
        if problem := _problem(place, name, here, found, want):
            wrong.append(f"{name}, round {number}: {problem}")
            print(wrong[-1], file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    return ends, wrong


def _problem(place: Place, name: str, folder: Path, found: list[str], want: dict[str, Any]) -> str:
    if crashed := [text for text in found if text and not text.startswith("said: ")]:
        return crashed[0]
    if "" not in found:
        return f"nobody came through: {found[0]}"
    refusal = ("another process", "is in use")
    if other := [text for text in found if text and not any(words in text for words in refusal)]:
        return f"the message names no other process: {other[0]}"
    if name not in WRITERS and any(found):
        return f"refused: {max(found)}"
    if place.state(folder) != want:
        return "other bits"
    for sums in folder.rglob("*.sha256"):
        if not sums.name.startswith("shard-"):
            check_sums(sums.with_suffix(""), whole=True)
    left = [str(path) for path in folder.rglob(".*.tmp*")]
    return f"{left} stayed behind" if left else ""


if __name__ == "__main__":

    def tried(name: str, folder: Path) -> tuple[str, list[str]]:
        ends, wrong = run(name, folder, int(sys.argv[2]), int(sys.argv[3]))
        return str(dict(ends)), wrong

    sys.exit(bool(each(sys.argv[4:] or PLACES, Path(sys.argv[1]), tried)))
