"""Repeats a module's call on the rows of one segment: a backward pass over all rows for each segment costs more."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..batch.segments import Segments
from ..model.precision import product_eps

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class Replay:
    """How to call the module again; its tensors are kept apart, so that autograd's hooks can pack them."""

    module: nn.Module
    segments: Segments
    leaves: list[Any]
    tree: Any
    places: list[int]  # where the tensors stand among the leaves

    @classmethod
    def of(
        cls, module: nn.Module, args: Any, kwargs: Any, segments: Segments
    ) -> tuple[Replay, list[torch.Tensor]] | None:
        """The replay of a call on the rows of one segment, and its tensors.

        None unless there are several segments, of whole rows; or where the call may do more than compute its result
        (fill a cache, count in a buffer), or has no tensor with the batch's rows.
        """
        bounds = [(begin, end) for begin, end in segments.bounds if begin < end]
        if len(bounds) < 2 or any(end % segments.length for _, end in bounds):
            return None
        if module.training and next(module.buffers(), None) is not None:
            return None
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if not all(isinstance(leaf, _PLAIN) for leaf in others):
            return None
        tensors = [leaves[i].detach() for i in places]
        if not any(_axis(t, segments) for t in tensors):
            return None
        kept = [None if i in places else leaf for i, leaf in enumerate(leaves)]
        return cls(module, segments, kept, tree, places), tensors

    def run(self, tensors: Sequence[torch.Tensor], begin: int, end: int) -> list[Any]:
        """The leaves of what the module gives for rows ``begin`` to ``end``."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = rows_of(tensor, _axis(tensor, self.segments), begin, end)
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        outputs: list[Any] = pytree.tree_flatten(self.module.forward(*args, **kwargs))[0]
        return outputs


Axis = tuple[int, int]  # which axis holds rows, and how many of its entries one row has


def _axis(x: torch.Tensor, segments: Segments) -> Axis | None:
    """The axis of ``x`` that holds the batch's rows; None: ``x`` is the same for all rows.

    A wrong guess is detected, because the results are compared.
    """
    if x.ndim and x.shape[0] == segments.batch:
        return 0, 1
    if x.ndim and x.shape[0] == segments.batch * segments.length:
        return 0, segments.length
    if x.shape[1:3] == (segments.batch, segments.length):
        return 1, 1
    return None


def view_axis(view: tuple[int, ...], segments: Segments) -> Axis:
    """The axis that holds the rows of an output, from its ``view`` (`Segments.token_views`)."""
    if view[0] == segments.batch * segments.length:
        return 0, segments.length
    return (1, 1) if view[0] == 1 != segments.batch else (0, 1)


def rows_of(x: torch.Tensor, axis: Axis | None, begin: int, end: int) -> torch.Tensor:
    return x if axis is None else x.narrow(axis[0], begin * axis[1], (end - begin) * axis[1])


@contextlib.contextmanager
def random_numbers(device: torch.device) -> Iterator[list[bool]]:
    """Afterwards torch's random numbers go on as before; the list says whether some were drawn inside."""

    def state() -> list[torch.Tensor]:
        on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *on_device]

    before, drawn = state(), list[bool]()
    try:
        yield drawn
    finally:
        if not all(map(torch.equal, before, state())):
            drawn.append(True)
            torch.set_rng_state(before[0])
            for one in before[1:]:
                torch.cuda.set_rng_state(one, device)


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two results are equal but for the order of sums, and what 16-bit numbers make of it: a few units in the
    last place."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    size = float(y.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if y.numel() else 0.0
    eps = product_eps(y)
    bound = max(4 * eps, min(2.0**7 * eps, 2.0**-16))
    return torch.allclose(x.detach(), y.detach(), rtol=bound, atol=bound * size, equal_nan=True)
