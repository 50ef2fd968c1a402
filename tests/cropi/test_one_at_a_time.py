"""Files that belong together are of one writer, also where two processes write others under the same names at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import cropi
from support.made_data import make_records, save_policy, write_lines
from support.places import fill

from cropi import locks
from cropi.errors import CropiError
from cropi.options import Influence, Selecting
from cropi.pipeline import Setup, choosing
from cropi.ranking.selection_files import read_selection
from cropi.ranking.table import SCORES, read_scores
from cropi.report.folder import report_folder, selection_of
from cropi.sealed import check_sums, summed
from cropi.store import SketchStore, export, exporting


def begins_inside(write: Callable[..., None], work: Callable[[], Any]) -> tuple[Any, threading.Thread]:
    """``write`` with ``work`` in another thread that begins before the first call does anything, and this thread."""
    other = threading.Thread(target=work)

    def interrupted(*words: Any) -> None:
        if other.ident is None:
            other.start()
            other.join(0.5)  # it would have ended
        write(*words)

    return interrupted, other


@pytest.mark.filterwarnings("ignore:another process writes")
def test_two_exports_to_one_file_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins between the two files of the first: each matrix has the rows of its own store beside it."""
    for name in ("a", "b"):
        fill(tmp_path / name, name, 8)
    out, second = tmp_path / "x.npy", SketchStore.open(tmp_path / "b")
    interrupted, other = begins_inside(exporting._write_npy, lambda: export(second, out))
    monkeypatch.setattr(exporting, "_write_npy", interrupted)
    export(SketchStore.open(tmp_path / "a"), out, normalise=True)
    other.join()
    ids = [json.loads(line)["id"] for line in (tmp_path / "x.npy.rows.jsonl").read_text().splitlines()]
    assert ids == [row.id for row in SketchStore.open(tmp_path / "b").rows() if row.row is not None]
    lengths = np.linalg.norm(np.load(out), axis=1)
    assert (abs(lengths - 1) > 0.1).all(), "the last one stays, which is not normalised"
    assert check_sums(out, whole=True) == 2
    assert not list(tmp_path.glob(".*")), "no lock stays behind"


@pytest.mark.parametrize("what", ["a write", "the first name", "the second name"])
def test_an_export_that_fails_leaves_no_matrix_with_the_rows_of_another(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an earlier export: until both new files are whole, both old ones stay."""
    for name, count in (("a", 8), ("b", 9)):
        fill(tmp_path / name, name, count)
    out, beside = tmp_path / "x.npy", tmp_path / "x.npy.rows.jsonl"
    export(SketchStore.open(tmp_path / "a"), out)
    old, right = (out.read_bytes(), beside.read_bytes()), os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == (beside if what == "the first name" else out):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        right(source, target)

    with monkeypatch.context() as patched, pytest.raises(CropiError, match=f"cannot write {tmp_path}/x.npy"):
        if what == "a write":
            patched.setattr(exporting, "_write_at", lambda *words: refusing(errno.ENOSPC)(out))
        else:
            patched.setattr(os, "replace", replace)
        export(SketchStore.open(tmp_path / "b"), out)
    if what == "a write":
        assert (out.read_bytes(), beside.read_bytes()) == old
    else:
        assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    export(SketchStore.open(tmp_path / "b"), out)
    assert check_sums(out, whole=True) == 2 and len(np.load(out)) == 8


def test_a_waiting_writer_says_so_and_takes_no_lock_that_is_gone(tmp_path: Path) -> None:
    out, holds, goes = tmp_path / "new" / "x", threading.Event(), threading.Event()
    order: list[str] = []

    def first() -> None:
        with locks.one_at_a_time(out):
            holds.set()
            goes.wait()
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    holds.wait()
    threading.Timer(0.05, goes.set).start()
    with pytest.warns(UserWarning, match=f"another process writes {out}; waiting"), locks.one_at_a_time(out):
        order.append("second")
        # The first one removed the file of its lock; this is another one, and it is held.
        with open(out.parent / ".x.lock", encoding="utf-8") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    thread.join()
    assert order == ["first", "second"] and not list(out.parent.iterdir())


def refusing(number: int) -> Callable[..., int]:
    def refuse(*words: Any) -> int:
        raise OSError(number, os.strerror(number), str(words[0]))

    return refuse


def test_a_file_system_without_locks_and_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x"
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refusing(errno.ENOLCK))
        with summed(out):
            out.write_text("1")
    assert check_sums(out, whole=True) == 1
    monkeypatch.setattr(locks.os, "open", refusing(errno.EROFS))
    with (
        pytest.raises(CropiError, match=f"cannot write {out}: read-only file system; give a path"),
        summed(out),
    ):
        pass
    assert out.read_text() == "1" and check_sums(out, whole=True) == 1


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, trajectories and the results of a run, in ``out``."""
    folder = tmp_path_factory.mktemp("ran")
    save_policy(folder / "model")
    write_lines(folder / "train.jsonl", make_records(20))
    write_lines(folder / "valid.jsonl", make_records(8, seed=1))
    assert run(folder, folder / "out") == 0
    return folder


def run(made: Path, out: Path, *more: str) -> int:
    words = f"run --model {made}/model --train {made}/train.jsonl --valid {made}/valid.jsonl --out {out}"
    settings = "--dim 512 --fraction 0.2 --draws 0 --table 0 --no-progress"
    return cropi(*words.split(), *settings.split(), *more)


def results(out: Path) -> dict[str, bytes]:
    names = ("config.yaml", "scores.parquet", "selected.jsonl", "selected_trajectories.jsonl", "report.html")
    return {name: (out / name).read_bytes() for name in names}


@pytest.mark.long
def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ran / "out", out)
    before = results(out)
    with locks.locked_folder(out, "cropi run"):
        assert run(ran, out, "--fraction", "0.5") == 2
        assert f"{out} is in use: by the `cropi run` of process {os.getpid()}" in capsys.readouterr().err
        assert run(ran, out, "--dry-run") == 0
    assert results(out) == before
    assert run(ran, out, "--dim", "1024") == 2
    assert "was made with spec.dim = 512, but this run has 1024" in capsys.readouterr().err
    assert results(out) == before, "config.yaml says how the results that are there were made"
    assert run(ran, out, "--fraction", "0.5") == 0
    after = results(out)
    assert b"fraction: 0.5" in after["config.yaml"] and len(read_selection(out / "selected.jsonl")) == 10
    assert all(after[name] != before[name] for name in before)


@pytest.mark.long
def test_a_selection_is_not_shown_beside_scores_that_it_was_not_made_from(ran: Path, tmp_path: Path) -> None:
    """As a report would find them between the two files of another run."""
    out = tmp_path / "out"
    shutil.copytree(ran / "out", out)
    report_folder(out)
    stores = out / "sketches"
    words = f"influence --train {stores}/train --valid {stores}/valid --draws 0 --out {out}/scores.parquet"
    assert cropi(*words.split(), "--metric", "dot") == 0
    with pytest.raises(
        CropiError, match="selected.jsonl was chosen from another score table .*; select again"
    ):
        report_folder(out)
    assert (
        cropi("select", "--scores", out / SCORES, "--out", out / "selected.jsonl", "--fraction", "0.2") == 0
    )
    report_folder(out)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:another process writes")
def test_two_choices_in_one_folder_leave_the_files_of_one(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {name: SketchStore.open(ran / "out" / "sketches" / name) for name in ("train", "valid")}

    def choose(metric: str, fraction: float) -> None:
        setup = Setup(influence=Influence(metric=metric, draws=0), selecting=Selecting(fraction=fraction))
        choosing.conclude(stores, setup, tmp_path)

    interrupted, other = begins_inside(choosing.write_selection, lambda: choose("dot", 0.5))
    monkeypatch.setattr(choosing, "write_selection", interrupted)
    choose("cosine", 0.2)
    other.join()
    chosen = selection_of(read_scores(tmp_path / SCORES), tmp_path / "selected.jsonl")
    assert len(chosen.chosen) == 10 and chosen.scores.meta["metric"] == "dot"
