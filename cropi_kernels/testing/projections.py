"""How large the terms of a projection are: what the error of its float32 sums is bounded by."""

from __future__ import annotations

import numpy as np
import torch

from ..ops.project import ProjectionSpec, coordinates


def projection_magnitudes(x: torch.Tensor, spec: ProjectionSpec, offset: int = 0) -> torch.Tensor:
    """float64 [B, dim]: for each number of ``project(x, spec, offset)``, the sum of its terms' absolute values.

    Exact for the sparse kinds; for the dense ones every entry is taken to be 1, or 6 for ``gaussian``, which no normal
    of this generator exceeds.
    """
    size = x.detach().cpu().double().abs()
    if not spec.sparse:
        largest = 6.0 if spec.kind == "gaussian" else 1.0
        return (size.sum(1, keepdim=True) * (largest * spec.scale)).expand(-1, spec.dim)
    bucket, sign = coordinates(spec, np.arange(x.shape[1], dtype=np.uint64) + np.uint64(offset))
    out = torch.zeros(x.shape[0], spec.dim, dtype=torch.float64)
    for j in range(spec.nnz):
        out.index_add_(1, torch.from_numpy(bucket[j]), size * torch.from_numpy(sign[j]).abs())
    return out * spec.scale
