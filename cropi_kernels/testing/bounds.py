"""Bounds from theory, so that no test guesses a tolerance."""

from __future__ import annotations

import itertools

import torch

from ..plan import MatrixPlan


def sum_error_bound(
    magnitudes: torch.Tensor, n_terms: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``|computed - exact| <= 1.01 * n * eps * sum |terms|`` for any order of summation (Higham, 2002, section 3.1).

    ``magnitudes`` is the sum of the terms' absolute values; ``eps`` the unit roundoff of ``dtype``, with one rounding
    per product and per addition (``n_terms`` counts both).
    """
    unit_roundoff = torch.finfo(dtype).eps / 2
    return magnitudes.double() * (1.01 * n_terms * unit_roundoff)


def countsketch_variance(x: torch.Tensor, y: torch.Tensor, dim: int) -> float:
    """Variance of ``<Sx, Sy>`` for a CountSketch: ``(|x|^2 |y|^2 + <x, y>^2 - 2 sum x^2 y^2) / dim``.

    (Charikar, Chen and Farach-Colton, 2002; Weinberger et al., 2009, lemma 2.)
    """
    x, y = x.double().reshape(-1), y.double().reshape(-1)
    return float((x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x * x) @ (y * y)) / dim)


def slab_variance(x: torch.Tensor, y: torch.Tensor, plan: MatrixPlan) -> float:
    """Exact variance over seeds of ``<Sx, Sy>`` for the slab sketch of matrices at their folded size (docs/sketch.md).

    Only the plan's geometry counts. Two blocks meet under XORs (R, C), uniform over multiples of 8, with independent
    pair signs; their noise is ``sum_ij rho_i gamma_j z_ij``, ``z_ij = x_ij y'_{i^R, j^C} + x'_{i^R, j^C} y_ij``. The
    product rho_i of the two row signs is independent over i, except for two blocks in one row of blocks: there
    ``rho_i = rho_{i^R}``, and all are 1 for R = 0. Likewise gamma. So the variance is the sum over pairs of blocks of
    the mean over R and C of ``sum_groups (sum of z over a group of equal signs)^2``.
    """
    blocks_x, blocks_y = _blocks(x, plan), _blocks(y, plan)
    total, n_xors = 0.0, (plan.slab_rows // 8) * (plan.slab_cols // 8)
    for one, two in itertools.combinations(blocks_x, 2):
        for row_xor in range(0, plan.slab_rows, 8):
            rows = torch.arange(plan.slab_rows, device="cpu") ^ row_xor
            x2, y2 = blocks_x[two][rows], blocks_y[two][rows]
            for col_xor in range(0, plan.slab_cols, 8):
                cols = torch.arange(plan.slab_cols, device="cpu") ^ col_xor
                z = blocks_x[one] * y2[:, cols] + x2[:, cols] * blocks_y[one]
                z = _equal_signs(z, 0, rows) if one[0] == two[0] else z
                z = _equal_signs(z, 1, cols) if one[1] == two[1] else z
                total += float(z.square().sum())
    return total / n_xors / plan.n_slabs


def fold_variance(x: torch.Tensor, y: torch.Tensor, width: int) -> float:
    """Exact variance over seeds of ``<x', y'>``, where x', y' are x, y [rows, cols] with columns folded to ``width``.

    ``(8 / width) sum (X[c, c'] + X[c', c])^2`` over the pairs of columns that can meet: equal mod 8, in other blocks
    of ``width``; ``X = x^T y``. Signs of two different pairs are uncorrelated.
    """
    product = x.double().T @ y.double()
    c = torch.arange(x.shape[1], device="cpu")
    meet = (c[:, None] % 8 == c % 8) & (c[:, None] // width != c // width)
    return float((product + product.T)[meet].square().sum() / 2 * (8 / width))  # every pair is there twice


def _blocks(m: torch.Tensor, plan: MatrixPlan) -> dict[tuple[int, int], torch.Tensor]:
    """Blocks of the slab's shape, zero-padded, by (I, J)."""
    size = plan.n_row_blocks * plan.slab_rows, plan.n_col_blocks * plan.slab_cols
    whole = m.new_zeros(size, dtype=torch.float64)
    whole[: m.shape[0], : m.shape[1]] = m
    return {
        (i, j): block
        for i, band in enumerate(whole.split(plan.slab_rows))
        for j, block in enumerate(band.split(plan.slab_cols, dim=1))
    }


def _equal_signs(z: torch.Tensor, axis: int, partner: torch.Tensor) -> torch.Tensor:
    """``z`` with the terms summed that share a sign along ``axis``; its sum of squares is that of the groups' sums."""
    if int(partner[0]) == 0:
        return z.sum(axis, keepdim=True)
    return (z + z.index_select(axis, partner)) * 0.5**0.5  # every pair is there twice
