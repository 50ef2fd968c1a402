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

from cropi.store.codec import PACKED
from cropi.store.rows import RowInfo
from cropi.store.shards import Block
from cropi.store.store import SketchStore
from cropi_kernels import row_products

_MOST_THREADS = 8  # more of them wait for memory


def products(
    store: SketchStore, directions: torch.Tensor
) -> Iterator[tuple[list[RowInfo], np.ndarray, np.ndarray]]:
    """Block by block: rows with a sketch ``x``, float64 ``<x, d>`` ``[n, directions]`` and lengths ``|x|`` ``[n]``.

    Errors are at most ``70 * 2^-24 sum_i |x_i d_i|``: below 5e-6 in a cosine, and near 1e-8 as a rule.

    Args:
        store: where the sketches are.
        directions: ``[directions, dim]``; taken as float32.

    Raises:
        CropiError: a shard is damaged or gone.
    """
    wanted = directions.detach().to("cpu", torch.float32).contiguous()
    count = max(1, min(torch.get_num_threads(), _MOST_THREADS))
    own = threading.local()

    def multiply(block: Block) -> tuple[np.ndarray, np.ndarray]:
        buffer = getattr(own, "buffer", None)
        if buffer is None or len(buffer) < block.size:
            own.buffer = buffer = torch.empty(block.size, dtype=torch.uint8)
        return _multiply(block.read(buffer), wanted)

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
) -> tuple[list[RowInfo], np.ndarray, np.ndarray]:
    """All rows in order of id, what ``values`` makes of products and lengths, float64 ``[rows, columns]``, and the
    products with the last ``last`` directions, float32 ``[rows, last]``; NaN for prompts without a sketch."""
    rows = store.rows()
    places = _places(store, rows)
    table = np.full((len(rows), columns), np.nan)
    kept = np.full((len(rows), last), np.nan, np.float32)
    begin = 0
    for some, dots, lengths in products(store, directions):
        here = places[begin : begin + len(some)]
        table[here] = values(dots, lengths)
        if last:
            kept[here] = dots[:, -last:]
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


def _multiply(tensors: Mapping[str, torch.Tensor], directions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    name = next(name for name in tensors if name != "scale")
    # One thread: this is one of several, and those of OpenMP spin while they wait.
    dots, squares = row_products(
        tensors[name], directions, tensors.get("scale"), bits=PACKED.get(name), threads=1
    )
    return dots.numpy(), np.sqrt(squares.numpy())
