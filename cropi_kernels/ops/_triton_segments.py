"""Ragged segments without a host: how kernels cut segments into chunks and add the chunks up again.

Every segment is cut into chunks of CHUNK tokens, counted from its own first token, so that its sums do not depend on
its neighbours. A launch has room for ``T // CHUNK + S`` chunks, which no cut of T tokens into S segments exceeds; which
program has which chunk stands in a table, made on the device by one small kernel. Nothing is read back to the host:
safe in a CUDA graph.

A segment of one chunk adds straight into the output. Longer ones write a partial result to a slot per chunk, and
`reduce_partials` adds the slots in order: no atomics, the same bits on every run and on every GPU.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from .._launch import Launch
from .._triton import ceil_div

SEGMENT_BLOCK = 64  # offsets scanned at a time
# Numbers of a program, and partial results on their way to it. Measured on an H200: sums of 144 results each (4
# segments of 8 chunks and 18 groups) take 37 us; 84 with 1024 numbers and one result at a time.
REDUCE_BLOCK, REDUCE_AHEAD = 512, 8
SECOND = tl.constexpr(1 << 15)  # programs along a grid's second axis, at most


@triton.jit
def _slots(n_segments, n_tokens, CHUNK: tl.constexpr, ALWAYS: tl.constexpr):
    """`n_slots`: offsets that decrease ask for more, and must not get them."""
    tokens = tl.zeros((), tl.int64) + n_tokens
    slots = tokens // CHUNK + n_segments
    return slots if ALWAYS else tl.minimum(slots, 2 * tokens // CHUNK)


@triton.jit
def offset_of(offsets, s, valid, n_tokens):
    """Offsets on a device are not checked: what they say may be wrong, but no access leaves the tokens."""
    return tl.minimum(tl.maximum(tl.load(offsets + s, mask=valid, other=0), 0), n_tokens)


@triton.jit
def _count_chunks(offsets, s, valid, n_tokens, CHUNK: tl.constexpr):
    begin, end = offset_of(offsets, s, valid, n_tokens), offset_of(offsets, s + 1, valid, n_tokens)
    return (tl.maximum(end - begin, 0) + CHUNK - 1) // CHUNK


@triton.jit
def _locate(
    offsets, n_segments, n_tokens, item, CHUNK: tl.constexpr, ALWAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """(segment, first token, end token, slot or -1) of chunk ``item``; segment == n_segments past the last chunk."""
    segment = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int64)
    slot = tl.zeros((), tl.int64)
    total = tl.zeros((), tl.int64)
    for s0 in range(0, n_segments, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        valid = s < n_segments
        n = _count_chunks(offsets, s, valid, n_tokens, CHUNK)
        before = (total + tl.cumsum(n, 0) <= item) & valid
        segment += tl.sum(before.to(tl.int64), 0)
        first += tl.sum(tl.where(before, n, 0), 0)
        slot += tl.sum(tl.where(before & ((n > 1) | ALWAYS), n, 0), 0)
        total += tl.sum(n, 0)
    found = segment < n_segments
    begin = offset_of(offsets, segment, found, n_tokens)
    end = offset_of(offsets, segment + 1, found, n_tokens)
    t0 = begin + (item - first) * CHUNK
    t1 = tl.minimum(t0 + CHUNK, end)
    slot = tl.minimum(slot + item - first, _slots(n_segments, n_tokens, CHUNK, ALWAYS) - 1)
    slot = tl.where((end - begin > CHUNK) | ALWAYS, slot, -1)
    return segment, t0, t1, slot


@triton.jit
def _count_slots(
    offsets, segment, n_segments, n_tokens, CHUNK: tl.constexpr, ALWAYS: tl.constexpr, BLOCK: tl.constexpr
):
    """(first slot, number of slots) of a segment."""
    slot = tl.zeros((), tl.int64)
    for s0 in range(0, n_segments, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        valid = s < segment
        n = _count_chunks(offsets, s, valid, n_tokens, CHUNK)
        slot += tl.sum(tl.where((n > 1) | ALWAYS, n, 0), 0)
    chunks = _count_chunks(offsets, segment, True, n_tokens, CHUNK)
    chunks = tl.where((chunks > 1) | ALWAYS, chunks, 0)
    return slot, tl.maximum(tl.minimum(chunks, _slots(n_segments, n_tokens, CHUNK, ALWAYS) - slot), 0)


@triton.jit
def _turn(
    offsets, n_segments, n_tokens, n_items, item, segment, t0, t1, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Which turn chunk ``item`` has: whole chunks first, the others by falling length. As many programs as the device
    runs at once take their turns at once: the last ones to end are short. ``item`` where offsets that decrease ask for
    more chunks than there is room for."""
    rest = (t1 - t0) % CHUNK
    whole = tl.zeros((), tl.int64)
    others = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    longer = tl.zeros((), tl.int64)
    for s0 in range(0, n_segments, BLOCK):
        s = s0 + tl.arange(0, BLOCK)
        valid = s < n_segments
        begin, end = offset_of(offsets, s, valid, n_tokens), offset_of(offsets, s + 1, valid, n_tokens)
        length = tl.maximum(end - begin, 0)
        n, r = length // CHUNK, length % CHUNK
        whole += tl.sum(n, 0)
        others += tl.sum((r > 0).to(tl.int64), 0)
        before += tl.sum(tl.where(s < segment, n, 0), 0)
        longer += tl.sum(((r > rest) | ((r == rest) & (s < segment))).to(tl.int64), 0)
    own = (t0 - offset_of(offsets, segment, segment < n_segments, n_tokens)) // CHUNK
    turn = tl.where(rest == 0, before + own, whole + longer)
    return tl.where((segment < n_segments) & (whole + others <= n_items), turn, item)


@triton.jit(do_not_specialize=["n_segments", "n_tokens", "n_items"])
def chunks_kernel(
    offsets,  # int64 [n_segments + 1]
    table,  # int64 [n_items, 4], then [n_segments, 2]: see Chunks
    n_segments,
    n_tokens,
    n_items,
    CHUNK: tl.constexpr,
    ALWAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    if pid < n_items:
        segment, t0, t1, slot = _locate(offsets, n_segments, n_tokens, pid, CHUNK, ALWAYS, BLOCK)
        turn = _turn(offsets, n_segments, n_tokens, n_items, pid, segment, t0, t1, CHUNK, BLOCK)
        row = table + turn * 4
        tl.store(row, segment)
        tl.store(row + 1, t0)
        tl.store(row + 2, t1)
        tl.store(row + 3, slot)
    else:
        segment = pid - n_items
        slot, n = _count_slots(offsets, segment, n_segments, n_tokens, CHUNK, ALWAYS, BLOCK)
        row = table + (n_items.to(tl.int64) * 4 + segment * 2)
        tl.store(row, slot)
        tl.store(row + 1, n)


@triton.jit
def chunk_of(table, item):
    """(segment, first token, end token, slot or -1) of a chunk; the number of segments past the last one."""
    row = table + item * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def slots_of(table, n_items, segment):
    """(first slot, number of slots) of a segment."""
    row = table + (n_items.to(tl.int64) * 4 + segment * 2)
    return tl.load(row), tl.load(row + 1)


@triton.jit
def second():
    """The number of a program along the second axis of a grid, int32: see `along_second`."""
    return tl.program_id(1) + tl.program_id(2) * SECOND


def along_second(n: int) -> tuple[int, int]:
    """The second and third axis of a grid for ``n`` programs, and for some more: CUDA's second axis ends at 65535."""
    return min(n, SECOND.value), ceil_div(n, SECOND.value)


@triton.jit(do_not_specialize=["n_parts", "n_items"])
def reduce_partials_kernel(
    partial,  # float32 [slots, n_parts, width]
    out,  # float32 [n_segments, width], rows out_stride apart
    table,  # see Chunks
    width,
    out_stride,
    n_parts,
    n_items,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = second().to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot, n = slots_of(table, n_items, segment)
    if n > 0:
        inside = column < width
        total = tl.zeros((BLOCK,), tl.float32)
        source = partial + slot * n_parts * width + column
        for _ in tl.range(0, (n * n_parts).to(tl.int32), loop_unroll_factor=AHEAD):
            total += tl.load(source, mask=inside, other=0.0)
            source += width
        target = out + segment * out_stride + column
        tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How tokens in segments are cut, from shapes and from offsets that stay on the device.

    ``table`` int64: ``[n_items, 4]``, a chunk's (segment, first token, end token, slot or -1), with the number of
    segments for the segment of rows past the last chunk; then ``[n_segments, 2]``, a segment's (first slot, number of
    slots).
    """

    table: torch.Tensor
    n_segments: int
    n_items: int
    n_slots: int


LAUNCHES: dict[tuple[int, bool], Launch] = {}
REDUCE = Launch(reduce_partials_kernel, BLOCK=REDUCE_BLOCK, AHEAD=REDUCE_AHEAD, num_warps=4)


def cut(offsets: torch.Tensor, n_tokens: int, chunk: int, always: bool) -> Chunks:
    """Chunks of at most ``chunk`` tokens; ``offsets`` int64 [segments + 1] on the device. ``always``: segments of one
    chunk have a slot too."""
    n_segments = offsets.numel() - 1
    # Upper bounds, from shapes alone. A segment of several chunks has less than two of them per ``chunk`` tokens.
    n_items = n_tokens // chunk + n_segments
    n_slots = n_items if always else min(n_items, 2 * n_tokens // chunk)
    table = torch.empty(n_items * 4 + n_segments * 2, dtype=torch.int64, device=offsets.device)
    if (launch := LAUNCHES.get((chunk, always))) is None:
        launch = LAUNCHES[chunk, always] = Launch(
            chunks_kernel, CHUNK=chunk, ALWAYS=always, BLOCK=SEGMENT_BLOCK, num_warps=1
        )
    launch((n_items + n_segments,), (offsets, table), counts=(n_segments, n_tokens, n_items))
    return Chunks(table, n_segments, n_items, n_slots)


def reduce_partials(partial: torch.Tensor, out: torch.Tensor, chunks: Chunks, n_parts: int) -> None:
    """``out[s] += `` the partial results [slots, n_parts, width] of segment s, in order."""
    n_segments, width = out.shape
    if partial.numel() == 0 or n_segments == 0:
        return
    grid = n_segments, *along_second(ceil_div(width, REDUCE_BLOCK))
    REDUCE(grid, (partial, out, chunks.table), (width, out.stride(0)), (n_parts, chunks.n_items))
