"""Random projections of gradients that exist: CountSketch, SJLT, dense Rademacher and Gaussian, and their adjoints."""

from __future__ import annotations

from .api import project, project_transpose
from .csr import CsrRows, project_csr, project_csr_sparse
from .reference import coordinates
from .spec import ProjectionSpec, projection_of

__all__ = [
    "CsrRows",
    "ProjectionSpec",
    "coordinates",
    "project",
    "project_csr",
    "project_csr_sparse",
    "project_transpose",
    "projection_of",
]
