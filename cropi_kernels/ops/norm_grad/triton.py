"""Triton kernel behind `norm_grad` and `bias_grad`: one read of x and dy, a partial sum per chunk of a segment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import _gpu, _native, _triton
from .._triton_segments import SEGMENT_BLOCK, locate, n_items, n_slots, reduce_partials

BIAS_FEATURES = 256
CHUNK_TOKENS = 32  # measured on an H200, 1536 features: 55 us, 64 tokens 64 us, 128 tokens 97 us


@triton.jit
def norm_kernel(
    x,  # [tokens, n], rows stride_x apart; dy likewise
    dy,
    weight,  # float32 [segments, n]
    bias,
    weight_partial,  # float32 [slots, n]
    bias_partial,
    offsets,
    n_segments,
    n_tokens,
    n,
    stride_x,
    stride_dy,
    eps,
    CENTERED: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Statistics in float32, of the centred values: two passes over registers, no cancellation."""
    segment, t0, t1, slot = locate(
        offsets, n_segments, n_tokens, tl.program_id(0).to(tl.int64), CHUNK, False, SEGMENTS
    )
    if segment < n_segments:
        i = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
        inside = i < n
        w = tl.zeros((BN,), tl.float32)
        b = tl.zeros((BN,), tl.float32)
        for step in range(0, tl.cdiv((t1 - t0).to(tl.int32), BT)):
            t = t0 + step * BT + tl.arange(0, BT)
            mask = (t < t1)[:, None] & inside[None, :]
            g = tl.load(dy + t[:, None] * stride_dy + i[None, :], mask=mask, other=0.0).to(tl.float32)
            if WITH_BIAS:
                b += tl.sum(g, 0)
            if WITH_WEIGHT:
                v = tl.load(x + t[:, None] * stride_x + i[None, :], mask=mask, other=0.0).to(tl.float32)
                if CENTERED:
                    v = tl.where(mask, v - (tl.sum(v, 1) / n)[:, None], 0.0)
                scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / n + eps)
                # Rows past the end have g = 0; their scale is finite wherever eps > 0, and made so where it is not.
                w += tl.sum(tl.where(mask, g * (v * scale[:, None]), 0.0), 0)
        if WITH_WEIGHT:
            target = tl.where(slot < 0, weight + segment * n, weight_partial + slot * n)
            tl.store(target + i, w, mask=inside)
        if WITH_BIAS:
            target = tl.where(slot < 0, bias + segment * n, bias_partial + slot * n)
            tl.store(target + i, b, mask=inside)


def tile(n: int, with_weight: bool) -> tuple[int, int, int]:
    """(tokens, features, warps) of a program."""
    if not with_weight:
        return 16, min(BIAS_FEATURES, max(16, _triton.next_power_of_two(n))), 4
    features = max(16, _triton.next_power_of_two(n))
    return max(1, 4096 // features), features, 4 if features <= 4096 else 8


def norm_grad(
    x: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    eps: float,
    centered: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """Fills ``weight`` and ``bias`` [segments, n], zeros before; one of no rows is not wanted, and is not computed."""
    x, dy = _native.rows_view(x), _native.rows_view(dy)
    n_tokens, n = dy.shape
    n_segments = offsets.numel() - 1
    if n_tokens == 0 or n_segments == 0:
        return
    slots = n_slots(n_tokens, n_segments, CHUNK_TOKENS, always=False)
    weight_partial, bias_partial = (
        torch.empty(slots if total.numel() else 0, n, dtype=torch.float32, device=dy.device)
        for total in (weight, bias)
    )
    tokens, features, warps = tile(n, weight.numel() > 0)
    with _gpu.on(dy):
        norm_kernel[(n_items(n_tokens, n_segments, CHUNK_TOKENS), triton.cdiv(n, features))](
            x, dy, weight, bias, weight_partial, bias_partial, offsets,
            n_segments, n_tokens, n, x.stride(0), dy.stride(0), eps,
            CENTERED=centered, WITH_WEIGHT=weight.numel() > 0, WITH_BIAS=bias.numel() > 0, CHUNK=CHUNK_TOKENS,
            SEGMENTS=SEGMENT_BLOCK, BT=tokens, BN=features, num_warps=warps,
        )  # fmt: skip
    for part, total in ((weight_partial, weight), (bias_partial, bias)):
        reduce_partials(part, total, offsets, n_tokens, CHUNK_TOKENS, 1, always=False)
