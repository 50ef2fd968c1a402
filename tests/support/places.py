"""Work that writes files: what it needs, what it does, and what is stored of it at any instant.

support/kills.py kills it, support/faults.py takes the disk away from it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cropi
from cropi.cli import main
from cropi.errors import optional
from cropi.model.policy import Policy
from cropi.ranking.table import read_scores
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store import SketchStore, merge
from cropi.store.rows import RowInfo
from cropi.trainers.newest import merge_rollouts
from cropi.trainers.trl.rollout_log import RolloutLog
from cropi_kernels import SketchSpec
from support import made_curriculum, made_dumps
from support.made_data import make_model, make_records, make_tokenizer, write_lines

DIM = 64
MANIFEST = {"spec": {"dim": DIM}, "stage": "0", "model": {"weights": "made up"}, "dtype": "float16"}


@dataclass(frozen=True)
class Place:
    """``work`` is done in a folder that ``prepare`` made; ``state`` is what is stored at any instant."""

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    state: Callable[[Path], dict[str, Any]]


def ready(place: Place, folder: Path) -> tuple[Path, Path]:
    """What the work needs, as it is at first, and the place of the copies of it in which the work is done.

    The work has been done once in this process: children that are forked then import nothing and build no kernels,
    which is nine tenths of the time of short work, and no time in which it writes.
    """
    prepared, here = folder / "prepared", folder / "here"
    prepared.mkdir(parents=True)
    place.prepare(prepared)
    shutil.copytree(prepared, here)
    place.work(here)
    shutil.rmtree(here)
    gc.freeze()  # a child that collects garbage would go through all modules
    return prepared, here


def each(names: Iterable[str], folder: Path, tried: Callable[[str, Path], tuple[str, list[str]]]) -> int:
    """Try places, each in a folder of its own, and print what was found; how much was wrong."""
    torch.set_num_threads(1)
    bad = 0
    for name in names:
        begun = time.monotonic()
        said, wrong = tried(name, folder / name.replace(" ", "-"))
        print(f"{name}: {said}, {len(wrong)} wrong ({time.monotonic() - begun:.0f} s)", flush=True)
        bad += len(wrong)
    return bad


def rows_of(store: Path) -> dict[str, Any]:
    """Every row with its bits; a row that comes twice is an error."""
    if not (store / "manifest.json").exists():
        return {}
    found: dict[str, Any] = {}
    opened = SketchStore.open(store)
    for rows, table in opened.shards():
        for row, vector in zip(rows, table, strict=True):
            assert row.id not in found, f"{row.id} is there twice"
            found[row.id] = row.status, row.norm, hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    return {row.id: found.get(row.id, (row.status, row.reason)) for row in opened.rows()}


def files_of(*names: str) -> Callable[[Path], dict[str, Any]]:
    """The whole bytes of files, where they are."""
    return lambda folder: {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if (folder / name).exists()
    }


def scores_of(folder: Path) -> dict[str, Any]:
    """The numbers of a score table, if it is there, and the selection; the table's metadata names the folder."""
    found = files_of("selected.jsonl")(folder)
    if (folder / "scores.parquet").exists():
        scores = read_scores(folder / "scores.parquet")
        found["scores"] = hashlib.sha256(repr(scores.ids).encode() + scores.table.tobytes()).hexdigest()
    return found


def fill(path: Path, name: str, count: int, **sizes: int) -> None:
    """A store of made-up rows."""
    with SketchStore.create(path, MANIFEST, **sizes) as store:
        for i in range(count):
            vector = torch.randn(DIM, generator=torch.Generator().manual_seed(i)) + 0.3
            sets = "x" if i % 2 else "y"
            store.add(
                RowInfo(f"{name}{i:04d}", set=sets, norm=float(vector.norm())), None if i % 7 == 6 else vector
            )


def _stores(folder: Path) -> None:
    for name in ("a", "b", "v"):
        fill(folder / name, name, 60, shard_rows=4)


def _sketch(folder: Path) -> None:
    job = SketchJob([folder / "t.jsonl"], folder / "out", SketchSpec(dim=512), shard_rows=1, shard_bytes=20_000,
                    tokens_per_batch=60)  # fmt: skip
    sketch(Policy(make_model(), make_tokenizer()), job, progress=False)


class Failed(Exception):
    """A command that ended with an error, and what it said."""


def _run(words: list[str]) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(words)
    if status:
        raise Failed(said.getvalue())


def _command(*lines: str) -> Callable[[Path], None]:
    """Command lines with the folder in place of ``@``."""

    def work(folder: Path) -> None:
        for line in lines:
            _run([word.replace("@", str(folder)) for word in line.split()])

    return work


def _and(*parts: Callable[[Path], None]) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        for part in parts:
            part(folder)

    return work


def _store(folder: Path) -> None:
    """Rows that are there are left out, as a job does; small shards are joined on the way."""
    with SketchStore.create(folder / "out", MANIFEST, shard_rows=1, shard_bytes=3000) as store:
        for i in range(60):
            if f"p{i:04d}" not in store:
                store.add(RowInfo(f"p{i:04d}"), torch.randn(DIM, generator=torch.Generator().manual_seed(i)))
        store.finish()


def _compact(folder: Path) -> None:
    with SketchStore.resume(folder / "a", shard_bytes=4000) as store:
        store.compact()
    with SketchStore.resume(folder / "a") as store:
        store.compact()


def _merge(folder: Path) -> None:
    merge(folder / "out", [folder / "a", folder / "b"], shard_bytes=4000)


def _curriculum(folder: Path) -> None:
    config = made_curriculum.config(folder, folder, trainer=_quiet(folder))
    # "select plot" draws.
    with made_curriculum.undrawn():
        _run(["curriculum", str(config), "--out", str(folder / "out")])


def _quiet(folder: Path) -> str:
    return f"{sys.executable} {folder / 'nudge.py'} {{model}} {{selected}} {{stage}} {{out}} {folder}/calls"


def _stages(folder: Path) -> dict[str, Any]:
    """The selections, the numbers of the score tables and the rows of the stores of all stages."""
    found: dict[str, Any] = {}
    for stage in sorted((folder / "out").glob("stage-*")):
        found |= {f"{stage.name} {key}": value for key, value in scores_of(stage).items()}
        for store in sorted((stage / "sketches").glob("*")):
            found |= {f"{stage.name} {store.name} {key}": value for key, value in rows_of(store).items()}
    return found


def _records(folder: Path) -> None:
    write_lines(folder / "t.jsonl", make_records(24))


def _rollout(folder: Path) -> None:
    """Prompts whose responses are drawn, one group after the other."""
    asked = [{"id": f"p{i}", "prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)]
    cropi.rollout(
        make_model(), asked, lambda prompt, response, answer: float(len(response) % 2), folder / "out" / "r.jsonl",
        make_tokenizer(), n=2, max_tokens=4, rows=2, progress=False,
    )  # fmt: skip


def _rolled(folder: Path) -> dict[str, Any]:
    found = {}
    for path in (folder / "out" / "r.jsonl.part", folder / "out" / "r.jsonl"):
        for line in path.read_text().split("\n")[:-1] if path.exists() else ():
            record = json.loads(line.partition("\t")[0])
            if "id" in record:
                found[record["id"]] = json.dumps(record)
    return found


def _log(folder: Path) -> None:
    """What a trainer records, from the beginning, and one record a prompt of it."""
    log = RolloutLog(folder / "out", 0)
    log.path("train").unlink(missing_ok=True)
    for step, record in enumerate(make_records(8)):
        log.append("train", [{**record, "step": step}])
        log.sync()
    log.close()
    merge_rollouts([log.path("train")], folder / "merged.jsonl")


def _dump(folder: Path) -> None:
    made_dumps.write(folder / "train_data_step7.jsonl", made_dumps.made("nemo-rl"))


def _saved(folder: Path) -> dict[str, Any]:
    """The rows of a data set, whose files hold names that are drawn."""
    if not (folder / "saved").exists():
        return {}
    rows = optional("datasets").load_from_disk(str(folder / "saved"))
    return {"saved": json.dumps(rows[:])}


_SCORES = "influence --train @/a @/b --valid @/v --draws 0 --out @/scores.parquet"
_SELECT = "select --scores @/scores.parquet --out @/selected.jsonl --fraction 0.2 --table 0"
_EXPORT = " --dataset @/data.jsonl --id-key id --export @/"
_scored = _and(_stores, _command(_SCORES))


def _dataset(folder: Path) -> None:
    _scored(folder)
    write_lines(folder / "data.jsonl", [{"id": f"{a}{i:04d}", "text": "x"} for a in "ab" for i in range(60)])


PLACES = {
    "sketch": Place(_records, _sketch, lambda folder: rows_of(folder / "out")),
    "store": Place(lambda folder: None, _store, lambda folder: rows_of(folder / "out")),
    "merge": Place(_stores, _merge, lambda folder: rows_of(folder / "out")),
    "compact": Place(_stores, _compact, lambda folder: rows_of(folder / "a")),
    "influence": Place(_stores, _command(_SCORES), scores_of),
    "select": Place(_scored, _command(_SELECT), scores_of),
    "export": Place(_stores, _command("store export @/a --out @/x.npy"), files_of("x.npy", "x.npy.rows.jsonl")),
    "curriculum": Place(lambda folder: (made_curriculum.make_folder(folder), None)[1], _curriculum, _stages),
}  # fmt: skip

# What is written in one go: a kill says little of it, a full disk more.
WRITTEN = {
    "export parquet": Place(_stores, _command("store export @/a --out @/x.parquet"), files_of("x.parquet")),
    "select exports": Place(
        _dataset,
        _command(
            *(_SELECT + _EXPORT + name for name in ("x.parquet", "x.jsonl", "x.json")),
            _SELECT + " --export @/x.txt",
        ),
        files_of("selected.jsonl", "x.parquet", "x.jsonl", "x.json", "x.txt"),
    ),
    "select saved": Place(_dataset, _command(_SELECT + _EXPORT + "saved --format save_to_disk"), _saved),
    "select plot": Place(_scored, _command(_SELECT + " --plot @/x.png"), files_of("selected.jsonl", "x.png")),
    "report": Place(_and(_scored, _command(_SELECT)), _command("report @"), files_of("report.html")),
    "convert": Place(
        _dump, _command("convert @/train_data_step7.jsonl --temperature 0.7 --out @/x.jsonl"), files_of("x.jsonl")
    ),
    "rollout": Place(lambda folder: None, _rollout, _rolled),
    "rollout log": Place(lambda folder: None, _log, files_of("merged.jsonl")),
}  # fmt: skip
