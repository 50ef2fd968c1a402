"""Files that are written with checksums: what stands in each, how it is written, and everything that reads it."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cropi.cli import contents
from cropi.curriculum.report import write_report
from cropi.curriculum.state import FORMAT, State
from cropi.options import Selecting
from cropi.pipeline import rescoring
from cropi.ranking import selection_files, table
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.report import folder as folders
from cropi.report import html
from cropi.report.curriculum import curriculum_page
from cropi.rollouts.file import MARK, RolloutFile
from cropi.sealed import sealed, sums_path
from cropi.store.rows import RowInfo
from cropi.trainers.nemo_rl.batches import Order
from support.commands import json_lines


@dataclass
class Kind:
    """What stands in a file, and how it is written with valid checksums; ``back`` goes through everything that reads
    it, and gives what was read."""

    file: Path
    right: Any
    put: Callable[[Any], None]
    back: Callable[[], Any]
    names: tuple[str, ...] = ()  # one of which each message has


def made_scores(**changes: Any) -> Scores:
    rows = [
        RowInfo(
            f"p{i}",
            set="x",
            task="ab"[i % 2],
            pass_rate=i / 12,
            tokens=i,
            norm=1.0 + i,
            extra={"ratio": 1.0, "ess": 0.5},
        )
        for i in range(12)
    ]
    rows[3] = RowInfo("p3", "failed", "NaN in its gradient")
    numbers = np.random.default_rng(0).standard_normal((12, 2))
    numbers[3] = np.nan
    one = {
        "name": "v",
        "prompts": 4,
        "stderr": 0.1,
        "stderr_at_cut": 0.1,
        "signal": 0.5,
        "from_responses": 0.1,
        "own": 0.1,
    }
    meta = {
        "metric": "cosine", "mean": "plain", "max_valid": None, "seed": 0, "groups": ["low", "high"],
        "train": {"path": "/none", "stage": "0", "model": {"weights": "aa"}, "spec": {"dim": 8}, "trajectories": "f"},
        "valid": [{"path": "/none", "stage": "0"}], "minus": "w", "minus_weight": 1.0,
        "uncertainty": {
            "sets": [one, one | {"name": "w"}], "overlap": 0.5, "overlap_of_set": {"v": 0.5, "w": 0.5}, "halves": 0.5,
            "draws": 20, "fraction": 0.25, "own_signal": 0.5,
        },
    }  # fmt: skip
    half = numbers[:, :, None] / 2
    return Scores(
        rows, ["v", "w"], numbers, meta, np.full((12, 2), 0.1), np.where(np.isnan(numbers[:, 0]), np.nan, 3 / 11),
        groups=["low", "high"], contributions=np.concatenate([half, half], axis=2),
    )  # fmt: skip


def put_sealed(file: Path) -> Callable[[Any], None]:
    def put(values: Any) -> None:
        text = json.dumps(sealed(values) if isinstance(values, dict) else values)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")

    return put


def state(folder: Path) -> Kind:
    store = {"files": ["t"], "behaviour": "file", "seconds": 1.0, "tokens": 4}
    beside = {"pool": 0.1, "selected": 0.2, "lowest": 0.1, "highest": 0.3}
    results: dict[str, Any] = {
        "rollouts": {"maker": "m", "train": ["t"], "valid": ["v"]},
        "sketch": {"train": store, "valid": {"v": store}, "fingerprints": {"train": "a"}, "weights": "aa", "prompts": 4,
                   "usable": 3, "without_gradient": {"equal": 1}, "anew": 2, "left": 1},
        "influence": {"sets": ["v"], "scored": 3},
        "select": {"prompts": 4, "usable": 3, "selected": 2, "scores": {"v": beside}, "pass_rate": beside,
                   "kept_from_last": 1, "last": 2},
        "train": {"model": "m", "training": {"reward": [0.1, 0.2], "equal_rewards": [0.1, None], "steps": [1, 4]}},
        "collect": {"model": "m", "train": ["t"], "replaced": 1, "unknown": 0},
    }  # fmt: skip
    done = [
        {"stage": stage, "step": step, "seconds": 1.0, "attempts": 1} | found
        for stage in (0, 1) for step, found in results.items()
    ]  # fmt: skip
    settings = {"train": {"steps": 4}, "sketch": {"model": "m"}}
    plan: Any = SimpleNamespace(
        out=folder,
        settings=lambda: settings,
        stages=2,
        steps=4,
        model="m",
        accept_changes=False,
        fingerprint=lambda: "a",
    )

    def back() -> Any:
        contents.describe_folder(folder)
        made = State.open(plan)
        made.latest("sketch", 1), made.result(0, "train")
        write_report(plan, made)
        return {key: made.data.get(key) for key in ("settings", "done", "started")}

    started = {"stage": 2, "step": "sketch", "attempts": 1}
    right = {"format": FORMAT, "settings": settings, "done": done, "started": started}
    file, names = folder / "state.json", ("state.json", "stages is", "was begun with")
    return Kind(file, right, put_sealed(file), back, names)


def report(folder: Path) -> Kind:
    kind, file = state(folder), folder / "report.json"
    kind.put(kind.right)
    kind.back()
    right = json.loads(file.read_text())
    del right["checksum"]
    kind.file.unlink()
    names = ("report.json", "no stage of the curriculum has begun")
    return Kind(file, right, put_sealed(file), lambda: curriculum_page(folder).read_bytes(), names)


def check(folder: Path) -> Kind:
    findings = [
        {"name": "sketch error", "level": "ok", "text": "é"},
        {"name": "layout", "level": "failed", "text": "b"},
    ]
    right = {
        "error": 0.01, "theory": 0.02, "method": "exact", "findings": findings,
        "by_type": {"mlp.up_proj": 0.5, "q": 0.5}, "by_layer": {"0": 0.5, "1": 0.5},
    }  # fmt: skip
    scores = made_scores()
    chosen, file = select(scores, Selecting(fraction=0.25)), folder / "check.json"

    def back() -> Any:
        contents.describe_file(file)
        given = html.ReportInput(scores, chosen, check=folders._check(folder, None, scores))
        html._anatomy(given.check), html._verdict(given)
        return given.check and {key: given.check.get(key) for key in right}

    return Kind(file, right, put_sealed(file), back)


def budget(folder: Path) -> Kind:
    """What a stage within a budget sketches anew."""
    right = {
        "for": {"stage": "1", "model": {"weights": "aa"}}, "options": {"budget": 0.1}, "tokens": 5.0, "spent": 4.0,
        "ids": ["p1", "p2"], "sets": ["v", "w"], "before": [[0.1, 0.2], None], "ages": [1, 2], "spread": [0.1, 0.2],
        "drift": [0.5, 3],
    }  # fmt: skip
    table.write_scores(folder / table.SCORES, made_scores())
    file = folder / rescoring.PLAN

    def back() -> Any:
        contents.describe_file(file)
        assert rescoring._drift_of(folder).variance >= 0
        return {key: rescoring.read_plan(file).get(key) for key in right}

    return Kind(file, right, put_sealed(file), back)


def chosen_prompts(folder: Path) -> Kind:
    scores, file = made_scores(), folder / "selected.jsonl"
    selection_files.write_selection(file, scores, select(scores, Selecting(fraction=0.5)))
    right = json_lines(file)
    for row in right:
        del row["check"]

    def put(rows: Any) -> None:
        lines = [
            json.dumps(row | {"check": selection_files._check(row)} if isinstance(row, dict) else row)
            for row in (rows if isinstance(rows, list) else [rows])
        ]
        file.write_text("\n".join(lines))

    def back() -> Any:
        contents.describe_rows(file)
        made = folders.selection_of(scores, file)
        assert len(set(made.chosen)) == len(made.chosen)
        html._overlap(scores, made)
        return made.ids

    return Kind(file, right, put, back)


def rollout(folder: Path) -> Kind:
    """One that was begun, whose lines carry checksums; it goes on."""
    file = RolloutFile(folder / "r.jsonl", {"model": "m", "n": 2})
    record = {"prompt": "q", "rewards": [0.5], "rollout": file.mark}
    records = {name: record | {"id": name} for name in ("a", "b")}
    right = [{MARK: file.settings, "way": "shared"}, *records.values()]

    def put(lines: Any) -> None:
        texts = [json.dumps(line).encode() for line in (lines if isinstance(lines, list) else [lines])]
        file.part.write_bytes(b"".join(text + b"\t%08x\n" % zlib.crc32(text) for text in texts))

    def back() -> Any:
        file.places.clear()
        file.out.unlink(missing_ok=True)
        sums_path(file.out).unlink(missing_ok=True)
        with file.opened():
            file.begin({})
            for name, one in records.items():
                if name not in file:  # a line without its end was never written
                    file.add(one)
            file.finish([*records])
        found = {one["id"]: one for one in json_lines(file.out)}
        assert found.keys() == records.keys()
        return found

    return Kind(file.part, right, put, back)


def rolled_out(folder: Path) -> Kind:
    """A finished one, whose file has its checksum beside it."""
    kind, out = rollout(folder), folder / "r.jsonl"

    def put(lines: Any) -> None:
        texts = [json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])]
        put_summed(out, "".join(texts).encode())

    def back() -> Any:
        kind.file.unlink(missing_ok=True)
        with RolloutFile(out, {"model": "m", "n": 2}).opened() as file:
            assert all(isinstance(name, str) for name in file.places)
            whole = out.read_bytes()
            return {name: whole[place:].partition(b"\n")[0] for name, place in file.places.items()}

    return Kind(out, kind.right[1:], put, back)


def put_summed(file: Path, whole: bytes) -> None:
    """Write a file, and its checksum beside it."""
    file.write_bytes(whole)
    sums_path(file).write_text(f"{hashlib.sha256(whole).hexdigest()}  {file.name}\n")


def indices(folder: Path) -> Kind:
    """Row numbers, for a trainer."""
    file = folder / "i.json"

    def back() -> Any:
        contents.describe_file(file)
        rows = Order(file, 60).take(60)
        assert all(0 <= row < 60 for row in rows)
        return rows

    return Kind(file, [*range(60)], lambda values: put_summed(file, json.dumps(values).encode()), back)


KINDS: tuple[Callable[[Path], Kind], ...] = (
    state, report, check, budget, chosen_prompts, rollout, rolled_out, indices,
)  # fmt: skip
