"""The kernels of `triton_tiles`, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton import expm1, finish_rows

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
FAR: tl.constexpr = tl.constexpr(2.0**60)  # of a row's sum in a tile


@triton.jit(do_not_specialize=["n_tokens"])
def own_kernel(
    hidden,  # [n_tokens, features], rows stride_hidden apart
    head,
    bias,  # float32 [vocabulary]
    target,  # int64 [n_tokens]
    own,  # float32 [n_tokens]
    n_tokens,
    vocabulary,
    features,
    stride_hidden,
    stride_head,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """The targets' logits; of a row that has no target, or one past the vocabulary, the first word's."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n_tokens
    y = tl.load(target + row, mask=there, other=0)
    word = tl.where((y >= 0) & (y < vocabulary), y, 0)
    products = tl.zeros((ROWS, FEATURES), tl.float32)
    for k in range(0, features, FEATURES):
        at = k + tl.arange(0, FEATURES)
        mask = there[:, None] & (at < features)[None, :]
        h = tl.load(hidden + row.to(tl.int64)[:, None] * stride_hidden + at[None, :], mask=mask, other=0.0)
        w = tl.load(head + word[:, None] * stride_head + at[None, :], mask=mask, other=0.0)
        products += h.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(products, 1)
    if BIAS:
        z += tl.load(bias + word, mask=there, other=0.0)
    tl.store(own + row, z, mask=there)


def finish_tile(
    z,  # float32 [rows, words]: a product's numbers
    row,
    word,
    i,
    t,
    bias,
    target,
    own,
    anchors,
    rests,
    weighted,
    far,
    n_tokens,
    vocabulary,
    scale,
    BY_ROW: tl.constexpr,
    AGAIN: tl.constexpr,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Writes the statistics of some rows of tile i of the tokens and t of the words, and returns exp((z - a) / T)."""
    there, inside = row < n_tokens, word < vocabulary
    if BIAS:
        z += tl.load(bias + word, mask=inside, other=0.0)[None, :]
    y = tl.load(target + row, mask=there, other=-1)
    anchor = tl.load(own + row, mask=there, other=0.0)
    z = tl.where((word[None, :] == y[:, None]) | (word[None, :] >= vocabulary), float("-inf"), z)
    at = t.to(tl.int64) * n_tokens + row
    if not BY_ROW:
        anchor = tl.maximum(anchor, tl.max(z, 1))
    if AGAIN:  # other rows of the tile keep their anchor
        was_far = tl.load(rests + at, mask=there, other=0.0) > FAR
        anchor = tl.where(was_far, tl.maximum(anchor, tl.max(z, 1)), anchor)
    anchor = tl.where(anchor == float("-inf"), 0.0, anchor)
    x = (z - anchor[:, None]) * scale  # to the base of 2
    p = tl.exp2(x)
    rest = tl.sum(p, 1)
    if ENTROPY:  # before the branch, so that x need not live in registers over it
        tl.store(weighted + at, tl.sum(p * tl.maximum(x, -1000.0), 1) * LN_2, mask=there)
    tl.store(anchors + at, anchor, mask=there)
    tl.store(rests + at, rest, mask=there)
    if BY_ROW and not AGAIN:
        if tl.max(tl.where(there, rest, 0.0), 0) > FAR:
            tl.store(far + t.to(tl.int64) * tl.cdiv(n_tokens, TOKENS) + i, t + 1)
    return p


_finish_tile = triton.jit(finish_tile)


@triton.jit
def _tile(
    i,
    t,
    hidden,
    head,
    bias,
    target,
    own,
    anchors,
    rests,
    weighted,
    e,
    far,
    n_tokens,
    vocabulary,
    features,
    stride,
    scale,
    LIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    AGAIN: tl.constexpr,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Tile i of the tokens and t of the words; the arguments are those of `tiles_kernel`."""
    z = tl.zeros((TOKENS, WORDS), tl.float32)
    for k in range(0, features, FEATURES):
        z = tl.dot(hidden.load([i * TOKENS, k]), head.load([t * WORDS, k]).T, z)
    row = i * TOKENS + tl.arange(0, TOKENS)
    word = t * WORDS + tl.arange(0, WORDS)
    p = _finish_tile(
        z, row, word, i, t, bias, target, own, anchors, rests, weighted, far, n_tokens, vocabulary, scale, BY_ROW,
        AGAIN, BIAS, ENTROPY, TOKENS,
    )  # fmt: skip
    if KEEP:
        place = e + row.to(tl.int64)[:, None] * stride + word[None, :]
        mask = (row < n_tokens)[:, None] & (word < vocabulary)[None, :]
        tl.store(place, (p * LIFT).to(e.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def tiles_kernel(
    hidden,  # descriptor of [n_tokens, features], tiles of TOKENS x FEATURES
    head,  # descriptor of [vocabulary, features], tiles of WORDS x FEATURES
    bias,  # float32 [vocabulary]
    target,  # int64 [n_tokens]
    own,  # float32 [n_tokens], of `own_kernel`
    anchors,  # float32 [tiles of words, n_tokens], as are rests and weighted
    rests,
    weighted,
    e,  # [n_tokens, vocabulary], rows stride apart
    far,  # int32 [tiles of words, tiles of tokens], 0: where a sum is beyond FAR, it becomes the words' tile and 1
    n_tokens,
    vocabulary,
    features,
    stride,
    scale,  # log2(e) / temperature
    LIFT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    # Programs that run together share tiles of the head: it is read once.
    across = tl.cdiv(n_tokens, TOKENS)
    i, t = tl.program_id(0) % across, tl.program_id(0) // across
    _tile(
        i, t, hidden, head, bias, target, own, anchors, rests, weighted, e, far, n_tokens, vocabulary, features, stride,
        scale, LIFT, BY_ROW, False, BIAS, ENTROPY, KEEP, TOKENS, WORDS, FEATURES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def again_kernel(
    hidden,
    head,
    bias,
    target,
    own,
    anchors,
    rests,
    weighted,
    e,
    far,
    n_tokens,
    vocabulary,
    features,
    stride,
    scale,
    LIFT: tl.constexpr,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    FEATURES: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """The tiles that are marked as far, with the largest logit of a tile's row as its anchor."""
    across = tl.cdiv(n_tokens, TOKENS)
    t, start = tl.program_id(0), tl.program_id(1) * FLAGS
    marks = far + t.to(tl.int64) * across
    lane = start + tl.arange(0, FLAGS)
    if tl.max(tl.load(marks + lane, mask=lane < across, other=0), 0) > 0:
        for i in range(start, tl.minimum(start + FLAGS, across)):
            # Which words: as the program's number, they would be held in 64 registers over the loop by Triton 3.9.
            mark = tl.load(marks + i)
            if mark > 0:
                _tile(
                    i, mark - 1, hidden, head, bias, target, own, anchors, rests, weighted, e, far, n_tokens,
                    vocabulary, features, stride, scale, LIFT, True, True, BIAS, ENTROPY, KEEP, TOKENS, WORDS, FEATURES,
                )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def combine_kernel(
    own,
    anchors,
    rests,
    weighted,
    target,
    logp,  # float32 [n_tokens], as are top, log_sum and entropy
    top,
    log_sum,
    entropy,
    n_tokens,
    vocabulary,
    tiles,
    scale,  # 1 / temperature
    ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n_tokens
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        mask = (t < tiles)[:, None] & there[None, :]
        at = t.to(tl.int64)[:, None] * n_tokens + row[None, :]
        best = tl.maximum(best, tl.max(tl.load(anchors + at, mask=mask, other=float("-inf")), 0))
    anchor = tl.where(best == float("-inf"), 0.0, best)
    rest = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        t = start + tl.arange(0, TILES)
        mask = (t < tiles)[:, None] & there[None, :]
        at = t.to(tl.int64)[:, None] * n_tokens + row[None, :]
        shift = (tl.load(anchors + at, mask=mask, other=float("-inf")) - anchor[None, :]) * scale
        share = tl.exp(shift)
        part = tl.load(rests + at, mask=mask, other=0.0)
        # A lane may have one tile of a row: chosen as in `rms_kernel`, so that lanes that share the row have one sum.
        rest += tl.sum(tl.where(mask, part * share, 0.0), 0)
        if ENTROPY:  # every x of a tile moves by its shift
            moved = tl.where(part > 0, tl.maximum(shift, -1000.0), 0.0)
            terms = (tl.load(weighted + at, mask=mask, other=0.0) + part * moved) * share
            sums += tl.sum(tl.where(mask, terms, 0.0), 0)
    y = tl.load(target + row, mask=there, other=-1)
    exists = (y >= 0) & (y < vocabulary)
    own_z = tl.load(own + row, mask=there & exists, other=float("-inf"))
    finish_rows(
        row, y, exists, own_z, best, rest, sums, logp, top, log_sum, entropy, scale, there, ENTROPY=ENTROPY
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def rescale_kernel(
    e,  # [n_tokens, vocabulary], rows stride apart: of `tiles_kernel`
    anchors,
    own,
    target,
    grad,  # float32 [n_tokens]
    logp,
    top,
    log_sum,
    factor,  # float32 [n_tokens], written unless WHOLE, as is missing
    missing,
    n_tokens,
    vocabulary,
    stride,
    scale,  # 1 / temperature
    LIFT: tl.constexpr,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Turns e into the gradient of the logits, or (not WHOLE) into the gradient divided by ``factor``.

    Then most rows have one anchor for all tiles, and of those the target's number alone is written. It is the largest,
    and ``missing`` is what rounding takes from it: without, gradients of 64 tokens with g = 1 were off by 2.3e-3, with
    whole logits by 1.7e-3.
    """
    row = tl.program_id(0).to(tl.int64)
    g, y = tl.load(grad + row), tl.load(target + row)
    counts = (g != 0) & (y >= 0)  # a row that does not count is 0, also where its logits are NaN
    highest, log_total = tl.load(top + row), tl.load(log_sum + row)
    minus_rest = expm1(tl.load(logp + row))
    of_row = -g * scale * tl.exp(-log_total)
    if WHOLE:
        of_target = -minus_rest * scale * g
        of_e = of_row / LIFT
        every = True
    else:
        tl.store(factor + row, tl.where(counts, of_row, 0.0))
        of_target = minus_rest * tl.exp(log_total)
        rounded = of_target.to(e.dtype.element_ty).to(tl.float32)
        tl.store(missing + row, tl.where(counts, of_target - rounded, 0.0))
        of_e = 1.0
        known = log_total - log_total == 0.0
        every = (highest != tl.load(own + row)) | ~(counts | known)
    if every:
        for start in range(0, tl.cdiv(vocabulary, WORDS), TILES):
            t = start + tl.arange(0, TILES)
            of_tile = tl.load(
                anchors + t.to(tl.int64) * n_tokens + row,
                mask=t < tl.cdiv(vocabulary, WORDS),
                other=float("-inf"),
            )
            of_tile = of_e * tl.exp((of_tile - highest) * scale)
            v = t[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
            place = e + row * stride + v
            value = tl.load(place, mask=v < vocabulary, other=0.0).to(tl.float32) * of_tile[:, None]
            value = tl.where(counts, tl.where(v == y, of_target, value), 0.0)
            tl.store(place, value.to(e.dtype.element_ty), mask=v < vocabulary)
    else:
        tl.store(e + row * stride + y, of_target.to(e.dtype.element_ty), mask=counts & (y < vocabulary))


@triton.jit
def scale_kernel(
    product,  # float32 [n_tokens, features], contiguous
    head,
    target,
    factor,
    missing,
    out,  # [n_tokens, features], rows stride_out apart
    vocabulary,
    features,
    stride_head,
    stride_out,
    FEATURES: tl.constexpr,
):
    """``out = factor (product + missing head[target])``, of a row and some features."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    y = tl.load(target + row)
    inside = at < features
    value = tl.load(product + row * features + at, mask=inside, other=0.0)
    own = tl.load(head + y * stride_head + at, mask=inside & (y >= 0) & (y < vocabulary), other=0.0)
    value = (value + tl.load(missing + row) * own.to(tl.float32)) * tl.load(factor + row)
    tl.store(out + row * stride_out + at, value.to(out.dtype.element_ty), mask=inside)
