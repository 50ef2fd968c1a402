"""More sketches of one pass: taps of other specs beside a sketcher's own, each with its own folded inputs and sums.

Each takes some 5 % of a pass (SmolLM2-135M on a CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..spec import SketchSpec
from .accumulator import Accumulator
from .attach import Attachment, plan_model
from .segments import Segments


class Sums(NamedTuple):
    """The taps of one spec, and the sums to which they add."""

    plan: Attachment
    acc: Accumulator


class More:
    """The sums of other specs of the same parameters.

    Args:
        model: its parameters are not frozen yet.
        specs: of the sketches.
        exclude: as of the sketcher.

    Raises:
        ValueError: a model that is spread over ranks, whose ranks add up one sketch.
    """

    def __init__(self, model: nn.Module, specs: Sequence[SketchSpec], exclude: Sequence[str] | str) -> None:
        self.sums: list[Sums] = []
        for spec in specs:
            acc = Accumulator(spec)
            self.sums.append(Sums(plan_model(model, spec, acc, exclude), acc))
        if any(one.plan.ranks is not None for one in self.sums):
            raise ValueError("more: the model is spread over ranks, which add up one sketch: give no more")

    def check(self, plan: Attachment) -> None:
        """Check that the sketcher's own taps are those that were planned for the other specs too.

        Raises:
            ValueError: parameters whose gradients have to be formed, which is done for one sketch.
        """
        if self.sums and plan.exact.parameters:
            name = plan.exact.parameters[0].name
            raise ValueError(
                f"more: the gradient of {name} is formed, for one sketch: give no more, or exclude it"
            )

    def begin(self, segments: Segments, device: torch.device) -> None:
        """Open a batch."""
        for one in self.sums:
            one.acc.begin(segments, device)

    @property
    def outs(self) -> list[torch.Tensor]:
        """The sums of the open batch, [segments, base_dim] each."""
        return [one.acc.out for one in self.sums]

    def end(self) -> tuple[torch.Tensor, ...]:
        """The sketches of the batch."""
        return tuple(one.acc.end() for one in self.sums)

    def close(self) -> None:
        """Free the batch, whether it has finished or failed."""
        for one in self.sums:
            one.acc.close()
