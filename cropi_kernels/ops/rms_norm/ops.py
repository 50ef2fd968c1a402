"""The operators ``cropi::rms_norm`` and ``cropi::rms_norm_backward``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import torch

from ... import dispatch
from ..._library import register
from .._checks import check_devices, check_floating, check_offset_values, check_offsets, offsets_for
from ..norm_grad.ops import choose_for_rows
from ..sketch_linear.ops import REMEDY


def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    y, scale = _forward_fake(x, weight, eps, backend)
    chosen = choose_for_rows("rms_norm", backend, x, weight)
    dispatch.kernels(__package__, chosen).rms_norm(x, weight, eps, y, scale)
    return y, scale


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_norm(x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=_wide(x))


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, sums = _backward_fake(dy, x, weight, scale, offsets, backend)
    if offsets is not None:
        _check_cover(offsets, x.shape[0])
    chosen = choose_for_rows("rms_norm_backward", backend, dy, x, weight, scale)
    if offsets is not None:
        if offsets.device.type != "cpu":
            # Offsets on a device are not checked; NaN marks tokens that they leave out.
            dx.fill_(float("nan"))
        offsets = offsets_for(chosen, offsets, x)
        if chosen == "cpu":
            _check_cover(offsets, x.shape[0])
    dispatch.kernels(__package__, chosen).rms_norm_backward(dy, x, weight, scale, offsets, dx, sums)
    return dx, sums


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: torch.Tensor | None,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_norm(x, weight)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(
            f"dy is {dy.dtype} {tuple(dy.shape)} but x {x.dtype} {tuple(x.shape)}: give the gradient of rms_norm(x)"
        )
    if scale.shape != x.shape[:1] or scale.dtype != _wide(x):
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)}: give what rms_norm(x) returned, {_wide(x)} [{x.shape[0]}]"
        )
    check_floating("dy", dy)
    check_floating("scale", scale)
    check_devices("x", x, dy=dy, scale=scale)
    n_segments = 0 if offsets is None else check_offsets(offsets)
    return x.new_empty(x.shape), x.new_zeros(n_segments, x.shape[1], dtype=_wide(x))


def _check_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: it must be [tokens, n]")
    check_floating("x", x)
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}: it must be {x.dtype} [{x.shape[1]}], as x has features"
        )
    check_floating("weight", weight)
    check_devices("x", x, weight=weight)


def _check_cover(offsets: torch.Tensor, n_tokens: int) -> None:
    """On the CPU only, as `check_offset_values`."""
    check_offset_values(offsets, n_tokens)
    if offsets.device.type == "cpu" and (int(offsets[0]) != 0 or int(offsets[-1]) != n_tokens):
        raise ValueError(
            f"offsets run from {int(offsets[0])} to {int(offsets[-1])}, and there are {n_tokens} tokens: every token "
            "must be in a segment, for its gradient is computed with the segment's"
        )


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


FORWARD = register(
    "rms_norm(Tensor x, Tensor weight, float eps, str? backend) -> (Tensor y, Tensor scale)",
    _forward, _forward_fake, remedy=REMEDY,
)  # fmt: skip
BACKWARD = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor scale, Tensor? offsets, str? backend) "
    "-> (Tensor dx, Tensor sums)",
    _backward, _backward_fake, remedy=REMEDY,
)  # fmt: skip
