"""Fused taps: RMSNorm and SwiGLU modules of a model, computed by kernels that also give what the sketch needs.

While a sketcher with ``fused=True`` is active, the ``forward`` of these modules is replaced, as that of experts is. The
norm's backward gives dx and, from the same read of x and dy, the sums that the scale's sketch needs; SwiGLU's forward
gives the folded inputs of down_proj with its product. Eager, a norm reads and writes some 120 bytes a number and pass,
and the product of a gated MLP 28; fused, 10 and 16 (bfloat16).

In the self-test's runs with trainable weights the modules' own code runs. The taps over frozen weights, and with them
the fused kernels, are compared with those runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ...names import module_name
from ...ops.rms_norm import rms_norm_backward
from ..model import sharded
from ..model.replaced import Replaced
from ..model.state import inside_compiled
from ..sums.accumulator import Accumulator
from ..sums.engine import Operators
from ..sums.matrix import MatrixSketch
from ..taps.taps import Hook, LinearTap, NormTap
from .attachment import Attachment
from .coverage import Coverage
from .fusable import against_gate, against_norm, looks_like_gate, looks_like_norm

NORM, GATE = "RMSNorm", "SwiGLU"


class _RmsNorm(torch.autograd.Function):
    """An RMSNorm whose backward lets ``tap`` add the scale's gradient to the open batch; None: nothing is added."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, acc: Accumulator, tap: NormTap | None
    ) -> torch.Tensor:
        y, scale = acc.engine.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.tap, ctx.segments = tap, acc.segments
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        dx = None if ctx.tap is None else ctx.tap.ride(dy, x, weight, scale, ctx.segments)
        if dx is None:  # no gradient of the weight is sketched
            n = x.shape[-1]
            dx = rms_norm_backward(dy.reshape(-1, n), x.reshape(-1, n), weight, scale)[0].view(x.shape)
        return dx, None, None, None, None


class _SwiGlu(torch.autograd.Function):
    """``silu(gate) * up`` and, for the ``matrix`` of the layer that reads it, the folded product."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, engine: Operators, matrix: MatrixSketch | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        h, folded = engine.swiglu(gate, up, matrix)
        ctx.save_for_backward(gate, up)
        ctx.engine = engine
        if folded is not None:
            ctx.mark_non_differentiable(folded)
        return h, folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor, _: Any) -> Any:
        return *ctx.engine.swiglu_backward(dh, *ctx.saved_tensors), None, None


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The modules of a model that are computed by fused kernels, and candidates that are not, with the reason."""

    acc: Accumulator
    norms: dict[nn.Module, str] = dataclasses.field(default_factory=dict)  # each with its name
    gates: dict[nn.Module, str] = dataclasses.field(default_factory=dict)
    unfused: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        return {kind: len(fused) for kind, fused in ((NORM, self.norms), (GATE, self.gates)) if fused}

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in self.counts.items())
        return f"; fused: {counts}" if counts else ""

    def reported(self, coverage: Coverage) -> Coverage:
        return dataclasses.replace(coverage, fused=self.counts, unfused=self.unfused)

    def hook(self, plan: Attachment) -> list[Hook]:
        """Replace the modules' forwards, until the returned handles' `remove`."""
        taps = plan.taps
        handles: list[Hook] = []
        for module, where in self.norms.items():
            tap = taps.get(module)
            norm = _FusedNorm(self.acc, where, tap if isinstance(tap, NormTap) else None)
            handles.append(Replaced(module, norm.run))
        for module, where in self.gates.items():
            reader = taps.get(module.get_submodule("down_proj"))
            gate = _FusedGate(self.acc, where, reader.matrix if isinstance(reader, LinearTap) else None)
            handles.append(Replaced(module, gate.run))
        return handles


@dataclasses.dataclass(frozen=True)
class _Fused:
    """What runs in the place of a module's forward; ``where`` is the module's name."""

    acc: Accumulator
    where: str

    def runs(self, module: nn.Module) -> bool:
        """Whether the fused kernel computes this call: in a batch, except in the self-test's run by the module's own
        code."""
        if self.acc.segments is None:
            return False
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"fused=True: {self.where} is being compiled: leave out torch.compile, or fused=True"
            )
        return self.acc.listener is None or not any(p.requires_grad for p in module.parameters())


@dataclasses.dataclass(frozen=True)
class _FusedNorm(_Fused):
    """An RMSNorm; ``tap`` adds the gradient of its scale. None: that is not sketched."""

    tap: NormTap | None

    def run(self, module: Any, original: Any, hidden_states: torch.Tensor) -> Any:
        # Where the graph begins at this module's output, no gradient of its input is needed.
        begins = torch.is_grad_enabled() and not hidden_states.requires_grad
        if begins or not self.runs(module):
            return original(hidden_states)
        if hidden_states.dtype != module.weight.dtype:
            raise ValueError(
                f"fused=True: {self.where} has {module.weight.dtype} weights and {hidden_states.dtype} inputs: give "
                "the model one dtype, call it outside of autocast, or leave out fused=True"
            )
        rides = self.tap if self.acc.listens and self.tap is not None and self.tap.adds else None
        return _RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon, self.acc, rides)


@dataclasses.dataclass(frozen=True)
class _FusedGate(_Fused):
    """A gated MLP; ``matrix``: the sketch of the layer that reads its product. None: that is not sketched."""

    matrix: MatrixSketch | None

    def run(self, module: Any, original: Any, x: torch.Tensor) -> Any:
        if not self.runs(module):
            return original(x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        matrix = self.matrix if self.acc.listens else None
        h, folded = _SwiGlu.apply(gate, up, self.acc.engine, matrix)
        if matrix is not None and folded is not None:
            self.acc.keep_fold(matrix.fold_key, h, folded)
        return module.down_proj(h)


def find_fusion(model: nn.Module, plan: Attachment, wanted: bool) -> Fusion:
    """What can be fused of a ``model`` as the caller gave it (with its wrappers); nothing unless it is ``wanted``.

    Raises:
        ValueError: nothing can be, or the model is compiled, sharded or split over ranks; says why.
    """
    if not wanted:
        return Fusion(plan.acc)
    remedy = "leave out fused=True"
    if inside_compiled(model):
        raise ValueError(f"fused=True: the model is compiled, and its graphs call no module: {remedy}")
    if plan.ranks is not None or sharded.units(model):
        raise ValueError(f"fused=True: the model is split over ranks, which is not supported: {remedy}")
    fusion = Fusion(plan.acc)
    for path, module in model.named_modules():
        where = module_name(path)
        for looks, against, fused in (
            (looks_like_norm, against_norm, fusion.norms),
            (looks_like_gate, against_gate, fusion.gates),
        ):
            if not looks(module):
                continue
            if (reason := against(module)) is None:
                fused[module] = where
            else:
                fusion.unfused[where] = f"{type(module).__name__}: {reason}"
    if not fusion.counts:
        why = "; ".join(f"{name} ({reason})" for name, reason in list(fusion.unfused.items())[:3])
        raise ValueError(
            f"fused=True: {type(model).__name__} has no RMSNorm and no SwiGLU that is known here"
            + (f" ({why})" if why else "")
            + f": {remedy}"
        )
    return fusion
