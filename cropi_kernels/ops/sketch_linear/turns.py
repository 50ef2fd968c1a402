"""Where `slab_turns_kernel` serves, with which constants."""

from __future__ import annotations

import functools
from typing import Any

from ... import _triton
from ..._launch import Launch

TURNS_FROM = 64  # columns of a slab
TURNS_STEP = 64  # tokens
# Without a fold: the steps of a chunk whose tiles of D fit into shared memory beside three stages of A, and the column
# blocks from which on they stay there (`what_d_is_of`). Not measured yet: no matrix has as many.
HELD_STEPS, HELD_FROM = 8, 1 << 20
# Whether slabs of 256 columns add to a pass's sums, as narrower ones do: by turns they have the registers for it. Not
# measured yet beside slots that are added up after every launch, which is what a pass does (`Stack.into`).
WIDE_SUMS = False
# Steps whose tiles of A stay in shared memory while pairs of 256 columns have a column block in common, and whether
# they do (`slab_stay_kernel`). Not measured yet.
STAY_STEPS, A_STAYS = 4, False


def turns_options(slab_cols: int, groups: int, held: bool = False, stays: bool = False) -> dict[str, int]:
    """Constants of `slab_turns_kernel`; 4 stages of 256 x 256 are 197 kB, as 6 of 128 x 128; 4 of 128 x 64 are 98.
    ``held``: tiles of D stay; 8 steps of both halves and 3 stages of A are 230 kB. ``stays``: of `slab_stay_kernel`; 4
    steps of A and 4 stages of D are 197 kB.

    Measured on an H200, in turns, 16384 tokens in 16 segments, microseconds of `slab_kernel`, and of slabs in 1, 2 and
    4 parts:

    - 256 columns: 8960 x 1536 184; 144. Without a fold 1099; 768. Products have 64 rows, so a part has 128 at least.
    - 128 columns: 1536 x 1536 (1 group) 48; 43, 29. 3584 x 3584 (2) 67; 56, 49. 8960 x 1536 (3) 139; 98, 109. Two of
      them (6) 259; 203, 185, but of 64 segments 288; 203, 220. Two of 18944 x 3584 (13) 544; 375, 401.
    - 64 columns: 1536 x 1536 27; 40, 24, 25. 8960 x 1536 101; 106, 88, 91. Two of them 189; 193, 165, 162. With two
      programs a multiprocessor, 4 parts: 23.6, 86, 168; of 64 segments 92 and 166 for 109 and 198.

    Programs that stay, and begin to copy for the next part before they write one, gained nothing: their turns are
    fixed, the device's own are not (144 and 152, 98 and 98, 86 and 91).
    """
    if slab_cols == 64:  # 80 registers for each of 12 warps: two programs a multiprocessor
        return {"PARTS": 4, "STAGES": 4, "HELD": 0, "OF_SECOND": 88, "OF_COPIES": 64, "maxnreg": 80}
    # 168 for each; up to 128 hold a group's sums. From Triton 3.8 on, warps that copy for 256 columns spill with 88.
    registers = {"OF_SECOND": 208, "OF_COPIES": 88 if _triton.installed() < (3, 8) else 96}
    if stays:
        return {"STAGES": 4, "STAY": STAY_STEPS, **registers}
    parts = 2 if slab_cols == 128 and groups <= 2 else 1
    of_tiles = {"STAGES": 3, "HELD": HELD_STEPS} if held else {"STAGES": 6 if parts == 2 else 4, "HELD": 0}
    return {"PARTS": parts, **of_tiles, **registers}


@functools.cache
def turns_launch(
    slab_rows: int,
    slab_cols: int,
    column_signs: bool,
    alone: bool,
    options: tuple[tuple[str, int], ...],
    into: str,
) -> Launch:
    """`slab_kernel` by warps of different work."""
    # Where they serve alone: not every release of Triton has Gluon.
    from .triton_stay import slab_stay_kernel
    from .triton_turns import WARPS, slab_turns_kernel

    constants: dict[str, Any] = dict(
        SLAB_ROWS=slab_rows, SLAB_COLS=slab_cols, COLUMN_SIGNS=column_signs, ALONE=alone, INTO=into, BK=TURNS_STEP,
        num_warps=WARPS.value, **dict(options),
    )  # fmt: skip
    if "STAY" in constants:
        return Launch(slab_stay_kernel, **constants)
    return Launch(slab_turns_kernel, **constants)
