"""Files that are changed anywhere and sealed again, as a damaged disk never leaves them but a hand or another program
may: each is read, or ends in words. Of stores this is test_store_fuzz.py."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support import fuzz

from cropi import rescoring
from cropi.cli import contents, info
from cropi.curriculum.learnt import nothing_learnt, read_training
from cropi.curriculum.report import write_report
from cropi.curriculum.state import FORMAT, State
from cropi.errors import CropiError
from cropi.options import Selecting
from cropi.pipeline import pick
from cropi.ranking import selection, selection_files, table
from cropi.ranking.scores import Scores
from cropi.ranking.selector import Selector
from cropi.ranking.uncertainty import Uncertainty
from cropi.report import folder as folders
from cropi.report import html
from cropi.report.curriculum import curriculum_page
from cropi.rollouts.file import MARK, RolloutFile
from cropi.sealed import sealed, sums_path
from cropi.store.rows import RowInfo
from cropi.trainers.nemo_rl.batches import Order
from cropi_kernels import SketchSpec

pytestmark = pytest.mark.long

LONGEST = 2_000  # bytes of a message


@dataclass
class Kind:
    """What stands in a file, how it is written with valid checksums, and everything that reads it."""

    right: Any
    put: Callable[[Any], None]
    back: Callable[[], Any]
    inputs: int = 400
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


# ------------------------------------------------------------------------------------------------ tables of scores
COLUMNS = (
    lambda rng, n: pyarrow.array([None] * n),
    lambda rng, n: pyarrow.array([whole_text(rng) or None for _ in range(n)], pyarrow.string()),
    lambda rng, n: pyarrow.array(["same"] * n).dictionary_encode(),
    lambda rng, n: pyarrow.array([rng.choice((None, 0.5, -1e308, np.nan, np.inf)) for _ in range(n)]),
    lambda rng, n: pyarrow.array([rng.choice((None, 0, -3, 2**62)) for _ in range(n)], pyarrow.int64()),
    lambda rng, n: pyarrow.array([2**64 - 1] * n, pyarrow.uint64()),
    lambda rng, n: pyarrow.array([0.25] * n, pyarrow.float32()),
    lambda rng, n: pyarrow.array([True, None] * (n // 2), pyarrow.bool_()),
    lambda rng, n: pyarrow.array([[1.0], None] * (n // 2), pyarrow.list_(pyarrow.float64())),
    lambda rng, n: pyarrow.array([{"a": 1}] * n),
    lambda rng, n: pyarrow.array([b"\xff"] * n),
    lambda rng, n: pyarrow.array([0] * n, pyarrow.timestamp("us")),
    lambda rng, n: pyarrow.array(["1" * 300] * n).cast(pyarrow.large_string()),
)  # fmt: skip


def whole_text(rng: random.Random) -> str:
    return fuzz.text(rng).encode("utf-8", "replace").decode()


def changed_table(rng: random.Random, whole: Any, meta: Any) -> Any:
    """One to three columns of another kind, renamed, left out, or there twice; or other rows."""
    for _ in range(rng.randint(1, 3)):
        if not whole.num_columns:
            break
        place, how = rng.randrange(whole.num_columns), rng.randrange(7)
        name = whole.column_names[place]
        if how == 0:
            whole = whole.remove_column(place)
        elif how == 1:
            other = rng.choice(
                [*whole.column_names, "score[]", "score[\ud800]".encode("utf-8", "replace").decode(), "x"]
            )
            whole = whole.rename_columns(
                [*whole.column_names[:place], other, *whole.column_names[place + 1 :]]
            )
        elif how == 2:
            whole = whole.append_column(name, whole.column(place))
        elif how == 3:
            whole = rng.choice(
                (
                    whole.slice(0, 0),
                    pyarrow.concat_tables([whole, whole]),
                    pyarrow.concat_tables([whole.slice(0, 1)] * 12),
                )
            )
        elif whole.num_rows == 12:
            whole = whole.set_column(place, name, rng.choice(COLUMNS)(rng, 12))
    text = json.dumps(meta)
    kinds = {"cropi": text, "cropi_sha256": table._sealed(whole.schema, whole.num_rows, text)}
    return whole.replace_schema_metadata(kinds)


def test_any_table_of_scores_is_read_or_ends_in_words(tmp_path: Path) -> None:
    file, scores = tmp_path / table.SCORES, made_scores()
    table.write_scores(file, scores)
    selection.write_selection(tmp_path / "selected.jsonl", scores, pick(scores, Selecting(fraction=0.25)))
    right, whole = scores.meta, pyarrow.parquet.read_table(file)
    places = list(fuzz.ways(right))
    # What is wrong with a table that can be read is said of the option that asks for it.
    names = (
        file.name,
        "selected.jsonl",
        "the scores have no",
        "the scores hold no",
        "leave out per",
        "weights: ",
    )

    def one(rng: random.Random) -> str:
        meta = fuzz.changed(rng, copy.deepcopy(right), places) if rng.random() < 0.5 else right
        other = changed_table(rng, whole, meta)
        pyarrow.parquet.write_table(other, file, write_page_checksum=True)
        return ended(partial(read_all, file), names)

    ends = fuzz.run(500, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["read"] > 15), ends


def read_all(file: Path) -> None:
    scores = table.read_scores(file)
    for options in (
        {},
        {"confidence": 0.9},
        {"method": "p_selected"},
        {"per": "task"},
        {"method": "learnability"},
    ):
        chosen = pick(scores, Selecting(fraction=0.25, **options))
        assert len(set(chosen.ids)) == len(chosen.ids)
    selection.write_selection(file.parent / "other.jsonl", scores, chosen)
    repr(scores), scores._repr_html_(), str(Uncertainty.of(scores)), chosen.weights
    info._scores(file)
    folders.report_folder(file.parent)


# ------------------------------------------------------------------------------------------------ JSON
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

    def back() -> None:
        contents.describe_folder(folder)
        made = State.open(plan)
        made.latest("sketch", 1), made.result(0, "train")
        write_report(plan, made)

    started = {"stage": 2, "step": "sketch", "attempts": 1}
    right = {"format": FORMAT, "settings": settings, "done": done, "started": started}
    return Kind(
        right, put_sealed(folder / "state.json"), back, names=("state.json", "stages is", "was begun with")
    )


def report(folder: Path) -> Kind:
    kind = state(folder)
    kind.put(kind.right)
    kind.back()
    right = json.loads((folder / "report.json").read_text())
    del right["checksum"]
    (folder / "state.json").unlink()
    names = ("report.json", "no stage of the curriculum has begun")
    return Kind(right, put_sealed(folder / "report.json"), lambda: curriculum_page(folder), names=names)


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
    chosen = pick(scores, Selecting(fraction=0.25))

    def back() -> None:
        contents.describe_file(folder / "check.json")
        given = html.ReportInput(scores, chosen, check=folders._check(folder, None, scores))
        html._anatomy(given.check), html._verdict(given)

    return Kind(right, put_sealed(folder / "check.json"), back)


def budget(folder: Path) -> Kind:
    """What a stage within a budget sketches anew."""
    right = {
        "for": {"stage": "1", "model": {"weights": "aa"}}, "options": {"budget": 0.1}, "tokens": 5.0, "spent": 4.0,
        "ids": ["p1", "p2"], "sets": ["v", "w"], "before": [[0.1, 0.2], None], "ages": [1, 2], "spread": [0.1, 0.2],
        "drift": [0.5, 3],
    }  # fmt: skip
    table.write_scores(folder / table.SCORES, made_scores())

    def back() -> None:
        contents.describe_file(folder / rescoring.PLAN)
        assert rescoring._drift_of(folder).variance >= 0

    return Kind(right, put_sealed(folder / rescoring.PLAN), back)


def chosen_prompts(folder: Path) -> Kind:
    scores, file = made_scores(), folder / "selected.jsonl"
    selection.write_selection(file, scores, pick(scores, Selecting(fraction=0.5)))
    right = [json.loads(line) for line in file.read_text().splitlines()]
    for row in right:
        del row["check"]

    def put(rows: Any) -> None:
        lines = [
            json.dumps(row | {"check": selection_files._check(row)} if isinstance(row, dict) else row)
            for row in (rows if isinstance(rows, list) else [rows])
        ]
        file.write_text("\n".join(lines))

    def back() -> None:
        contents.describe_rows(file)
        made = folders.selection_of(scores, file)
        assert len(set(made.chosen)) == len(made.chosen)
        html._overlap(scores, made)

    return Kind(right, put, back)


def rollout(folder: Path) -> Kind:
    """One that was begun, whose lines carry checksums."""
    file = RolloutFile(folder / "r.jsonl", {"model": "m", "n": 2})
    record = {"prompt": "q", "rewards": [0.5], "rollout": file.mark}
    right = [{MARK: file.settings, "way": "shared"}, record | {"id": "a"}, record | {"id": "b"}]

    def put(lines: Any) -> None:
        texts = [json.dumps(line).encode() for line in (lines if isinstance(lines, list) else [lines])]
        file.part.write_bytes(b"".join(text + b"\t%08x\n" % zlib.crc32(text) for text in texts))

    def back() -> None:
        file.places.clear()
        file.out.unlink(missing_ok=True)
        sums_path(file.out).unlink(missing_ok=True)
        with file.opened():
            file.begin({})
            for name in ("a", "b"):
                if name not in file:
                    file.add({"id": name})
            file.finish(["a", "b"])
        assert {json.loads(line)["id"] for line in file.out.read_text().splitlines()} == {"a", "b"}

    return Kind(right, put, back)


def rolled_out(folder: Path) -> Kind:
    """A finished one, whose file has its checksum beside it."""
    kind = rollout(folder)
    out = folder / "r.jsonl"

    def put(lines: Any) -> None:
        whole = "".join(
            json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])
        ).encode()
        put_summed(out, whole)

    def back() -> None:
        (folder / "r.jsonl.part").unlink(missing_ok=True)
        with RolloutFile(out, {"model": "m", "n": 2}).opened() as file:
            assert set(file.places) <= {"a", "b"} or all(isinstance(name, str) for name in file.places)

    return Kind(kind.right[1:], put, back)


def put_summed(file: Path, whole: bytes) -> None:
    file.write_bytes(whole)
    sums_path(file).write_text(f"{hashlib.sha256(whole).hexdigest()}  {file.name}\n")


def indices(folder: Path) -> Kind:
    """Row numbers, for a trainer."""
    file = folder / "i.json"

    def back() -> None:
        contents.describe_file(file)
        assert all(0 <= row < 9 for row in Order(file, 9).take(8))

    return Kind([4, 2, 0], lambda values: put_summed(file, json.dumps(values).encode()), back)


def training(folder: Path) -> Kind:
    """What a trainer says of its training: another one is left out, with a warning."""
    right = {"reward": [0.2, 0.1], "equal_rewards": [0.1, 0.99], "steps": [1, 9]}

    def back() -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = read_training(folder)
        assert bool(found) != bool(told)
        nothing_learnt([{"stage": 0, **found}])
        if told:
            raise CropiError(str(told[0].message))

    return Kind(right, lambda values: (folder / "training.json").write_text(json.dumps(values)), back)  # type: ignore[arg-type,return-value]


KINDS = (
    state, report, check, budget, chosen_prompts, rollout, rolled_out, indices, training,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_values_are_read_or_end_in_words(kind: Callable[[Path], Kind]) -> None:
    with fuzz.folder() as folder:
        made = kind(folder)
        made.put(made.right)
        made.back()
        places = list(fuzz.ways(made.right))

        def one(rng: random.Random) -> str:
            made.put(fuzz.changed(rng, copy.deepcopy(made.right), places))
            return ended(made.back, made.names or (str(folder),))

        ends = fuzz.run(made.inputs, one)
    assert fuzz.repeats() or (ends["words"] > 40 and ends["read"] > 10), ends


def ended(back: Callable[[], Any], names: tuple[str, ...]) -> str:
    """How reading ended; the message of an error has one of the names."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            back()
    except CropiError as error:
        text = str(error)
        assert len(text.encode("utf-8", "surrogatepass")) < LONGEST, text[:300]
        assert any(name in text for name in names), text
        return "words"
    return "read"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_values_inside_one_another_without_end(kind: Callable[[Path], Kind], tmp_path: Path) -> None:
    """Python's reader of JSON gives up below a thousand brackets."""
    made = kind(tmp_path)
    made.put(made.right)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    made.put(["x"])
    deep = b"[" * 100_000
    for path in tmp_path.iterdir():
        if path.stat().st_mtime_ns != before.get(path) and not path.name.endswith(".sha256"):
            put_summed(path, deep if path.suffix != ".part" else deep + b"\t%08x\n" % zlib.crc32(deep))
    assert ended(made.back, made.names or (str(tmp_path),)) == "words"


# ------------------------------------------------------------------------------------------------ a selector
def test_any_state_of_a_selector_is_taken_or_ends_in_words() -> None:
    spec = SketchSpec(dim=64)

    def selector() -> Selector:
        return Selector(["a", "b", "c"], spec, dim=64, bits=16)

    made = selector()
    made.update(["a", "b"], torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), 1)
    made.refresh(torch.ones(2, 64), ["x", "y"])
    right = made.state_dict()
    places = list(fuzz.ways(right))

    def value(rng: random.Random) -> Any:
        if rng.random() < 0.5:
            return fuzz.anything(rng)
        kinds = (torch.float32, torch.float64, torch.int64, torch.int8, torch.bool)
        return torch.zeros([rng.randint(0, 4) for _ in range(rng.randint(0, 3))], dtype=rng.choice(kinds))

    def back(state: Any) -> None:
        other = selector()
        other.load_state_dict(state)
        other.update(["c"], torch.ones(1, 64), other.step + 1)
        other.scores(["a"]), other.next(2, other.step)

    names = ("the state", "a state of a Selector", "the pool")

    def one(rng: random.Random) -> str:
        return ended(partial(back, fuzz.changed(rng, copy.deepcopy(right), places, value)), names)

    ends = fuzz.run(600, one)
    assert fuzz.repeats() or (ends["words"] > 100 and ends["read"] > 5), ends
