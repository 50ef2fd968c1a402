"""The sketches of one batch, and the ops by which taps add to them.

`Operators` serves every device and dtype. `CpuEngine` hands addresses straight to the CPU kernels in the common case
and falls back to `Operators` in every other. `gpu_engine` does so for the Triton kernels.

Why straight: between two large matrix products everything in Python runs with cold caches. An operator's way (views,
checks, choice of a backend, torch's dispatcher) took 190 us around a kernel of 700 us, and 380 us around a norm's of
120 us, several hundred times a pass: 3 % of forward and backward (SmolLM2-135M, 2 cores). What those checks ask of
every call holds for the whole batch here, and is asked once.
"""

from __future__ import annotations

import dataclasses

import torch

from ... import _native, dispatch
from ...ops._checks import check_offset_values
from ...ops.norm_grad import bias_grad, norm_grad
from ...ops.rms_norm import rms_norm, rms_norm_backward
from ...ops.sketch_vector import sketch_vector
from ...ops.swiglu import swiglu, swiglu_backward
from ...plan import VectorPlan
from ..batch.segments import Segments
from ..model.hooks import packed
from .matrix import MatrixSketch

Matrix = tuple[int, int, int, int, int]  # as `_native.matrix`


@dataclasses.dataclass(frozen=True)
class Site:
    """The module that a tensor belongs to, and whether its axes are [batch, heads, length, n]."""

    where: str
    heads_first: bool = False


@dataclasses.dataclass(frozen=True)
class Norm:
    """``y = weight * xhat(x) + bias``, ``xhat`` centered (LayerNorm) or not (RMSNorm); None where there is no plan to
    add to."""

    centered: bool
    eps: float
    weight: VectorPlan | None
    bias: VectorPlan | None


class Operators:
    """The ops on one batch: tensors as modules see them, any device, strides and dtype.

    ``out`` float32 [segments, dim] is what everything is added to.
    """

    def __init__(self, segments: Segments, out: torch.Tensor) -> None:
        self.segments, self.out = segments, out
        # Memory that this batch needed, in the engine's own unit; the next batch's engine is told.
        self.needed = 0

    def settle(self) -> torch.Tensor:
        """``out``, after the sums that an engine has not added yet are added to it."""
        return self.out

    def rows(self, x: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` as [tokens * repeats, n], and its offsets.

        Raises:
            ValueError: ``x`` does not hold every token of the batch once; names the module.
        """
        return self.segments.tokens_first(x, site.where, site.heads_first)

    def fold(self, x: torch.Tensor, matrix: MatrixSketch, site: Site) -> torch.Tensor:
        """What has to be kept of a module's inputs until backward."""
        with torch.no_grad():
            return matrix.fold(self.rows(x.detach(), site)[0])

    def add_linear(self, dy: torch.Tensor, kept: torch.Tensor, matrix: MatrixSketch, site: Site) -> None:
        """``out[s] += sketch(sum_{t in s} dy[t]^T x[t])``, where ``kept`` is `fold` of the inputs x."""
        d, offsets = self.rows(dy, site)
        matrix.add(d, kept, offsets, self.out)

    def add_rows(self, dy: torch.Tensor, ids: torch.Tensor, matrix: MatrixSketch, site: Site) -> None:
        """``out[s] += sketch(sum_{t in s} onehot(ids[t])^T dy[t])``; ``ids`` int64 [tokens]."""
        d, offsets = self.rows(dy, site)
        matrix.add_rows(d, ids, offsets, self.out)

    def add_bias(self, dy: torch.Tensor, plan: VectorPlan, site: Site) -> None:
        """``out[s] += sketch(sum_{t in s} dy[t])``."""
        d, offsets = self.rows(dy, site)
        self.add_vector(bias_grad(d, offsets), plan)

    def add_norm(self, dy: torch.Tensor, x: torch.Tensor, norm: Norm, site: Site) -> None:
        """The gradients of a norm's scale, ``sum_{t in s} dy[t] * xhat(x[t])``, and bias."""
        d, offsets = self.rows(dy, site)
        inputs = self.rows(x, site)[0]
        with_bias = norm.bias is not None
        weight, bias = norm_grad(inputs, d, offsets, norm.eps, centered=norm.centered, with_bias=with_bias)
        if norm.weight is not None:
            self.add_vector(weight, norm.weight)
        if norm.bias is not None and bias is not None:
            self.add_vector(bias, norm.bias)

    # ------------------------------------------------------------------------------ fused taps (`fused`)
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`ops.rms_norm` of ``x`` with any number of axes."""
        y, scale = rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
        return _shaped(y, x), scale

    def add_rms_norm(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        norm: Norm,
        site: Site,
    ) -> torch.Tensor:
        """`add_norm` of an RMSNorm, and the gradient of its input from the same pass."""
        assert norm.weight is not None
        d, offsets = self.rows(dy, site)
        # Heads before tokens: the scale has the order of `x`, the rows have that of tokens.
        order = scale.view(x.shape[:-1]).transpose(1, 2).reshape(-1) if site.heads_first else scale
        dx, sums = rms_norm_backward(d, self.rows(x, site)[0], weight, order, offsets)
        assert sums is not None
        self.add_vector(sums, norm.weight)
        return _shaped(dx, x.transpose(1, 2)).transpose(1, 2) if site.heads_first else _shaped(dx, x)

    def swiglu(
        self, gate: torch.Tensor, up: torch.Tensor, matrix: MatrixSketch | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`ops.swiglu`, with the fold for the ``matrix`` that reads its product, where it comes at no read of its
        own."""
        h, _ = swiglu(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]))
        return _shaped(h, gate), None

    def swiglu_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (x.reshape(-1, x.shape[-1]) for x in (dh, gate, up))
        dgate, dup = swiglu_backward(*rows)
        return _shaped(dgate, gate), _shaped(dup, up)

    def add_vector(self, gradients: torch.Tensor, plan: VectorPlan) -> None:
        """``out[s] += sketch(gradients[s])`` of gradients [segments, n] that exist."""
        sketch_vector(gradients, plan, self.out)

    def add_grouped(
        self, dy: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, matrix: MatrixSketch
    ) -> None:
        """Add ``D^T A`` of a stack of experts: rows sorted by (expert, segment), cut into ``ranges``."""
        matrix.add_grouped(dy, kept, ranges, self.out)

    def add_grouped_bias(self, dy: torch.Tensor, ranges: torch.Tensor, plan: VectorPlan) -> None:
        sums, segments = bias_grad(dy, ranges), self.out.shape[0]
        by_segment = sums.view(-1, segments, sums.shape[1]).transpose(0, 1).reshape(segments, -1)
        sketch_vector(by_segment, plan, self.out)


def _shaped(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Fresh rows in the shape of a tensor. No view for autograd, which would refuse that one is changed in place."""
    made: torch.Tensor = torch.ops.aten._unsafe_view(rows, like.shape)
    return made


class CpuEngine(Operators):
    """The CPU kernels on plain dense tensors [batch, length, n]; everything else goes through `Operators`.

    Args:
        expected: features of a token that `fold` will give in this batch, if known: one block of memory holds them.
            `needed` counts them.
    """

    def __init__(self, segments: Segments, out: torch.Tensor, expected: int = 0) -> None:
        super().__init__(segments, out)
        check_offset_values(segments.offsets, segments.batch * segments.length)
        self._kernels = _native.native()
        self._batch, self._length = segments.batch, segments.length
        self._ranges = segments.count, segments.offsets.data_ptr()
        self._out = out.data_ptr(), out.stride(0)
        self._threads = _native.threads()
        self._expected, self._pool = expected, out.new_empty(0)

    @staticmethod
    def serves(out: torch.Tensor) -> bool:
        """Whether the CPU kernels are the backend of this batch."""
        return out.device.type == "cpu" and dispatch.choose("sketch_linear", out) == "cpu"

    def plain(self, x: torch.Tensor) -> Matrix | None:
        """``x`` [batch, length, n] as the kernels take [tokens, n], or None: it is not the common case."""
        if type(x) is not torch.Tensor or torch.compiler.is_dynamo_compiling():  # no memory of its own, maybe
            return None
        code = _native.DTYPES.get(x.dtype)
        if code is None or x.ndim != 3 or not x.is_cpu or not x.is_contiguous():
            return None
        batch, length, n = x.shape
        address = x.data_ptr()
        if batch != self._batch or length != self._length or address % x.element_size():
            return None
        return address, batch * length, n, n, code

    def fold(self, x: torch.Tensor, matrix: MatrixSketch, site: Site) -> torch.Tensor:
        rows, plan = self.plain(x), matrix.plan
        if rows is None or plan is None or plan.col_fold is None or rows[2] != plan.cols:
            return super().fold(x, matrix, site)
        folded = self._memory(rows[1], plan.folded_cols, x.dtype)
        offset, sign = _native.column_fold(plan)
        self._kernels.fold_columns(rows, folded.data_ptr(), plan.folded_cols, offset, sign, self._threads)
        return folded

    def _memory(self, tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """From one block for the whole batch, as large as the last batch needed: one by one, the small copies are cut
        out of holes in the heap that large temporaries of the forward would fit in."""
        if not packed():  # else copies come and go layer by layer: a block would hold them all
            if not self.needed and self._expected:
                self._pool = torch.empty(tokens * self._expected, dtype=dtype, device="cpu")
            begin, self.needed = self.needed, self.needed + cols
            if self.needed * tokens <= self._pool.numel() and dtype == self._pool.dtype:
                return self._pool[begin * tokens : self.needed * tokens].view(tokens, cols)
        return torch.empty(tokens, cols, dtype=dtype, device="cpu")

    def add_linear(self, dy: torch.Tensor, kept: torch.Tensor, matrix: MatrixSketch, site: Site) -> None:
        rows, plan = self.plain(dy), matrix.plan
        common = plan is not None and plan.row_fold is None and plan.col_fold is not None
        if rows is None or plan is None or not common or rows[2] != plan.rows:
            return super().add_linear(dy, kept, matrix, site)
        # Hooks of saved tensors may return other strides.
        if kept.shape[0] != rows[1] or not kept.is_contiguous():
            return super().add_linear(dy, kept, matrix, site)
        slab, inputs = _native.slab_plan(plan, True), _native.matrix(kept)
        self._kernels.sketch_linear(
            rows, inputs, slab, *self._ranges, *self._out, plan.n_slabs, self._threads
        )

    def add_bias(self, dy: torch.Tensor, plan: VectorPlan, site: Site) -> None:
        rows = self.plain(dy)
        if rows is None:
            return super().add_bias(dy, plan, site)
        self._sums(rows, rows, False, 0.0, None, plan)

    def add_norm(self, dy: torch.Tensor, x: torch.Tensor, norm: Norm, site: Site) -> None:
        rows, inputs = self.plain(dy), self.plain(x)
        if rows is None or inputs is None or inputs[2] != rows[2]:
            return super().add_norm(dy, x, norm, site)
        self._sums(inputs, rows, norm.centered, norm.eps, norm.weight, norm.bias)

    def _sums(
        self,
        inputs: Matrix,
        rows: Matrix,
        centered: bool,
        eps: float,
        weight: VectorPlan | None,
        bias: VectorPlan | None,
    ) -> None:
        """`norm_grad` and the `sketch_vector` of what it gives; an output without a plan is not computed."""
        n = rows[2]
        sums = torch.empty(2, self._ranges[0], n, dtype=torch.float32, device="cpu")
        at = sums.data_ptr()
        to = at if weight is not None else 0, at + sums.stride(0) * 4 if bias is not None else 0
        self._kernels.norm_grad(inputs, rows, centered, eps, *self._ranges, *to, self._threads)
        for plan, address in zip((weight, bias), to, strict=True):
            if plan is not None:
                scatter = _native.vector_plan(plan)
                self._kernels.sketch_vector(address, self._ranges[0], n, n, *scatter, *self._out)
