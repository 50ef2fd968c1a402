"""The work folder of the fidelity benchmark: continued for the same numbers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines

from benchmarks.lib.examples import read_groups
from benchmarks.lib.fidelity_collect import collect, shapes_of, sketch_all
from benchmarks.lib.fidelity_variants import Variant, variants
from cropi.errors import CropiError
from cropi_kernels import SketchSpec, plan_matrix
from cropi_kernels.names import canonical_name
from cropi_kernels.testing import sketch_gradients


@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
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


@pytest.mark.parametrize("tied", [True, False])
def test_sketches_of_formed_gradients_are_those_of_the_definition(tied: bool) -> None:
    """Folds included: one that was left unfolded by hand was refused by the operators."""
    model = make_model(tie_word_embeddings=tied).double()
    spec = SketchSpec(width=16, vocab_width=32)
    generator = torch.Generator().manual_seed(0)
    gradient = {
        canonical_name(n): torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()
    }
    roles = [Variant(role, spec, (role,)) for role in ("linear", "tied", "embedding", "vector")]
    got = torch.from_numpy(sketch_all(gradient, roles, shapes_of(model)).sum(0))
    want = sketch_gradients(model, {name: g.double() for name, g in gradient.items()}, spec)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert plan_matrix(spec, "a", 8, 64).col_fold is not None
