"""A curriculum that is killed: it goes on where it was, and its results are those of an undisturbed run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.made_curriculum import calls, config, curriculum, make_folder, report, selections

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("curriculum"))


def killed_at(path: Path, place: int) -> bool:
    """Run in a child that is killed at its ``place``-th file replacement; True if it came through."""
    child = os.fork()
    if child == 0:
        replace, count = os.replace, 0

        def counting(*paths: Any) -> None:
            nonlocal count
            count += 1
            if count == place:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = counting  # type: ignore[assignment]
        os._exit(curriculum(path))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return not os.WIFSIGNALED(status)


def same_results(out: Path, expected: Path) -> None:
    assert selections(out) == selections(expected)
    for stage in ("stage-00", "stage-01"):
        name = f"{stage}/trained/model.safetensors"
        assert (out / name).read_bytes() == (expected / name).read_bytes()


@pytest.fixture(scope="module")
def expected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("expected") / "run"
    assert curriculum(config(made, out)) == 0
    return out


def test_kills_between_and_inside_all_steps_change_nothing(
    made: Path, tmp_path: Path, expected: Path
) -> None:
    """Each life is killed one write later than the last one was, so that the kills fall on all kinds of steps."""
    out = tmp_path / "run"
    first = 1
    path, place = config(made, out), first
    while not killed_at(path, place):
        place += 1
        assert place < 30
    assert place - first >= 5
    same_results(out, expected)
    assert {row["stage"] for row in report(out)} == {0, 1}


def test_finished_training_is_not_repeated(made: Path, tmp_path: Path, expected: Path) -> None:
    out = tmp_path / "run"
    path = config(made, out)
    # Every step leaves its "done" in state.json: kill right after each of them, and before.
    for place in range(8, 80, 12):
        if killed_at(path, place):
            break
    assert curriculum(path) == 0
    same_results(out, expected)
    assert calls(expected) == ["0", "1"]
    before = (out / "state.json").read_text()
    assert curriculum(path) == 0  # nothing is left to do
    assert (out / "state.json").read_text() == before
    done = json.loads(before)["done"]
    assert [(e["stage"], e["step"]) for e in done] == [
        (stage, step) for stage in (0, 1) for step in ("sketch", "influence", "select", "train", "collect")
    ]
    for stage in "01":
        attempts = next(e["attempts"] for e in done if (str(e["stage"]), e["step"]) == (stage, "train"))
        assert calls(out).count(stage) == attempts


def test_killed_while_the_trainer_runs(made: Path, tmp_path: Path, expected: Path) -> None:
    """The trainer outlives us and keeps the folder locked; when it has ended, the run goes on."""
    out = tmp_path / "run"
    go, pid = tmp_path / "go", tmp_path / "pid"
    nudge = yaml.safe_load(config(made, out).read_text())["trainer"]
    slow = f"echo $$ > {pid}; while [ -d {tmp_path} ] && [ ! -e {go} ]; do sleep 0.05; done; {nudge}"
    path = config(made, out, trainer=slow)
    child = os.fork()
    if child == 0:
        os._exit(curriculum(path))
    try:
        wait_for(lambda: pid.exists() and bool(pid.read_text()))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert curriculum(path) == 2  # the first trainer still runs
    finally:
        go.touch()
    wait_for(lambda: can_lock(out / ".lock"))
    assert curriculum(path) == 0
    same_results(out, expected)
    assert calls(out) == ["0", "0", "1"]
    assert report(out)[0]["cut_short"] == ["train"] and "taken up again in: train" in (
        out / "report.md"
    ).read_text("utf-8")


def can_lock(path: Path) -> bool:
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")
