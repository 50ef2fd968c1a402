"""Formed gradients of segments that are whole rows: from the module's call on their rows, where that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import odd_models, zoo
from support.formed import Affine, by_autograd
from support.zoo import SPEC, assert_close
from torch import nn

from cropi_kernels import GradientSketcher
from cropi_kernels.sketcher.checks import listener


@pytest.mark.parametrize("name", ["gpt-oss", "apertus", "mamba2", "bamba"])
def test_a_bad_token_fails_its_segment_alone(name: str) -> None:
    """Token 94 occurs in the last prompt only: a segment of whole rows is formed from its own rows."""
    model, batch = odd_models.make(name), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        clean = batch.sketch(sketcher).sketches
        with torch.no_grad():
            model.get_input_embeddings().weight[94, 3] = float("nan")  # type: ignore[operator]
        got = batch.sketch(sketcher).sketches
    assert got[2].isnan().all()
    torch.testing.assert_close(got[:2], clean[:2], rtol=1e-4, atol=1e-6)


class Counting(nn.Module):
    """Counts its calls, and what a call of fewer rows is told."""

    def __init__(self, change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.scale, self.change, self.rows = nn.Parameter(torch.rand(8)), change, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return self.change(self, x * self.scale)


CHANGES: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], bool]] = {
    "rows apart": (lambda m, y: y, True),
    "counts its calls": (lambda m, y: y * len(m.rows), False),
    "another first row": (lambda m, y: y * torch.arange(1, len(y) + 1)[:, None, None], False),
    "fails on fewer rows": (lambda m, y: y.view(2, 6, 8), False),
}


@pytest.mark.parametrize("case", CHANGES)
def test_rows_are_taken_apart_where_the_module_does_so(case: str) -> None:
    """The call is repeated on a segment's rows; where that gives something else, all rows are differentiated."""
    change, apart = CHANGES[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Counting(change), nn.Linear(8, 8))
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    with (
        GradientSketcher(model, SPEC, verify=False) as sketcher,
        sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out,
    ):
        (model(x) * w).sum().backward()
    rows, model[1].rows = model[1].rows, []
    assert (rows == [2, 1, 1]) == apart or not apart
    grads = []
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        found = []
        for span in (slice(0, 6), slice(6, 12)):
            model.zero_grad()
            model[1].rows = []
            (model(x.to(dtype)) * w.to(dtype)).flatten(0, 1)[span].sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        grads.append(found)
    assert_close(out.sketches, model, *grads)


def test_an_input_that_is_changed_later_is_not_used_again() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.in_place = Affine(), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 1.0
            z = self.inner(y).sigmoid()
            return y.add_(z) if self.in_place else y + z

    torch.manual_seed(0)
    model = Residual()
    model.inner.weight.requires_grad_(False)  # its gradient needs the input as it was, with and without taps
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    with GradientSketcher(model, SPEC) as sketcher, sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
        (model(x) * w).sum().backward()
    spans, model.in_place = [slice(0, 6), slice(6, 12)], False
    grads = [by_autograd(model, x, w, spans, wide) for wide in (True, False)]
    assert_close(out.sketches, model, *grads)


class Dropped(nn.Module):
    """A residual branch, ``size`` small, with dropout; the mask does not depend on the dtype."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.scale, self.size = nn.Parameter(torch.rand(8)), size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = (torch.rand(x.shape) > 0.3).to(x.dtype)
        return x + self.size * kept * (x * self.scale)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float32, 1e-6)])
def test_dropout_has_one_mask_and_random_numbers_go_on_as_before(dtype: torch.dtype, size: float) -> None:
    """Another mask changes the outputs by less than rounding may, and the gradient of the scale by its own size."""
    torch.manual_seed(0)
    model = Dropped(size).to(dtype)
    x, w, spans = torch.randn(2, 6, 8).to(dtype), torch.randn(2, 6, 8).to(dtype), [slice(0, 6), slice(6, 12)]
    torch.manual_seed(1)
    with (
        GradientSketcher(model, SPEC, verify=False) as sketcher,
        sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out,
    ):
        (model(x) * w).sum().backward()
    after = torch.get_rng_state()
    grads: list[list[dict[str, torch.Tensor]]] = [[], []]
    for kind, found in zip((torch.float64, dtype), grads, strict=True):
        model.to(kind)
        for span in spans:
            model.zero_grad()
            torch.manual_seed(1)
            (model(x.to(kind)) * w.to(kind)).flatten(0, 1)[span].sum().backward()
            found.append({"scale": model.scale.grad.clone()})
        assert torch.equal(after, torch.get_rng_state())
    assert_close(out.sketches, model, *grads)


def test_the_self_test_reads_the_row_alone_to_which_a_gradient_was_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows of all segments for each took half of the first batch where a list holds 32 experts."""
    read, projected = list[int](), listener.projected

    def noted(out: torch.Tensor) -> torch.Tensor:
        read.append(len(out))
        return projected(out)

    monkeypatch.setattr(listener, "projected", noted)
    model = Counting(CHANGES["rows apart"][0])
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(torch.tensor([0, 1, 2]), shape=(3, 6)):
            model(torch.randn(3, 6, 8)).sum().backward()
        assert sketcher.self_test is not None and sketcher.self_test.names == ("scale",)
    assert set(read) == {1}
