"""Plain torch twin of `sketch_vector`, in any float dtype."""

from __future__ import annotations

import torch

from ...plan import VectorPlan


def sketch_vector(gradient: torch.Tensor, plan: VectorPlan, out: torch.Tensor) -> None:
    position = torch.from_numpy(plan.position).to(out.device)
    out.index_add_(1, position, gradient.to(out.dtype) * torch.from_numpy(plan.sign).to(out))
