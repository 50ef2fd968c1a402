"""Which segment each token of a batch belongs to, seen from any module in the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from ..._spec_base import as_int


class NotTokensError(ValueError):
    """A tensor does not hold every token of the batch once."""


def sizes(segments: torch.Tensor, shape: Sequence[int] | None) -> tuple[int, int]:
    """Rows of a batch, and tokens of a row: 1 where ``shape`` has the rows alone.

    Raises:
        ValueError: ``shape`` is not given and needed, or is none.
    """
    if shape is None and segments.ndim != 2:
        raise ValueError(
            f"segments has shape {tuple(segments.shape)}: give ids per token, or shape=(batch, length), or "
            "shape=(batch,) where rows are examples of another kind, such as images"
        )
    given = shape if isinstance(shape, Sequence) else segments.shape if shape is None else ()
    found = [as_int(n, 0) for n in given]
    whole = [n for n in found if n is not None]
    if len(given) not in (1, 2) or len(whole) < len(found):
        raise ValueError(f"shape={shape!r}: give (batch, length), or (batch,) where rows are no tokens")
    return whole[0], whole[1] if len(whole) == 2 else 1


def ids_on_host(segments: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Ids per row [batch] or per token [batch, length], int64 on the CPU.

    Raises:
        ValueError: wrong dtype or shape.
    """
    if segments.dtype not in (torch.int64, torch.int32) or segments.shape not in ((batch,), (batch, length)):
        raise ValueError(
            f"segments is {segments.dtype} {tuple(segments.shape)}: give int64 ids per row [{batch}] or per token "
            f"[{batch}, {length}]"
        )
    return segments.to("cpu", torch.int64)


@dataclasses.dataclass(frozen=True)
class Segments:
    """Tokens [batch, length] in flattened order; ``offsets`` [segments + 1] cuts them into segments.

    ``offsets`` is on the CPU, where it is checked; taps of a model on a GPU get a copy there, made once per batch.
    """

    batch: int
    length: int
    offsets: torch.Tensor
    _copies: dict[tuple[torch.device, int], torch.Tensor] = dataclasses.field(
        default_factory=dict, compare=False
    )
    # The segments of a rank's part of the tokens (sequence parallel), by the key of `parts.window`.
    windows: dict[object, Segments] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, segments: torch.Tensor, batch: int, length: int, n_segments: int | None) -> Segments:
        """From segment ids per row [batch] or per token [batch, length], non-decreasing in flattened order.

        Raises:
            ValueError: wrong dtype or shape, ids that decrease or are out of range.
        """
        ids = ids_on_host(segments, batch, length).numpy().reshape(-1)
        if ids.size and (ids[0] < 0 or (ids[1:] < ids[:-1]).any()):
            raise ValueError("segments must be >= 0 and must not decrease: sort the batch's rows by prompt")
        highest = int(ids[-1]) + 1 if ids.size else 0
        if n_segments is None and highest > batch * length:
            raise ValueError(
                f"segments holds id {highest - 1}, and the batch {batch} x {length} tokens: number its prompts 0, 1, "
                "... (torch.unique(ids, return_inverse=True)[1]), or give num_segments for a row of every id"
            )
        if n_segments is None:
            n_segments = highest
        if n_segments < highest:
            raise ValueError(f"num_segments={n_segments} but segments holds id {highest - 1}")
        offsets = np.searchsorted(ids, np.arange(n_segments + 1))
        if segments.ndim == 1:
            offsets = offsets * length
        return cls(batch, length, torch.from_numpy(offsets))

    @property
    def count(self) -> int:
        return self.offsets.numel() - 1

    def heads_first(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is [batch, heads, length, n] (after a transpose) rather than [batch, length, heads, n].

        With as many heads as tokens only the strides tell. A gradient may have other strides than its tensor, so this
        is asked once per module call, of the input.
        """
        # Sizes are compared one by one, and the result is a constant. Where a graph is traced with dynamic shapes, no
        # number is found in a tuple of sizes, and a comparison is no index.
        if x.ndim == 4 and x.shape[0] == self.batch and x.shape[2] == self.length:
            if x.shape[1] != self.length or x.stride(1) < x.stride(2):
                return True
        return False

    def tokens_first(
        self, x: torch.Tensor, where: str, heads_first: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` as [tokens * repeats, n] with its offsets; repeats > 1 where a module sees every head apart."""
        if x.ndim == 3 and x.shape[0] == self.batch and x.shape[1] == self.length:  # nearly every call
            return x.reshape(-1, x.shape[-1]), self.offsets_on(x.device, 1)
        if heads_first:
            x = x.transpose(1, 2)
        # Axes of length 1 do not matter; behind [batch, length] or [tokens] only an axis of heads may follow.
        axes = _not_one(*x.shape[:-1])
        leads = _not_one(self.batch, self.length), _not_one(self.batch * self.length)
        heads = next((axes[len(lead) :] for lead in leads if axes[: len(lead)] == lead), None)
        # Where rows are examples of another kind, all that a module sees of one is its row's.
        if heads is None or len(heads) > 1 and self.length > 1:
            whole = ""
            if self.length > 1:
                whole = f", or where segments are whole rows, batch(..., shape=({self.batch},))"
            raise NotTokensError(
                f"{where} saw an input of shape {tuple(x.shape)} in a batch of {self.batch} x {self.length} tokens: "
                f"it does not see every token once; exclude its parameters{whole}"
            )
        repeats = math.prod(heads)
        return x.reshape(-1, x.shape[-1]), self.offsets_on(x.device, repeats)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and last (exclusive) token of every segment."""
        return list(pairwise(self.offsets.tolist()))

    def token_views(self, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes in which a mask [batch, length] can be broadcast to ``x``, by the meaning of ``x``'s axes.

        Empty: ``x`` does not hold every token once. More than one: the sizes do not tell (as many heads as rows).
        """
        shape, tokens = tuple(x.shape), (self.batch, self.length)
        views: dict[str, tuple[int, ...]] = {}
        if shape[:2] == tokens:
            views["batch, length, ..."] = (*tokens, *(1 for _ in shape[2:]))
        if shape[:1] == (self.batch * self.length,) and not views:
            views["tokens, ..."] = (self.batch * self.length, *(1 for _ in shape[1:]))
        if shape[1:3] == tokens:
            views["copies, batch, length, ..."] = (1, *tokens, *(1 for _ in shape[3:]))
        if len(shape) == 4 and (shape[0], shape[2]) == tokens:
            views["batch, heads, length, n"] = (self.batch, 1, self.length, 1)
        return views

    def convolved_view(self, x: torch.Tensor, padding: object) -> dict[str, tuple[int, ...]]:
        """The same for the output [batch, channels, length] of a convolution over the tokens.

        A causal one that pads both ends has ``padding`` more columns at the end.
        """
        more = (0, *padding[:1]) if isinstance(padding, tuple) else (0,)
        fits = x.ndim == 3 and x.shape[0] == self.batch and x.shape[2] - self.length in more
        return {"batch, channels, length": (self.batch, 1, self.length)} if fits else {}

    def only(self, segment: int, x: torch.Tensor, view: tuple[int, ...]) -> torch.Tensor:
        """``x`` with zeros for the tokens of all other segments; ``view``: one of `token_views`."""
        begin, end = self.bounds[segment]
        mine = torch.zeros(self.batch * self.length, dtype=torch.bool, device=x.device)
        mine[begin:end] = True
        mine = mine.view(view)
        if x.shape[-1] > self.length == mine.shape[-1] > 1:  # a convolution's padding belongs to no token
            mine = torch.nn.functional.pad(mine, (0, x.shape[-1] - self.length))
        return torch.where(mine, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def ranges_of(self, expert: torch.Tensor, token: torch.Tensor, n_experts: int) -> torch.Tensor:
        """Offsets [experts * segments + 1] of rows that are sorted by (expert, token), for `sketch_grouped`."""
        offsets = self.offsets_on(token.device)
        segment = torch.searchsorted(offsets, token, right=True) - 1
        keys = torch.arange(n_experts * self.count + 1, device=token.device)
        return torch.searchsorted(expert * self.count + segment, keys)

    def offsets_on(self, device: torch.device, repeats: int = 1) -> torch.Tensor:
        """``offsets * repeats`` on a device."""
        if device.type == "cpu" and repeats == 1:
            return self.offsets
        if (device, repeats) not in self._copies:
            # Not from the host where a copy is there already: the host would wait for the device.
            made = self.offsets.to(device) if repeats == 1 else self.offsets_on(device) * repeats
            self._copies[device, repeats] = made
        return self._copies[device, repeats]

    def keep(self, copy: torch.Tensor) -> None:
        """``offsets`` on another device, for `offsets_on`."""
        self._copies[copy.device, 1] = copy


def _not_one(*sizes: int) -> tuple[int, ...]:
    return tuple(size for size in sizes if size != 1)
