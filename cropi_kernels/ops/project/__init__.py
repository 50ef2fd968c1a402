"""Random projections of gradients that exist: CountSketch, SJLT, dense Rademacher and Gaussian, and their adjoints."""

from __future__ import annotations

from .api import project, project_transpose
from .csr import CsrRows, project_csr, project_csr_sparse
from .quantize import QuantizedRows, quantize_rows
from .reference import coordinates
from .spec import ProjectionSpec

__all__ = [
    "CsrRows",
    "ProjectionSpec",
    "QuantizedRows",
    "coordinates",
    "project",
    "project_csr",
    "project_csr_sparse",
    "project_transpose",
    "quantize_rows",
]
