"""One small call of every op: for tests that ask the same of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cropi_kernels import (
    SketchSpec,
    bias_grad,
    fold_inputs,
    fold_outputs,
    linear_logprob,
    norm_grad,
    plan_matrix,
    plan_vector,
    rms_norm,
    rms_norm_backward,
    sketch_embedding,
    sketch_grouped,
    sketch_linear,
    sketch_vector,
    swiglu,
    swiglu_backward,
)
from support.tensors import normal

SPEC = SketchSpec(width=16, vocab_width=16)
PLAN = plan_matrix(SPEC, "model.layers.0.mlp.up_proj.weight", 20, 40)
STACK = plan_matrix(SPEC, "model.layers.0.mlp.experts.down_proj", 40, 40)
TIED = plan_matrix(SPEC, "lm_head.weight", 60, 40, "tied")
NORM = plan_vector(SPEC, "model.norm.weight", 40)


D, A, X, OUT = normal(9, 20), normal(9, 40, seed=1), normal(9, 60, seed=2), normal(3, 32768, seed=3)
HEAD = normal(60, 40, seed=4)
OFFSETS, RANGES = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 2, 2, 4, 4, 5, 9])
ROWS = torch.tensor([1, 5, 5, 0, 59, 2, 2, 7, 7])


@dataclasses.dataclass(frozen=True)
class OpCall:
    """A call's floating-point operands by their argument's name, and what makes the call from a backend and them."""

    operands: dict[str, torch.Tensor]
    run: Callable[..., Any]

    def __call__(self, backend: str | None = None, **changes: torch.Tensor) -> Any:
        """What the op returns for fresh copies of the operands, some of them changed."""
        return self.run(backend, **{n: t.clone() for n, t in self.operands.items()} | changes)


OPS = {
    "fold_inputs": OpCall({"a": A}, lambda b, a: fold_inputs(a, PLAN, backend=b)),
    "fold_outputs": OpCall({"d": X}, lambda b, d: fold_outputs(d, TIED, backend=b)),
    "sketch_linear": OpCall(
        {"d": D, "a": A, "out": OUT}, lambda b, d, a, out: sketch_linear(d, a, OFFSETS, PLAN, out, backend=b)
    ),
    "sketch_grouped": OpCall(
        {"d": D, "a": A, "out": OUT}, lambda b, d, a, out: sketch_grouped(d, a, RANGES, STACK, out, backend=b)
    ),
    "sketch_embedding": OpCall(
        {"x": A, "out": OUT}, lambda b, x, out: sketch_embedding(x, ROWS, OFFSETS, TIED, out, backend=b)
    ),
    "sketch_vector": OpCall(
        {"gradient": normal(3, 40), "out": OUT},
        lambda b, gradient, out: sketch_vector(gradient, NORM, out, backend=b),
    ),
    "norm_grad": OpCall(
        {"x": A, "dy": A + 1},
        lambda b, x, dy: norm_grad(x, dy, OFFSETS, 1e-6, centered=True, with_bias=True, backend=b),
    ),
    "bias_grad": OpCall({"dy": A}, lambda b, dy: bias_grad(dy, OFFSETS, backend=b)),
    "rms_norm": OpCall({"x": A, "weight": A[0]}, lambda b, x, weight: rms_norm(x, weight, 1e-6, backend=b)),
    "rms_norm_backward": OpCall(
        {"dy": A, "x": A + 1, "weight": A[0], "scale": A[:, 0].abs()},
        lambda b, dy, x, weight, scale: rms_norm_backward(dy, x, weight, scale, OFFSETS, backend=b),
    ),
    "swiglu": OpCall({"gate": A, "up": A + 1}, lambda b, gate, up: swiglu(gate, up, PLAN, backend=b)),
    "swiglu_backward": OpCall(
        {"dh": A, "gate": A, "up": A + 1}, lambda b, dh, gate, up: swiglu_backward(dh, gate, up, backend=b)
    ),
    "linear_logprob": OpCall(
        {"hidden": A, "head": HEAD}, lambda b, hidden, head: linear_logprob(hidden, head, ROWS, backend=b)
    ),
}
