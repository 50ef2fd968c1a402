"""Every reader of files is given paths and values of 100 kB, and paths that the system refuses: a result, or less than
2 kB of words."""

from __future__ import annotations

import errno
import json
import os
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.make_formats import records
from support import fuzz
from support.made_dumps import KINDS, MORE, made, write

import cropi
from cropi.cli.config import read_config
from cropi.cli.contents import describe_file, describe_folder, describe_rows
from cropi.curriculum.learnt import read_training
from cropi.curriculum.state import read_state
from cropi.data.export import export, read_dataset
from cropi.data.readers import read
from cropi.gradient.tokenize import Tokenize
from cropi.model.moments import read_moments
from cropi.pipeline.rescoring import read_plan
from cropi.ranking.scores import Scores
from cropi.ranking.selection_files import read_selection
from cropi.ranking.table import read_scores, write_scores
from cropi.rollouts.prompts import read_prompts
from cropi.sealed import read_sealed
from cropi.store.manifest import read_manifest
from cropi.store.rows import RowInfo
from cropi.trainers.dumps.auto import read_rollouts
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.pickled import load_dump
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.recognise import recognise
from cropi.trainers.trl.stage_state import read_state as read_trl_state

LONG = "y" * 10**5
DUMPS = KINDS | MORE


def gone_through(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda path: deque(make(path), maxlen=0)


def of(kind: str) -> Callable[[Any], Any]:
    return gone_through(
        lambda path: read_rollouts(path, kind.split()[0], Reading(temperature=0.7), Left(skip_bad=False))
    )


def exported(path: Any) -> None:
    export(Path("out.json"), ["p0"], format="indices", dataset=path)


ROW = records()[0]
NO_MODEL = Tokenize(None, 100, eos=False)
STATE = {"version": 1, "stage": 1, "name": "a"}
# By module and function: a file's name, what it holds (lines of JSON, or a kind of dump), what reads it.
Readers = dict[str, list[tuple[str, Any, Callable[[Any], Any]]]]
# Of files of lines that others write: test_odd_files.py gives them odd ones.
OF_LINES: Readers = {
    "data.readers.read": [
        ("r.jsonl", ROW, gone_through(read)),
        ("r.jsonl", ROW | {"key": "a"}, gone_through(lambda path: read(path, columns={"answer": "key"}))),
    ],
    "data.export.read_dataset": [("d.jsonl", ROW, read_dataset), ("d.jsonl", ROW | {"index": 4}, exported)],
    "rollouts.prompts.read_prompts": [("q.jsonl", ROW, lambda path: read_prompts(path, NO_MODEL))],
    "cli.contents.describe_rows": [("i.jsonl", ROW, lambda path: describe_rows(Path(path)))],
    "trainers.dumps.recognise.recognise": [("d.jsonl", ROW, recognise)],
    "trainers.dumps.auto.read_rollouts": [(DUMPS[kind][0], kind, of(kind)) for kind in DUMPS],
}  # fmt: skip
READERS: Readers = OF_LINES | {
    "ranking.selection_files.read_selection": [("s.jsonl", {"id": "a", "scores": {}, "check": "x"}, read_selection)],
    "ranking.table.read_scores": [("s.parquet", "scores", read_scores)],
    "cli.config.read_config": [("c.json", {"dim": 64}, read_config)],
    "cli.contents.describe_file": [("i.json", ROW, describe_file)],
    "cli.contents.describe_folder": [("i.json", ROW, lambda path: describe_folder(Path(path)))],
    "curriculum.state.read_state": [("s.json", STATE, lambda path: read_state(Path(path)))],
    "curriculum.learnt.read_training": [("s.json", STATE, lambda path: read_training(Path(path)))],
    "pipeline.rescoring.read_plan": [("p.json", STATE, lambda path: read_plan(Path(path)))],
    "sealed.read_sealed": [("s.json", STATE, lambda path: read_sealed(Path(path), {"version": int}, "make it"))],
    "store.manifest.read_manifest": [("manifest.json", STATE, lambda path: read_manifest(Path(path)))],
    "model.moments.read_moments": [("o.pt", STATE, lambda path: read_moments(path, torch.nn.Linear(2, 2)))],
    "trainers.trl.stage_state.read_state": [("s.json", STATE, lambda path: read_trl_state(Path(path)))],
    "trainers.dumps.pickled.load_dump": [("7.pt", "slime", lambda path: load_dump(Path(path), "a dump"))],
}  # fmt: skip
# What reads files by one of those alone, or no file.
OTHERS = {
    "grouping.read_groups", "ranking.shares.read_quotas", "trainers.dumps.unpickle.read_zip", "store.shards.read_shard",
    *(f"trainers.dumps.{module}.read_dump" for module in
      ("art", "atropos", "nemo_gym", "nemo_rl", "open_instruct", "openai", "roll", "slime", "swift", "text_rows", "trl",
       "verifiers", "verl", "vllm")),
}  # fmt: skip
ALL = [(name, number) for name, some in READERS.items() for number in range(len(some))]


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, str) and content in DUMPS:
        return write(path, made(content))
    if content == "scores":
        write_scores(path, Scores([RowInfo("a"), RowInfo("b")], ["s"], np.zeros((2, 1)), {}))
    else:
        path.write_text(json.dumps(content) + "\n")
    return path


def changed(held: Any, way: fuzz.Way, value: Any) -> Any:
    copy = json.loads(json.dumps(held))
    inner = copy
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return copy


def ended(reader: Callable[[Any], Any], path: Any) -> None:
    """With a result, or in a few words."""
    fuzz.ended(partial(reader, path))


@pytest.mark.parametrize(("name", "number"), ALL)
def test_a_value_of_a_hundred_kilobytes(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, content, reader = READERS[name][number]
    ended(reader, written(tmp_path, file, content))
    if not isinstance(content, dict):
        return
    for way in [way for way in fuzz.ways(content) if way]:
        for value in (LONG, [LONG], {LONG: 1}) if len(way) == 1 else (LONG,):
            ended(reader, written(tmp_path, file, changed(content, way, value)))
    ended(reader, written(tmp_path, file, content | {LONG: 1}))
    ended(reader, written(tmp_path, file, LONG))


@pytest.mark.parametrize(("name", "number"), ALL)
def test_a_path_that_the_system_refuses(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, content, reader = READERS[name][number]
    ending = Path(file).suffix
    circle = tmp_path / f"circle{ending}"
    circle.symlink_to(circle)
    for path in (
        circle,
        circle / file,
        tmp_path / f"{'x' * 300}{ending}",
        f"{LONG}{ending}",
        f"a\0b{ending}",
    ):
        ended(reader, path)
    path, right = written(tmp_path, file, content), os.stat
    for number in (errno.EACCES, errno.EIO):

        def refuse(given: Any, *words: Any, number: int = number, **named: Any) -> Any:
            if given == path or given == str(path):
                raise OSError(number, os.strerror(number), str(path))
            return right(given, *words, **named)

        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", refuse)
            ended(reader, path)


def test_every_reader_is_in_the_table() -> None:
    root = Path(cropi.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name in re.findall(r"^def (\w+)", path.read_text(), re.MULTILINE):
            if name.split("_")[0] in ("read", "describe", "recognise") or name in ("load_dump", "parts_of"):
                found.add(f"{module}.{name}")
    assert found >= OTHERS | set(READERS) and not found - OTHERS - set(READERS), found ^ (
        OTHERS | set(READERS)
    )


def test_paths_are_asked_about_in_words() -> None:
    """``Path.exists``, ``is_file`` and ``is_dir`` raise the system's errors, or take them for no."""
    root = Path(cropi.__file__).parent
    asked = re.compile(r"\.(exists|is_file|is_dir)\(\)")
    found = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if asked.search(path.read_text("utf-8"))
    }
    assert found == {"atomic.py"}, found
