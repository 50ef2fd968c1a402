"""A batch's sketches are those of the backward passes inside of it: of whole ones, and of at least one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec
from cropi_kernels.sketcher import SelfTestError

SPEC = SketchSpec(1024)
ROWS = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 0, 1, 1])


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(ROWS).log_softmax(-1).square().mean()


def backward(model: nn.Module) -> None:
    loss_of(model).backward()


def forward_alone(model: nn.Module) -> None:
    loss_of(model)


def without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        loss_of(model)


def detached(model: nn.Module) -> None:
    model(ROWS).detach().requires_grad_().sum().backward()


def failing(model: Any, again: bool) -> None:
    """A backward pass that fails at the embedding, when the other modules' taps have added."""
    failed: list[bool] = []

    def fail(gradient: torch.Tensor) -> None:
        if not failed:
            failed.append(True)
            raise MemoryError("no memory")

    handle = model[0].register_forward_hook(lambda module, args, y: (y.register_hook(fail), None)[1])
    loss = loss_of(model)
    handle.remove()
    with contextlib.suppress(MemoryError):
        loss.backward(retain_graph=again)
    if again:
        loss.backward()


def failed_once(model: nn.Module) -> None:
    failing(model, again=False)


def failed_and_tried_again(model: nn.Module) -> None:
    failing(model, again=True)


def gradient_of_a_gradient(model: nn.Module) -> None:
    y = model[1](x := torch.randn(4, 6, 8, requires_grad=True))  # type: ignore[index]
    (gradient,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    gradient.square().sum().backward()


def gradient_for_a_figure(model: nn.Module) -> None:
    """As trainers log the norm of one layer's gradient."""
    loss = loss_of(model)
    torch.autograd.grad(loss, [model[2].weight], retain_graph=True)  # type: ignore[index, union-attr, list-item]
    loss.backward()


def two_at_once(model: Any) -> None:
    """A pass of another thread, which begins where the first one has come by a tap and ends before it goes on."""
    other = threading.Thread(target=silent, args=(loss_of(model).backward,))

    def begin(gradient: torch.Tensor) -> None:
        other.start()
        other.join()

    handle = model[1].register_forward_hook(lambda module, args, y: (y.register_hook(begin), None)[1])
    loss = loss_of(model)
    handle.remove()
    loss.backward()


def silent(run: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):
        run()


NOTHING = forward_alone, without_gradients, detached
FAILED = failed_once, failed_and_tried_again, two_at_once


@pytest.mark.parametrize("kind", [LiveSketcher, GradientSketcher])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_whole_backward_pass_is_an_error(kind: Any, verify: bool, first: bool) -> None:
    cases: list[tuple[Callable[[nn.Module], None], str]] = [
        *((run, "no backward pass ran inside the block") for run in NOTHING),
        *((run, "raised an error on its way") for run in FAILED),
        (gradient_of_a_gradient, "second derivatives .* have no sketch"),
    ]
    for run, message in cases:
        model = small()
        with kind(model, SPEC, verify=verify) as sketcher:
            if not first:
                with sketcher.batch(IDS, shape=ROWS.shape) as want:
                    backward(model)
            with pytest.raises((SelfTestError, RuntimeError), match=message):
                with sketcher.batch(IDS, shape=ROWS.shape):
                    run(model)
            with sketcher.batch(IDS, shape=ROWS.shape) as got:  # nothing of that is left
                backward(model)
        assert got.sketches.any(dim=1).all()
        assert first or torch.equal(got.sketches, want.sketches)


@pytest.mark.parametrize("first", [True, False])
def test_gradients_that_are_given_back_are_not_added_to_those_of_the_step(first: bool) -> None:
    model = small()
    with LiveSketcher(model, SPEC) as live:
        for _ in range(0 if first else 3):  # all parameters have been compared with autograd
            with live.batch(IDS, shape=ROWS.shape) as want:
                backward(model)
        with pytest.raises(RuntimeError, match="would be the sum of the two"):
            with live.batch(IDS, shape=ROWS.shape):
                gradient_for_a_figure(model)
        for begin in (
            torch.autograd.backward,
            lambda loss: torch.autograd.grad(loss, list(model.parameters())),
        ):
            with live.batch(IDS, shape=ROWS.shape) as got:
                begin(loss_of(model))
            assert first or torch.equal(got.sketches, want.sketches)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph:UserWarning")
def test_a_part_of_a_pass_does_not_hide_that_the_pass_can_be_differentiated() -> None:
    """Checkpointing asks for the part's gradients itself, without gradients of these."""
    model: Any = small()
    with LiveSketcher(model, SPEC, verify=False) as live:
        with pytest.raises(RuntimeError, match="second derivatives .* have no sketch"):
            with live.batch(IDS, shape=ROWS.shape):
                h = checkpoint(model[1], model[0](ROWS), use_reentrant=True)
                model[2](h).square().sum().backward(create_graph=True)
                model[2].weight.grad.square().sum().backward()


def test_the_graph_of_a_step_is_free_after_it() -> None:
    """Nodes of parameters belong to the stream on which they were made: a later step makes its own."""
    model = small()
    p = next(model.parameters())
    with LiveSketcher(model, SPEC) as live:
        with live.batch(IDS, shape=ROWS.shape):
            node = get_gradient_edge(p).node
            node.metadata["of"] = "this step"
            backward(model)
            assert get_gradient_edge(p).node.metadata == {"of": "this step"}
            del node
    assert get_gradient_edge(p).node.metadata == {}


def test_several_passes_add_up() -> None:
    """Over one graph, and a pass of some rows' loss alone: the others have no gradient."""
    model = small()
    with LiveSketcher(model, SPEC) as live:
        with live.batch(IDS, shape=ROWS.shape) as want:
            backward(model)
        with live.batch(IDS, shape=ROWS.shape) as got:
            loss = loss_of(model)
            loss.backward(retain_graph=True)
            loss.backward()
        torch.testing.assert_close(got.sketches, 2 * want.sketches)
        with live.batch(IDS, shape=ROWS.shape) as got:
            each = model(ROWS).log_softmax(-1).square().mean((1, 2)) / len(ROWS)
            each[:2].sum().backward()
        assert got.sketches[0].any() and not got.sketches[1].any()
        torch.testing.assert_close(got.sketches[0], want.sketches[0])


@pytest.mark.long
@pytest.mark.parametrize("kind", [LiveSketcher, GradientSketcher])
def test_passes_of_compiled_autograd_are_whole(kind: Any) -> None:
    """It runs functions that are not compiled as they are, and calls nothing at the end of a pass."""
    from torch._dynamo import compiled_autograd

    model = small()
    with kind(model, SPEC) as sketcher:
        with sketcher.batch(IDS, shape=ROWS.shape) as want:
            backward(model)
        for _ in range(2):
            with sketcher.batch(IDS, shape=ROWS.shape) as got:
                loss = loss_of(model)
                with compiled_autograd._enable(lambda graph: graph):
                    loss.backward()
            torch.testing.assert_close(got.sketches, want.sketches)


def test_the_number_of_rows_is_any_integer() -> None:
    """Lengths come from NumPy and torch too."""
    model = small()
    rows, length = len(ROWS), ROWS.shape[1]
    with LiveSketcher(model, SPEC) as live:
        for shape in ([rows, length], (np.int64(rows), np.int32(length)), (rows, torch.tensor(length))):
            with live.batch(IDS, shape=shape) as got:  # type: ignore[arg-type]
                backward(model)
            assert got.sketches.any(dim=1).all()
        for shape in (
            (float(rows), length),
            (True, length),
            (-rows, length),
            (rows, length, 1),
            (),
            str(rows),
        ):
            with pytest.raises(
                ValueError, match=r"shape=.*: give \(batch, length\), or \(batch,\) where rows"
            ):
                with live.batch(IDS, shape=shape):  # type: ignore[arg-type]
                    pass
