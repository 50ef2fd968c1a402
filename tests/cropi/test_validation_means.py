"""Validation sets whose prompts have no gradient: what `Selector.refresh` takes, and what it says."""

from __future__ import annotations

import pytest
import torch

from cropi import Selector
from cropi.errors import CropiError
from cropi_kernels import SketchSpec


def made() -> Selector:
    return Selector(["p0", "p1"], SketchSpec(256), dim=64, explore=0.0)


def test_a_validation_set_without_a_gradient_is_left_out_or_the_means_before_are_kept() -> None:
    selector, x = made(), torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CropiError, match="'valid' has no gradient .2 of its 2 rows are not finite"):
        selector.refresh(torch.full((2, 256), float("nan")))
    with pytest.raises(
        CropiError, match="'b' has no gradient .its 2 rows add up to zero.: give .* leave the"
    ):
        selector.refresh(torch.stack([x[0], x[1], -x[1]]), ["a", "b", "b"])
    selector.refresh(x[:2], ["a", "b"])
    selector.update(["p0", "p1"], x[1:], step=3)
    before = selector.scores(["p0", "p1"]).tolist()
    with pytest.warns(
        UserWarning, match="'a' .*'b' .*, so the validation means of step 0 are kept; give more"
    ):
        selector.refresh(x * float("nan"), ["a", "b", "b"])
    assert selector.scores(["p0", "p1"]).tolist() == before
    with pytest.warns(
        UserWarning,
        match="'b' has no gradient .its 2 rows are all zero., so it does not count until the next refresh",
    ):
        selector.refresh(torch.stack([x[2], 0 * x[2], 0 * x[2]]), ["a", "b", "b"])
    alone = made()
    alone.refresh(x[2:])
    alone.update(["p0", "p1"], x[1:], step=3)
    assert selector.scores(["p0", "p1"]).tolist() == alone.scores(["p0", "p1"]).tolist()
