"""The backward pass begins at the first tapped module: layers before it are not passed back through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo
from support.versions import checkpoint_layers

from cropi_kernels import GradientSketcher, SketchSpec

SPEC = SketchSpec(width=16, vocab_width=64)
LAST: dict[str, tuple[str, ...]] = {
    "llama": ("*layers.0.*", "*embed_tokens*"),
    "gemma3": ("*layers.0.*", "*embed_tokens*"),
    "gpt2": ("*.h.0.*", "*wte*", "*wpe*"),
}


def passed(model: Any, exclude: tuple[str, ...], reached: list[str]) -> torch.Tensor:
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    with GradientSketcher(model, SPEC, exclude=exclude) as sketcher:
        sketcher.check_model()
        handles = [
            layer.mlp.register_full_backward_hook(lambda module, *_, n=str(n): reached.append(n))
            for n, layer in enumerate(layers)
        ]
        found = zoo.padded().sketch(sketcher).sketches
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", LAST)
def test_only_the_last_layer_is_passed_back_through(name: str) -> None:
    reached: list[str] = []
    model = zoo.make(name)
    got = passed(model, LAST[name], reached)
    assert reached == ["1"]
    wide = zoo.gradients(zoo.make(name, torch.float64))
    exact = zoo.sketches(model, wide, SPEC, LAST[name])
    own = zoo.sketches(model, zoo.gradients(zoo.make(name)), SPEC, LAST[name], torch.float32)
    assert ((got - exact).norm(dim=1) <= 2 * (own - exact).norm(dim=1)).all()


def test_the_head_alone() -> None:
    """Nothing of the decoder is passed back through."""
    reached: list[str] = []
    model = zoo.make("llama")
    got = passed(model, ("model.*",), reached)
    assert reached == []
    exact = zoo.sketches(model, zoo.gradients(zoo.make("llama", torch.float64)), SPEC, ("model.*",))
    assert ((got - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()


def test_checkpointed_layers() -> None:
    model: Any = zoo.make("llama").train()
    checkpoint_layers(model, {"use_reentrant": False})
    reached: list[str] = []
    got = passed(model, LAST["llama"], reached)
    exact = zoo.sketches(model, zoo.gradients(zoo.make("llama", torch.float64)), SPEC, LAST["llama"])
    assert ((got - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()
