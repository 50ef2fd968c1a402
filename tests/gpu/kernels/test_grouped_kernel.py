"""The grouped sketch's Triton kernel against float64: rows inside of blocks, groups without tokens, several shares."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from rehearsal import INTERPRETER

from cropi_kernels import MatrixPlan, SketchSpec, plan_matrix, sketch_grouped
from cropi_kernels.ops.sketch_grouped import triton as kernels
from cropi_kernels.ops.sketch_grouped.reference import sketch_grouped as reference
from cropi_kernels.ops.sketch_linear.reference import folded_coordinates
from cropi_kernels.testing import sum_error_bound

# groups, rows, cols, width, dim, first row, rows to the next group
CASES: dict[str, tuple[int, int, int, int | None, int, int, int]] = {
    "aligned": (4, 48, 96, 64, 32768, 0, 48),
    "odd rows": (3, 37, 40, 16, 32768, 5, 41),
    "straddling blocks": (3, 200, 300, None, 32768, 0, 200),
    "two slabs": (3, 300, 64, 64, 65536, 8, 304),
    "several shares": (27, 8, 9, None, 32768, 2000, 1000),
    "one part of a layer": (1, 48, 96, 64, 32768, 496, 48),
}
NOT_INTERPRETED = ("straddling blocks", "two slabs", "several shares")  # in float32
LENGTHS = [[1, 0, 20], [0, 0, 0], [70, 0, 3], [0, 0, 5]]


def make(
    case: str, dtype: torch.dtype
) -> tuple[MatrixPlan, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, int]]:
    groups, rows, cols, width, dim, first_row, step = CASES[case]
    plan = plan_matrix(SketchSpec(dim=dim, width=width), "a.experts.b", first_row + groups * step, cols)
    lengths = [LENGTHS[g % len(LENGTHS)] for g in range(groups)]
    offsets = torch.tensor([2, *itertools.chain(*lengths)]).cumsum(0)
    g = torch.Generator().manual_seed(0)
    d = torch.randn(int(offsets[-1]) + 1, rows, generator=g)
    a = torch.randn(len(d), plan.folded_cols, generator=g)
    return plan, d.to(dtype), a.to(dtype), offsets, dict(first_row=first_row, row_step=step)


def exact_and_bound(
    plan: MatrixPlan, d: torch.Tensor, a: torch.Tensor, offsets: torch.Tensor, where: Any
) -> Any:
    shape = 3, plan.n_slabs * 32768
    exact, size = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    reference(d.double(), a.double(), offsets, plan, exact, **where)
    bucket, _ = folded_coordinates(plan)
    for q, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        row = where["first_row"] + q // 3 * where["row_step"]
        terms = d[begin:end].double().abs().T @ a[begin:end].double().abs()
        size[q % 3].index_add_(0, bucket[row : row + d.shape[1]].reshape(-1), terms.reshape(-1))
    terms_a_number = int((offsets[1:] - offsets[:-1]).sum()) * plan.n_col_blocks + plan.n_row_blocks
    return exact, sum_error_bound(size, 2 * terms_a_number + 2)


@pytest.mark.parametrize("case", CASES)
def test_sketch_grouped(case: str, dtype: torch.dtype) -> None:
    if INTERPRETER and dtype == torch.float32 and case in NOT_INTERPRETED:
        pytest.skip("the exact float32 tiles are small: too many programs to interpret")
    plan, d, a, offsets, where = make(case, dtype)
    exact, bound = exact_and_bound(plan, d, a, offsets, where)
    start = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    out = sketch_grouped(d, a, offsets, plan, start.clone(), **where, backend="triton")
    error = (out.double() - start.double() - exact).abs()
    assert (error <= bound + 2.0**-22 * (start.abs() + exact.abs() + 1e-6)).all(), float(error.max())


def test_the_case_with_several_shares_has_them() -> None:
    groups, rows, _, _, _, first_row, step = CASES["several shares"]
    plan = make("several shares", torch.float32)[0]
    entries = kernels.grouped_pairs(plan, groups, rows, first_row, step, torch.device("cpu"))
    assert entries.most > kernels.GROUP_PAIRS and len(entries.words) >= groups


def test_a_segment_is_alone_in_the_world(half: torch.dtype) -> None:
    plan, d, a, offsets, where = make("odd rows", half)
    together = sketch_grouped(d, a, offsets, plan, torch.zeros(3, 32768), **where, backend="triton")
    ranges = list(zip(offsets.tolist(), offsets.tolist()[1:]))
    for s in range(3):
        mine = torch.cat([torch.arange(*ranges[q]) for q in range(s, 9, 3)])
        alone = torch.tensor([0, *(ranges[q][1] - ranges[q][0] for q in range(s, 9, 3))]).cumsum(0)
        got = sketch_grouped(d[mine], a[mine], alone, plan, torch.zeros(1, 32768), **where, backend="triton")
        assert torch.equal(got[0], together[s])


def test_not_a_number_stays_in_its_segment(half: torch.dtype) -> None:
    plan, d, a, offsets, where = make("aligned", half)
    clean = sketch_grouped(d, a, offsets, plan, torch.zeros(3, 32768), **where, backend="triton")
    a[30], d[31, 5] = float("nan"), float("inf")  # the third group's tokens of the first segment
    broken = sketch_grouped(d, a, offsets, plan, torch.zeros(3, 32768), **where, backend="triton")
    assert torch.equal(broken[1:], clean[1:]) and broken[0].isnan().any() and clean[2].any()


def test_strided_operands_of_different_dtypes(half: torch.dtype) -> None:
    plan, d, a, offsets, where = make("aligned", half)
    wanted = sketch_grouped(
        d.float(), a.float(), offsets, plan, torch.zeros(3, 32768), **where, backend="triton"
    )
    wide = torch.zeros(len(d), 200, dtype=half)
    wide[:, 3:51] = d
    got = sketch_grouped(
        wide[:, 3:51], a.float(), offsets, plan, torch.zeros(3, 32768), **where, backend="triton"
    )
    assert torch.equal(got, wanted)


def test_offsets_that_lie_stay_inside_of_the_tokens(half: torch.dtype) -> None:
    """On a device nobody checks them: the emulator raises where an access leaves its operand."""
    plan, d, a, _, where = make("aligned", half)
    lies = torch.tensor([0, 10**6, -7, 5, 3, 2**40, 1, 0, 0, 4, 4, 99999, -1])
    kernels.sketch_grouped(d, a, lies, plan, torch.zeros(3, 32768), **where)
