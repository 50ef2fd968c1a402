"""The sketches that are compared, computed from one gradient that exists.

A sketch is linear, so the sketch of a formed gradient is the sketch that the taps would have made (the benchmark checks
that on its first prompts). Every parameter group is sketched apart: sums of groups give the whole model, and any choice
of width per layer type, without sketching again.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from cropi_kernels import SketchSpec, plan_matrix, project, projection_of, sketch_embedding, sketch_vector
from cropi_kernels.plan import VectorPlan, plan_vector
from cropi_kernels.sketcher.sums.matrix import KronMatrix, TensorMatrix

PARTS = 8  # a gradient's rows are sketched in parts, in parallel


@dataclasses.dataclass(frozen=True)
class Variant:
    """One sketch of one group of parameters: ``label`` names the family and its one setting."""

    label: str
    spec: SketchSpec
    roles: tuple[str, ...]  # roles of matrices that it applies to; vectors use the slab's plan throughout


def variants(
    seeds: int, widths: list[int | None], vocab_widths: list[int | None], keeps: list[float]
) -> list[Variant]:
    found = []
    for seed in range(seeds):
        for width in widths:
            found.append(
                Variant(f"slab/width={width or 'full'}", SketchSpec(seed=seed, width=width), ("linear",))
            )
        for vocab in vocab_widths:
            spec = SketchSpec(seed=seed, vocab_width=vocab)
            found.append(Variant(f"slab/vocab={vocab or 'full'}", spec, ("tied", "embedding")))
        for width in (64, 128):  # the other side of a tied head: its hidden features folded like any input
            spec = SketchSpec(seed=seed, width=width)
            found.append(Variant(f"slab/hidden={width}", spec, ("tied-as-linear",)))
        found.append(Variant("slab/vector", SketchSpec(seed=seed), ("vector",)))
        for keep in keeps:
            spec = SketchSpec(seed=seed, kind="dropout", keep=keep)
            found.append(Variant(f"dropout/keep={keep:g}", spec, ("linear", "tied", "embedding", "vector")))
        for kind in ("kron", "tensor"):
            spec = SketchSpec(seed=seed, kind=kind)  # type: ignore[arg-type]
            found.append(Variant(kind, spec, ("linear", "tied", "embedding", "vector")))
    return found


class Sketcher:
    """Sketches formed gradients under one spec; dense matrices are drawn once and kept for the next prompt."""

    def __init__(self, spec: SketchSpec) -> None:
        self.spec = spec
        self._drawn: dict[str, KronMatrix | TensorMatrix] = {}

    def matrix(self, name: str, gradient: torch.Tensor, role: str) -> torch.Tensor:
        spec = self.spec
        if spec.kind == "slab":
            return _slab(spec, name, gradient, role)
        if spec.kind == "dropout":
            return project(gradient.reshape(1, -1), projection_of(spec, name))[0]
        if name not in self._drawn:
            kind = KronMatrix if spec.kind == "kron" else TensorMatrix
            self._drawn[name] = kind(spec, name, *gradient.shape, "linear")
        drawn = self._drawn[name]
        if isinstance(drawn, KronMatrix):
            return (drawn.p_out.T @ gradient @ drawn.p_in).reshape(-1)
        return _tensor(drawn, gradient)

    def vector(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        plan: VectorPlan = plan_vector(self.spec, name, gradient.numel())
        return sketch_vector(gradient[None], plan, torch.zeros(1, self.spec.base_dim))[0]


def _slab(spec: SketchSpec, name: str, gradient: torch.Tensor, role: str) -> torch.Tensor:
    """A gradient's rows, each of them "looked up" once: the same addresses as the taps use."""
    rows, cols = gradient.shape
    plan = plan_matrix(spec, name, rows, cols, "linear" if role == "tied-as-linear" else role)  # type: ignore[arg-type]
    bounds = torch.linspace(0, rows, PARTS + 1).long()
    out = torch.zeros(PARTS, spec.base_dim)
    return sketch_embedding(gradient, torch.arange(rows), bounds, plan, out).sum(0)


def _tensor(sketch: TensorMatrix, gradient: torch.Tensor) -> torch.Tensor:
    """The bucket of coordinate (r, c) is (h(r) + h'(c)) mod dim: a bincount per panel of rows."""
    dim, total = sketch.spec.dim, np.zeros(sketch.spec.dim)
    signed = gradient * sketch.col_sign
    column = sketch.col_bucket.numpy().astype(np.int64)
    row, sign = sketch.row_bucket.numpy(), sketch.row_sign
    step = max(1, (1 << 22) // gradient.shape[1])
    for r in range(0, gradient.shape[0], step):
        bucket = ((row[r : r + step, None] + column[None, :]) & (dim - 1)).reshape(-1)
        values = (signed[r : r + step] * sign[r : r + step, None]).reshape(-1).numpy()
        total += np.bincount(bucket, weights=values, minlength=dim)
    return torch.from_numpy(total).float()
