"""Curricula that take no time: a folder with all that one needs, and what its runs leave behind."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from cropi.cli import main
from support.commands import json_lines
from support.made_data import make_records, save_policy, write_lines

# Training that costs nothing: every weight is moved by an amount that depends on the selection, and the call is
# noted, so that a test can tell how often each stage was trained.
NUDGE = """
import hashlib, os, shutil, sys
from safetensors.numpy import load_file, save_file
model, selected, stage, out, calls = sys.argv[1:]
with open(calls, "a") as file:
    file.write(stage + "\\n")
for name in os.listdir(model):
    shutil.copy(os.path.join(model, name), out)
weights = load_file(os.path.join(model, "model.safetensors"))
with open(selected, "rb") as file:
    step = int(hashlib.sha256(file.read()).hexdigest()[:4], 16) / 65536 * 0.1
moved = {name: value + step for name, value in weights.items()}
save_file(moved, os.path.join(out, "model.safetensors"), {"format": "pt"})
"""


def make_folder(folder: Path) -> Path:
    """A folder with a model, trajectory files and a trainer."""
    save_policy(folder / "model", tie_word_embeddings=False)
    write_lines(folder / "train.jsonl", make_records(40))
    write_lines(folder / "valid.jsonl", make_records(12, seed=1, sets=["x", "y"]))
    (folder / "nudge.py").write_text(NUDGE)
    return folder


def config(made: Path, out: Path, **changes: Any) -> Path:
    """A config file beside ``out``; None takes a key out."""
    nudge = f"{sys.executable} {made / 'nudge.py'} {{model}} {{selected}} {{stage}} {{out}} {out}.calls"
    values = {
        "model": str(made / "model"), "train": str(made / "train.jsonl"), "valid": str(made / "valid.jsonl"),
        "out": str(out), "stages": 2, "steps": 4, "fraction": 0.2, "trainer": nudge,
        "sketch": {"dim": 512}, "no_progress": True,
    }  # fmt: skip
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
    return path


def undrawn() -> Any:
    """What is drawn takes half of a stage's time: inside, the files of plots hold one letter."""
    return patch(
        "matplotlib.figure.Figure.savefig", lambda figure, path, **given: Path(path).write_bytes(b"x")
    )


def curriculum(path: Path, *words: object, drawn: bool = False) -> int:
    with nullcontext() if drawn else undrawn():
        return main(["curriculum", str(path), *map(str, words)])


def selections(out: Path) -> list[list[dict[str, Any]]]:
    return [json_lines(path) for path in sorted(out.glob("stage-*/selected.jsonl"))]


def report(out: Path) -> list[dict[str, Any]]:
    return list(json.loads((out / "report.json").read_text())["stages"])


def calls(out: Path) -> list[str]:
    return Path(f"{out}.calls").read_text(encoding="utf-8").split()
