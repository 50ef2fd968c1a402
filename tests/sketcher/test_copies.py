"""Copies of a model that are made while taps are on it, and sketchers that leave a model in any order."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import live as made
from support import odd_models, zoo
from support.live import SPEC, Step

from cropi_kernels import GradientSketcher, LiveSketcher

MADE: dict[str, Callable[[], Any]] = {
    "hooks": lambda: LiveSketcher(zoo.make("llama"), SPEC),
    "experts and a router": lambda: LiveSketcher(odd_models.make("mixtral"), SPEC),
    "fused": lambda: GradientSketcher(zoo.make("llama"), SPEC, fused=True),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_copy_runs_on_its_own_weights(kind: str) -> None:
    """As a reference policy does, or an average of weights."""
    sketcher, ids = MADE[kind](), Step().ids
    model = sketcher.model.eval()
    with sketcher:
        want = model(ids).logits.detach()
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        assert torch.equal(copied(ids).logits, want)
    assert torch.equal(copied(ids).logits, want)


def test_a_copy_in_a_batch_adds_nothing_to_it() -> None:
    model, step = zoo.make("llama"), Step()
    want = made.captured(model, made.grpo)
    with LiveSketcher(model, SPEC) as live, live.batch(step.prompts, shape=step.shape) as sketch:
        loss = made.grpo(made.logits_of(model, step), step, step.rows(None))
        made.logits_of(copy.deepcopy(model), step).sum().backward()
        loss.backward()
    assert torch.equal(-sketch.sketches, want)


@pytest.mark.long
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sketcher: pickle.loads(pickle.dumps(sketcher))])
def test_a_copy_of_a_sketcher(copied: Callable[[Any], Any]) -> None:
    """Mamba has taps that are replaced when the model is tried."""
    sketcher, batch = GradientSketcher(odd_models.make("mamba").eval(), SPEC), zoo.padded()
    other = copied(sketcher)
    with sketcher, other:
        assert torch.equal(batch.sketch(other).sketches, batch.sketch(sketcher).sketches)


@pytest.mark.parametrize("later_first", [True, False])
def test_sketchers_leave_in_any_order(later_first: bool) -> None:
    model, step = odd_models.make("mixtral"), Step()
    want = made.captured(model, made.grpo)
    first, second = LiveSketcher(model, SPEC), LiveSketcher(model, SPEC)
    with contextlib.ExitStack() as rest:
        for sketcher in (first, second):
            sketcher.__enter__()
        leaves, stays = (second, first) if later_first else (first, second)
        rest.callback(stays.__exit__, None, None, None)
        for batch in range(2):  # in the first block the taps come off for the self-test, and on again
            with stays.batch(step.prompts, shape=step.shape) as sketch:
                made.grpo(made.logits_of(model, step), step, step.rows(None)).backward()
            assert torch.equal(-sketch.sketches, want)
            if batch == 0:
                leaves.__exit__(None, None, None)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("later_first", [True, False])
def test_weights_are_frozen_until_the_last_sketcher_leaves(later_first: bool) -> None:
    """One that stays must form no gradient of a weight."""
    model, batch = zoo.make("llama"), zoo.padded()
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    first, second = GradientSketcher(model, SPEC), GradientSketcher(model, SPEC)
    with contextlib.ExitStack() as rest:
        first.__enter__()
        second.__enter__()
        leaves, stays = (second, first) if later_first else (first, second)
        rest.callback(stays.__exit__, None, None, None)
        want = batch.sketch(stays).sketches
        leaves.__exit__(None, None, None)
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(batch.sketch(stays).sketches, want)
        assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable


@pytest.mark.parametrize("kind", [GradientSketcher, LiveSketcher])
def test_a_hook_that_fails_leaves_the_model_as_it_was(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama")
    sketcher, fails = kind(model, SPEC), model.lm_head
    before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    with monkeypatch.context() as patch:
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            patch.setattr(
                fails, register, lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no hooks here"))
            )
        with pytest.raises(RuntimeError, match="no hooks here"):
            sketcher.__enter__()
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    with sketcher:  # and it may be entered again
        pass
