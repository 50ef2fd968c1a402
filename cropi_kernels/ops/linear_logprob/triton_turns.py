"""`tiles_kernel` by two groups of warps that take turns: one multiplies while the other reduces what it has multiplied.

A warp brings the operands of one step after another, of the next tile too, and says so by ``ready``; each group
multiplies 64 rows of a tile of 128 and says by ``empty`` that it has read them. In `tiles_kernel` the tensor cores wait
at the end of a tile for its exponentials and for the first operands of the next. The bits are those of `tiles_kernel`.

What a gradient needs is written by the copy engine too, a piece of 64 words at a time: a group stores one piece while
the one before is on its way.

Measured on an H200, 8192 tokens, in turns with a large product by cuBLAS, of whose rate log-probs alone have 0.90
(Qwen2.5-1.5B), 1.01 (7B) and 1.01 (Llama-3-8B), `tiles_kernel` 0.83, 0.95, 0.96; where e is kept 0.86 and 0.99, with e
stored from registers 0.80 and 0.94, `tiles_kernel` 0.75 and 0.91. A head start for one group, and steps of 32 features,
were no different.

Gluon is the part of Triton in which warps are given different work. It may change with every release, so it serves the
releases that it was compiled with.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..._triton import installed
from .._gluon import load_tile, store_tile
from .triton_tile_kernels import finish_tile

_finish_tile = gluon.jit(finish_tile)
GROUPS = gl.constexpr(2)
WARPS = gl.constexpr(4)  # of a group: as many as share a product
# Of a thread of the second group, and of the warp that brings operands. The first group has the rest of 168 for each of
# 12 warps: 248, or 232 from Triton 3.8 on, where the warp spills with 24. A group needs 128 for its product and some 60
# more.
REGISTERS = gl.constexpr((232, 24 if installed() < (3, 8) else 40))
# Of a group's words that are kept; in shared memory at a time.
PIECES, BUFFERS = gl.constexpr(4), gl.constexpr(2)


@gluon.jit
def _bring(
    hidden,
    head,
    h,
    w,
    ready,
    empty,
    across,
    total,
    features,
    ROWS: gl.constexpr,
    WORDS: gl.constexpr,
    FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
):
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        for k in range(0, features, FEATURES):
            stage = step % STAGES
            # The wait for a phase before the first returns at once.
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (GROUPS * ROWS + WORDS) * FEATURES * 2)
            for group in gl.static_range(GROUPS):
                at = (tile % across * GROUPS + group) * ROWS
                load_tile(hidden, [at, k], bar, h.index(stage * GROUPS + group))
            load_tile(head, [tile // across * WORDS, k], bar, w.index(stage))
            step += 1


@gluon.jit
def _multiply(
    h,
    w,
    kept,
    ready,
    empty,
    bias,
    target,
    own,
    anchors,
    rests,
    weighted,
    e,
    far,
    across,
    total,
    n_tokens,
    vocabulary,
    features,
    scale,
    GROUP: gl.constexpr,
    LIFT: gl.constexpr,
    BY_ROW: gl.constexpr,
    BIAS: gl.constexpr,
    ENTROPY: gl.constexpr,
    KEEP: gl.constexpr,
    ROWS: gl.constexpr,
    WORDS: gl.constexpr,
    FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
):
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WORDS, 16])
    PIECE: gl.constexpr = WORDS // PIECES
    stored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    step = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        i, t = tile % across, tile // across
        z = gl.zeros((ROWS, WORDS), gl.float32, layout=products)
        for k in range(0, features, FEATURES):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            z = warpgroup_mma(
                h.index(stage * GROUPS + GROUP), w.index(stage).permute((1, 0)), z, is_async=True
            )
            z = warpgroup_mma_wait(1, deps=(z,))
            if k > 0:  # the step before has ended
                mbarrier.arrive(empty.index((step - 1) % STAGES))
            step += 1
        z = warpgroup_mma_wait(0, deps=(z,))
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        start = (i * GROUPS + GROUP) * ROWS
        row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, products))
        word = t * WORDS + gl.arange(0, WORDS, layout=gl.SliceLayout(0, products))
        p = _finish_tile(
            z, row, word, i, t, bias, target, own, anchors, rests, weighted, far, n_tokens, vocabulary, scale, BY_ROW,
            False, BIAS, ENTROPY, GROUPS * ROWS,
        )  # fmt: skip
        if KEEP:
            left, right = _halves((p * LIFT).to(e.dtype))
            pieces = _halves(left) + _halves(right)
            for piece in gl.static_range(PIECES):
                buffer = kept.index(GROUP * BUFFERS + piece % BUFFERS)
                tma.store_wait(BUFFERS - 1)
                buffer.store(gl.convert_layout(pieces[piece], stored, assert_trivial=True))
                fence_async_shared()
                store_tile(e, [start, t * WORDS + piece * PIECE], buffer)
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _halves(x):
    """Its left and its right columns."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit(do_not_specialize=["n_tokens"])
def turns_kernel(
    hidden,  # descriptor of [n_tokens, features], tiles of TOKENS / GROUPS x FEATURES
    head,  # the others are those of `tiles_kernel`
    bias,
    target,
    own,
    anchors,
    rests,
    weighted,
    e,  # descriptor of [n_tokens, vocabulary], tiles of TOKENS / GROUPS x WORDS / PIECES; not read unless KEEP
    far,
    n_tokens,
    vocabulary,
    features,
    scale,
    LIFT: gl.constexpr,
    BY_ROW: gl.constexpr,
    BIAS: gl.constexpr,
    ENTROPY: gl.constexpr,
    KEEP: gl.constexpr,
    TOKENS: gl.constexpr,
    WORDS: gl.constexpr,
    FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
):
    ROWS: gl.constexpr = TOKENS // GROUPS
    across = gl.cdiv(n_tokens, TOKENS)
    total = across * gl.cdiv(vocabulary, WORDS)
    h = gl.allocate_shared_memory(hidden.dtype, [STAGES * GROUPS, ROWS, FEATURES], hidden.layout)
    w = gl.allocate_shared_memory(head.dtype, [STAGES, WORDS, FEATURES], head.layout)
    kept = w
    if KEEP:
        kept = gl.allocate_shared_memory(e.dtype, [GROUPS * BUFFERS, ROWS, WORDS // PIECES], e.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    h, w, kept, ready, empty, bias, target, own, anchors, rests, weighted, e, far, across, total,
                    n_tokens, vocabulary, features, scale, 0, LIFT, BY_ROW, BIAS, ENTROPY, KEEP, ROWS, WORDS, FEATURES,
                    STAGES,
                ),
            ),
            (
                _multiply,
                (
                    h, w, kept, ready, empty, bias, target, own, anchors, rests, weighted, e, far, across, total,
                    n_tokens, vocabulary, features, scale, 1, LIFT, BY_ROW, BIAS, ENTROPY, KEEP, ROWS, WORDS, FEATURES,
                    STAGES,
                ),
            ),
            (_bring, (hidden, head, h, w, ready, empty, across, total, features, ROWS, WORDS, FEATURES, STAGES)),
        ],
        [WARPS, 1],
        [REGISTERS[0], REGISTERS[1]],
    )  # fmt: skip


def described(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """``x`` as `turns_kernel` takes it, in tiles of ``rows`` x ``columns``."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=2 * columns, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)
