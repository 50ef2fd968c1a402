"""A whole model through Triton: every kernel as the sketcher chains them, on the layouts that models hand it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx_emulator import launch
from ptx_emulator.launch import execute
from rehearsal import set_stage

from cropi_kernels import GradientSketcher, SketchSpec, dispatch

pytest.importorskip("transformers")
from support import zoo

SPEC = SketchSpec(width=16, vocab_width=64)
ONE_LAYER = {"gpt2": {"n_layer": 1}}  # a second one would launch the same kernels again
KERNELS = {"chunks", "fold", "slab", "rows", "norm", "tail", "reduce_partials", "forward", "backward"}


# Every dtype, family and layout once: what kernels make of all pairs, their own tests say.
@pytest.mark.parametrize(
    "name, layout, of",
    [
        ("qwen2", "padded", torch.bfloat16),
        ("gemma2", "shared", torch.float16),
        ("gpt2", "padded", torch.float32),
    ],
)
def test_sketches_of_a_model(
    name: str, layout: str, of: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketches_of_a_model(name, layout, of, KERNELS, monkeypatch)


def test_fused_taps_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = KERNELS - {"norm"} | {"rms", "rms_backward", "swiglu_fold", "swiglu_backward"}
    sketches_of_a_model("qwen2", "padded", torch.bfloat16, launched, monkeypatch, fused=True)


def sketches_of_a_model(
    name: str,
    layout: str,
    dtype: torch.dtype,
    kernels: set[str],
    monkeypatch: pytest.MonkeyPatch,
    fused: bool = False,
) -> None:
    """Per segment at most twice as far from float64 as autograd in the model's own dtype with a float32 sketch."""
    model = zoo.make(name, dtype, **ONE_LAYER.get(name, {"num_hidden_layers": 1}))
    served, launched = set(), set()
    own = zoo.sketches(model, zoo.gradients(model), SPEC, (), torch.float32)
    with monkeypatch.context() as patch, set_stage(patch):
        choose = dispatch.choose

        def noted(op: str, *tensors: torch.Tensor, **rest: str | None) -> str:
            backend = choose(op, *tensors, **rest)  # type: ignore[arg-type]
            served.add((op, backend))
            return backend

        def counted(kernel: Any, grid: Any, arguments: Any) -> None:
            launched.add(kernel.metadata.name.removesuffix("_kernel"))
            execute(kernel, grid, arguments)

        patch.setattr(dispatch, "choose", noted)
        patch.setattr(launch, "execute", counted)
        with GradientSketcher(model, SPEC, verify=False, fused=fused) as sketcher:
            got = zoo.LAYOUTS[layout]().sketch(sketcher).sketches
    assert launched >= kernels
    assert {backend for _, backend in served} == {"triton"}
    exact = zoo.sketches(model, zoo.gradients(model.double()), SPEC)
    error, allowed = (got - exact).norm(dim=1), (own - exact).norm(dim=1)
    assert (error <= 2 * allowed).all(), (error, allowed)
    assert (allowed <= 0.1 * exact.norm(dim=1)).all(), "a yardstick this long measures nothing"
