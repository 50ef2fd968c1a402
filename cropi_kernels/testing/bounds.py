"""Bounds from theory, so that no test guesses a tolerance."""

from __future__ import annotations

import torch


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
