"""Taps that no token id reaches are tested on the first batch that does, as the caller runs it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from support.seeing import LENGTH, ROWS, SPEC, Seeing, loss_of

from cropi_kernels import GradientSketcher, LiveSketcher
from cropi_kernels.sketcher import SelfTestError
from cropi_kernels.testing import sketch_gradients

KINDS = pytest.mark.parametrize("kind", [LiveSketcher, GradientSketcher])
OF_ROWS = torch.arange(ROWS) // 2


def checked(kind: Any, model: Seeing, segments: torch.Tensor, autocast: bool = False, **options: Any) -> Any:
    """The sketches of a batch with images behind one without, in the bits that they have without the checks."""
    made = []
    for verify in (True, False):
        with kind(model, SPEC, verify=verify, **options) as sketcher:
            for step in range(2):
                with sketcher.batch(segments, shape=(ROWS, LENGTH) if segments.ndim == 1 else None) as got:
                    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                        loss_of(model, step, step > 0).backward()
        assert not verify or {"tower.weight", "tower.bias"} <= set(sketcher.self_test.names)
        made.append(got.sketches)
    assert torch.equal(*made)
    return made[0]


def gradient_of(model: Seeing) -> torch.Tensor:
    """The sketch of the whole gradient of the second batch, in float64."""
    model = model.double()
    for p in model.parameters():
        p.grad = None
    loss_of(model, 1, True).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sketch_gradients(model, gradients, SPEC)


@KINDS
def test_under_autocast_they_run_as_the_caller_ran_them(kind: Any) -> None:
    """Images are float32 and weights bfloat16, which only autocast multiplies."""
    model = Seeing().to(torch.bfloat16)
    got = checked(kind, model, OF_ROWS, autocast=True).sum(0) * (-1 if kind is LiveSketcher else 1)
    want = gradient_of(model)
    # Four products in bfloat16, of 2^-8 each, of numbers of about one size.
    assert 0 < (got - want).norm() <= 2.0**-5 * want.norm()


def test_prompts_that_depend_on_each_other_have_parts_that_add_up() -> None:
    """Taken by `coupled`: later tokens of a row, of another prompt, depend on what the earlier ones see."""
    model = Seeing(attends=True)
    of_tokens = (torch.arange(ROWS * LENGTH) // 5).view(ROWS, LENGTH)
    got = -checked(LiveSketcher, model, of_tokens, coupled=True).sum(0)
    want = gradient_of(model)
    assert 0 < (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(
    "kind, options", [(LiveSketcher, {}), (LiveSketcher, {"coupled": True}), (GradientSketcher, {})]
)
def test_every_call_of_a_batch_is_tested(kind: Any, options: dict[str, bool]) -> None:
    """A batch may call the model twice, and only the second call has images: two of row 0, and none of row 3."""
    model = Seeing()
    with kind(model, SPEC, **options) as sketcher:
        with sketcher.batch(OF_ROWS, shape=(ROWS, LENGTH)):
            loss_of(model, 0, False).backward()
        wrong = pytest.raises(SelfTestError, match=r"tower\.weight.*of one segment count for another")
        with wrong, sketcher.batch(OF_ROWS, shape=(ROWS, LENGTH)):
            (loss_of(model, 1, False) + loss_of(model, 2, True, torch.tensor([0, 1, 0, 2]))).backward()


@KINDS
def test_taps_that_cannot_be_tested_are_named_once(kind: Any) -> None:
    """A call of a part of the model cannot be repeated. Nor can one of a compiled model, whose graph calls no hook."""
    model, said = Seeing(), []
    with kind(model, SPEC) as sketcher:
        for step in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with sketcher.batch(OF_ROWS, shape=(ROWS, LENGTH)):
                    loss_of(model.forward, step, step > 0).backward()
            said.append([str(one.message) for one in caught])
            assert {one.filename for one in caught} <= {__file__}
    assert said[::2] == [[], []] and [one[:36] for one in said[1]] == ["not compared with autograd: tower. A"]
