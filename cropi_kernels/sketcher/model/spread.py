"""Tensors that are spread over ranks (DTensors): which part of them is on this rank, and where it lies in the whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

Range = tuple[int, int]


def is_spread(x: object) -> bool:
    """Whether ``x`` is a DTensor."""
    return hasattr(x, "device_mesh") and hasattr(x, "placements")


def local(x: Any) -> Any:
    """This rank's numbers of a tensor."""
    return x.to_local() if is_spread(x) else x


def settled(gradient: Any, p: torch.Tensor) -> Any:
    """This rank's part of a gradient of ``p``, which autograd may give in another layout than that of ``p``."""
    if not is_spread(gradient):
        return gradient
    if is_spread(p) and gradient.placements != p.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=p.placements)  # type: ignore[attr-defined]
    return gradient.to_local()


@dataclasses.dataclass(frozen=True)
class Share:
    """This rank's part of a parameter of shape ``shape``: ``ranges`` of axis ``axis``, one behind the other.

    ``axis`` None: all of it. ``adds``: whether this rank adds what it has of such a gradient.
    """

    shape: tuple[int, ...]
    axis: int | None = None
    ranges: tuple[Range, ...] = ()
    adds: bool = True

    @property
    def size(self) -> int:
        """How many rows or columns of the axis are on this rank."""
        return sum(end - begin for begin, end in self.ranges)

    def part(self, x: torch.Tensor, axis: int) -> torch.Tensor | None:
        """This rank's part of ``x``, whose ``axis`` is whole or already cut; None: it is neither."""
        assert self.axis is not None
        if x.shape[axis] == self.size:
            return x
        return self.cut(x, axis) if x.shape[axis] == self.shape[self.axis] else None

    def cut(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """This rank's part of ``x``, which is whole along ``axis``."""
        pieces = [x.narrow(axis, begin, end - begin) for begin, end in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def placed(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """``x``, this rank's part along ``axis``, at its place in zeros of the whole's size."""
        assert self.axis is not None
        shape = list(x.shape)
        shape[axis] = self.shape[self.axis]
        out, at = x.new_zeros(shape), 0
        for begin, end in self.ranges:
            out.narrow(axis, begin, end - begin).copy_(x.narrow(axis, at, end - begin))
            at += end - begin
        return out

    def whole(self, here: torch.Tensor) -> torch.Tensor | None:
        """What this rank adds of its part of a gradient, in the whole's shape; None: nothing."""
        if self.axis is not None:
            return self.placed(here, self.axis)
        return here if self.adds else None


def like_spread(x: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """``x`` as this rank's part of a tensor that is spread like ``spread``; ``x`` itself if that is not spread."""
    if not is_spread(spread):
        return x
    from torch.distributed.tensor import DTensor

    made: torch.Tensor = DTensor.from_local(
        x,
        spread.device_mesh,  # type: ignore[attr-defined]
        spread.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=spread.shape,
        stride=spread.stride(),
    )
    return made


def laid_like(x: torch.Tensor, spread: Any) -> torch.Tensor:
    """``x``, whole on every rank, in the layout of ``spread``."""
    if not is_spread(spread):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    whole = DTensor.from_local(x, spread.device_mesh, [Replicate()], run_check=False)
    laid: torch.Tensor = whole.redistribute(placements=spread.placements)
    return laid


def ranges_of(size: int, ranks: int, rank: int, factor: int = 1) -> tuple[Range, ...]:
    """The ranges of ``size`` numbers that torch's ``Shard`` gives to a rank: shares rounded up, the last ones smaller.

    ``factor`` > 1: a share of each of so many equal parts, as ``_StridedShard`` gives.
    """
    ranges = []
    for first in range(0, size, max(1, size // factor)):
        length = min(size // factor, size - first)
        step = -(-length // ranks)
        begin, end = min(rank * step, length), min((rank + 1) * step, length)
        if begin < end:
            ranges.append((first + begin, first + end))
    return tuple(ranges)
