"""The sketch of a matrix parameter: what forward keeps of the inputs, what backward adds, by the kind of the spec."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from ... import philox as px
from ..._library import no_autocast
from ...ops.project import project, projection_of
from ...ops.sketch_embedding import sketch_embedding
from ...ops.sketch_grouped import sketch_grouped
from ...ops.sketch_linear import fold_inputs, sketch_linear
from ...plan import MatrixPlan, Role, plan_matrix
from ...spec import SketchSpec

PANEL = 1 << 22  # numbers of a gradient that the comparison kinds form at a time


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


# ------------------------------------------------------------------------------------------ comparison kinds
class FlatMatrix(MatrixSketch):
    """``countsketch`` and ``dropout``: the projection of the gradient, of which panels are formed."""

    def _project(self, piece: torch.Tensor, offset: int, out: torch.Tensor) -> None:
        """``out += S piece``, for the coordinates from ``offset`` on."""
        spec = projection_of(self.spec, self.name)
        project(piece.reshape(1, -1), spec, offset, out=out[None], nonfinite="ignore")

    def add(self, d: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        panel = max(1, PANEL // self.cols)
        for s, (begin, end) in enumerate(pairwise(offsets.tolist())):
            a = kept[begin:end].float()
            for r in range(0, self.rows if end > begin else 0, panel):
                gradient = _product(d[begin:end, r : r + panel].float().T, a)
                self._project(gradient, r * self.cols, out[s])

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        for s, (begin, end) in enumerate(pairwise(offsets.tolist())):
            touched, inverse = rows[begin:end].unique(return_inverse=True)
            gradient = x.new_zeros(len(touched), self.cols, dtype=torch.float32)
            gradient.index_add_(0, inverse, x[begin:end].float())
            for row, values in zip(touched.tolist(), gradient):
                self._project(values, row * self.cols, out[s])

    def add_formed(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        self._project(gradient.contiguous(), 0, out[0])


class KronMatrix(MatrixSketch):
    """``kron``: Rademacher projections of both sides, ``(D P_out)^T (A P_in)`` (LoGra, arXiv 2405.13954, section 3).

    Unlike LoGra, layers add into the same numbers instead of being laid side by side.
    """

    def __init__(self, spec: SketchSpec, name: str, rows: int, cols: int, role: Role) -> None:
        super().__init__(spec, name, rows, cols, role)
        key = px.key_of(spec.version, spec.seed, name)
        self.in_dim = 1 << (int(math.log2(spec.dim)) // 2)
        self.out_dim = spec.dim // self.in_dim
        self.p_in = _rademacher(key, cols, self.in_dim, px.DENSE_COLUMNS)
        self.p_out = _rademacher(key, rows, self.out_dim, px.DENSE_ROWS)

    @property
    def fold_key(self) -> str:
        return f"{self.name}/{self.in_dim}"  # every parameter has a projection of its own

    def fold(self, a: torch.Tensor) -> torch.Tensor:
        return _product(a.float(), self.p_in.to(a.device))

    def add(self, d: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        self._add_products(_product(d.float(), self.p_out.to(d.device)), kept, offsets, out)

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        self._add_products(self.p_out.to(rows.device)[rows], self.fold(x), offsets, out)

    def _add_products(
        self, d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor
    ) -> None:
        for s, (begin, end) in enumerate(pairwise(offsets.tolist())):
            out[s] += _product(d[begin:end].T, a[begin:end]).reshape(-1)


class TensorMatrix(MatrixSketch):
    """``tensor``: TensorSketch (Pham and Pagh, KDD 2013): bucket ``(h(r) + h'(c)) mod dim``, by FFT per token."""

    def __init__(self, spec: SketchSpec, name: str, rows: int, cols: int, role: Role) -> None:
        super().__init__(spec, name, rows, cols, role)
        key = px.key_of(spec.version, spec.seed, name)
        self.row_bucket, self.row_sign = _buckets(key, rows, spec.dim, px.TENSOR_ROWS)
        self.col_bucket, self.col_sign = _buckets(key, cols, spec.dim, px.TENSOR_COLUMNS)

    def add(self, d: torch.Tensor, kept: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        def spectrum(t0: int, t1: int) -> torch.Tensor:
            folded = d.new_zeros(t1 - t0, self.spec.dim, dtype=torch.float32)
            folded.index_add_(1, self.row_bucket.to(d.device), d[t0:t1].float() * self.row_sign.to(d.device))
            return torch.fft.rfft(folded)

        self._convolve(spectrum, kept, offsets, out)

    def add_rows(self, x: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, out: torch.Tensor) -> None:
        frequency = torch.arange(self.spec.dim // 2 + 1, device=rows.device)

        def spectrum(t0: int, t1: int) -> torch.Tensor:
            row = rows[t0:t1]
            # Whole turns are taken off in integers: bucket * frequency reaches dim^2 / 2.
            turns = self.row_bucket.to(row.device)[row][:, None] * frequency % self.spec.dim
            phase = turns.double() * (-2 * math.pi / self.spec.dim)
            sign = self.row_sign.to(row.device)[row].double()[:, None]
            return torch.polar(sign.expand_as(phase), phase).to(torch.complex64)

        self._convolve(spectrum, x, offsets, out)

    def add_formed(self, gradient: torch.Tensor, out: torch.Tensor) -> None:
        g = gradient.reshape(self.rows, self.cols)
        panel = max(1, PANEL // self.cols)
        for r in range(0, self.rows, panel):
            rows = slice(r, r + panel)
            bucket = (self.row_bucket[rows, None] + self.col_bucket[None, :]) % self.spec.dim
            sign = self.row_sign[rows, None] * self.col_sign[None, :]
            out[0].index_add_(0, bucket.reshape(-1).to(g.device), (g[rows] * sign.to(g)).reshape(-1))

    def _convolve(
        self,
        spectrum: Callable[[int, int], torch.Tensor],
        a: torch.Tensor,
        offsets: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """``out[s] += sum_{t in s} irfft(spectrum(t) * rfft(the columns' CountSketch of a[t]))``; ``spectrum(t0, t1)``
        [t1 - t0, dim / 2 + 1] is that of the rows' CountSketches."""
        chunk = max(1, PANEL // self.spec.dim)
        for s, (begin, end) in enumerate(pairwise(offsets.tolist())):
            for t in range(begin, end, chunk):
                t1 = min(end, t + chunk)
                folded = a.new_zeros(t1 - t, self.spec.dim, dtype=torch.float32)
                signed = a[t:t1].float() * self.col_sign.to(a.device)
                folded.index_add_(1, self.col_bucket.to(a.device), signed)
                product = (spectrum(t, t1) * torch.fft.rfft(folded)).sum(0)
                out[s] += torch.fft.irfft(product, n=self.spec.dim)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with no_autocast(a):
        return a @ b


def _rademacher(key: tuple[int, int], n: int, dim: int, purpose: int) -> torch.Tensor:
    """Signs [n, dim] / sqrt(dim), so that inner products keep their expectation."""
    return torch.from_numpy(px.signs(key, n * dim, purpose).reshape(n, dim)) * dim**-0.5


def _buckets(key: tuple[int, int], n: int, dim: int, purpose: int) -> tuple[torch.Tensor, torch.Tensor]:
    words = px.philox(key, np.arange(-(-n // 4)), 0, purpose).reshape(-1)[:n]
    sign = np.where(words >> 31, np.float32(-1), np.float32(1))
    return torch.from_numpy((words & np.uint32(dim - 1)).astype(np.int64)), torch.from_numpy(sign)


KINDS: dict[str, type[MatrixSketch]] = {
    "slab": SlabMatrix,
    "countsketch": FlatMatrix,
    "dropout": FlatMatrix,
    "kron": KronMatrix,
    "tensor": TensorMatrix,
}


def matrix_sketch(spec: SketchSpec, name: str, rows: int, cols: int, role: Role) -> MatrixSketch:
    """The sketch of a matrix parameter for ``spec.kind``."""
    return KINDS[spec.kind](spec, name, rows, cols, role)
