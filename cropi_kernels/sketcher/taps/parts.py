"""Sketches and taps of parameters of which this rank has a part (tensor parallel)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from ...ops.norm_grad import bias_grad, norm_grad
from ...ops.sketch_grouped import sketch_grouped
from ...plan import VectorPlan
from ..batch.segments import NotTokensError, Segments
from ..model.hooks import Sink, capture
from ..model.spread import Share, is_spread, local
from ..sums.engine import Operators, Site
from ..sums.matrix import MatrixSketch
from .taps import EmbeddingTap, LinearTap, NormTap, Tap


class PartMatrix(MatrixSketch):
    """The sketch of this rank's rows, or columns, of a matrix, at their places in the whole matrix.

    Output gradients and inputs may be whole or already cut. What is not this rank's is left out, so that every rank
    adds its own part of the gradient once.
    """

    def __init__(self, whole: MatrixSketch, share: Share, splits_rows: bool) -> None:
        super().__init__(whole.spec, whole.name, whole.rows, whole.cols, whole.role)
        assert share.axis is not None
        self.matrix, self.share, self.splits_rows = whole, share, splits_rows

    @property
    def fold_key(self) -> str | None:
        return self.matrix.fold_key if self.splits_rows else None

    def fold(self, a: torch.Tensor) -> torch.Tensor:
        if self.splits_rows:
            return self.matrix.fold(a)
        here = self._here(a, "input")
        if self.matrix.fold_key is None:  # kept until backward as it is: without the zeros it is smaller
            return here
        return self.matrix.fold(self.share.placed(here, 1))

    def add(self, d: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        plan = self.matrix.plan
        if not self.splits_rows:
            self.matrix.add(d, self._inputs(kept), offsets, out)
        elif plan is None or plan.row_fold is not None:
            self.matrix.add(self.share.placed(self._here(d, "output"), 1), kept, offsets, out)
        else:  # a stack of one matrix
            self.add_grouped(d, kept, offsets, out)

    def add_grouped(
        self, d: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `MatrixSketch.add_grouped`; ``share`` cuts the rows, or columns, of every matrix alike."""
        plan = self.matrix.plan
        assert plan is not None
        if not self.splits_rows:
            sketch_grouped(d, self._inputs(kept), ranges, plan, out)
            return
        d, at = self._here(d, "output"), 0
        rows = self.share.shape[self.share.axis or 0]
        for begin, end in self.share.ranges:
            columns = d[:, at : at + end - begin]
            sketch_grouped(columns, kept, ranges, plan, out, first_row=begin, row_step=rows)
            at += end - begin

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        if self.splits_rows:
            here = torch.zeros_like(rows, dtype=torch.bool)
            for begin, end in self.share.ranges:
                here |= (rows >= begin) & (rows < end)
            # Zeros, because removing tokens would change the offsets of the segments.
            self.matrix.add_rows(torch.where(here[:, None], x, 0), rows, offsets, out)
        else:
            self.matrix.add_rows(self.share.placed(self._here(x, "output"), 1), rows, offsets, out)

    def add_formed(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        # The gradient has the shape of the whole parameter (`Tap.whole`).
        self.matrix.add_formed(gradient, out)

    def _inputs(self, kept: torch.Tensor) -> torch.Tensor:
        """What `fold` kept of inputs that are split, at its place in the whole."""
        return kept if self.matrix.fold_key is not None else self.share.placed(kept, 1)

    def _here(self, x: torch.Tensor, what: str) -> torch.Tensor:
        part = self.share.part(x, 1)
        if part is None:
            raise NotTokensError(
                f"{self.name}: an {what} has {x.shape[1]} features where the whole has "
                f"{self.share.shape[self.share.axis or 0]} and this rank {self.share.size}: exclude it"
            )
        return part


@dataclasses.dataclass(frozen=True)
class Call:
    """How the tensors of one call of a module are spread over ranks.

    Attributes:
        engine: of the tokens that are on this rank.
        placement: the layout that the output's gradient is brought into; None: it is a plain tensor.
        adds: whether this rank adds the gradients of parameters that all ranks have.
    """

    engine: Operators
    placement: Any
    adds: bool

    def gradient(self, dy: torch.Tensor) -> torch.Tensor:
        if not is_spread(dy):
            return dy
        return local(dy.redistribute(placements=[self.placement]))  # type: ignore[attr-defined]


class PartTap(Tap):
    """A tap of a module whose inputs and outputs may be spread over ranks: before another class of taps, which takes
    the other arguments.

    ``shares`` of its parameters by their names in the module.
    """

    def __init__(self, *args: Any, shares: dict[str, Share]) -> None:
        super().__init__(*args)
        self.shares = shares

    @property
    def splits(self) -> Share | None:
        """How the weight is split (the bias, where only that is sketched); None: it is not split."""
        share = self.shares.get("weight", self.shares.get("bias"))
        return share if share is not None and share.axis is not None else None

    def call(self, y: torch.Tensor, site: Site) -> Call:
        """How the call with the output ``y`` is spread.

        Where every rank has tokens (or heads) of its own, all ranks add their gradients.
        """
        segments = self.acc.segments
        assert segments is not None
        adds = all(share.adds for share in self.shares.values())
        if not is_spread(y):
            return Call(self.acc.engine, None, adds)
        from torch.distributed.tensor import Replicate, Shard

        (placement,) = y.placements  # type: ignore[attr-defined]
        last = y.ndim - 1
        if self.splits is not None and self.splits_outputs:
            return Call(self.acc.engine, Shard(last), adds)
        if self.splits is not None or not placement.is_shard() or placement.dim % y.ndim == last:
            return Call(self.acc.engine, Replicate(), adds)
        axis = placement.dim % y.ndim
        here = window(segments, y, axis, site.heads_first)
        engine = self.acc.engine if here is segments else Operators(here, self.acc.out)
        return Call(engine, Shard(axis), True)

    @property
    def splits_outputs(self) -> bool:
        """Whether the weight is split along its outputs."""
        return False

    def input(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """The part of the module's input that this rank's gradient needs, as a plain tensor."""
        if not is_spread(x):
            return x
        from torch.distributed.tensor import Replicate, Shard

        cut = Shard(x.ndim - 1) if self.splits is not None and not self.splits_outputs else Replicate()
        if self.splits is None and call.placement is not None and call.placement.is_shard():
            cut = call.placement
        return local(x.detach().redistribute(placements=[cut]))  # type: ignore[attr-defined]

    def sink_of(self, call: Call, site: Site) -> Sink:
        inner = self.within(functools.partial(self.add_part, call, site))
        return lambda dy, *kept: inner(call.gradient(dy), *kept)

    def add_part(self, call: Call, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        raise NotImplementedError

    def vector(self, which: str, gradients: torch.Tensor, plan: VectorPlan, call: Call) -> None:
        """Add gradients [segments, n] of a vector, whole or this rank's part."""
        share = self.shares[which]
        if share.axis is not None:
            part = share.part(gradients, 1)
            assert part is not None
            call.engine.add_vector(share.placed(part, 1), plan)
        elif call.adds:
            call.engine.add_vector(gradients, plan)

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        return self.shares[name].whole(gradient)


class PartLinearTap(PartTap, LinearTap):
    """A linear layer of which this rank has some outputs, some inputs, or all."""

    @property
    def splits_outputs(self) -> bool:
        return self.splits is not None and (self.splits.axis == 0) != self.turned

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        call, matrix = self.call(y, site), self.matrix
        if matrix is None:
            return capture(y, self.sink_of(call, site))
        with self.acc.timed():
            key = matrix.fold_key if not is_spread(x) else None
            kept = self.acc.folded(key, x, lambda: call.engine.fold(self.input(x, call), matrix, site))
        return capture(y, self.sink_of(call, site), kept)

    def add_part(self, call: Call, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        if (
            self.matrix is not None
            and kept is not None
            and (self.shares["weight"].axis is not None or call.adds)
        ):
            call.engine.add_linear(dy, kept, self.matrix, site)
        if self.bias is not None:
            d, offsets = call.engine.rows(dy, site)
            self.vector("bias", bias_grad(d, offsets), self.bias, call)


class PartEmbeddingTap(PartTap, EmbeddingTap):
    """An embedding of which this rank has some words, or some features of all."""

    @property
    def splits_outputs(self) -> bool:
        return self.shares["weight"].axis == 1

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        if not is_spread(y):
            return super().attach(x, y, site)
        from torch.distributed.tensor import Replicate

        call = self.call(y, self._sites[0])
        ids = local(x.redistribute(placements=[Replicate()])) if is_spread(x) else x  # type: ignore[attr-defined]
        return capture(y, self.sink_of(call, site), ids)

    def add_part(self, call: Call, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        EmbeddingTap.backward(self, site, dy, kept)


class PartNormTap(PartTap, NormTap):
    """A norm that all ranks have, of tokens or heads that may be this rank's alone."""

    def attach(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        call = self.call(y, site)
        if self.norm.weight is None:
            return capture(y, self.sink_of(call, site))
        return capture(y, self.sink_of(call, site), self.input(x, call).detach())

    def add_part(self, call: Call, site: Site, dy: torch.Tensor, kept: torch.Tensor | None = None) -> None:
        norm, (d, offsets) = self.norm, call.engine.rows(dy, site)
        sums: tuple[torch.Tensor | None, torch.Tensor | None]
        if kept is None:
            sums = None, bias_grad(d, offsets)
        else:
            x = call.engine.rows(kept, site)[0]
            sums = norm_grad(x, d, offsets, norm.eps, centered=norm.centered, with_bias=norm.bias is not None)
        for which, plan, gradient in zip(("weight", "bias"), (norm.weight, norm.bias), sums, strict=True):
            if plan is not None and gradient is not None:
                self.vector(which, gradient, plan, call)


def window(segments: Segments, y: torch.Tensor, axis: int, heads_first: bool) -> Segments:
    """The segments of this rank's tokens of ``y``, whose ``axis`` is split; all tokens, if that is an axis of heads."""
    shape, key = tuple(y.shape), ("window", tuple(y.shape), axis, heads_first)
    known: dict[Any, Segments] = segments.windows
    if key in known:
        return known[key]
    batch, length = segments.batch, segments.length
    ids = torch.arange(segments.count, device="cpu").repeat_interleave(
        segments.offsets.diff(), output_size=batch * length
    )
    token_axis = 2 if heads_first else 1
    grid = None
    if shape[0] == batch and shape[min(token_axis, len(shape) - 1)] == length:
        grid, cut = ids.view(batch, length), {0: 0, token_axis: 1}.get(axis)
    elif shape[0] == batch * length:
        grid, cut = ids.view(1, -1), 1 if axis == 0 else None
    if grid is None:
        raise NotTokensError(
            f"an output of shape {shape} does not hold the {batch} x {length} tokens of the batch once"
        )
    here = segments
    if cut is not None:
        mesh = y.device_mesh  # type: ignore[attr-defined]
        step = -(-grid.shape[cut] // mesh.size())
        begin = min(mesh.get_local_rank() * step, grid.shape[cut])
        mine = grid.narrow(cut, begin, min(step, grid.shape[cut] - begin))
        here = Segments.of(mine, mine.shape[0], mine.shape[1], segments.count)
    known[key] = here
    return here
