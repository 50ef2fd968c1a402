"""The interface of every kind of matrix sketch (what forward keeps, what backward adds), and the slab sketch."""

from __future__ import annotations

import abc

import torch

from ..ops.sketch_embedding import sketch_embedding
from ..ops.sketch_grouped import sketch_grouped
from ..ops.sketch_linear import fold_inputs, sketch_linear
from ..plan import MatrixPlan, Role, plan_matrix
from ..spec import SketchSpec


class MatrixSketch(abc.ABC):
    """Sketch of the gradient ``D^T A`` [rows, cols] of one parameter.

    ``fold(a)`` returns what has to be saved of the inputs until backward; ``add`` takes it back. ``plan`` is the plan
    of the slab sketch, None for the comparison kinds.
    """

    plan: MatrixPlan | None = None

    def __init__(self, spec: SketchSpec, name: str, rows: int, cols: int, role: Role) -> None:
        self.spec, self.name, self.rows, self.cols, self.role = spec, name, rows, cols, role

    @property
    def fold_key(self) -> str | None:
        """Equal for parameters that may share ``fold(a)`` of the same input tensor; None: the input itself is kept."""
        return None

    def fold(self, a: torch.Tensor) -> torch.Tensor:
        return a

    @abc.abstractmethod
    def add(self, d: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        """``out[s] += sketch(sum_{t in s} d[t]^T a[t])``."""

    def add_grouped(
        self, d: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, out: torch.Tensor
    ) -> None:
        """`add` for a stack of matrices; ``ranges`` cuts rows that are sorted by (matrix, segment)."""
        raise NotImplementedError

    @abc.abstractmethod
    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        """``out[s] += sketch(sum_{t in s} onehot(rows[t])^T x[t])``."""

    def add_formed(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """``out += sketch(gradient)`` of a gradient [rows, cols] that exists; ``out`` [1, base_dim]."""
        rows = torch.arange(self.rows, device=gradient.device)
        offsets = torch.tensor([0, self.rows], device="cpu")
        self.add_rows(gradient.reshape(self.rows, self.cols), rows, offsets, out)


class SlabMatrix(MatrixSketch):
    """``slab``: the sketch of docs/sketch.md."""

    plan: MatrixPlan

    def __init__(self, spec: SketchSpec, name: str, rows: int, cols: int, role: Role) -> None:
        super().__init__(spec, name, rows, cols, role)
        self.plan = plan_matrix(spec, name, rows, cols, role)

    @property
    def fold_key(self) -> str | None:
        return self.plan.fold_key if self.plan.col_fold is not None else None

    def fold(self, a: torch.Tensor) -> torch.Tensor:
        return fold_inputs(a, self.plan)  # all that is kept of a layer's inputs

    def add(self, d: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        sketch_linear(d, kept, offsets, self.plan, out)

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        sketch_embedding(x, rows, offsets, self.plan, out)

    def add_grouped(
        self, d: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, out: torch.Tensor
    ) -> None:
        sketch_grouped(d, kept, ranges, self.plan, out)
