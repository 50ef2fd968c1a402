"""Where every coordinate of a parameter lands in the sketch: a pure function of the spec, the name and the shape.

The slab sketch of a matrix gradient G [R, C] (docs/sketch.md has the formulas):

1. fold: columns (inputs of a linear layer) or rows (vocabulary of a tied head) are summed into fewer features with
   signs; block b of `width` features is XORed with a multiple of 8;
2. slab: the folded matrix is cut into blocks of slab_rows x slab_cols = 32768 entries; block (I, J) is added to a slab
   with a pair sign, its row and column indices XORed with multiples of 8 drawn for the pair.

Column randomness is keyed by the parent module: layers that read the same input (q/k/v, gate/up) share one fold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import philox as px
from ._spec_base import as_int
from .spec import SLAB_SIZE, SketchSpec

Role = Literal["linear", "embedding", "tied"]
MAX_SLAB_COLS = 256


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixPlan:
    """Plan of a matrix parameter seen as [out_features or vocabulary, in_features or hidden]; made by `plan_matrix`.

    ``rows, cols`` are the gradient's, ``folded_rows, folded_cols`` those that reach the slabs, of which there are
    ``n_slabs`` of [slab_rows, slab_cols]. ``row_sign`` [rows] and ``col_sign`` [cols] apply once: in the fold where
    there is one, in the slab otherwise. ``row_fold`` and ``col_fold`` hold the XOR of each block of a fold, None for no
    fold; the ``pair_*`` [row blocks, column blocks] the XOR of rows and of columns, the slab and the sign of each block
    of the folded matrix. Layers with one ``fold_key`` fold their inputs alike.

    >>> plan_matrix(SketchSpec(1024), "up_proj.weight", 48, 32, role="linear").folded_cols
    32
    """

    name: str
    rows: int
    cols: int
    folded_rows: int
    folded_cols: int
    slab_rows: int
    slab_cols: int
    n_slabs: int
    row_sign: NDArray[np.float32]
    col_sign: NDArray[np.float32]
    row_fold: NDArray[np.uint32] | None
    col_fold: NDArray[np.uint32] | None
    pair_row: NDArray[np.uint32]
    pair_col: NDArray[np.uint32]
    pair_slab: NDArray[np.uint32]
    pair_sign: NDArray[np.float32]
    fold_key: str
    # The arguments that made the plan: how it passes through an operator's schema, which takes no objects. Not copied
    # by dataclasses.replace, whose result is another plan.
    recipe: str = dataclasses.field(default="", init=False)

    @property
    def dim(self) -> int:
        """Numbers of a sketch, in all its slabs."""
        return self.n_slabs * self.slab_rows * self.slab_cols

    @property
    def n_row_blocks(self) -> int:
        return self.pair_row.shape[0]

    @property
    def n_col_blocks(self) -> int:
        return self.pair_row.shape[1]

    def fold_rows(self, row: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Folded row and sign of each row index."""
        sign = self.row_sign[row]
        if self.row_fold is None:
            return row, sign
        width = self.folded_rows
        return (row % width) ^ self.row_fold[row // width].astype(np.int64), sign


@dataclasses.dataclass(frozen=True, eq=False)
class VectorPlan:
    """Plan of a vector parameter: coordinate i is added to ``position[i]``, below ``dim``, with ``sign[i]``.

    Made by `plan_vector`. ``blocks`` int64 [blocks, 2]: the slab's first position, and the XOR of the places within it,
    of every ``block`` coordinates; ``sign`` int8 [size].

    >>> plan_vector(SketchSpec(1024), "norm.weight", 32).size
    32
    """

    name: str
    size: int
    dim: int
    block: int
    blocks: NDArray[np.int64]
    sign: NDArray[np.int8]
    recipe: str = dataclasses.field(default="", init=False)

    @property
    def position(self) -> NDArray[np.int64]:
        """int64 [size], made anew: for large vectors eight times the plan."""
        index = np.arange(self.size)
        start, xor = self.blocks[index // self.block].T
        return start + (index % self.block ^ xor)


def plan_matrix(spec: SketchSpec, name: str, rows: int, cols: int, role: Role = "linear") -> MatrixPlan:
    """Where the gradient [rows, cols] of a matrix parameter lands in the sketch.

    >>> plan = plan_matrix(SketchSpec(), "model.layers.0.mlp.up_proj.weight", 1536, 576)
    >>> d, a, offsets = torch.randn(10, 1536), torch.randn(10, 576), torch.tensor([0, 4, 10])
    >>> sketch_linear(d, a, offsets, plan, torch.zeros(2, 32768)).shape  # of tokens 0 to 3 and 4 to 9
    torch.Size([2, 32768])

    Args:
        spec: its dim, width, vocab_width, seed and version count.
        name: the parameter's name without the marks of wrappers (`canonical_name`): another name draws other signs and
            places. Matrices of one parent module with as many columns (q/k/v, gate/up) share the fold of the columns.
        role: ``"linear"`` folds the columns to ``spec.width``; ``"tied"`` folds the rows to ``spec.vocab_width``;
            ``"embedding"`` folds nothing (only the rows that occur cost anything).

    Plans are cached: equal arguments give the same object.

    Raises:
        ValueError: a side is below 1, or ``role`` is not one of the three.
    """
    sides = as_int(rows, 1), as_int(cols, 1)
    if None in sides:
        raise ValueError(f"shape=({rows}, {cols}) of {name!r}: both sides must be integers, at least 1")
    if role not in ("linear", "embedding", "tied"):
        raise ValueError(f"role={role!r} of {name!r}: give 'linear', 'embedding' or 'tied'")
    width = spec.width if role == "linear" else None
    vocab = spec.vocab_width if role == "tied" else None
    return _plan_matrix(
        spec.version, spec.seed, max(1, spec.base_dim // SLAB_SIZE), name, *sides, width, vocab
    )


@functools.lru_cache(maxsize=16384)
def _plan_matrix(
    version: int,
    seed: int,
    n_slabs: int,
    name: str,
    rows: int,
    cols: int,
    width: int | None,
    vocab: int | None,
) -> MatrixPlan:
    fold_key = name.rsplit(".", 2)[0] if name.count(".") >= 2 else name
    key = px.key_of(version, seed, name)
    col_key = px.key_of(version, seed, f"{fold_key}/columns/{cols}")
    folded_cols = cols if width is None else min(cols, width)
    folded_rows = rows if vocab is None else min(rows, vocab)
    folds_cols, folds_rows = folded_cols < cols, folded_rows < rows
    slab_cols = min(MAX_SLAB_COLS, max(8, 1 << (folded_cols - 1).bit_length()))
    slab_rows = SLAB_SIZE // slab_cols
    row_blocks, col_blocks = -(-folded_rows // slab_rows), -(-folded_cols // slab_cols)
    draw = px.philox(key, np.arange(row_blocks)[:, None], np.arange(col_blocks)[None, :], px.PAIR)
    plan = MatrixPlan(
        name=name,
        rows=rows,
        cols=cols,
        folded_rows=folded_rows,
        folded_cols=folded_cols,
        slab_rows=slab_rows,
        slab_cols=slab_cols,
        n_slabs=n_slabs,
        row_sign=px.signs(key, rows, px.ROW_SIGN),
        col_sign=px.signs(col_key, cols, px.COLUMN_SIGN),
        row_fold=px.offsets(key, -(-rows // folded_rows), folded_rows, px.ROW_FOLD) if folds_rows else None,
        col_fold=px.offsets(col_key, -(-cols // folded_cols), folded_cols, px.COLUMN_FOLD)
        if folds_cols
        else None,
        pair_row=np.ascontiguousarray(px.xor_offset(draw[..., 1], slab_rows)),
        pair_col=np.ascontiguousarray(px.xor_offset(draw[..., 2], slab_cols)),
        pair_slab=np.ascontiguousarray(draw[..., 3] & np.uint32(n_slabs - 1)),
        pair_sign=np.ascontiguousarray(1.0 - 2.0 * (draw[..., 0] & 1)).astype(np.float32),
        fold_key=f"{fold_key}/{cols}/{width}",
    )
    return _with_recipe(plan, version, seed, n_slabs, name, rows, cols, width, vocab)


def plan_vector(spec: SketchSpec, name: str, size: int) -> VectorPlan:
    """Where the gradient [size] of vector parameter ``name`` (as in `plan_matrix`) lands in the sketch of ``spec``.

    Coordinate i goes to (i mod m) XOR draw(i // m) of a slab, with its own sign; ``m`` is the slab's size 32768, or the
    sketch's dim where that is smaller (the comparison kinds). Plans are cached.

    Raises:
        ValueError: ``size`` is below 1.

    >>> out = torch.zeros(1, 32768)
    >>> _ = sketch_vector(torch.ones(1, 32), plan_vector(SketchSpec(1024), "norm.weight", 32), out)
    >>> float(out.norm()) ** 2 > 0
    True
    """
    whole = as_int(size, 1)
    if whole is None:
        raise ValueError(f"size={size} of {name!r}: must be an integer, at least 1")
    return _plan_vector(spec.version, spec.seed, spec.base_dim, name, whole)


@functools.lru_cache(maxsize=16384)
def _plan_vector(version: int, seed: int, dim: int, name: str, size: int) -> VectorPlan:
    key = px.key_of(version, seed, name)
    block = min(dim, SLAB_SIZE)
    draw = px.philox(key, np.arange(-(-size // block)), 0, px.PAIR)
    slab = draw[:, 3] & np.uint32(dim // block - 1)
    blocks = np.stack([slab.astype(np.int64) * block, px.xor_offset(draw[:, 1], block)], 1)
    plan = VectorPlan(name, size, dim, block, blocks, px.signs(key, size, px.ROW_SIGN).astype(np.int8))
    return _with_recipe(plan, version, seed, dim, name, size)


# ------------------------------------------------------------------------------------------------- recipes
Plan = TypeVar("Plan", MatrixPlan, VectorPlan)


def _with_recipe(plan: Plan, *made_from: object) -> Plan:
    object.__setattr__(plan, "recipe", json.dumps(made_from))  # the one thing that is known after the fact
    return plan


def recipe_of(plan: MatrixPlan | VectorPlan) -> str:
    """What the operators take for ``plan``.

    Raises:
        ValueError: the plan was not made by `plan_matrix` or `plan_vector`.
    """
    if not plan.recipe:
        raise ValueError(
            f"the plan of {plan.name!r} was changed by hand: make plans by plan_matrix and plan_vector"
        )
    return plan.recipe


@functools.lru_cache(maxsize=16384)
def matrix_plan_of(recipe: str) -> MatrixPlan:
    return _plan_matrix(*json.loads(recipe))


@functools.lru_cache(maxsize=16384)
def vector_plan_of(recipe: str) -> VectorPlan:
    return _plan_vector(*json.loads(recipe))
