"""Segments of a batch that a trainer made: prompts in any order, rows of which a module sees the last columns alone.

`Segments` needs ids that do not decrease. A trainer shuffles the rows of its prompts, so every run of equal ids is a
segment here, and the sketches of a prompt's runs are added afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...adding import add_rows
from .inputs import check_tensors
from .segments import Segments, ids_on_host, sizes


@dataclasses.dataclass(frozen=True)
class RowSegments(Segments):
    """`Segments` of whole rows. A token's row says which segment it belongs to, so a module may also be called on
    [batch, n, features] with another n than the batch's length (the head, on the last columns).

    ``heads``: of a model that was given images, the names of the modules of which that holds: there may be as many
    images as rows, and several of one row. Empty: it holds of all modules.
    """

    heads: list[str] = dataclasses.field(default_factory=list, repr=False, compare=False)

    def tokens_first(
        self, x: torch.Tensor, where: str, heads_first: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        other = bool(self.heads) and where not in self.heads
        if x.ndim != 3 or x.shape[0] != self.batch or x.shape[1] == self.length or other:
            return super().tokens_first(x, where, heads_first)
        columns = x.shape[1]
        key = x.device, -columns  # `offsets_on` has the positive numbers
        if key not in self._copies:
            self._copies[key] = self.offsets_on(x.device) // self.length * columns
        return x.reshape(-1, x.shape[-1]), self._copies[key]


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of equal ids in a batch, each a segment of ``segments``; ``owner`` int64 [runs] is the id of each.

    ``count`` is the number of ids, ``rows`` whether they were given per row.
    """

    segments: Segments
    owner: torch.Tensor
    count: int
    rows: bool

    @property
    def present(self) -> int:
        """Different ids in the batch."""
        return len(self.owner.unique())

    @property
    def visited(self) -> torch.Tensor:
        """bool [count]: whether the batch has the id."""
        made = torch.zeros(self.count, dtype=torch.bool, device="cpu")
        made[self.owner] = True
        return made

    @classmethod
    def of(cls, ids: torch.Tensor, shape: Sequence[int] | None, count: int | None) -> Runs:
        """From ids per row [batch] with ``shape`` (see `sizes`), or per token [batch, length]; in any order, all >= 0.

        Raises:
            ValueError: no tensor of such ids; names what is wrong.
        """
        check_tensors(segments=ids)
        batch, length = sizes(ids, shape)
        flat = ids_on_host(ids, batch, length).reshape(-1)
        if flat.numel() == 0 or length < 1:
            raise ValueError("segments is empty: a batch has at least one row")
        if int(flat.min()) < 0:
            raise ValueError(f"segments holds {int(flat.min())}: ids are 0 or more")
        highest = int(flat.max()) + 1
        count = highest if count is None else count
        if count < highest:
            raise ValueError(f"num_segments={count} but segments holds id {highest - 1}")
        owner, tokens = torch.unique_consecutive(flat, return_counts=True)
        offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
        rows = ids.ndim == 1
        kind = RowSegments if rows else Segments
        return cls(kind(batch, length, offsets * length if rows else offsets), owner, count, rows)

    def only_heads(self, names: list[str]) -> None:
        """The batch has images: of whole rows, only these modules may see other columns."""
        if isinstance(self.segments, RowSegments):
            self.segments.heads[:] = names or [""]

    def gathered(self, sketches: torch.Tensor) -> torch.Tensor:
        """The sketches [runs, dim] added up by id: [count, dim], in a fixed order."""
        if torch.equal(self.owner, torch.arange(self.count, device="cpu")):
            return sketches
        owner = self.owner.to(sketches.device)
        out = torch.zeros(self.count, sketches.shape[1], dtype=sketches.dtype, device=sketches.device)
        return add_rows(out, owner, sketches)
