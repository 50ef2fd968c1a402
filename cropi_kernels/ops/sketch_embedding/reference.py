"""Plain torch: form the dense [rows, cols] gradient of each segment and sketch it with the explicit S."""

from __future__ import annotations

import torch

from ...plan import MatrixPlan
from ..sketch_linear.reference import sketch_matrix


def sketch_embedding(
    x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, plan: MatrixPlan, out: torch.Tensor
) -> None:
    for s, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        gradient = out.new_zeros(plan.rows, plan.cols)
        gradient.index_add_(0, rows[begin:end], x[begin:end].to(out.dtype))
        out[s] += sketch_matrix(gradient, plan)
