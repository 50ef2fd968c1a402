"""Triton kernels behind `sketch_vector`: every number of the sketch gathers what falls on it, in order.

`vector_kernel` takes sums that exist. `tail_kernel` takes the partial sums of many vectors at once, chunk by chunk: the
end of a pass, where a launch for each would cost the host more than the device. Where the memory for partial sums does
not hold all of them, several launches make one sum, in the order in which one launch would.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl

from ..._launch import Launch
from ..._triton import ceil_div
from ...plan import VectorPlan
from ...spec import SLAB_SIZE
from .._device_plan import cached, upload, vector_tables
from .._triton_segments import Chunks, slots_of

BLOCK = 512
TAIL_BLOCK = 1024  # of aligned numbers of the sketch: an XOR maps them to aligned numbers of a vector


@triton.jit(do_not_specialize=["hits", "depth", "stride_g"])
def vector_kernel(
    gradient,  # [segments, size], rows stride_g apart
    out,  # float32, rows stride_out apart
    position,  # int64 [hits]
    source,  # int32 [depth, hits], -1 for none
    sign,  # int8 [size]
    stride_out,
    stride_g,
    hits,
    depth,
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


@triton.jit(do_not_specialize=["n_entries", "n_slots", "n_items", "first", "last"])
def tail_kernel(
    partial,  # float32: [slots, size] of one vector behind the other
    out,  # float32 [segments, dim], rows stride_out apart; added to by the last launch
    left,  # as out: the sums of the launches before
    table,  # of the chunks
    entries,  # int32 [n_entries, 6], see Entries
    sign,  # int8
    stride_out,
    n_entries,
    n_slots,
    n_items,
    first,  # 1: `left` holds nothing yet
    last,
    SLAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    slab = begin // SLAB
    column = (begin % SLAB).to(tl.int32)
    slot, n = slots_of(table, n_items, segment)
    place = segment * stride_out + begin + tl.arange(0, BLOCK)
    total = tl.load(left + place, mask=(place >= 0) & (first == 0), other=0.0)
    for e in range(0, n_entries):
        entry = entries + e * 6
        size, stride, start = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        shift, xor = tl.load(entry + 3), tl.load(entry + 4)
        if (tl.load(entry + 5) == slab) & ((column ^ xor) // BLOCK * BLOCK < size):
            i = (column + tl.arange(0, BLOCK)) ^ xor
            i = tl.max_contiguous(tl.multiple_of(i, 8), 8)
            inside = i < size
            source = partial + (start.to(tl.int64) * n_slots + slot * stride + shift) + i
            got = tl.zeros((BLOCK,), tl.float32)
            for _ in range(0, n.to(tl.int32)):
                got += tl.load(source, mask=inside, other=0.0)
                source += stride
            total += got * tl.load(sign + (start + shift) + i, mask=inside, other=0).to(tl.float32)
    if last:
        tl.store(out + place, tl.load(out + place) + total)
    else:
        tl.store(left + place, total)


@dataclasses.dataclass(frozen=True)
class Entries:
    """Vectors one behind the other. ``table`` int32 [entries, 6]: a piece of at most SLAB_SIZE numbers each, by its
    size, its vector's size, the numbers before its vector, those of its vector before it, its XOR and its slab."""

    table: torch.Tensor
    sign: torch.Tensor


def entries_of(plans: tuple[VectorPlan, ...], device: torch.device) -> Entries:
    def build() -> Entries:
        rows, start = [], 0
        for plan in plans:
            for shift, (place, xor) in zip(range(0, plan.size, SLAB_SIZE), plan.blocks.tolist(), strict=True):
                size = min(SLAB_SIZE, plan.size - shift)
                rows.append((size, plan.size, start, shift, xor, place // SLAB_SIZE))
            start += plan.size
        signs = np.concatenate([plan.sign for plan in plans])
        return Entries(upload(np.array(rows), np.int32, device), upload(signs, np.int8, device))

    return cached(plans[0], device, build, ("entries", plans[1:]))


VECTOR = Launch(vector_kernel, BLOCK=BLOCK, num_warps=4)
TAIL = Launch(tail_kernel, SLAB=SLAB_SIZE, BLOCK=TAIL_BLOCK, num_warps=4)


def sketch_vector(gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor) -> None:
    """``out[s, position(i)] += sign(i) * gradient[s, i]``."""
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    tables = vector_tables(plan, out.device)
    depth, hits = tables.source.shape
    if gradient.shape[0]:
        VECTOR(
            (gradient.shape[0], ceil_div(hits, BLOCK)),
            (gradient, out, tables.position, tables.source, tables.sign),
            (out.stride(0),),
            (gradient.stride(0), hits, depth),
        )


def sketch_tail(
    partial: torch.Tensor,
    plans: tuple[VectorPlan, ...],
    chunks: Chunks,
    out: torch.Tensor,
    left: torch.Tensor | None = None,
    last: bool = True,
) -> torch.Tensor | None:
    """`sketch_vector` of vectors whose sums over each chunk are in ``partial``: [slots, size] of each, in order.

    ``chunks`` must have a slot for every chunk; ``out`` has whole slabs. All that comes between two calls with ``last``
    is one sum: the other calls leave it aside, and return what the next one takes as ``left``.
    """
    entries, first = entries_of(plans, out.device), left is None
    if left is None:
        left = out if last else torch.empty_like(out)
    TAIL(
        (chunks.n_segments, out.shape[1] // TAIL_BLOCK),
        (partial, out, left, chunks.table, entries.table, entries.sign),
        (out.stride(0),),
        (entries.table.shape[0], chunks.n_slots, chunks.n_items, int(first), int(last)),
    )
    return None if last else left
