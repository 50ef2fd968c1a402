"""Every edit of one byte of what is written is found when it is read back, or changes nothing.

A sample of the edits; ``CROPI_EVERY_BYTE=1`` tries every byte. Score tables and selections have tests of their own
(test_score_table.py, test_selection_damage.py).
"""

from __future__ import annotations

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
from support import made_dumps
from support.made_data import make_records
from test_store import MANIFEST, content, fill, vector

from cropi.cli import main
from cropi.curriculum.report import write_report
from cropi.curriculum.state import FORMAT, State
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.selection import read_selection, select
from cropi.ranking.selector import Selector
from cropi.report.curriculum import curriculum_page
from cropi.report.folder import _check as read_check
from cropi.rescoring import PLAN, read_plan
from cropi.rollouts.file import RolloutFile
from cropi.sealed import check_sums, read_sealed, sealed, summed
from cropi.store import SketchStore, export
from cropi.store.manifest import GROUPS
from cropi.store.rows import RowInfo
from cropi.trainers.nemo_rl.batches import Order
from cropi.trainers.trl.live import LiveRun
from cropi.trainers.trl.rollout_log import RolloutLog, merge_rollouts
from cropi.trainers.trl.stages import STATE, read_state
from cropi_kernels import SketchSpec

EVERY = bool(os.environ.get("CROPI_EVERY_BYTE"))
EDITS = 60  # of a file


def store(folder: Path) -> Callable[[], Any]:
    fill(folder / "s", 9)
    with SketchStore.resume(folder / "s") as made:
        made.finish()

    def back() -> Any:
        opened = SketchStore.open(folder / "s")
        opened.check_finished()
        rows = [(row.id, row.norm, row.tokens) for row in opened.rows()]
        return rows, {name: row.tolist() for name, row in content(folder / "s").items()}

    return back


def rollout(folder: Path) -> Callable[[], Any]:
    """One that was ended before it was finished, and goes on; and its file, to which prompts are added."""
    out, settings = folder / "r.jsonl", {"model": "m", "n": 2}
    with RolloutFile(out, settings).opened() as file:
        file.begin({"way": "shared"})
        file.add({"id": "a", "rewards": [0.5, 1.0]})
        file.add({"id": "b", "rewards": [1.0, 0.0]})
    begun = file.part.read_bytes()
    file.part.rename(folder / "begun")

    def back() -> Any:
        for path in (out, file.part, folder / "r.jsonl.sha256"):
            path.unlink(missing_ok=True)
        file.part.write_bytes((folder / "begun").read_bytes())
        with RolloutFile(out, settings).opened() as again:
            notes = again.notes
            again.begin({"way": "shared"})
            for name in ("a", "b"):
                if name not in again:  # a line without its end was never written
                    again.add({"id": name, "rewards": [0.5, 1.0] if name == "a" else [1.0, 0.0]})
            again.finish(["a", "b"])
        return {key: value for key, value in notes.items() if key != "way"}, out.read_text()

    assert begun.count(b"\t") == 3
    return back


def finished_rollout(folder: Path) -> Callable[[], Any]:
    out, settings = folder / "r.jsonl", {"model": "m", "n": 2}
    with RolloutFile(out, settings).opened() as file:
        file.begin({})
        file.add({"id": "a", "rewards": [0.5, 1.0]})
        file.finish(["a"])

    def back() -> Any:
        (folder / "r.jsonl.part").unlink(missing_ok=True)
        with RolloutFile(out, settings).opened() as again:
            again._file.seek(again.places["a"])  # type: ignore[union-attr]
            return again._file.readline()  # type: ignore[union-attr]

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


def state(folder: Path) -> Callable[[], Any]:
    done = [{"stage": 0, "step": "influence", "seconds": 1.5, "attempts": 1, "sets": ["v"], "scored": 3}]
    State(folder / "state.json", {"format": FORMAT, "settings": {}, "done": done, "started": None}).write()
    plan: Any = SimpleNamespace(out=folder, settings=dict, stages=2, accept_changes=False)

    def back() -> Any:
        found = State.open(plan).data
        return {key: found.get(key) for key in ("settings", "done", "started")}

    return back


def plan(folder: Path) -> Callable[[], Any]:
    """What a stage within a budget sketches anew."""
    held = {
        "for": {"stage": "1", "model": {"weights": "aa"}}, "options": {"passes": 0.5}, "tokens": 5.0, "spent": 4.0,
        "ids": ["a", "b"], "sets": ["v"], "before": [[0.1], None], "ages": [1, 0], "spread": [0.1], "drift": [0.5, 3],
    }  # fmt: skip
    (folder / PLAN).write_text(json.dumps(sealed(held)) + "\n")
    return lambda: {key: read_plan(folder / PLAN).get(key) for key in held}


def report(folder: Path) -> Callable[[], Any]:
    settings = {"train": {"steps": 4}, "sketch": {"model": "m"}}
    plan: Any = SimpleNamespace(
        out=folder, fingerprint=lambda: "aa", settings=lambda: settings, stages=1, steps=4, model="m"
    )
    done = [{"stage": 0, "step": "train", "seconds": 1.5, "attempts": 1}]
    write_report(plan, State(folder / "state.json", {"done": done, "started": None, "settings": {}}))
    for name in ("report.md", "report.html"):
        (folder / name).unlink()

    def back() -> Any:
        page = curriculum_page(folder, folder.parent / "page.html")
        return page.read_bytes()

    return back


def check(folder: Path) -> Callable[[], Any]:
    held = {"error": 0.01, "findings": [{"name": "layout", "level": "ok", "text": "é"}]}
    (folder / "check.json").write_text(json.dumps(sealed(held), indent=2) + "\n")

    def back() -> Any:
        found = read_check(folder, None, Scores([], [], np.zeros((0, 0)), {}))
        return found and {key: found.get(key) for key in held}

    return back


def selector(folder: Path) -> Callable[[], Any]:
    """What a checkpoint of TRL keeps under ``live``."""
    made = tiny_selector()
    made.update(["a", "b"], torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), 1)
    made.refresh(torch.ones(2, 64), ["x", "y"])
    LiveRun.save(SimpleNamespace(selector=made), folder)  # type: ignore[arg-type]

    def back() -> Any:
        run: Any = SimpleNamespace(selector=tiny_selector())
        LiveRun.load(run, folder)
        return repr(run.selector.state_dict())

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

    def back() -> Any:
        opened = SketchStore.open(folder / "s")
        opened.check_finished()
        rows = [(row.id, row.pass_rate) for row in opened.rows()]
        return opened.groups, rows, {name: row.tolist() for name, row in content(folder / "s").items()}

    return back


def for_trainers(folder: Path) -> Callable[[], Any]:
    """Row numbers, and ids, of which NeMo-RL's and verl's trainers read every one."""
    with summed(folder / "i.json"):
        (folder / "i.json").write_text(f"{[*range(60)]}\n")
    scores = Scores([RowInfo(f"p{i}") for i in range(99)], ["x"], np.arange(99.0)[:, None], {})
    select(scores, fraction=0.5).save(folder / "ids.txt", format="ids")
    return lambda: (Order(folder / "i.json", 60).take(60), read_selection(folder / "ids.txt"))


def figures(folder: Path) -> Callable[[], Any]:
    """What ``cropi bench --compare`` reads."""
    held = {"table": {"device": "cpu", "dtype": "float32", "rows": [{"op": "project", "seconds": 0.125}]}}
    (folder / "b.json").write_text(json.dumps(sealed(held), indent=2) + "\n")
    return lambda: read_sealed(folder / "b.json", {"table": dict}, "measure again")["table"]


KINDS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    "store": store, "rollout": rollout, "finished rollout": finished_rollout, "trajectories": trajectories,
    "npy": lambda folder: exported(folder, "npy"), "parquet": lambda folder: exported(folder, "parquet"),
    "state": state, "plan": plan, "report": report, "check": check, "selector": selector, "checkpoint": checkpoint,
    "logged": logged, "groups": groups, "for trainers": for_trainers, "figures": figures,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_counts(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    back, rng, ends = KINDS[kind](folder), random.Random(kind), Counter[str]()
    want = back()
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "r.jsonl.part")
    ]
    for path in sorted(files if kind != "rollout" else [folder / "begun"]):
        whole = path.read_bytes()
        for place in range(len(whole)) if EVERY else rng.sample(range(len(whole)), min(EDITS, len(whole))):
            others = {whole[place] ^ 1 << rng.randrange(8), *b'{0a",\n'} - {whole[place]}
            new = rng.choice(sorted(others))
            path.write_bytes(whole[:place] + bytes([new]) + whole[place + 1 :])
            try:
                got = back()
            except (CropiError, UnicodeDecodeError):
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
    from cropi.data.writers import write_trajectories

    write_trajectories(out, read(make_records(3)))
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
