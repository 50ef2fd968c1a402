"""Positions that are looked up once for all rows of a batch (GPT-2): their gradient, row by row.

Autograd sums the gradient of [1, length, n] over the rows that it was broadcast to, and with them over the segments. So
it is widened to all rows, but only where the model itself broadcasts it: elsewhere (one row taken out, a table of
relative positions) other code may count on its shape, and its gradient does not belong to the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

_SUMS = frozenset({"add", "sub", "mul", "div", "true_divide", "rsub"})
_OPERATORS = frozenset(f"__{side}{name}__" for side in ("", "r") for name in ("add", "sub", "mul", "truediv"))
_IN_PLACE = frozenset({"add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__"})
_ELEMENTWISE = _SUMS | _OPERATORS
_COPIES = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"})


class OneRow(torch.Tensor):
    """A tensor [1, length, n] that becomes [rows, length, n] where it is combined with a tensor of so many rows.

    Copies of it and products with numbers are such tensors too; every other function gets the plain tensor.
    """

    rows: int
    wide: Callable[[], torch.Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        mine = [a for a in args if isinstance(a, OneRow)]
        with torch._C.DisableTorchFunctionSubclass():
            if len(mine) == 1 and _shape_of(name, args) == (mine[0].rows, *mine[0].shape[1:]):
                return func(*(mine[0].wide() if a is mine[0] else a for a in args), **kwargs)
            plain_args, plain_kwargs = pytree.tree_map(_plain, (args, kwargs))
            result = func(*plain_args, **plain_kwargs)
            if len(mine) != 1 or name not in _ELEMENTWISE | _COPIES or not isinstance(result, torch.Tensor):
                return result
            (row,) = mine
            if result.shape != row.shape:
                return result

            def wide() -> torch.Tensor:
                out: torch.Tensor = func(*(row.wide() if a is row else a for a in args), **kwargs)
                return out

            return one_row(result, row.rows, wide)


def one_row(y: torch.Tensor, rows: int, wide: Callable[[], torch.Tensor]) -> torch.Tensor:
    """``y`` [1, length, n] as a `OneRow`; ``wide()`` is what takes its place where it is broadcast."""
    row = y.as_subclass(OneRow)
    row.rows, row.wide = rows, wide
    return row


def widened(y: torch.Tensor, rows: int) -> torch.Tensor:
    """``y`` [1, length, n] for all rows; if another tap has made it a `OneRow`, what that tap gives."""
    return y.wide() if isinstance(y, OneRow) else y.expand(rows, -1, -1)


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, OneRow) else value


def _shape_of(name: str, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The shape that a call broadcasts to; None: the call does not broadcast."""
    if name in _ELEMENTWISE | _IN_PLACE:
        return tuple(torch.broadcast_shapes(*(a.shape for a in args if isinstance(a, torch.Tensor))))
    if name == "expand_as":
        return tuple(args[1].shape)
    if name == "expand":
        sizes = args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:]
        if len(sizes) == 3:
            return tuple(n if size == -1 else size for size, n in zip(sizes, args[0].shape))
    return None
