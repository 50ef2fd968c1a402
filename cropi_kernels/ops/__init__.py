"""The ops, one folder each: formula in ``__init__``, ``reference`` in plain torch, one file a backend, checks and the
registration with PyTorch in ``ops``. `docs/ops.md` lists the schemas.

=====================  ==========================================================================================
`sketch_linear`        ``out[s] += S vec(sum_{t in s} d[t]^T a[t])``: a linear layer
`fold_inputs`          the columns of ``a`` summed into few, with signs: what a linear layer keeps until backward
`fold_outputs`         the same of ``d``, for a tied head
`sketch_grouped`       `sketch_linear` of stacked experts, a range of tokens for each (expert, segment)
`sketch_embedding`     ``out[s] += S vec(sum_{t in s} onehot(rows[t])^T x[t])``: an embedding
`sketch_vector`        ``out[s] += S g[s]``: norm scales and biases
`norm_grad`            per-segment gradients of a norm's scale and bias
`bias_grad`            ``sum_{t in s} dy[t]``
`rms_norm`             RMSNorm; `rms_norm_backward` with the scale's gradient per segment from the same pass
`swiglu`               ``silu(gate) * up``, with the fold of the next layer's inputs; `swiglu_backward`
`linear_logprob`       token log-probs from hidden states and a head, without the logits
`logprob_and_grad`     the same with the gradient of a weighted sum
`project`              ``y = x S^T``: CountSketch, SJLT, Rademacher or Gaussian projections of rows that exist
`project_transpose`    ``x = y S``, its adjoint
`project_csr`          `project` of sparse rows; `project_csr_sparse` with a sparse result
`row_products`         ``<x[b], d[v]>`` and ``<x[b], x[b]>`` for rows in 32 to 1 bits with scales
=====================  ==========================================================================================
"""

from __future__ import annotations

from .linear_logprob import linear_logprob, logprob_and_grad
from .norm_grad import bias_grad, norm_grad
from .project import project, project_csr, project_csr_sparse, project_transpose
from .rms_norm import rms_norm, rms_norm_backward
from .row_products import row_products
from .sketch_embedding import sketch_embedding
from .sketch_grouped import sketch_grouped
from .sketch_linear import fold_inputs, fold_outputs, sketch_linear
from .sketch_vector import sketch_vector
from .swiglu import swiglu, swiglu_backward

__all__ = [
    "bias_grad",
    "fold_inputs",
    "fold_outputs",
    "linear_logprob",
    "logprob_and_grad",
    "norm_grad",
    "project",
    "project_csr",
    "project_csr_sparse",
    "project_transpose",
    "rms_norm",
    "rms_norm_backward",
    "row_products",
    "sketch_embedding",
    "sketch_grouped",
    "sketch_linear",
    "sketch_vector",
    "swiglu",
    "swiglu_backward",
]
