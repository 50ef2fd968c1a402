"""The row work in Triton, around the vendor's matrix products: the twin of csrc/cpu/logprob_rows.cpp.

On Hopper, 16-bit products are `triton_tiles`'s own; these kernels serve all others.

Forward: one program per row, one pass with a running maximum. The target's own term is left out of the sum and added
at the end, so that 1 - p of a confident target is a sum of small positive numbers and never a cancellation. Backward:
element by element from the forward's statistics, in the logits' own memory but in the head's dtype, which is what the
tensor cores multiply next.

A target below 0 does not count; one past the vocabulary gives NaN, because a device cannot raise without a wait.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ... import _gpu, _triton
from ..._launch import OPTIONS
from .contract import RowMath, Stats

FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 4096


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for x <= 0: a series where the subtraction would cancel."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0)
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * series)
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series)))
    return tl.where(x > -0.4, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for x >= 0, by ``2 atanh(x / (2 + x))`` where x is small."""
    w = x / (2.0 + x)
    q = w * w
    series = 2.0 * w * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q / 9.0))))
    return tl.where(x < 0.4, series, tl.log(1.0 + x))


@triton.jit
def _cap(z, softcap):
    """(softcap * tanh(z / softcap), its derivative 1 - tanh^2), both without a cancellation."""
    u = z / softcap
    e = expm1(-2.0 * tl.abs(u))  # in (-1, 0]
    t = -e / (2.0 + e)
    slope = 4.0 * (1.0 + e) / ((2.0 + e) * (2.0 + e))
    return tl.where(u < 0, -t, t) * softcap, slope


@triton.jit
def finish_rows(
    row, y, exists, own_z, best, rest, weighted, logp, top, log_sum, entropy, scale, there, ENTROPY: tl.constexpr
):  # fmt: skip
    """Writes the statistics of a row, or of a block of rows: from sums without the target, and the target's logit."""
    counts = y >= 0
    own_x = (own_z - best) * scale
    own = tl.where(exists, tl.exp(own_x), 0.0)
    total = own + rest
    lse = tl.where(own == 1.0, _log1p(rest), tl.log(total))
    lse = tl.where(exists | (y < 0), lse, float("nan"))
    tl.store(top + row, best, mask=there)
    tl.store(log_sum + row, lse, mask=there)
    tl.store(logp + row, tl.where(exists, own_x - lse, tl.where(counts, float("nan"), 0.0)), mask=there)
    if ENTROPY:
        own_term = tl.where(own > 0, own * own_x, own)
        # Ignored tokens are computed on a GPU, and hold 0 as everywhere.
        tl.store(entropy + row, tl.where(counts, lse - (weighted + own_term) / total, 0.0), mask=there)


@triton.jit
def forward_kernel(
    z,  # [rows, vocabulary], rows stride apart
    target,  # int64 [rows]
    logp,  # float32 [rows], as are top, log_sum and entropy
    top,
    log_sum,
    entropy,
    vocabulary,
    stride,
    scale,  # 1 / temperature
    softcap,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    line = z + row * stride
    best = tl.full((), float("-inf"), tl.float32)
    rest = tl.zeros((), tl.float32)  # sum of exp((z - best) * scale) without the target
    weighted = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < vocabulary
        value = tl.load(line + v, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:
            value = tl.where(inside, _cap(value, softcap)[0], float("-inf"))
        higher = tl.maximum(best, tl.max(value, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp((best - anchor) * scale)
        x = (value - anchor) * scale
        e = tl.where(inside & (v != y), tl.exp(x), 0.0)
        if ENTROPY:  # every x moves by (best - anchor) * scale as the anchor moves
            moved = tl.where(rest > 0, (best - anchor) * scale, 0.0)
            terms = e * tl.maximum(x, -1000.0)
            if BLOCK <= 256:  # a lane may have one term: as in `rms_kernel`
                terms = tl.where(inside & (v != y), terms, 0.0)
            weighted = (weighted + rest * moved) * shrink + tl.sum(terms, 0)
        rest = rest * shrink + tl.sum(e, 0)
        best = higher
    exists = (y >= 0) & (y < vocabulary)
    own_z = tl.load(line + y, mask=exists, other=float("-inf")).to(tl.float32)
    if CAPPED:
        own_z = tl.where(exists, _cap(own_z, softcap)[0], float("-inf"))
    finish_rows(
        row, y, exists, own_z, best, rest, weighted, logp, top, log_sum, entropy, scale, True, ENTROPY
    )


@triton.jit
def backward_kernel(
    z,  # float32 [rows, vocabulary], rows stride_z apart
    dz,  # [rows, vocabulary], rows stride_dz apart: z itself, or narrower elements from the start of each of z's rows
    target,
    grad,  # float32 [rows]
    logp,
    top,
    log_sum,
    vocabulary,
    stride_z,
    stride_dz,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(grad + row)
    y = tl.load(target + row)
    counts = (g != 0) & (y >= 0)  # a row that does not count is 0, also where its logits are NaN
    highest = tl.load(top + row)
    log_total = tl.load(log_sum + row)
    one_minus_p = -expm1(tl.load(logp + row))
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < vocabulary
        value = tl.load(z + row * stride_z + v, mask=inside, other=0.0).to(tl.float32)
        slope = 1.0
        if CAPPED:
            value, slope = _cap(value, softcap)
        x = (value - highest) * scale - log_total
        d = g * scale * tl.where(v == y, one_minus_p, -tl.exp(x)) * slope
        d = tl.where(counts, d, 0.0)
        # Element v lands at or before the place that held logit v: all of this block's logits, and every earlier
        # one, have been read by the time any of them is overwritten.
        tl.debug_barrier()
        tl.store(dz + row * stride_dz + v, d.to(dz.dtype.element_ty), mask=inside)


@dataclasses.dataclass(frozen=True)
class DeviceKernels:
    """The products go to the vendor's GEMM, with operands in the head's ``dtype`` and sums in float32."""

    dtype: torch.dtype

    def logits(
        self, hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor
    ) -> None:
        if hidden.dtype == z.dtype:
            torch.mm(hidden, head.t(), out=z)
        elif z.is_cuda:
            torch.mm(hidden, head.t(), out_dtype=z.dtype, out=z)
        else:  # the interpreter's host has no such product
            torch.mm(hidden.to(z.dtype), head.to(z.dtype).t(), out=z)
        if bias is not None:
            z += bias

    def forward(self, z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
        if z.shape[0] == 0:
            return
        entropy = stats.logp if stats.entropy is None else stats.entropy  # not written where it is not wanted
        block = min(FORWARD_BLOCK, max(16, _triton.next_power_of_two(z.shape[1])))
        with _gpu.on(z):
            forward_kernel[(z.shape[0],)](
                z, target, stats.logp, stats.top, stats.log_sum, entropy, z.shape[1], z.stride(0),
                1.0 / math.temperature, math.softcap, CAPPED=math.softcap != 0, ENTROPY=stats.entropy is not None,
                BLOCK=block, num_warps=8, **OPTIONS,
            )  # fmt: skip

    def backward(
        self, z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats
    ) -> torch.Tensor:
        dz = z if self.dtype == z.dtype else z.view(self.dtype)[:, : z.shape[1]]
        if z.shape[0] == 0:
            return dz
        block = min(BACKWARD_BLOCK, max(16, _triton.next_power_of_two(z.shape[1])))
        with _gpu.on(z):
            backward_kernel[(z.shape[0],)](
                z, dz, target, grad, stats.logp, stats.top, stats.log_sum, z.shape[1], z.stride(0), dz.stride(0),
                1.0 / math.temperature, math.softcap, CAPPED=math.softcap != 0, BLOCK=block, num_warps=8,
                **OPTIONS,
            )  # fmt: skip
        return dz

    def times_head(self, dz: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        if dz.dtype == torch.float32:
            torch.mm(dz, head, out=out)
        elif out.dtype == torch.float32 and dz.is_cuda:
            torch.mm(dz, head, out_dtype=torch.float32, out=out)
        elif dz.is_cuda:  # a product with a narrow result may be split, and its parts added in that dtype
            out.copy_(torch.mm(dz, head, out_dtype=torch.float32))
        else:
            out.copy_(torch.mm(dz.float(), head.float()))
