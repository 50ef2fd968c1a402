"""What :func:`cropi.influence` and :func:`cropi.neighbours` are given: stores, or sketches that no store holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cropi.errors import CropiError, article
from cropi.ranking.origin import origin_of
from cropi.store.memory import MemoryStore
from cropi.store.rows import FAILED, SKIPPED, RowInfo
from cropi.store.store import SketchStore

# Of a store's notes: ids are numbers of rows, and say nothing about which prompts they are.
NUMBERED = "numbered"
WANTED = (
    "a SketchStore (cropi.sketch, SketchStore.open), the batch of cropi.score_batch or LiveSketcher, or sketches "
    "[n, dim] as a tensor or an array"
)
FLOATS = "give floats [n, dim], a sketch a row"


def given_stores(train: Any, valid: Any) -> tuple[SketchStore, list[SketchStore]]:
    """The store of training prompts, and the validation stores.

    Args:
        train: a store, a :class:`cropi.SketchedBatch`, or a `cropi_kernels.LiveSketch` or floats ``[n, dim]``, whose
            rows are named by their numbers.
        valid: the same, a list of these, or a dict of batches and floats by the name of their validation set. In a list
            of several, the place in it stands before the numbers of rows.

    Raises:
        CropiError: what is given is none of these.
    """
    pool = _store(train, "train")
    if isinstance(valid, Mapping):
        if wrong := [name for name in valid if not isinstance(name, str) or not name]:
            raise CropiError(f"valid names a set {wrong[0]!r:.100}: give names as text")
        sides = [_store(given, f"valid[{name!r}]", name) for name, given in valid.items()]
    elif isinstance(valid, (list, tuple)):
        several = len(valid) > 1
        sides = [
            _store(given, f"valid[{place}]", before=f"{place}-" if several else "")
            for place, given in enumerate(valid)
        ]
    else:
        sides = [_store(valid, "valid")]
    if not sides:
        raise CropiError(f"valid is empty: give {WANTED}")
    return pool, sides


def _store(given: Any, name: str, of_set: str | None = None, before: str = "") -> SketchStore:
    if isinstance(given, SketchStore):
        if of_set is not None:
            raise CropiError(f"{name} is a SketchStore, whose rows name their set: give stores in a list")
        return given
    # Two stores need no sketcher, whose import takes 0.2 s of the 2 s before `cropi influence` and `select` begin.
    from cropi_kernels import LiveSketch

    manifest: dict[str, Any] = {}
    ids: list[str] | None = None
    if isinstance(given, np.ndarray):
        if given.dtype.kind != "f":
            raise CropiError(f"{name} is {given.dtype} {list(given.shape)}: {FLOATS}")
        # A copy: torch takes no strides below 0, no foreign byte order, no long doubles, and warns of read-only memory.
        with np.errstate(over="ignore"):
            sketches = torch.from_numpy(np.array(given, np.float32, order="C"))
    elif isinstance(given, torch.Tensor):
        sketches = given
    elif isinstance(getattr(given, "sketches", None), torch.Tensor) and (
        hasattr(given, "ids") or isinstance(given, LiveSketch)
    ):
        sketches, origin = given.sketches, origin_of(given)
        ids = None if isinstance(given, LiveSketch) else [str(name) for name in given.ids]
        manifest = {"spec": given.spec.to_dict(), "model": origin, "estimator": origin.pop("estimator", None)}
    elif isinstance(given, LiveSketch):
        raise CropiError(f"{name} is {given!r}: give it when its block has ended")
    else:
        raise CropiError(f"{name} is {article(type(given).__name__)}: give {WANTED}")
    dense = sketches.layout == torch.strided
    if sketches.ndim != 2 or not sketches.numel() or not sketches.is_floating_point() or not dense:
        raise CropiError(
            f"{name} is {sketches.dtype} {list(sketches.shape)}{'' if dense else ', sparse'}: {FLOATS}"
        )
    if ids is None:
        # Ids are ordered as text.
        digits = len(str(len(sketches) - 1))
        ids = [f"{before}{row:0{digits}d}" for row in range(len(sketches))]
        manifest["notes"] = {NUMBERED: True}
    store = MemoryStore({"spec": {"dim": sketches.shape[1]}, **manifest})
    store.path = Path(name)  # what messages name
    sketches = sketches.detach().to("cpu", torch.float32)
    norms = torch.linalg.vector_norm(sketches.double(), dim=1).tolist()
    for row, norm, sketch in zip(ids, norms, sketches, strict=True):
        if 0 < norm < float("inf"):
            store.add(RowInfo(row, set=of_set, norm=norm), sketch)
        elif norm == 0:
            store.add(RowInfo(row, SKIPPED, "zero gradient", set=of_set))
        else:
            store.add(RowInfo(row, FAILED, "the sketch is not finite", set=of_set))
    store.finish()
    return store
