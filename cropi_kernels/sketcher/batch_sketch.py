"""What `GradientSketcher.batch` yields."""

from __future__ import annotations

import torch


class BatchSketch:
    """Filled by `GradientSketcher.batch` when its block ends: float32 [segments, dim], of ``+grad L_s``.

    >>> layer = torch.nn.Linear(4, 4)
    >>> with GradientSketcher(layer, SketchSpec(1024)) as sketcher:
    ...     with sketcher.batch(torch.tensor([0, 1]), shape=(2, 3)) as batch:
    ...         layer(torch.ones(2, 3, 4, requires_grad=True)).sum().backward()
    >>> batch.sketches.shape
    torch.Size([2, 1024])
    """

    sketches: torch.Tensor

    def __repr__(self) -> str:
        if not hasattr(self, "sketches"):
            return "BatchSketch(not filled yet: its block has not ended)"
        return f"BatchSketch({len(self.sketches)} segments, sketches of {self.sketches.shape[1]})"
