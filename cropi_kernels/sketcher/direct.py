"""The CPU kernels as taps call them in the common case: addresses handed over, no operator in between.

Between two large matrix products everything in Python runs with cold caches. An operator's way there (views, checks,
choice of a backend, torch's dispatcher) took 190 us around a kernel of 700 us, and 380 us around a norm's of 120 us,
several hundred times a pass: 3 % of forward and backward (SmolLM2-135M, 2 cores). What those checks ask of
every call holds for the whole batch here, and is asked once; a tensor that is not the common case (another device,
strides, an axis of heads, float64) is refused, and the operators serve it.
"""

from __future__ import annotations

import torch

from .. import _native, dispatch
from ..ops._checks import check_offset_values
from ..plan import MatrixPlan, VectorPlan
from .batch import Segments
from .graph import packed

Matrix = tuple[int, int, int, int, int]  # as `_native.matrix`


class Direct:
    """The kernels on one batch: its ranges of tokens, and the sketches [segments, dim] that they add to."""

    def __init__(self, segments: Segments, out: torch.Tensor, folded: int = 0) -> None:
        check_offset_values(segments.offsets, segments.batch * segments.length)
        self._kernels = _native.native()
        self._batch, self._length = segments.batch, segments.length
        self._ranges = segments.count, segments.offsets.data_ptr()
        self._out = out.data_ptr(), out.stride(0)
        self._threads = _native.threads()
        self._kept_alive = segments.offsets, out
        self._expected, self._pool, self.folded = folded, torch.empty(0, device="cpu"), 0

    @classmethod
    def of(cls, segments: Segments, out: torch.Tensor, folded: int = 0) -> Direct | None:
        """None where another backend serves the batch. ``folded``: features of a token that will be kept, if known."""
        if out.device.type != "cpu" or dispatch.choose("sketch_linear", out) != "cpu":
            return None
        return cls(segments, out, folded)

    def rows(self, x: torch.Tensor) -> Matrix | None:
        """``x`` [batch, length, n] as the kernels take [tokens, n], or None: it is not the common case."""
        if type(x) is not torch.Tensor or torch.compiler.is_compiling():  # no memory of its own, maybe
            return None
        code = _native.DTYPES.get(x.dtype)
        if code is None or x.ndim != 3 or not x.is_cpu or not x.is_contiguous():
            return None
        batch, length, n = x.shape
        if batch != self._batch or length != self._length:
            return None
        return x.data_ptr(), batch * length, n, n, code

    def fold(self, x: torch.Tensor, plan: MatrixPlan) -> torch.Tensor | None:
        """``x`` folded [tokens, plan.folded_cols], as by `fold_inputs`."""
        rows = self.rows(x)
        if rows is None or plan.col_fold is None or rows[2] != plan.cols:
            return None
        folded = self._memory(rows[1], plan.folded_cols, x.dtype)
        offset, sign = _native.column_fold(plan)
        self._kernels.fold_columns(rows, folded.data_ptr(), plan.folded_cols, offset, sign, self._threads)
        return folded

    def _memory(self, tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """From one block for the whole batch, as large as the last batch needed: one by one, the small copies are cut
        out of holes in the heap that large temporaries of the forward would fit in."""
        if not packed():  # else copies come and go layer by layer: a block would hold them all
            if not self.folded and self._expected:
                self._pool = torch.empty(tokens * self._expected, dtype=dtype, device="cpu")
            begin, self.folded = self.folded, self.folded + cols
            if self.folded * tokens <= self._pool.numel() and dtype == self._pool.dtype:
                return self._pool[begin * tokens : self.folded * tokens].view(tokens, cols)
        return torch.empty(tokens, cols, dtype=dtype, device="cpu")

    def add_linear(self, dy: torch.Tensor, folded: torch.Tensor, plan: MatrixPlan) -> bool:
        """`sketch_linear` of ``dy`` [batch, length, plan.rows] and what `fold` gave; False: not done."""
        rows = self.rows(dy)
        if rows is None or plan.row_fold is not None or plan.col_fold is None or rows[2] != plan.rows:
            return False
        slab, inputs = _native.slab_plan(plan, True), _native.matrix(folded)
        self._kernels.sketch_linear(
            rows, inputs, slab, *self._ranges, *self._out, plan.n_slabs, self._threads
        )
        return True

    def add_norm(
        self,
        x: torch.Tensor | None,
        dy: torch.Tensor,
        eps: float,
        centered: bool,
        weight: VectorPlan | None,
        bias: VectorPlan | None,
    ) -> bool:
        """`norm_grad` (of a bias alone, `bias_grad`) and the `sketch_vector` of what it gave; False: not done."""
        rows = self.rows(dy)
        inputs = rows if x is None else self.rows(x)
        if rows is None or inputs is None or inputs[2] != rows[2]:
            return False
        n = rows[2]
        sums = torch.empty(2, self._ranges[0], n, dtype=torch.float32, device="cpu")
        at = sums.data_ptr()
        to = at if weight is not None else 0, at + sums.stride(0) * 4 if bias is not None else 0
        self._kernels.norm_grad(inputs, rows, centered, eps, *self._ranges, *to, self._threads)
        for plan, address in zip((weight, bias), to, strict=True):
            if plan is not None:
                scatter = _native.vector_plan(plan)
                self._kernels.sketch_vector(address, self._ranges[0], n, n, *scatter, *self._out)
        return True
