"""A power cut takes what was not synced: what is stored is right all the same, and what was said to be done is there.

A sample of the cuts; ``CROPI_FAULTS=0.1`` makes that share of them, in the places that take longer too.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
from support.failing_files import PRELOADED, SHARE, check_places
from support.syncs import recorded

from cropi.atomic import make_folder, sync_all, write_atomic
from cropi.errors import CropiError
from cropi.rollouts import file as rollouts
from cropi.rollouts.file import RolloutFile

QUICK = [
    "store",
    "merge",
    "compact",
    "export",
    "export parquet",
    "select",
    "select saved",
    "convert",
    "rollout log",
]
LONG = ["influence", "sketch", "rollout", "curriculum", "select exports", "select plot", "report"]


@pytest.mark.long
@PRELOADED
@pytest.mark.parametrize("places", [QUICK, *([LONG] if SHARE != "0" else [])], ids=lambda places: places[0])
def test_where_the_power_is_cut(tmp_path: Path, places: list[str]) -> None:
    check_places("power.py", tmp_path, places)


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="names of open files are read from /proc")


@LINUX
def test_new_folders_and_whole_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = recorded(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2, "it was there"
    (tmp_path / "a" / "b" / "x").write_text("1")
    (tmp_path / "a" / "y").symlink_to(tmp_path / "nowhere")
    synced.clear()
    sync_all(tmp_path / "a")
    files = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "x"]
    assert synced[-1] == tmp_path and sorted(synced[:-1]) == files


def test_a_file_system_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems do; of a file the error counts."""
    sync = os.fsync

    def refuse(folder: bool, file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode) == folder:
            raise OSError(errno.EINVAL, "no")
        sync(file)

    monkeypatch.setattr(os, "fsync", lambda file: refuse(True, file))
    write_atomic(tmp_path / "new" / "x", "1")
    assert (tmp_path / "new" / "x").read_text() == "1"
    monkeypatch.setattr(os, "fsync", lambda file: refuse(False, file))
    with pytest.raises(CropiError, match="cannot write .*x: invalid argument"):
        write_atomic(tmp_path / "new" / "x", "2")
    assert (tmp_path / "new" / "x").read_text() == "1"


@LINUX
def test_finished_rollouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, now = recorded(monkeypatch), 0.0
    monkeypatch.setattr(rollouts.time, "monotonic", lambda: now)
    out = RolloutFile(tmp_path / "new" / "r.jsonl", {})
    with out.opened():
        assert synced == [tmp_path, tmp_path / "new"]
        out.begin({})
        for now, want in ((rollouts.SYNC_AFTER - 1, []), (rollouts.SYNC_AFTER, [out.part])):
            synced.clear()
            out.add({"id": f"p{now}"})
            assert synced == want, now
