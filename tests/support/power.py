"""Work whose power is cut: what a disk keeps of it is right, and the same work goes on.

    OMP_NUM_THREADS=1 python tests/support/power.py FOLDER SHARE [place ...]

A disk promises the bytes of a file that was synced, and the names in a folder that was synced; of all else it may keep
nothing, or the new names without the bytes. Both disks are built, for a cut before a SHARE of the operations of every
place (support/places.py; 1 for all) and for one after the last. They must hold nothing that is wrong and everything
that they held before, and the work must go on there to the result of undisturbed work; after the last operation, when
a command has said that it is done, they must hold that result.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support import faults
from support.faults import CUT, GROW, REMOVE, Fault

POWER = Fault(GROW | REMOVE | CUT, error=-1, once=True)


class Disk:
    """What a power cut leaves of a folder, of which ``prepared`` is a copy as it was at first."""

    def __init__(self, folder: Path, prepared: Path, kept: Path) -> None:
        self.folder, self.kept = folder, kept
        paths = [folder, *folder.rglob("*")]
        self.first = {path.stat().st_ino: prepared / path.relative_to(folder) for path in paths}
        self.names = {
            path.stat().st_ino: [(one.stat().st_ino, one.is_dir(), one.name) for one in path.iterdir()]
            for path in paths
            if path.is_dir()
        }
        # Until the work is over: a file that it makes would get the number of one that it has removed.
        self.held = [os.open(path, os.O_PATH) for path in paths]
        kept.mkdir()

    def let_go(self) -> None:
        """The work is over, and makes no more files."""
        for file in self.held:
            os.close(file)

    def bytes_of(self, number: int) -> bytes:
        """Those of a file that were synced."""
        there = self.kept / str(number)
        if not there.exists() and number not in self.first:
            return b""  # another program made it
        return (there if there.exists() else self.first[number]).read_bytes()

    def names_in(self, number: int) -> list[tuple[int, bool, str]]:
        """``(inode, whether it is a folder, name)`` of all that was in a folder when that was synced."""
        there = self.kept / str(number)
        if not there.exists():
            return self.names.get(number, [])
        lines = (line.split(" ", 2) for line in there.read_text().splitlines())
        return [(int(inode), is_folder == "1", name) for inode, is_folder, name in lines]

    def synced(self, target: Path) -> None:
        """The disk that has lost everything that was not synced."""
        todo = [(self.folder.stat().st_ino, target)]
        while todo:
            number, path = todo.pop()
            path.mkdir()
            for inode, is_folder, name in self.names_in(number):
                if is_folder:
                    todo.append((inode, path / name))
                else:
                    (path / name).write_bytes(self.bytes_of(inode))

    def named(self, target: Path) -> None:
        """The disk that has all names, and of the files the bytes that were synced."""
        shutil.copytree(self.folder, target)
        for path in self.folder.rglob("*"):
            if path.is_file():
                (target / path.relative_to(self.folder)).write_bytes(self.bytes_of(path.stat().st_ino))


def run(name: str, folder: Path, share: float, seed: int = 0) -> tuple[int, list[str]]:
    """The cuts of one place, and what was wrong."""
    from support.places import PLACES, WRITTEN, ready

    place, rng = (PLACES | WRITTEN)[name], random.Random(f"{name}-{seed}")
    prepared, here = ready(place, folder)
    total = _cut(place, folder, 0)["counted"]
    want = place.state(here)
    assert want and total, name
    chosen = sorted(rng.sample(range(1, total + 1), max(1, round(share * total))))
    held: dict[str, Any] = place.state(prepared)
    wrong: list[str] = []
    for number in [*chosen, 0]:
        ended = _cut(place, folder, number)
        assert ended["how"] == ("crash" if number else "done"), ended["text"]
        for disk in ("named", "synced"):
            found, now = _problem(place, folder, disk, want, held, done=not number)
            if found:
                wrong.append(f"{name}, cut before operation {number or 'none'} of {total}, {disk}: {found}")
                print(wrong[-1], file=sys.stderr, flush=True)
        held = now
    shutil.rmtree(folder)
    return 2 * (len(chosen) + 1), wrong


def _cut(place: Any, folder: Path, number: int) -> dict[str, Any]:
    """Do the work anew, up to the operation with this number (0: to its end), and build both disks."""
    here, kept = folder / "here", folder / "kept"
    for path in (here, kept, folder / "named", folder / "synced"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(folder / "prepared", here)
    disk = Disk(here, folder / "prepared", kept)
    ended = faults.attempt(place.work, here, POWER, number, kept)
    disk.let_go()
    disk.named(folder / "named")
    disk.synced(folder / "synced")
    return ended


def _problem(
    place: Any, folder: Path, disk: str, want: dict[str, Any], held: dict[str, Any], *, done: bool
) -> tuple[str, dict[str, Any]]:
    """What is wrong with a disk, "" if nothing is, and what it holds."""
    here = folder / "here"
    shutil.rmtree(here)
    (folder / disk).rename(here)  # what was written may name the folder
    try:
        now = place.state(here)
    except Exception as error:
        return f"what is stored cannot be read: {error}", held
    if other := [key for key, value in now.items() if want.get(key) != value]:
        return f"other bits in {other[:3]}", now
    if lost := sorted((want if done else held).keys() - now.keys()):
        return f"lost {lost[:3]}", now
    again = faults.attempt(place.work, here, POWER, 0)
    if again["how"] != "done":
        return f"it does not go on: {again['text']}", now
    return "" if place.state(here) == want else "it goes on to another result", now


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    faults.begin(target)
    from support.places import PLACES, WRITTEN, each

    def tried(name: str, folder: Path) -> tuple[str, list[str]]:
        cuts, wrong = run(name, folder, float(sys.argv[2]))
        return f"{cuts} disks after power cuts", wrong

    sys.exit(bool(each(sys.argv[3:] or PLACES | WRITTEN, target, tried)))
