"""Fused kernels that sketch policy gradients while the backward pass runs, never forming a gradient.

Start with `SketchSpec` (what a sketch is) and `GradientSketcher` (attaches to a model); `docs/sketch.md` has the
mathematics, `explain()` tells which backend serves a call.
"""

from __future__ import annotations

from ._version import __version__
from .dispatch import explain
from .names import canonical_name
from .ops.flat_sketch import flat_sketch
from .ops.linear_logprob import linear_logprob, logprob_and_grad
from .ops.norm_grad import bias_grad, norm_grad
from .ops.project import ProjectionSpec, QuantizedRows, project, project_transpose, quantize_rows
from .ops.sketch_linear import fold_inputs, fold_outputs, sketch_linear
from .ops.sketch_rows import sketch_embedding
from .ops.sketch_vector import sketch_vector
from .plan import MatrixPlan, VectorPlan, plan_matrix, plan_vector
from .reduce import reduce_sketch
from .sketcher import Coverage, GradientSketcher, PolicyGradient, UncoveredParameterError
from .spec import SketchSpec

__all__ = [
    "Coverage",
    "GradientSketcher",
    "MatrixPlan",
    "PolicyGradient",
    "ProjectionSpec",
    "QuantizedRows",
    "SketchSpec",
    "UncoveredParameterError",
    "VectorPlan",
    "__version__",
    "bias_grad",
    "canonical_name",
    "explain",
    "flat_sketch",
    "fold_inputs",
    "fold_outputs",
    "linear_logprob",
    "logprob_and_grad",
    "norm_grad",
    "plan_matrix",
    "plan_vector",
    "project",
    "project_transpose",
    "quantize_rows",
    "reduce_sketch",
    "sketch_embedding",
    "sketch_linear",
    "sketch_vector",
]
