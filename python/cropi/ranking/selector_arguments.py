"""What `Selector` is made with, checked."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from cropi.checked import fits, is_id
from cropi.errors import CropiError
from cropi_kernels import SketchSpec


def check_settings(
    spec: SketchSpec, dim: int, half_life: float, explore: float, within: int | None, seed: int
) -> None:
    """Raises CropiError: a setting that is out of its range."""
    if not fits(dim, int) or dim < 1 or dim & (dim - 1) or dim > spec.dim:
        default = " (the default)" if dim == 1024 else ""
        raise CropiError(
            f"dim must be a power of two up to the sketch's {spec.dim}, got {dim!r}{default}: give dim=N, how "
            "many numbers of a sketch are kept"
        )
    for name, value, least in (("half_life", half_life, 1e-9), ("explore", explore, 0.0)):
        if not fits(value, float) or value < least:
            raise CropiError(f"{name} must be a number of at least {least:g}, got {value!r}")
    if within is not None and (not fits(within, int) or within < 1):
        raise CropiError(f"within must be None or a number of steps of at least 1, got {within!r}")
    if not fits(seed, int) or not 0 <= seed < 1 << 63:
        raise CropiError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")


def features_of(given: Any, n: int) -> npt.NDArray[np.float32]:
    """The features of ``n`` prompts, of length 1 on average (root mean square)."""
    try:
        rows = np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError):  # text, lists of several lengths
        rows = np.zeros(0, dtype=np.float32)
    if rows.ndim != 2 or len(rows) != n or not bool(np.isfinite(rows).all()) or not rows.any():
        raise CropiError(f"features must be {n} rows of finite numbers, one for each id, got {given!r:.200}")
    # A sum without rounding: the state's digest of features is one in whichever order the pool stands.
    size = math.sqrt(math.fsum(np.square(rows, dtype=np.float64).sum(axis=1)) / n)
    made: npt.NDArray[np.float32] = rows / np.float32(size)
    return made


def names_of(ids: Any) -> list[Any]:
    """The ids of a pool as plain strings and integers, all different."""
    if isinstance(ids, (str, bytes)) or not hasattr(ids, "__len__") or not len(ids):
        raise CropiError(f"ids is {ids!r:.100}: give a list of at least one prompt's id")
    names = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    for i, name in enumerate(names):
        if not is_id(name):
            raise CropiError(
                f"ids holds {name!r:.100} in place {i}: every prompt needs an id, a string or an integer"
            )
    # Plain ones in the place of numpy's, which a checkpoint would not give back.
    names = [str(name) if isinstance(name, str) else int(name) for name in names]
    if len(set(names)) < len(names):
        raise CropiError(f"ids holds {Counter(names).most_common(1)[0][0]!r} twice: ids must be different")
    return names
