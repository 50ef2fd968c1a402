"""The sketch of a matrix parameter, by the kind of the spec."""

from __future__ import annotations

from ..plan import Role
from ..spec import SketchSpec
from .baselines import FlatMatrix, KronMatrix, TensorMatrix
from .slab import MatrixSketch, SlabMatrix


def matrix_sketch(spec: SketchSpec, name: str, rows: int, cols: int, role: Role) -> MatrixSketch:
    """The sketch of a matrix parameter for ``spec.kind``."""
    kinds: dict[str, type[MatrixSketch]] = {
        "slab": SlabMatrix,
        "countsketch": FlatMatrix,
        "dropout": FlatMatrix,
        "kron": KronMatrix,
        "tensor": TensorMatrix,
    }
    return kinds[spec.kind](spec, name, rows, cols, role)
