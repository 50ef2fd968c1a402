"""Every edit of one byte of what is written is found when it is read back, or changes nothing.

A sample of the edits; ``CROPI_EVERY_BYTE=1`` tries every byte. Score tables have a test of their own
(test_score_table.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import made_dumps, sealed_files
from support.made_data import make_records, write_lines
from support.sealed_files import Kind
from test_store import MANIFEST, content, fill, vector

from cropi.cli import main
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.ranking.selection_files import read_selection
from cropi.ranking.selector import Selector
from cropi.sealed import check_sums, read_sealed, sealed, summed, sums_path
from cropi.store import SketchStore, export
from cropi.store.manifest import GROUPS
from cropi.store.rows import RowInfo
from cropi.trainers.newest import merge_rollouts
from cropi.trainers.trl.live import LiveRun
from cropi.trainers.trl.rollout_log import RolloutLog
from cropi.trainers.trl.stage_state import STATE, read_state
from cropi_kernels import SketchSpec

EVERY = bool(os.environ.get("CROPI_EVERY_BYTE"))
EDITS = 60  # of a file


def store(folder: Path) -> Callable[[], Any]:
    fill(folder / "s", 9)
    with SketchStore.resume(folder / "s") as made:
        made.finish()

    return reader(folder / "s")


def reader(path: Path) -> Callable[[], Any]:
    """What gives all that a finished store holds."""

    def back() -> Any:
        opened = SketchStore.open(path)
        opened.check_finished()
        return opened.groups, opened.rows(), {name: row.tolist() for name, row in content(path).items()}

    return back


def trajectories(folder: Path) -> Callable[[], Any]:
    path = made_dumps.write(folder / "train_data_step7.jsonl", made_dumps.made("nemo-rl"))
    out = folder / "out.jsonl"
    assert main(["convert", str(path), "--temperature", "0.7", "--out", str(out), "-q"]) == 0
    path.unlink()
    return lambda: [group.raw for group in read(out)]


def exported(folder: Path, form: str) -> Callable[[], Any]:
    """What others read: the checksums beside it are compared."""
    fill(folder / "s", 9)
    made = export(SketchStore.open(folder / "s"), folder / f"x.{form}")
    for path in (folder / "s").iterdir():
        path.unlink()
    (folder / "s").rmdir()
    return lambda: [check_sums(folder / f"x.{form}", whole=True), [path.read_bytes() for path in made]]


def selector(folder: Path) -> Callable[[], Any]:
    """What a checkpoint of TRL keeps under ``live``."""
    made = tiny_selector()
    made.update(["a", "b"], torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), 1)
    made.refresh(torch.ones(2, 64), ["x", "y"])
    LiveRun.save(SimpleNamespace(selector=made), folder)  # type: ignore[arg-type]

    def back() -> Any:
        run: Any = SimpleNamespace(selector=tiny_selector())
        LiveRun.load(run, folder)
        held = run.selector.state_dict()
        return repr(held), held["rows"]["values"].tolist()  # repr() rounds

    return back


def tiny_selector() -> Selector:
    return Selector(["a", "b", "c"], SketchSpec(dim=64), dim=64, bits=16)


def checkpoint(folder: Path) -> Callable[[], Any]:
    """What a checkpoint of TRL keeps of the stages."""
    held = {
        "version": 1,
        "stage": 2,
        "selected": ["a", "é"],
        "logs": {"train.jsonl": 3},
        "settings": {"seed": 0},
    }
    (folder / STATE).write_text(json.dumps(sealed(held), ensure_ascii=False) + "\n")
    return lambda: {key: read_state(folder / STATE)[key] for key in held if key != "version"}


def logged(folder: Path) -> Callable[[], Any]:
    """One record a prompt, of the rollouts that a trainer has logged."""
    log = RolloutLog(folder / "log", 0)
    log.append("train", [record | {"step": 1} for record in make_records(4)])
    log.close()
    merge_rollouts([log.path("train")], folder / "merged.jsonl")
    log.path("train").unlink()
    log.path("train").parent.rmdir()
    return lambda: [group.raw for group in read(folder / "merged.jsonl")]


def groups(folder: Path) -> Callable[[], Any]:
    """A store by groups of parameters, whose rows hold several sketches."""
    apart = [{"name": name, "patterns": [f"*{name}*"]} for name in ("low", "high")]
    manifest = MANIFEST | {GROUPS: apart, "dtype": "int4"}
    with SketchStore.create(folder / "s", manifest, shard_rows=4) as made:
        for i in range(6):
            made.add(RowInfo(f"p{i}", pass_rate=i / 8), torch.cat([vector(i), vector(i + 1)]))
        made.finish()

    return reader(folder / "s")


def for_trainers(folder: Path) -> Callable[[], Any]:
    """Ids, of which verl's trainers read every one."""
    scores = Scores([RowInfo(f"p{i}") for i in range(99)], ["x"], np.arange(99.0)[:, None], {})
    select(scores, fraction=0.5).save(folder / "ids.txt", format="ids")
    return lambda: read_selection(folder / "ids.txt")


def figures(folder: Path) -> Callable[[], Any]:
    """What ``cropi bench --compare`` reads."""
    held = {"table": {"device": "cpu", "dtype": "float32", "rows": [{"op": "project", "seconds": 0.125}]}}
    (folder / "b.json").write_text(json.dumps(sealed(held), indent=2) + "\n")
    return lambda: read_sealed(folder / "b.json", {"table": dict}, "measure again")["table"]


KINDS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "store": store, "trajectories": trajectories,
    "npy": lambda folder: exported(folder, "npy"), "parquet": lambda folder: exported(folder, "parquet"),
    "selector": selector, "checkpoint": checkpoint,
    "logged": logged, "groups": groups, "for trainers": for_trainers, "figures": figures,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_counts(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    back = KINDS[kind](folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    edited(kind, files, back)


@pytest.mark.parametrize("kind", sealed_files.KINDS, ids=lambda kind: kind.__name__)
def test_every_byte_of_a_sealed_file_counts(kind: Callable[[Path], Kind], tmp_path: Path) -> None:
    made = kind(tmp_path)
    made.put(made.right)
    beside = sums_path(made.file)
    edited(kind.__name__, [made.file, *([beside] if beside.exists() else [])], made.back)


def edited(kind: str, files: list[Path], back: Callable[[], Any]) -> None:
    rng, ends = random.Random(kind), Counter[str]()
    right = {path: path.read_bytes() for path in files}
    want = back()
    for path, whole in right.items():
        for place in range(len(whole)) if EVERY else rng.sample(range(len(whole)), min(EDITS, len(whole))):
            others = {whole[place] ^ 1 << rng.randrange(8), *b'{0a",\n'} - {whole[place]}
            new = rng.choice(sorted(others))
            path.write_bytes(whole[:place] + bytes([new]) + whole[place + 1 :])
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    got = back()
            except CropiError:
                ends["found"] += 1
            else:
                ends["harmless"] += 1
                assert got == want, (
                    f"{path.name}: byte {place} of {len(whole)} as {new} went through in silence"
                )
        path.write_bytes(whole)
    print(f"{kind}: {dict(ends)} of {ends.total()} edits")
    assert back() == want and ends["found"] > ends.total() / 2, ends


def test_records_of_a_trajectory_file_are_compared_when_they_are_read(tmp_path: Path) -> None:
    """The message says what to do where the change is the user's."""
    out = tmp_path / "t.jsonl"
    with summed(out):
        write_lines(out, make_records(3))
    assert main(["store", "verify", str(out)]) == 0
    out.write_text(out.read_text().replace("1.0", "0.0", 1))
    with pytest.raises(
        CropiError, match="t.jsonl is not the file that was written.*remove that file of checksums"
    ):
        list(read(out))
    assert main(["store", "verify", str(out)]) == 2
    (tmp_path / "t.jsonl.sha256").unlink()
    assert len(list(read(out))) == 3
    assert main(["store", "verify", str(out)]) == 2, "there is nothing to compare it with"
