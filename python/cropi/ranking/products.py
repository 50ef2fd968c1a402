"""A store's sketches times a few directions, streamed.

Every thread takes a block, reads it into a buffer of its own, checks it and multiplies it from the stored numbers
(`cropi_kernels.row_products`): a block stays in the cache of one processor, and all of them share the reading. Equal
sketches have equal products, wherever they stand.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from cropi.store.codec import PACKED, decode
from cropi.store.rows import RowInfo
from cropi.store.shards import Block
from cropi.store.store import SketchStore
from cropi_kernels import row_products

_MOST_THREADS = 8  # more of them wait for memory
# Lengths between which float32 squares of a row's entries neither overflow nor lose more than rounding to underflow.
_SHORTEST, _LONGEST = 2.0**-40, 2.0**60


_MOST_PRODUCTS = 1 << 22  # of a block that a thread makes before it makes them to values: 32 MB


def _as_they_are(dots: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return dots, lengths


def products(
    store: SketchStore,
    directions: torch.Tensor,
    apart: int = 0,
    change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = _as_they_are,
) -> Iterator[tuple[list[RowInfo], np.ndarray, np.ndarray]]:
    """Block by block: rows with a sketch ``x``, float64 ``<x, d>`` ``[n, directions]`` and lengths ``|x|`` ``[n]``.

    Behind the first ``apart`` directions stand their products group by group, ``<x_g, d_g>``: those with all of them
    for the store's first group of parameters, then for the second, and so on.

    Errors are at most ``70 * 2^-24 sum_i |x_i d_i|``: below 5e-6 in a cosine, and near 1e-8 as a rule.

    Args:
        store: where the sketches are.
        directions: ``[directions, dim]``; taken as float32.
        apart: see above; 0 for a store without groups.
        change: what is made of the products and lengths of some rows, which is yielded in their place; the threads call
            it, so that not all products of a block with many directions are in memory.

    Raises:
        CropiError: a shard is damaged or gone.
    """
    wanted, powers = _near_one(directions.detach().cpu())
    width = store.dim // len(store.groups) if apart else 0
    count = max(1, min(torch.get_num_threads(), _MOST_THREADS))
    own = threading.local()

    def multiply(block: Block) -> tuple[np.ndarray, np.ndarray]:
        buffer = getattr(own, "buffer", None)
        if buffer is None or len(buffer) < block.size:
            own.buffer = buffer = torch.empty(block.size, dtype=torch.uint8, device="cpu")
        tensors, rows = block.read(buffer), max(1, _MOST_PRODUCTS // max(len(wanted), 1))
        parts = [
            change(
                *_multiply({n: t[at : at + rows] for n, t in tensors.items()}, wanted, powers, apart, width)
            )
            for at in range(0, len(block.rows), rows)
        ]
        first, second = (np.concatenate(part) if len(parts) > 1 else part[0] for part in zip(*parts))
        return first, second

    waiting: deque[tuple[list[RowInfo], Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="cropi-products") as pool:
        for block in store.unread():
            waiting.append((block.rows, pool.submit(multiply, block)))
            if len(waiting) > 2 * count:
                rows, made = waiting.popleft()
                yield rows, *made.result()
        for rows, made in waiting:
            yield rows, *made.result()


def in_order(
    store: SketchStore,
    directions: torch.Tensor,
    values: Callable[[np.ndarray, np.ndarray], np.ndarray],
    columns: int,
    last: int = 0,
    apart: int = 0,
) -> tuple[list[RowInfo], np.ndarray, np.ndarray]:
    """The values and products of all rows of a store, in order of id; NaN for prompts without a sketch.

    Args:
        store: of the training prompts.
        directions: float32 ``[directions, dim]``.
        values: ``values(products, lengths)`` gives ``[n, columns]`` for n rows.
        columns: how many values a row has.
        last: so many of the last directions' products are returned.
        apart: see :func:`products`.

    Returns:
        The rows; their values, float64 ``[rows, columns]``; and their products with the last directions, ``[rows,
        last]``, float32, or float64 where their size needs it.
    """
    rows = store.rows()
    places = _places(store, rows)
    table = np.full((len(rows), columns), np.nan)
    kept = np.full((len(rows), last), np.nan, np.float32)
    begin = 0

    def wanted(dots: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values(dots, lengths), dots[:, dots.shape[1] - last :].copy()

    for some, made, dots in products(store, directions, apart, wanted):
        here = places[begin : begin + len(some)]
        table[here] = made
        if last:
            if kept.dtype == np.float32 and _leave_float32(dots):
                kept = kept.astype(np.float64)
            kept[here] = dots
        begin += len(some)
    return rows, table, kept


def _places(store: SketchStore, rows: Sequence[RowInfo]) -> np.ndarray:
    """Where the prompts with a sketch, in the order in which they are read, stand among ``rows``, which are sorted."""
    ids = [row.id for shard in store.files() for row in shard.kept]
    places = np.empty(len(ids), dtype=np.int64)
    places[sorted(range(len(ids)), key=ids.__getitem__)] = [
        i for i, row in enumerate(rows) if row.row is not None
    ]
    return places


def _leave_float32(products: np.ndarray) -> bool:
    sizes = np.abs(products).max(axis=1, initial=0.0)
    return bool(((sizes > 2.0**100) | (sizes > 0) & (sizes < 2.0**-90)).any())


def _near_one(rows: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """Rows scaled by powers of two so that the largest entry of each is in [1/2, 1), float32, and the exponents.

    Squares and products of such rows stay within float32's range, and no bit of an entry is lost.
    """
    wide = rows.double().numpy()
    powers = np.frexp(np.abs(wide).max(axis=1, initial=0.0))[1]
    return torch.from_numpy(np.ldexp(wide, -powers[:, None]).astype(np.float32)), powers


def _row_products(
    values: torch.Tensor, directions: torch.Tensor, scale: torch.Tensor | None = None, bits: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Products with some directions after the other: those that stay in a processor's cache."""
    step = max(256, (1 << 17) // directions.shape[1])
    parts = [
        row_products(values, directions[at : at + step], scale, bits=bits, threads=1)
        for at in range(0, len(directions), step)
    ]
    return torch.cat([dots for dots, _ in parts], dim=1) if len(parts) > 1 else parts[0][0], parts[0][1]


def _multiply(
    tensors: Mapping[str, torch.Tensor],
    directions: torch.Tensor,
    powers: np.ndarray,
    apart: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    name = next(name for name in tensors if name != "scale")
    # One thread: this is one of several, and those of OpenMP spin while they wait.
    dots, squares = _row_products(tensors[name], directions, tensors.get("scale"), PACKED.get(name))
    made, lengths = dots.numpy(), np.sqrt(squares.numpy())
    odd = np.flatnonzero(~((lengths > _SHORTEST) & (lengths < _LONGEST)))
    if odd.size:
        rows, sizes = _near_one(decode({key: held[torch.from_numpy(odd)] for key, held in tensors.items()}))
        dots, squares = _row_products(rows, directions)
        made[odd] = np.ldexp(dots.numpy(), sizes[:, None])
        lengths[odd] = np.ldexp(np.sqrt(squares.numpy()), sizes)
    made = np.ldexp(made, powers)
    if apart:
        rows, sizes = _near_one(decode(tensors))  # a block of entries with one scale may lie in two groups
        groups = (slice(begin, begin + width) for begin in range(0, rows.shape[1], width))
        parts = [row_products(rows[:, g], directions[:apart, g], threads=1)[0].numpy() for g in groups]
        back = sizes[:, None] + powers[:apart]
        made = np.concatenate(
            [made[:, :apart], *(np.ldexp(part, back) for part in parts), made[:, apart:]], axis=1
        )
    return made, lengths
