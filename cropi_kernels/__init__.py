"""Fused kernels that sketch policy gradients while the backward pass runs, never forming a gradient.

Start with `SketchSpec` (what a sketch is) and `GradientSketcher` (attaches to a model); `docs/sketch.md` has the
mathematics. What there is:

- a model's policy gradients: `GradientSketcher`, its `Coverage` and its results, `PolicyGradient`; `reduce_sketch`
- the gradients of a training step, prompt by prompt, from the trainer's own backward pass: `LiveSketcher`
- the ops beneath (`cropi_kernels.ops`): `plan_matrix` and `plan_vector` say where a parameter lands, `sketch_linear`,
  `sketch_grouped`, `sketch_embedding` and `sketch_vector` add to a sketch, `norm_grad`, `bias_grad`, `fold_inputs` and
  `fold_outputs` come before them; names are those of `canonical_name`
- what models of Llama's kind compute between products, in one pass each: `rms_norm`, `swiglu` and their gradients,
  `rms_norm_backward` and `swiglu_backward` (what `GradientSketcher(fused=True)` runs)
- token log-probs without the logits: `token_logprobs` of a model; `linear_logprob`, `logprob_and_grad` of a head
- projections of gradients that exist: `ProjectionSpec`, `project`, `project_transpose`; of sparse rows (`CsrRows`),
  `project_csr` and `project_csr_sparse`; the one that a sketch of kind ``countsketch`` or ``dropout`` makes of a
  parameter, `projection_of`; in the shapes that other code expects, `cropi_kernels.projectors`
- rows in one or two bytes a number: `quantize_rows`, `QuantizedRows`; `row_products` of such rows with directions

Every op takes ``backend=``; `explain` tells which one serves given tensors, and the environment variable
``CROPI_KERNELS_BACKEND`` names one for all calls; ``CROPI_KERNELS_ISA`` (baseline, avx2, avx512) the instruction set of
the CPU kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._arguments import named
from ._library import without_derivative
from ._version import __version__
from .dispatch import explain
from .names import canonical_name
from .ops.linear_logprob import linear_logprob, logprob_and_grad
from .ops.norm_grad import bias_grad, norm_grad
from .ops.project import (
    CsrRows,
    ProjectionSpec,
    project,
    project_csr,
    project_csr_sparse,
    project_transpose,
    projection_of,
)
from .ops.rms_norm import rms_norm, rms_norm_backward
from .ops.row_products import row_products
from .ops.sketch_embedding import sketch_embedding
from .ops.sketch_grouped import sketch_grouped
from .ops.sketch_linear import fold_inputs, fold_outputs, sketch_linear
from .ops.sketch_vector import sketch_vector
from .ops.swiglu import swiglu, swiglu_backward
from .plan import MatrixPlan, VectorPlan, plan_matrix, plan_vector
from .quantize import QuantizedRows, quantize_rows
from .reduce import reduce_sketch
from .spec import SketchSpec

if TYPE_CHECKING:
    from .sketcher import (
        BatchSketch,
        CoupledLossError,
        Coverage,
        GradientSketcher,
        LiveSketch,
        LiveSketcher,
        PolicyGradient,
        UncoveredParameterError,
        token_logprobs,
    )

# A wrong type raises an error that names the argument, and so does a derivative that an op would lose. Inside of the
# package the functions are called as they are.
for _function in (
    bias_grad, fold_inputs, fold_outputs, logprob_and_grad, norm_grad, project_csr, project_csr_sparse, quantize_rows,
    rms_norm, rms_norm_backward, row_products, sketch_embedding, sketch_grouped, sketch_linear, sketch_vector, swiglu,
    swiglu_backward,
):  # fmt: skip
    globals()[_function.__name__] = without_derivative(named(_function))
for _other in (canonical_name, linear_logprob, plan_matrix, plan_vector, reduce_sketch):
    globals()[_other.__name__] = named(_other)

__all__ = [
    "BatchSketch",
    "CoupledLossError",
    "Coverage",
    "CsrRows",
    "GradientSketcher",
    "LiveSketch",
    "LiveSketcher",
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
    "fold_inputs",
    "fold_outputs",
    "linear_logprob",
    "logprob_and_grad",
    "norm_grad",
    "plan_matrix",
    "plan_vector",
    "project",
    "project_csr",
    "project_csr_sparse",
    "project_transpose",
    "projection_of",
    "quantize_rows",
    "reduce_sketch",
    "rms_norm",
    "rms_norm_backward",
    "row_products",
    "sketch_embedding",
    "sketch_grouped",
    "sketch_linear",
    "sketch_vector",
    "swiglu",
    "swiglu_backward",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    # What is public and not here is `sketcher`'s, which takes three quarters of the time that all imports take.
    if name == "sketcher" or name in __all__:
        sketcher = importlib.import_module(".sketcher", __name__)
        return sketcher if name == "sketcher" else getattr(sketcher, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion: those that this module imports for itself are left out."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
