"""The operators ``cropi::norm_grad`` and ``cropi::bias_grad``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from .._checks import check_devices, check_floating, check_offset_values, check_offsets, offsets_for
from ..sketch_linear.ops import REMEDY

WIDEST = 8192  # features: a row has to fit into the registers of one program


def _norm(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    with_bias: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = _norm_fake(x, dy, offsets, eps, centered, with_bias, backend)
    check_offset_values(offsets, x.shape[0])
    chosen = choose_for_rows("norm_grad", backend, x, dy)
    kernels, offsets = dispatch.kernels(__package__, chosen), offsets_for(chosen, offsets, x)
    kernels.norm_grad(x, dy, offsets, eps, centered, weight, bias)
    return weight, bias


def _norm_fake(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    with_bias: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.ndim != 2 or x.shape != dy.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} but dy {tuple(dy.shape)}: both must be [tokens, n]")
    check_floating("x", x)
    check_floating("dy", dy)
    check_devices("x", x, dy=dy)
    n_segments = check_offsets(offsets)
    return _sums(x, n_segments), _sums(x, n_segments if with_bias else 0)


def _bias(dy: torch.Tensor, offsets: torch.Tensor, backend: str | None) -> torch.Tensor:
    bias, no_weight = _bias_fake(dy, offsets, backend), _sums(dy, 0)
    check_offset_values(offsets, dy.shape[0])
    chosen = dispatch.choose("bias_grad", dy, backend=backend)
    kernels, offsets = dispatch.kernels(__package__, chosen), offsets_for(chosen, offsets, dy)
    kernels.norm_grad(dy, dy, offsets, 0.0, False, no_weight, bias)
    return bias


def _bias_fake(dy: torch.Tensor, offsets: torch.Tensor, backend: str | None) -> torch.Tensor:
    if dy.ndim != 2:
        raise ValueError(f"dy has shape {tuple(dy.shape)}: it must be [tokens, n]")
    check_floating("dy", dy)
    return _sums(dy, check_offsets(offsets))


def choose_for_rows(op: str, backend: str | None, *tensors: torch.Tensor) -> str:
    """The backend of an op whose kernel holds a row of the first tensor at once."""
    n = tensors[0].shape[1]
    without = {"triton": f"rows of {n} features; the kernel takes up to {WIDEST}" if n > WIDEST else None}
    return dispatch.choose(op, *tensors, backend=backend, without=without)


def _sums(x: torch.Tensor, n_segments: int) -> torch.Tensor:
    """Zeros for the sums of ``x``; no rows where they are not wanted."""
    return x.new_zeros(n_segments, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


NORM = register(
    "norm_grad(Tensor x, Tensor dy, Tensor offsets, float eps, bool centered, bool with_bias, str? backend) "
    "-> (Tensor weight, Tensor bias)",
    _norm, _norm_fake, remedy=REMEDY,
)  # fmt: skip
BIAS = register(
    "bias_grad(Tensor dy, Tensor offsets, str? backend) -> Tensor", _bias, _bias_fake, remedy=REMEDY
)
