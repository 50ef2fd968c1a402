"""Collects for the self-test the sketch that each tap adds, and the size of the terms that rounding is a part of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from ..batch.segments import Segments
from ..model.precision import unit_roundoff
from ..sums.accumulator import Accumulator
from ..taps.exact import Exact
from ..taps.taps import NormTap, Tap

PROJECTED = 2048  # numbers that a sketch is summed down to, with signs: they are kept for every parameter

Source = Tap | Exact  # either may add to the sketches


class Listener:
    """Takes what each tap adds out of the accumulator's sketches, call by call."""

    def __init__(self, acc: Accumulator) -> None:
        self.acc = acc
        self.sums: dict[Source, torch.Tensor] = {}  # [segments, numbers]
        self.size: dict[Source, float] = {}  # sum over calls of |dy| |a|
        self.unit: dict[Source, float] = {}  # the coarsest unit roundoff of what went in
        self.calls: dict[Source, int] = {}
        self.outputs: list[torch.Tensor] = []
        self.called: dict[Source, None] = {}  # taps of modules that ran on numbers that have a gradient

    def attached(self, tap: Source, y: torch.Tensor) -> None:
        """``tap`` will be attached to a module's output ``y`` next."""
        if y.requires_grad:
            self.outputs.append(y)
            self.called[tap] = None

    def added(
        self,
        tap: Source,
        dy: torch.Tensor,
        kept: torch.Tensor | None,
        coarse: float = 0.0,
        rows: slice = slice(None),
    ) -> None:
        """``tap`` has added to the sketches what it had kept in forward, with the output's gradient ``dy``. Of a formed
        gradient ``dy``, ``coarse`` is the unit roundoff of what it was formed of; ``rows``: the segments to whose
        sketches it was added."""
        took = self._take(self.acc.out[rows], rows)
        if tap not in self.sums:
            self.sums[tap] = took.new_zeros(len(self.acc.out), took.shape[1])
        self.sums[tap][rows] += took
        d = dy.detach()
        terms = (d.numel() / max(1, d.shape[-1] if d.ndim else 1)) ** 0.5
        unit = unit_roundoff(d)
        if isinstance(tap, Exact):  # autograd formed the gradient, of sums that are not known here
            terms = max(terms, 16.0)
            # The operands have 16 bits, as under autocast, and their sums 32.
            unit = max(unit, coarse / terms)
        if kept is not None and kept.is_floating_point():
            unit = max(unit, unit_roundoff(kept))
            # A norm's input is normalised: its rows have norm sqrt(n).
            of_norm = isinstance(tap, NormTap)
            terms = kept.numel() ** 0.5 if of_norm else max(terms, _uses(d, kept) * norm(kept))
        self.size[tap] = self.size.get(tap, 0.0) + norm(d) * terms
        self.unit[tap] = max(self.unit.get(tap, 0.0), unit)
        self.calls[tap] = self.calls.get(tap, 0) + 1

    def _take(self, added: torch.Tensor, rows: slice) -> torch.Tensor:
        """What was ``added`` to the sketches of some segments, projected; the sketches are zero again."""
        took = projected(added)
        added.zero_()
        return took

    @contextlib.contextmanager
    def batch(self, segments: Segments, device: torch.device) -> Iterator[None]:
        self.acc.begin(segments, device)
        self.acc.listener = self
        try:
            yield
        finally:
            self.acc.listener = None
            self.acc.close()


def _uses(dy: torch.Tensor, kept: torch.Tensor) -> float:
    """The square root of how many rows of ``dy`` each row of ``kept`` meets: one for every expert of a token."""
    rows = dy.numel() / max(1, dy.shape[-1]), kept.numel() / max(1, kept.shape[-1])
    return float(max(1.0, rows[0] / max(1.0, rows[1])) ** 0.5)


def projected(out: torch.Tensor) -> torch.Tensor:
    """Sketches [segments, dim] summed with fixed signs to at most `PROJECTED` numbers, on the CPU in float64."""
    dim = out.shape[-1]
    width = min(PROJECTED, dim)
    wide = out.detach().to("cpu", torch.float64) * _signs(dim)
    return wide.view(*out.shape[:-1], dim // width, width).sum(-2)


@functools.lru_cache(maxsize=1)
def _signs(dim: int) -> torch.Tensor:
    generator = torch.Generator(device="cpu").manual_seed(dim)
    return torch.randint(0, 2, (dim,), generator=generator, device="cpu", dtype=torch.float64) * 2 - 1


def norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)))
