"""What a backend of `project` is tried on, and how large the terms are that bound the error of its float32 sums."""

from __future__ import annotations

import numpy as np
import torch

from ..ops.project import ProjectionSpec, coordinates

S = ProjectionSpec
# name: (spec, columns, offset). Every way to cut a call: several tiles a stage, one, pieces of a tile, some nonzeros a
# slice; stages that begin anywhere, more than one part, groups of buckets smaller than 16, coordinates beyond 2^32.
PROJECTION_CASES: dict[str, tuple[ProjectionSpec, int, int]] = {
    "many tiles a stage": (S(256), 60_001, 48),
    "odd offset": (S(256), 3011, 5),
    "narrow": (S(48), 3000, 16),
    "group of one": (S(7), 3011, 3),
    "one bucket": (S(1), 100, 2**40),
    "one column": (S(4096), 1, 2**32 - 1),
    "several parts": (S(4096, seed=1), 600_000, 2**31 - 1008),
    "pieces of a tile": (S(65536), 150_000, 2**32 - 70_000),
    "pieces that are not whole": (S(40_000), 90_000, 16),
    "keep": (S(512, keep=0.3), 30_000, 128),
    "keep in pieces": (S(20_016, keep=0.1), 60_000, 7),
    "sjlt": (S(256, kind="sjlt", nnz=4), 9000, 32),
    "sjlt, groups of four": (S(60, kind="sjlt", nnz=3), 3011, 1),
    "sjlt, slices of nonzeros": (S(49_152, kind="sjlt", nnz=4), 70_000, 0),
    "sjlt, last slice smaller": (S(24_000, kind="sjlt", nnz=5), 40_000, 48),
    "sjlt, a nonzero a slice": (S(65_536, kind="sjlt", nnz=4), 40_000, 77),
    "sixty-four nonzeros": (S(1024, kind="sjlt", nnz=64), 9000, 0),
    "sixty nonzeros": (S(960, kind="sjlt", nnz=60, keep=0.5), 9000, 48),
    "rademacher": (S(200, kind="rademacher"), 3011, 3),
    "rademacher in parts": (S(64, kind="rademacher", keep=0.6), 9000, 2**33 + 64),
    "gaussian": (S(130, kind="gaussian", keep=0.25), 3011, 64),
}


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
    out = torch.zeros(x.shape[0], spec.dim, dtype=torch.float64, device="cpu")
    for j in range(spec.nnz):
        out.index_add_(1, torch.from_numpy(bucket[j]), size * torch.from_numpy(sign[j]).abs())
    return out * spec.scale
