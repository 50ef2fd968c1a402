"""More sketches of one pass: taps of other specs beside a sketcher's own, each with its own folded inputs and sums.

Each takes some 5 % of a pass (SmolLM2-135M on a CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..spec import SketchSpec
from .accumulator import Accumulator
from .attach import Attachment, plan_model
from .segments import Segments


class More:
    """The sums of other specs of the same parameters.

    Args:
        model: its parameters are not frozen yet.
        specs: of the sketches.
        exclude: as of the sketcher.

    Attributes:
        plans: the taps of each spec.

    Raises:
        ValueError: a model that is spread over ranks, whose ranks add up one sketch.
    """

    def __init__(self, model: nn.Module, specs: Sequence[SketchSpec], exclude: Sequence[str] | str) -> None:
        self.plans = [plan_model(model, Accumulator(spec), exclude) for spec in specs]
        if any(plan.ranks is not None for plan in self.plans):
            raise ValueError("more: the model is spread over ranks, which add up one sketch: give no more")

    def check(self, plan: Attachment) -> None:
        """Check that the sketcher's own taps are those that were planned for the other specs too.

        Raises:
            ValueError: parameters whose gradients have to be formed, which is done for one sketch.
        """
        if self.plans and plan.exact.parameters:
            name = plan.exact.parameters[0].name
            raise ValueError(
                f"more: the gradient of {name} is formed, for one sketch: give no more, or exclude it"
            )

    def begin(self, segments: Segments, device: torch.device) -> None:
        """Open a batch."""
        for one in self.plans:
            one.acc.begin(segments, device)

    @property
    def outs(self) -> list[torch.Tensor]:
        """The sums of the open batch, [segments, base_dim] each."""
        return [one.acc.out for one in self.plans]

    def end(self) -> tuple[torch.Tensor, ...]:
        """The sketches of the batch."""
        return tuple(one.acc.end() for one in self.plans)

    def close(self) -> None:
        """Free the batch, whether it has finished or failed."""
        for one in self.plans:
            one.acc.close()
