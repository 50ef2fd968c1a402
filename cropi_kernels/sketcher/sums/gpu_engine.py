"""The Triton kernels as taps call them: what the host spends on a launch is what a small pass waits for.

An operator's way to a kernel takes 20 to 60 us, and a layer of seven matrices needs more than thirty launches. Here a
layer takes a third of them, and none goes through a dispatcher:

- What operators ask of every call (offsets, device, backend) is asked once a batch; the table of chunks is made once.
- Gradients of matrices that read the same inputs (q, k and v; gate and up) wait for each other and go in one launch.
- Sums over chunks stay in one buffer for the whole pass, to which every launch adds; they are added up at its end.
- Vectors (scales of norms, biases) leave their sums over chunks behind, which one launch takes for many of them.

All of it depends on the model and the segment's own tokens alone, and no two programs of a launch write to one place:
the same bits on every run, and whatever else is in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import torch

from ... import dispatch
from ..._gpu import DTYPES
from ...ops._checks import check_offset_values
from ...ops.norm_grad.ops import WIDEST
from ...plan import VectorPlan
from ...spec import SLAB_SIZE
from ..batch.segments import Segments
from .engine import Norm, Operators, Site
from .matrix import MatrixSketch

TAIL = 16 << 20  # numbers of vectors' sums that wait, 64 MB; a vector that has more of them waits alone
ANYWHERE = Site("")  # of tensors whose rows may have any order


@dataclasses.dataclass
class Waiting:
    """A gradient that is read later, and the number of changes in place that it had seen."""

    dy: torch.Tensor
    plan: Any
    where: str
    version: int


def _read(waiting: list[Waiting]) -> tuple[list[torch.Tensor], list[Any]]:
    """The gradients, and their plans.

    Raises:
        RuntimeError: one was changed in place meanwhile; names its module.
    """
    dys, plans = [], []
    for one in waiting:
        if one.dy._version != one.version:
            raise RuntimeError(
                f"the gradient of the outputs of {one.where} was changed in place in the backward pass, before the "
                "sketcher had read it: let the hook or function that does so return a new tensor"
            )
        dys.append(one.dy)
        plans.append(one.plan)
    return dys, plans


@dataclasses.dataclass
class Tail:
    """Sums over chunks of vectors, of a batch whose tokens a module sees ``repeats`` times."""

    chunks: Any
    plans: list[VectorPlan]
    sums: torch.Tensor
    used: int = 0
    left: torch.Tensor | None = None  # the sums of earlier launches


@functools.cache
def _kernels() -> tuple[Any, ...]:
    """What needs Triton, which is imported when there is a use for it."""
    from ..._launch import MEMBERS
    from ...ops import _triton_segments
    from ...ops.norm_grad import triton as norms
    from ...ops.rms_norm import triton as rms
    from ...ops.sketch_linear import triton as slabs
    from ...ops.sketch_vector import triton as vectors
    from ...ops.swiglu import triton as gates

    return norms, slabs, vectors, rms, gates, _triton_segments, MEMBERS


class GpuEngine(Operators):
    """Dense tensors of one device as models have them; everything else goes through `Operators`, to the same sums.

    Args:
        expected: groups of block pairs whose sums are kept apart, if known. `needed` counts them.
    """

    def __init__(self, segments: Segments, out: torch.Tensor, expected: int = 0) -> None:
        super().__init__(segments, out)
        self._norms, self._slabs, self._vectors, self._rms, self._gates, parts, self._members = _kernels()
        self._cut, self._reduce = parts.cut, parts.reduce_partials
        check_offset_values(segments.offsets, segments.batch * segments.length)
        self._tokens = segments.batch, segments.length
        self.needed = expected
        self._chunks: Any = None  # of the slabs, and their sums [slots, groups, dim]
        self._sums: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None  # the inputs of the matrices that wait
        # The latest matrix's gradient, whose bias may follow. Not its address, where another's may be by then.
        self._latest: weakref.ref[torch.Tensor] | None = None
        self._matrices: list[Waiting] = []
        self._biases: list[Waiting] = []
        self._tails: dict[int, Tail] = {}

    @staticmethod
    def serves(out: torch.Tensor) -> bool:
        """Whether the Triton kernels are the backend of this batch, and its sketches are whole slabs."""
        whole = out.shape[1] % SLAB_SIZE == 0 and out.shape[0] > 0
        return whole and dispatch.choose("sketch_linear", out) == "triton"

    # ------------------------------------------------------------------------------------------ tensors
    def _plain(self, x: torch.Tensor, n: int, site: Site) -> int | None:
        """How often each token is a row of ``x`` [batch, length, (heads,) n]; None: it is not the common case."""
        if type(x) is not torch.Tensor or site.heads_first or torch.compiler.is_dynamo_compiling():
            return None
        shape = x.shape
        usual = len(shape) in (3, 4) and shape[:2] == self._tokens and shape[-1] == n and x.is_contiguous()
        if not usual or x.device != self.out.device or x.dtype not in DTYPES or x.numel() == 0:
            return None
        if x.data_ptr() % x.element_size():
            return None
        return 1 if len(shape) == 3 else shape[2]

    # ------------------------------------------------------------------------------------------ matrices
    def fold(self, x: torch.Tensor, matrix: MatrixSketch, site: Site) -> torch.Tensor:
        plan = matrix.plan
        if plan is None or plan.col_fold is None or self._plain(x, plan.cols, site) != 1:
            return super().fold(x, matrix, site)
        tables = self._slabs.matrix_tables(plan, x.device)
        n_tokens = self._tokens[0] * self._tokens[1]
        return self._slabs.fold_rows(
            x, n_tokens, plan.cols, tables.col_sign, tables.col_fold, plan.folded_cols
        )

    def add_linear(self, dy: torch.Tensor, kept: torch.Tensor, matrix: MatrixSketch, site: Site) -> None:
        plan = matrix.plan
        common = plan is not None and plan.row_fold is None and plan.col_fold is not None
        if plan is None or not common or dy.dtype != kept.dtype or self._plain(dy, plan.rows, site) != 1:
            return super().add_linear(dy, kept, matrix, site)
        if kept.shape[0] != self._tokens[0] * self._tokens[1] or not kept.is_contiguous():
            return super().add_linear(dy, kept, matrix, site)
        others, self._latest = self._kept, weakref.ref(dy)
        if others is None or others.data_ptr() != kept.data_ptr() or others.dtype != kept.dtype:
            self._launch()
            self._kept = kept
        self._matrices.append(Waiting(dy, plan, site.where, dy._version))
        if len(self._matrices) == self._members:
            self._launch_matrices()

    def _launch_matrices(self) -> None:
        waiting, kept = self._matrices, self._kept
        self._matrices, self._kept = [], None
        if not waiting or kept is None:
            return
        ds, plans = _read(waiting)
        stack = self._slabs.stack_of(tuple(plans), kept.device, kept.dtype)
        if self._chunks is None:
            offsets = self.segments.offsets_on(self.out.device)
            self._chunks = self._cut(offsets, self._tokens[0] * self._tokens[1], stack.chunk, True)
        own = stack.into == "slots"
        sums = self._own(stack.groups) if own else self._room(stack.groups)
        self._slabs.add_slabs(stack, ds, None, kept, stack.cols, self.out, sums, self._chunks, stack.into)
        if own:
            self._reduce(sums, self.out, self._chunks, stack.groups)

    def _own(self, groups: int) -> torch.Tensor:
        shape = self._chunks.n_slots, groups, self.out.shape[1]
        return torch.empty(shape, dtype=torch.float32, device=self.out.device)

    def _room(self, groups: int) -> torch.Tensor:
        """The sums over chunks, with room for as many groups of block pairs."""
        self.needed = max(self.needed, groups)
        sums = self._sums
        if sums is None or sums.shape[1] < self.needed:
            shape = self._chunks.n_slots, self.needed, self.out.shape[1]
            wider = torch.zeros(shape, dtype=torch.float32, device=self.out.device)
            if sums is not None:
                wider[:, : sums.shape[1]] = sums
            self._sums = sums = wider
        return sums

    # ------------------------------------------------------------------------------------------ vectors
    def add_bias(self, dy: torch.Tensor, plan: VectorPlan, site: Site) -> None:
        if self._plain(dy, plan.size, site) != 1:
            return super().add_bias(dy, plan, site)
        if self._latest is None or self._latest() is not dy:  # else the bias waits with its matrix
            self._launch()
        self._biases.append(Waiting(dy, plan, site.where, dy._version))
        if len(self._biases) == self._members:
            self._launch_biases()

    def _launch_biases(self) -> None:
        waiting, self._biases = self._biases, []
        if not waiting:
            return
        dys, plans = _read(waiting)
        tail, places = self._places(1, plans)
        self._norms.add_sums(dys, [plan.size for plan in plans], self.out, tail.sums, places, tail.chunks)

    def add_norm(self, dy: torch.Tensor, x: torch.Tensor, norm: Norm, site: Site) -> None:
        plan, n = norm.weight, dy.shape[-1]
        repeats = self._plain(dy, n, site)
        if plan is None or n > WIDEST or repeats is None or self._plain(x, n, site) != repeats:
            return super().add_norm(dy, x, norm, site)
        plans = [plan] if norm.bias is None else [plan, norm.bias]
        tail, places = self._places(repeats, plans)
        self._norms.norm_launch(n, norm.centered, norm.bias is not None)(
            (tail.chunks.n_items,),
            (x, dy, self.out, self.out, tail.sums, tail.chunks.table),
            (n, n, n, places[0], places[-1]),
            (tail.chunks.n_segments,),
            (norm.eps,),
        )

    # ------------------------------------------------------------------------------ fused taps (`fused`)
    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = x.shape[-1]
        if n > WIDEST or not weight.is_contiguous() or self._plain(x, n, ANYWHERE) is None:
            return super().rms_norm(x, weight, eps)
        n_tokens = x.numel() // n
        y, scale = torch.empty_like(x), torch.empty(n_tokens, dtype=torch.float32, device=x.device)
        self._rms.forward(x, weight, eps, y, scale, n_tokens, n)
        return y, scale

    def add_rms_norm(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        norm: Norm,
        site: Site,
    ) -> torch.Tensor:
        plan, n = norm.weight, x.shape[-1]
        repeats = self._plain(dy, n, site) if weight.is_contiguous() else None
        if plan is None or n > WIDEST or repeats is None or self._plain(x, n, site) != repeats:
            return super().add_rms_norm(dy, x, weight, scale, norm, site)
        tail, (place,) = self._places(repeats, [plan])
        dx = torch.empty_like(x)
        into = self.out, tail.sums, place, tail.chunks
        self._rms.backward(dy, x, weight, scale, dx, (n, n), x.numel() // n, into)
        return dx

    def swiglu(
        self, gate: torch.Tensor, up: torch.Tensor, matrix: MatrixSketch | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        n = gate.shape[-1]
        if self._plain(gate, n, ANYWHERE) is None or self._plain(up, n, ANYWHERE) is None:
            return super().swiglu(gate, up, matrix)
        plan = None if matrix is None else matrix.plan
        if plan is not None and (plan.col_fold is None or plan.cols != n):
            plan = None
        n_tokens, h = gate.numel() // n, torch.empty_like(gate)
        folded = None
        if plan is not None:
            folded = torch.empty(n_tokens, plan.folded_cols, dtype=gate.dtype, device=gate.device)
        self._gates.forward(gate, up, plan, h, folded, n_tokens, (n, n))
        return h, folded

    def swiglu_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = gate.shape[-1]
        if any(self._plain(x, n, ANYWHERE) is None for x in (dh, gate, up)):
            return super().swiglu_backward(dh, gate, up)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        self._gates.backward(dh, gate, up, dgate, dup, gate.numel() // n, (n, n, n))
        return dgate, dup

    def _places(self, repeats: int, plans: list[VectorPlan]) -> tuple[Tail, list[int]]:
        """Room for the sums of vectors over chunks, one behind the other."""
        tail = self._tails.get(repeats)
        if tail is None:
            offsets = self.segments.offsets_on(self.out.device, repeats)
            n_tokens = self._tokens[0] * self._tokens[1] * repeats
            chunks = self._cut(offsets, n_tokens, self._norms.CHUNK_TOKENS, True)
            tail = self._tails[repeats] = Tail(chunks, [], self.out.new_empty(0))
        slots = tail.chunks.n_slots
        need = slots * sum(plan.size for plan in plans)
        if tail.used + need > tail.sums.numel():
            self._launch_tail(tail, last=False)
        if need > tail.sums.numel():
            tail.sums = torch.empty(max(TAIL, need), dtype=torch.float32, device=self.out.device)
        places = []
        for plan in plans:
            places.append(tail.used)
            tail.used += slots * plan.size
        tail.plans += plans
        return tail, places

    def _launch_tail(self, tail: Tail, last: bool) -> None:
        """How many vectors there is room for depends on the batch; ``left`` keeps their order of sums the same."""
        plans, tail.plans, tail.used = tuple(tail.plans), [], 0
        if plans:
            args = tail.sums, plans, tail.chunks, self.out, tail.left, last
            tail.left = self._vectors.sketch_tail(*args)

    # ------------------------------------------------------------------------------------------ the end
    def _launch(self) -> None:
        """What waits for company goes now."""
        if self._matrices:
            self._launch_matrices()
        if self._biases:
            self._launch_biases()

    def settle(self) -> torch.Tensor:
        self._launch()
        for tail in self._tails.values():
            self._launch_tail(tail, last=True)
        sums, self._sums = self._sums, None
        if sums is not None:
            self._reduce(sums, self.out, self._chunks, sums.shape[1])
        return self.out
