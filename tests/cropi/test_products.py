"""A store that is continued, here or by other processes, multiplies as the run that began it: the bits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import sketches_of

from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.job_store import PRODUCTS
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec, frozen

pytestmark = [
    pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens"),
    pytest.mark.skipif(frozen.unsupported() is not None, reason="torch without packed products"),
]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the measurement says in this process, which has decided nothing yet."""
    said = {"ratio": 0.1}
    monkeypatch.setattr(frozen, "_LEAST_SIZE", 1)
    monkeypatch.setattr(frozen, "_DECISIONS", {})
    monkeypatch.setattr(frozen, "_ratio", lambda rows, cols, threads: said["ratio"])
    monkeypatch.delenv(frozen.VARIABLE, raising=False)
    return said


def run(tmp_path: Path, name: str, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    path = tmp_path / "records.jsonl"
    if not path.exists():
        write_lines(path, records)
    job = SketchJob([path], tmp_path / name, spec=SketchSpec(dim=1024))
    sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    store = SketchStore.open(tmp_path / name)
    return sketches_of(store)


@pytest.mark.long
def test_a_continued_store_keeps_the_decisions_of_its_beginning(
    measured: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(8)
    calls: list[int] = []
    real = frozen.product
    monkeypatch.setattr(frozen, "product", lambda *given: (calls.append(1), real(*given))[1])
    whole = run(tmp_path, "whole", records)
    assert calls
    notes = SketchStore.open(tmp_path / "whole").manifest["notes"][PRODUCTS]
    assert notes and all(notes.values())
    # A run that was killed before it had a shard, and goes on where the measurement says the opposite.
    run(tmp_path, "killed", records)
    for shard in (tmp_path / "killed").glob("shard-*"):
        shard.unlink()
    measured["ratio"] = 9.0
    monkeypatch.setattr(frozen, "_DECISIONS", {})
    calls.clear()
    again = run(tmp_path, "killed", records)
    assert calls, "measured anew, torch would multiply"
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    # A store of its own is measured anew.
    monkeypatch.setattr(frozen, "_DECISIONS", {})
    calls.clear()
    run(tmp_path, "other", records)
    assert not any(SketchStore.open(tmp_path / "other").manifest["notes"][PRODUCTS].values()) and not calls


def test_decisions_are_of_the_shapes_that_can_be_packed(measured: dict[str, float]) -> None:
    model = make_model()
    shapes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    head = tuple(model.get_output_embeddings().weight.shape)
    assert set(frozen.choices(model)) == {f"{rows}x{cols}" for rows, cols in shapes - {head}}
    assert frozen.choices(model.to(torch.bfloat16)) == {}
    with pytest.raises(ValueError, match="made holds the key '3'"):
        frozen.decide({"3": True})


def test_the_environment_leaves_nothing_to_decide(
    measured: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(frozen.VARIABLE, "torch")
    assert frozen.choices(make_model()) == {}
