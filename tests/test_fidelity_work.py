"""The work folder of the fidelity benchmark: continued for the same numbers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_data import make_model, make_records, make_tokenizer, write_lines

from benchmarks.lib.examples import read_groups
from benchmarks.lib.fidelity_collect import collect
from benchmarks.lib.fidelity_variants import variants
from cropi.errors import CropiError


@pytest.mark.filterwarnings("ignore::cropi.scan.LossyTokens")
def test_numbers_of_another_model_or_other_prompts_do_not_mix(tmp_path: Path) -> None:
    chosen = [
        v for v in variants(1, [64], [8192], []) if v.label.startswith("slab/") and "hidden" not in v.label
    ]

    def groups(model: Any, seed: int) -> Any:
        path = write_lines(tmp_path / f"{seed}.jsonl", make_records(8, seed=seed))
        return read_groups(model, make_tokenizer(), str(path))[:3]

    model, other = (make_model(seed=seed, tie_word_embeddings=True) for seed in (0, 1))
    train, valid, work = groups(model, 0), {"v": groups(model, 1)}, tmp_path / "work"
    collect(model, train[:2], valid, chosen, work)
    first = np.load(work / "train-0000.npz")["products"]
    for given, named in (
        ((other, train, valid, chosen), "another model"),
        ((model, train[1:], valid, chosen), "another train"),
        ((model, train, {"v": train}, chosen), "another valid"),
        ((model, train, valid, chosen[1:]), "another variants"),
    ):
        with pytest.raises(CropiError, match=named):
            collect(*given, work)
    collect(model, train, valid, chosen, work)  # more prompts of the same
    collect(model, train[:1], valid, chosen, work)
    assert np.array_equal(np.load(work / "train-0000.npz")["products"], first)
    assert (work / "train-0002.npz").exists()
    (work / "made_from.json").unlink()
    with pytest.raises(CropiError, match="does not say what it was made from"):
        collect(model, train, valid, chosen, work)
