"""Ragged segments without a host: how kernels cut segments into chunks and add the chunks up again.

Every segment is cut into chunks of CHUNK tokens, counted from its own first token, so that its sums do not depend on
its neighbours. A launch has room for ``T // CHUNK + S`` chunks, which no cut of T tokens into S segments exceeds; a
program finds its chunk by a prefix sum over the offsets. Nothing is read back to the host: safe in a CUDA graph.

A segment of one chunk adds straight into the output. Longer ones write a partial result to a slot per chunk, and
`reduce_partials` adds the slots in order: no atomics, the same bits on every run and on every GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _gpu

SEGMENT_BLOCK = 64  # offsets scanned at a time
REDUCE_BLOCK = 1024


@triton.jit
def _slots(n_segments, n_tokens, CHUNK: tl.constexpr, ALWAYS: tl.constexpr):
    """`n_slots`: offsets that decrease ask for more, and must not get them."""
    tokens = tl.zeros((), tl.int64) + n_tokens
    slots = tokens // CHUNK + n_segments
    return slots if ALWAYS else tl.minimum(slots, 2 * tokens // CHUNK)


@triton.jit
def _offset(offsets, s, valid, n_tokens):
    """Offsets on a device are not checked: what they say may be wrong, but no access leaves the tokens."""
    return tl.minimum(tl.maximum(tl.load(offsets + s, mask=valid, other=0), 0), n_tokens)


@triton.jit
def locate(
    offsets, n_segments, n_tokens, item, CHUNK: tl.constexpr, ALWAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """(segment, first token, end token, slot or -1) of chunk ``item``; segment == n_segments past the last chunk.

    ALWAYS: segments of one chunk have a slot too.
    """
    segment = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int64)
    slot = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    for s0 in range(0, n_segments, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        valid = s < n_segments
        begin = _offset(offsets, s, valid, n_tokens)
        n = (tl.maximum(_offset(offsets, s + 1, valid, n_tokens) - begin, 0) + CHUNK - 1) // CHUNK
        before = (total + tl.cumsum(n, 0) <= item) & valid
        segment += tl.sum(before.to(tl.int64), 0)
        first += tl.sum(tl.where(before, n, 0), 0)
        slot += tl.sum(tl.where(before & ((n > 1) | ALWAYS), n, 0), 0)
        total += tl.sum(n, 0)
    found = segment < n_segments
    begin = _offset(offsets, segment, found, n_tokens)
    end = _offset(offsets, segment + 1, found, n_tokens)
    t0 = begin + (item - first) * CHUNK
    t1 = tl.minimum(t0 + CHUNK, end)
    slot = tl.minimum(slot + item - first, _slots(n_segments, n_tokens, CHUNK, ALWAYS) - 1)
    slot = tl.where((end - begin > CHUNK) | ALWAYS, slot, -1)
    return segment, t0, t1, slot


@triton.jit
def reduce_partials_kernel(
    partial,  # float32 [slots, n_parts, width]
    out,  # float32 [n_segments, width], rows out_stride apart
    offsets,
    n_segments,
    n_tokens,
    width,
    out_stride,
    n_parts,
    CHUNK: tl.constexpr,
    ALWAYS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.zeros((), tl.int64)
    for s0 in range(0, n_segments, SEGMENTS):
        s = s0 + tl.arange(0, SEGMENTS)
        valid = s < segment
        begin = _offset(offsets, s, valid, n_tokens)
        n = (tl.maximum(_offset(offsets, s + 1, valid, n_tokens) - begin, 0) + CHUNK - 1) // CHUNK
        slot += tl.sum(tl.where((n > 1) | ALWAYS, n, 0), 0)
    begin = _offset(offsets, segment, True, n_tokens)
    chunks = (tl.maximum(_offset(offsets, segment + 1, True, n_tokens) - begin, 0) + CHUNK - 1) // CHUNK
    chunks = tl.minimum(chunks, _slots(n_segments, n_tokens, CHUNK, ALWAYS) - slot)
    if (chunks > 1) | (ALWAYS & (chunks > 0)):
        inside = column < width
        total = tl.zeros((BLOCK,), tl.float32)
        source = partial + slot * n_parts * width + column
        for _ in range(0, (chunks * n_parts).to(tl.int32)):
            total += tl.load(source, mask=inside, other=0.0)
            source += width
        target = out + segment * out_stride + column
        tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


def n_items(n_tokens: int, n_segments: int, chunk: int) -> int:
    """An upper bound of the number of chunks, from shapes alone."""
    return n_tokens // chunk + n_segments


def n_slots(n_tokens: int, n_segments: int, chunk: int, always: bool) -> int:
    """An upper bound of the slots: a segment of more than one chunk has less than 2 chunks per CHUNK tokens."""
    items = n_items(n_tokens, n_segments, chunk)
    return items if always else min(items, 2 * n_tokens // chunk)


def reduce_partials(
    partial: torch.Tensor,
    out: torch.Tensor,
    offsets: torch.Tensor,
    n_tokens: int,
    chunk: int,
    n_parts: int,
    always: bool,
) -> None:
    """``out[s] += `` the partial results of segment s, in order."""
    n_segments, width = out.shape
    if partial.numel() == 0 or n_segments == 0:
        return
    with _gpu.on(out):
        reduce_partials_kernel[(n_segments, triton.cdiv(width, REDUCE_BLOCK))](
            partial, out, offsets, n_segments, n_tokens, width, out.stride(0), n_parts,
            CHUNK=chunk, ALWAYS=always, SEGMENTS=SEGMENT_BLOCK, BLOCK=REDUCE_BLOCK, num_warps=4,
        )  # fmt: skip
