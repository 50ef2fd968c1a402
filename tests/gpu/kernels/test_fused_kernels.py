"""rms_norm and swiglu, and their gradients, in Triton against float64; and as the GPU engine launches them."""

from __future__ import annotations

import pytest
import torch
from rehearsal import set_stage

from cropi_kernels import (
    MatrixPlan,
    SketchSpec,
    fold_inputs,
    plan_matrix,
    plan_vector,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)
from cropi_kernels.sketcher.batch.segments import Segments
from cropi_kernels.sketcher.sums.engine import Norm, Operators, Site
from cropi_kernels.sketcher.sums.gpu_engine import GpuEngine
from cropi_kernels.sketcher.sums.matrix import SlabMatrix
from cropi_kernels.testing import sum_error_bound

EPS = 1e-6


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def within(got: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, depth: int) -> bool:
    info = torch.finfo(got.dtype)
    allowed = sum_error_bound(size.abs(), depth) + exact.abs() * (info.eps / 2) + info.tiny * info.eps
    return bool(((got.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("n", [1, 300])
def test_norm(n: int, dtype: torch.dtype) -> None:
    x, dy = ((normal(seed, 50, n + 8) + 1).to(dtype)[:, :n] for seed in (0, 1))  # rows apart
    weight, offsets = (normal(2, n) + 1).to(dtype), torch.tensor([0, 40, 40, 41, 50])
    y, scale = rms_norm(x, weight, EPS, backend="triton")
    exact, exact_scale = rms_norm(x.double(), weight.double(), EPS, backend="reference")
    depth = n + 10  # a sum in any order
    assert within(y, exact, exact, depth) and within(scale, exact_scale, exact_scale, depth)
    dx, sums = rms_norm_backward(dy, x, weight, scale, offsets, backend="triton")
    wide = dy.double(), x.double(), weight.double(), exact_scale, offsets
    exact, exact_sums = rms_norm_backward(*wide, backend="reference")
    sizes = rms_norm_backward(wide[0].abs(), -wide[1].abs(), *wide[2:], backend="reference")[1]
    assert sums is not None and exact_sums is not None and sizes is not None
    assert within(dx, exact, _sizes(*wide[:4]), 2 * depth)
    assert within(sums, exact_sums, sizes, 50 + depth)
    again = rms_norm_backward(dy, x, weight, scale, offsets, backend="triton")
    alone, nothing = rms_norm_backward(dy, x, weight, scale, backend="triton")
    assert all(map(torch.equal, again, (dx, sums))) and nothing is None and torch.equal(alone, dx)  # type: ignore[arg-type]


def _sizes(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Of the terms of dx."""
    g, xhat = (dy * weight).abs(), x.abs() * scale[:, None]
    return scale[:, None] * (g + xhat * (g * xhat).mean(1, keepdim=True))


def test_a_norm_of_segments_does_not_depend_on_company(half: torch.dtype) -> None:
    x, dy, weight = normal(0, 90, 72).to(half), normal(1, 90, 72).to(half), normal(2, 72).to(half)
    scale = rms_norm(x, weight, EPS, backend="triton")[1]
    whole = rms_norm_backward(dy, x, weight, scale, torch.tensor([0, 10, 80, 90]), backend="triton")
    part = slice(10, 80)
    alone = rms_norm_backward(dy[part], x[part], weight, scale[part], torch.tensor([0, 70]), backend="triton")
    assert whole[1] is not None and alone[1] is not None
    assert torch.equal(alone[0], whole[0][part]) and torch.equal(alone[1][0], whole[1][1])


@pytest.mark.parametrize("n", [1, 300])
def test_gate(n: int, dtype: torch.dtype) -> None:
    gate, up, dh = (normal(seed, 21, n + 8).to(dtype)[:, :n] for seed in (3, 4, 5))
    gate = gate * 4
    gate[2], gate[3] = -130, 130
    wide = dh.double(), gate.double(), up.double()
    exact, _ = swiglu(*wide[1:], backend="reference")
    h, folded = swiglu(gate, up, backend="triton")
    lost = 130 * 2.0**-120  # below exp(-87): no normal numbers are left
    depth = 16  # of which the exponential may take 8
    assert folded is None and within(h, exact, exact.abs() + lost, depth)
    dgate, dup = swiglu_backward(dh, gate, up, backend="triton")
    exact_gate, exact_up = swiglu_backward(*wide, backend="reference")
    s = torch.sigmoid(wide[1])
    slope = (wide[0] * wide[2]).abs() * (s + s * (1 - s) * wide[1].abs())
    assert within(dgate, exact_gate, slope + lost, depth) and within(
        dup, exact_up, exact_up.abs() + lost, depth
    )


def is_fold_of(h: torch.Tensor, folded: torch.Tensor, plan: MatrixPlan) -> bool:
    """The blocks of a fold are added in float32, in an order of their own."""
    exact, blocks = fold_inputs(h.double(), plan, backend="reference"), -(-plan.cols // plan.folded_cols)
    return bool(folded.any()) and within(folded, exact, h.double().abs().sum(-1, keepdim=True), blocks)


@pytest.mark.parametrize("width, n", [(16, 24), (16, 1100), (256, 300), (2048, 2100)])
def test_the_fold_rides(width: int, n: int, dtype: torch.dtype) -> None:
    plan = plan_matrix(SketchSpec(width=width), "model.0.mlp.down_proj.weight", 20, n)
    gate, up = normal(3, 11, n).to(dtype), normal(4, 11, n).to(dtype)
    h, folded = swiglu(gate, up, plan, backend="triton")
    assert torch.equal(h, swiglu(gate, up, backend="triton")[0])
    assert folded is not None and is_fold_of(h, folded, plan)


def test_offsets_on_a_device_that_leave_tokens_out_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(0, 9, 8), torch.ones(8)
    scale = rms_norm(x, weight, EPS, backend="triton")[1]
    from cropi_kernels.ops.rms_norm import ops

    class Device:
        type = "cuda"

    class Elsewhere(torch.Tensor):
        device = Device()  # type: ignore[assignment]

    monkeypatch.setattr(ops, "offsets_for", lambda backend, offsets, x: offsets.as_subclass(torch.Tensor))
    monkeypatch.setattr(ops, "check_offsets", lambda offsets: offsets.numel() - 1)
    offsets = torch.tensor([0, 4, 7]).as_subclass(Elsewhere)
    dx, _ = ops._backward(x, x, weight, scale, offsets, "triton")
    assert dx[:7].isfinite().all() and dx[7:].isnan().all()


# ------------------------------------------------------------------------------------------------ the engine
SITE = Site("a.norm")


def run(engine: Operators, dtype: torch.dtype) -> list[torch.Tensor]:
    """What fused taps ask of an engine in a pass: a norm of tokens, one of heads, one of rows with heads in front, an
    MLP; each in forward and backward."""
    results = []
    shapes = {"norm": (2, 40, 72), "q_norm": (2, 40, 3, 8), "k_norm": (2, 3, 40, 8)}
    for seed, (name, shape) in enumerate(shapes.items()):
        x, dy = normal(seed, *shape).to(dtype), normal(seed + 10, *shape).to(dtype)
        weight = normal(seed + 20, shape[-1]).to(dtype)
        y, scale = engine.rms_norm(x, weight, EPS)
        norm = Norm(False, EPS, plan_vector(SketchSpec(), f"model.0.{name}.weight", shape[-1]), None)
        results += [y, engine.add_rms_norm(dy, x, weight, scale, norm, Site(name, name == "k_norm"))]
    matrix = SlabMatrix(SketchSpec(width=16), "model.0.mlp.down_proj.weight", 24, 40, "linear")
    gate, up, dh = (normal(seed, 2, 40, 40).to(dtype) for seed in (30, 31, 32))
    h, folded = engine.swiglu(gate, up, matrix)
    fold = engine.fold(h, matrix, SITE)
    assert folded is None or is_fold_of(h.flatten(0, 1), folded, matrix.plan)
    return [*results, h, fold, *engine.swiglu_backward(dh, gate, up), engine.settle()]


def test_the_engine_gives_what_operators_give(half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_stage(monkeypatch)
    where = Segments.of(torch.tensor([0] * 35 + [1] * 45).view(2, 40), 2, 40, None)
    got = run(GpuEngine(where, torch.zeros(2, 32768)), half)
    want = run(Operators(where, torch.zeros(2, 32768)), half)
    for a, b in zip(got[:-1], want[:-1], strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-5, atol=1e-5)  # chunks are added up later
    assert want[-1].any()


@pytest.mark.parametrize("n", [3, 18, 30, 32])
def test_all_numbers_of_a_narrow_row_have_the_scale_that_is_kept(n: int) -> None:
    """Lanes that share a row have one scale, to the bit."""
    x, weight = torch.randn(300, n, generator=torch.Generator().manual_seed(n)), torch.ones(n)
    y, scale = rms_norm(x, weight, 1e-6, backend="triton")
    assert torch.equal(y, x * scale[:, None])
