"""Oracles and error bounds that tests and benchmarks share; installed, so that users can check their own models."""

from __future__ import annotations

from .bounds import countsketch_variance, fold_variance, slab_variance, sum_error_bound
from .oracle import exact_gradient, sketch_and_magnitudes, sketch_gradients
from .projections import PROJECTION_CASES, projection_magnitudes

__all__ = [
    "PROJECTION_CASES",
    "countsketch_variance",
    "exact_gradient",
    "fold_variance",
    "projection_magnitudes",
    "sketch_and_magnitudes",
    "sketch_gradients",
    "slab_variance",
    "sum_error_bound",
]
