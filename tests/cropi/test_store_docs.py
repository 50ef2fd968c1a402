"""The code of docs/store.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.places import fill

from cropi.cli import main

TEXT = (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, count in (("train", 20), ("more", 8), ("valid", 4)):
        fill(tmp_path / "sketches" / name, name[0], count)
    return tmp_path


def test_the_python_api(folder: Path) -> None:
    exec(compile(BLOCKS[0], "docs/store.md", "exec"), {})
    assert np.load(folder / "train.npy", mmap_mode="r").shape == (18, 64)
    assert main("store verify sketches/all".split()) == 0


def test_neighbours_by_faiss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sketch is its own nearest neighbour: valid.npy holds the first four of the training prompts."""
    pytest.importorskip("faiss")
    assert main("store export sketches/train --out train.npy --normalise".split()) == 0
    np.save("valid.npy", np.load("train.npy")[:4])
    capsys.readouterr()
    exec(compile(BLOCKS[1], "docs/store.md", "exec"), {})
    found = capsys.readouterr().out
    assert [row.split("'")[1] for row in found.split("[")[2:]] == ["t0000", "t0001", "t0002", "t0003"]
