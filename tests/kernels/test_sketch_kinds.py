"""The kinds for comparison, matrix by matrix, against their coordinates written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.tensors import normal

from cropi_kernels import SketchSpec
from cropi_kernels.sketcher.sums.matrix import MatrixSketch, TensorMatrix, matrix_sketch
from cropi_kernels.testing.oracle import _sketch_matrix

NAME = "model.layers.0.mlp.up_proj.weight"
OFFSETS = torch.tensor([0, 30, 30, 31, 75])
SPECS = [
    SketchSpec(width=16, vocab_width=16),
    SketchSpec(kind="countsketch", dim=256),
    SketchSpec(kind="dropout", dim=1 << 17, keep=0.3),
    SketchSpec(kind="kron", dim=128),
    SketchSpec(kind="tensor", dim=64),
    SketchSpec(kind="tensor", dim=32768),
]


def allowed(matrix: MatrixSketch, d: torch.Tensor, a: torch.Tensor) -> float:
    """Bound of the L2 error of a sketch of ``d^T a``, in units of ``2^-24 sum_t |d_t| |a_t|``.

    A sum of n terms per coordinate: n. Dense projections: a sum of m terms rounds m times, relative to a sum of
    absolute values that is up to sqrt(m) larger. FFT: 3 roundings per stage and transform (Higham, 2002, section
    24.1), relative to the largest value of the other spectrum, at most |d|_1.
    """
    tokens, kind = d.shape[0], matrix.spec.kind
    size = float((d.norm(dim=1) * a.norm(dim=1)).sum())
    if kind == "tensor":
        size = float((d.abs().sum(1) * a.norm(dim=1)).sum())
        return size * (3 * 3 * math.log2(matrix.spec.dim) + tokens)
    if kind == "kron":
        return size * (matrix.rows**1.5 + matrix.cols**1.5 + tokens)
    return size * (tokens + 10 + (matrix.cols if kind == "slab" else 0))


@pytest.mark.parametrize("role", ["linear", "tied", "embedding"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.dim}")
def test_kinds_within_rounding(spec: SketchSpec, role: str) -> None:
    """From inputs and output gradients, and from rows; a middle segment is empty."""
    matrix = matrix_sketch(spec, NAME, 50, 40, role)  # type: ignore[arg-type]
    d, a = normal(75, 50, seed=1), normal(75, 40, seed=2)
    index = torch.randint(0, 50, (75,), generator=torch.Generator().manual_seed(3))
    linear, rows = torch.zeros(4, spec.base_dim), torch.zeros(4, spec.base_dim)
    matrix.add(d, matrix.fold(a), OFFSETS, linear)
    matrix.add_rows(a, index, OFFSETS, rows)
    hot = torch.nn.functional.one_hot(index, 50).double()
    for s, (begin, end) in enumerate(zip(OFFSETS.tolist(), OFFSETS.tolist()[1:])):
        y = a[begin:end].double()
        for got, x in ((linear, d.double()), (rows, hot)):
            exact = _sketch_matrix(matrix, x[begin:end].T @ y)
            error = float((got[s] - exact).norm())
            assert error <= 2**-24 * allowed(matrix, x[begin:end], y), (s, error)
    assert not linear[1].any() and not rows[1].any()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.dim}")
def test_autocast_rounds_nothing(spec: SketchSpec) -> None:
    matrix, d, a = matrix_sketch(spec, NAME, 40, 50, "linear"), normal(75, 40, seed=0), normal(75, 50, seed=1)
    rows = torch.arange(75) % 40

    def run() -> torch.Tensor:
        out = torch.zeros(4, spec.base_dim)
        matrix.add(d, matrix.fold(a), OFFSETS, out)
        matrix.add_rows(a, rows, OFFSETS, out)
        return out

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), want)


def test_a_bucket_times_a_frequency_is_not_rounded() -> None:
    """At dim 2^20 a phase of 2^19 turns has no digits left behind the point in float32."""
    matrix = matrix_sketch(SketchSpec(kind="tensor", dim=1 << 20), NAME, 50, 40, "embedding")
    assert isinstance(matrix, TensorMatrix)
    x, out = torch.zeros(1, 40), torch.zeros(1, 1 << 20)
    x[0, 3] = 1.0
    matrix.add_rows(x, torch.tensor([7]), torch.tensor([0, 1]), out)
    where = int((matrix.row_bucket[7] + matrix.col_bucket[3]) % (1 << 20))
    assert abs(float(out[0, where]) - float(matrix.row_sign[7] * matrix.col_sign[3])) < 1e-4
    out[0, where] = 0
    assert float(out.abs().max()) < 1e-4
