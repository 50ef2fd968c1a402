"""A whole model through Triton: every kernel as the sketcher chains them, on the layouts that models hand it."""

from __future__ import annotations

import pytest
import torch
from rehearsal import set_stage

from cropi_kernels import GradientSketcher, SketchSpec, dispatch

pytest.importorskip("transformers")
from support import zoo

SPEC = SketchSpec(width=16, vocab_width=64)
ONE_LAYER = {"gpt2": {"n_layer": 1}}  # a second one would launch the same kernels again
OPS = {"fold_columns", "sketch_linear", "sketch_embedding", "sketch_vector", "norm_grad", "linear_logprob"}


@pytest.mark.parametrize("name, layout", [("qwen2", "padded"), ("gemma2", "shared"), ("gpt2", "padded")])
def test_sketches_of_a_model(
    name: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per segment at most twice as far from float64 as autograd in the model's own dtype with a float32 sketch."""
    model, served = zoo.make(name, dtype, **ONE_LAYER.get(name, {"num_hidden_layers": 1})), set()
    own = zoo.sketches(model, zoo.gradients(model), SPEC, (), torch.float32)
    with monkeypatch.context() as patch, set_stage(patch):
        choose = dispatch.choose

        def noted(op: str, *tensors: torch.Tensor, **rest: str | None) -> str:
            backend = choose(op, *tensors, **rest)  # type: ignore[arg-type]
            served.add((op, backend))
            return backend

        patch.setattr(dispatch, "choose", noted)
        with GradientSketcher(model, SPEC, verify=False) as sketcher:
            got = zoo.LAYOUTS[layout]().sketch(sketcher).sketches
    assert {op for op, backend in served if backend == "triton"} >= OPS
    assert {backend for _, backend in served} == {"triton"}
    exact = zoo.sketches(model, zoo.gradients(model.double()), SPEC)
    error, allowed = (got - exact).norm(dim=1), (own - exact).norm(dim=1)
    assert (error <= 2 * allowed).all(), (error, allowed)
    assert (allowed <= 0.1 * exact.norm(dim=1)).all(), "a yardstick this long measures nothing"
