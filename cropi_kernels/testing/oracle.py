"""The exact per-segment gradient by ordinary autograd, and sketches by the explicit random matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..names import canonical_name
from ..ops.project import projection_of
from ..ops.project.reference import project as project_reference
from ..ops.sketch_linear import reference as linear
from ..plan import MatrixPlan, plan_vector
from ..reduce import reduce_sketch
from ..sketcher.attach.attachment import plan_model
from ..sketcher.sums.accumulator import Accumulator
from ..sketcher.sums.matrix import KronMatrix, MatrixSketch, SlabMatrix, TensorMatrix
from ..sketcher.taps.experts import ExpertsTap
from ..sketcher.taps.taps import EmbeddingTap, LinearTap
from ..spec import SketchSpec


def exact_gradient(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    positions: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    temperature: float = 1.0,
    **model_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """``sum_n w_n grad log pi(target_n)`` for every trainable parameter, by canonical name, in the model's dtype.

    Full logits through the model's own forward and one ordinary backward: arguments as in
    `GradientSketcher.policy_gradient`, with the weights given. Run the model in float64 for an oracle.
    """
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=input_ids, use_cache=False, **model_kwargs).logits
    z = logits.reshape(-1, logits.shape[-1])[positions]
    z = z.to(torch.promote_types(z.dtype, torch.float32)) / temperature
    logprobs = torch.log_softmax(z, dim=-1).gather(1, targets[:, None])[:, 0]
    (logprobs * weights.to(logprobs)).sum().backward()
    gradients = {
        canonical_name(name): torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return gradients


def sketch_gradients(
    model: nn.Module, gradients: dict[str, torch.Tensor], spec: SketchSpec, exclude: tuple[str, ...] = ()
) -> torch.Tensor:
    """Sketch [dim] of a gradient that exists, coordinate by coordinate, in its dtype (float64: an oracle).

    Computed on the CPU; the result is on the gradients' device.
    """
    plan = plan_model(model, Accumulator(spec), exclude)
    matrices: dict[str, tuple[MatrixSketch, Callable[[torch.Tensor], torch.Tensor]]] = {}
    for module, tap in plan.taps.items():
        if isinstance(tap, ExpertsTap):
            matrices.update({m.name: (m, tap.layout.stacked) for m in tap.experts.values()})
        elif isinstance(tap, (LinearTap, EmbeddingTap)) and tap.matrix is not None:
            transposed = type(tap) is LinearTap and not isinstance(module, nn.Linear)
            matrices[tap.matrix.name] = tap.matrix, torch.t if transposed else torch.Tensor.contiguous
    for one in plan.exact.parameters:
        if one.matrix is not None:
            matrices[one.name] = one.matrix, torch.Tensor.contiguous
    given = next(iter(gradients.values()))
    dtype, device = given.dtype, given.device
    out = torch.zeros(spec.base_dim, dtype=dtype, device="cpu")
    for name in plan.coverage.names:
        gradient = gradients[name].cpu()
        if name in matrices:
            matrix, outputs_first = matrices[name]
            out += _sketch_matrix(matrix, outputs_first(gradient).contiguous())
        else:
            gradient = gradient.flatten()
            vector = plan_vector(spec, name, gradient.numel())
            signed = gradient.reshape(-1) * torch.from_numpy(vector.sign).to(dtype)
            out.index_add_(0, torch.from_numpy(vector.position), signed)
    return reduce_sketch(out, spec.dim, seed=spec.seed, version=spec.version).to(device)


def sketch_and_magnitudes(
    d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sketch_linear` adds for operands that are folded already: float64 [segments, base_dim], and of each number
    the sum of its terms' absolute values, which bounds the error of any float32 sum (`sum_error_bound`).

    ``d`` is [tokens, plan.folded_rows] and ``a`` [tokens, plan.folded_cols] in any dtype, ``offsets`` int64
    [segments + 1].
    """
    shape = offsets.numel() - 1, plan.dim
    exact, size = (torch.zeros(shape, dtype=torch.float64, device="cpu") for _ in range(2))
    linear.sketch_linear(d.double(), a.double(), offsets, plan, exact)
    bucket, _ = linear.folded_coordinates(plan)
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        terms = d[begin:end].double().abs().T @ a[begin:end].double().abs()
        size[s].index_add_(0, bucket.reshape(-1), terms.reshape(-1))
    return exact, size


def _sketch_matrix(matrix: MatrixSketch, gradient: torch.Tensor) -> torch.Tensor:
    spec = matrix.spec
    if isinstance(matrix, SlabMatrix):
        return linear.sketch_matrix(gradient, matrix.plan)
    if isinstance(matrix, KronMatrix):
        return (matrix.p_out.to(gradient).T @ gradient @ matrix.p_in.to(gradient)).reshape(-1)
    out = gradient.new_zeros(spec.dim)
    if isinstance(matrix, TensorMatrix):
        bucket = (matrix.row_bucket[:, None] + matrix.col_bucket[None, :]) % spec.dim
        sign = matrix.row_sign[:, None] * matrix.col_sign[None, :]
        return out.index_add_(0, bucket.reshape(-1), (gradient * sign.to(gradient)).reshape(-1))
    project_reference(gradient.reshape(1, -1), projection_of(spec, matrix.name), out[None], 0)
    return out
