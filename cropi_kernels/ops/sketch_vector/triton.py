"""Triton kernel behind `sketch_vector`: every number of the sketch gathers what falls on it, in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import _gpu
from ...plan import VectorPlan
from .._device_plan import vector_tables

BLOCK = 512


@triton.jit
def vector_kernel(
    gradient,  # [segments, size], rows stride_g apart
    out,  # float32, rows stride_out apart
    position,  # int64 [hits]
    source,  # int32 [depth, hits], -1 for none
    sign,  # int8 [size]
    hits,
    depth,
    stride_g,
    stride_out,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = h < hits
    to = out + segment * stride_out + tl.load(position + h, mask=inside, other=0)
    total = tl.load(to, mask=inside, other=0.0)
    line = source + h
    for _ in range(0, depth):
        i = tl.load(line, mask=inside, other=-1)
        line += hits
        g = tl.load(gradient + segment * stride_g + i, mask=i >= 0, other=0.0).to(tl.float32)
        total += g * tl.load(sign + i, mask=i >= 0, other=0).to(tl.float32)
    tl.store(to, total, mask=inside)


def sketch_vector(gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor) -> None:
    """``out[s, position(i)] += sign(i) * gradient[s, i]``."""
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    tables = vector_tables(plan, out.device)
    depth, hits = tables.source.shape
    if gradient.shape[0]:
        with _gpu.on(out):
            vector_kernel[(gradient.shape[0], triton.cdiv(hits, BLOCK))](
                gradient, out, tables.position, tables.source, tables.sign, hits, depth, gradient.stride(0),
                out.stride(0), BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
