"""Whether fused taps are worth it: a layer's norm and gated product, eager and fused, beside what was predicted from
the bytes that they read and write; and the fused kernels held to the eager ones on the same operands.

Whole passes with and without are rows of `model`.
"""

from __future__ import annotations

from typing import Any

import common
import torch

from cropi_kernels import (
    SketchSpec,
    fold_inputs,
    plan_matrix,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)

TOKENS, HIDDEN, INNER, SEGMENTS, EPS = 16384, 1536, 8960, 16, 1e-6
# Microseconds at 3.0 TB/s: eager forward and backward; fused forward; fused backward; a fold of INNER features.
NORM, GATE, FOLD = (1000, 34, 50), (1370, 295, 490), 98
DTYPE = torch.bfloat16


def made(features: int) -> torch.Tensor:
    return torch.randn(TOKENS, features, device="cuda").to(DTYPE)


def compared(got: torch.Tensor, want: torch.Tensor) -> float:
    """Error in units of the dtype's roundoff: eager code rounds up to four times, fused code once."""
    unit = torch.finfo(DTYPE).eps / 2
    return float((got.double() - want.double()).norm() / want.double().norm()) / unit


def norm() -> dict[str, Any]:
    x, dy, weight = made(HIDDEN).requires_grad_(), made(HIDDEN), made(HIDDEN)[0]
    offsets = common.ragged(TOKENS, SEGMENTS).cuda()

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        y = weight * wide.to(DTYPE)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    leaf = x.detach()
    y, scale = rms_norm(leaf, weight, EPS)
    dx, _ = rms_norm_backward(dy, leaf, weight, scale, offsets)
    forward = common.kernel_milliseconds([lambda: rms_norm(leaf, weight, EPS)])
    backward = common.kernel_milliseconds([lambda: rms_norm_backward(dy, leaf, weight, scale, offsets)])
    errors = [compared(a, b) for a, b in zip((y, dx), eager(), strict=True)]
    return timed(common.milliseconds(eager), forward, backward, NORM) | judged(errors)


def gate() -> dict[str, Any]:
    z, u, dh = made(INNER).requires_grad_(), made(INNER).requires_grad_(), made(INNER)
    plan = plan_matrix(SketchSpec(), "model.layers.0.mlp.down_proj.weight", HIDDEN, INNER)

    def eager() -> tuple[torch.Tensor, ...]:
        h = torch.nn.functional.silu(z) * u
        return h.detach(), *torch.autograd.grad(h, (z, u), dh)

    gates, ups = z.detach(), u.detach()
    h, folded = swiglu(gates, ups, plan)
    gradients = swiglu_backward(dh, gates, ups)
    forward = common.kernel_milliseconds([lambda: swiglu(gates, ups, plan)])
    alone = common.kernel_milliseconds([lambda: swiglu(gates, ups)])
    fold = common.kernel_milliseconds([lambda: fold_inputs(h, plan)])
    backward = common.kernel_milliseconds([lambda: swiglu_backward(dh, gates, ups)])
    errors = [compared(a, b) for a, b in zip((h, *gradients), eager(), strict=True)]
    assert folded is not None
    apart = compared(folded, fold_inputs(h, plan))  # blocks are added in another order
    row = timed(common.milliseconds(eager), forward, backward, GATE) | judged(errors)
    own = {
        "forward_without_fold_us": alone["ms"] * 1000,
        "fold_alone_us": fold["ms"] * 1000,
        "fold_prediction_us": FOLD,
    }
    return row | own | {"fold_roundings_apart": apart, "ok": row["ok"] and apart <= 0.1}


def timed(
    eager_ms: float, forward: dict[str, float], backward: dict[str, float], predicted: tuple[int, int, int]
) -> dict[str, Any]:
    row = {
        "eager_us": eager_ms * 1000,
        "forward_us": forward["ms"] * 1000,
        "backward_us": backward["ms"] * 1000,
    }
    names = ("eager_prediction_us", "forward_prediction_us", "backward_prediction_us")
    times = (row["forward_us"] + row["backward_us"]) / row["eager_us"]
    return row | dict(zip(names, predicted, strict=True)) | {"times_eager": times}


def judged(errors: list[float]) -> dict[str, Any]:
    return {"roundings_apart": max(errors), "ok": max(errors) <= 5}


def rows(results: common.Results) -> None:
    results.attempt("fused norm", norm)
    results.attempt("fused gated product", gate)
