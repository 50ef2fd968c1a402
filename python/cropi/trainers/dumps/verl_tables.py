"""The containers that verl dumps: its own objects, or what is left of them in a file read without their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cropi.trainers.dumps.fields import BadSample, shown
from cropi.trainers.dumps.pickled import DAMAGED, inner
from cropi.trainers.dumps.unpickle import Ragged, StandIn


def columns_of(table: Any, where: str) -> dict[str, Any]:
    """The columns of a TensorDict, by name.

    Raises:
        BadSample: ``table`` is not one.
    """
    if isinstance(table, StandIn):
        table = _columns_left(table, where)
    if isinstance(table, Mapping):
        return {str(name): values for name, values in table.items()}
    if hasattr(table, "keys") and hasattr(table, "batch_size"):
        return {str(name): table[name] for name in table.keys()}
    raise BadSample(where, "batch", f"should be a table of columns, got {shown(table)}")


def _columns_left(table: StandIn, where: str) -> Any:
    kind = table.name.rpartition(".")[2]
    if kind == "_make_td" and len(table.args) == 2:
        state = table.args[1]
    elif kind == "_rebuild_tensordict_files_consolidated" and len(table.args) == 2:
        return _consolidated(table.args[0], table.args[1], where)
    else:
        state = table.state
    if isinstance(state, Mapping) and isinstance(state.get("_tensordict"), Mapping):
        return state["_tensordict"]
    raise BadSample(where, "batch", f"should be a TensorDict, got {shown(table)}")


def _consolidated(metadata: Any, storage: Any, where: str) -> dict[str, Any]:
    """A TensorDict whose tensors lie in one storage one after the other."""
    try:
        columns = {key: value[0] for key, value in metadata["non_tensors"].items()}
        parts: dict[str, Any] = {}
        for key, (kind, shape, start, stop, pad, *_) in metadata["leaves"].items():
            dtype = getattr(torch, kind.removeprefix("torch."))
            value = storage[start:stop].view(dtype)
            size = int(np.prod(shape, dtype=np.int64))
            parts[key] = (value[:size] if pad else value).view(shape)
        for key, value in parts.items():
            if key.startswith("<NJT_OFFSETS>"):
                name = key.removeprefix("<NJT_OFFSETS>")
                columns[name] = Ragged.of(
                    parts[f"<NJT_VALUES>{name}"], value, parts.get(f"<NJT_LENGTHS>{name}")
                )
            elif not key.startswith("<NJT_"):
                columns[key] = value
    except DAMAGED as error:
        raise BadSample(
            where, "batch", f"is not a TensorDict that can be read ({str(error)[:200]})"
        ) from error
    return columns


def rows_of(value: Any, count: int, field: str, where: str) -> list[Any]:
    """A column as one value a row: of a tensor, a nested tensor, a list, or tensordict's stack of Python values.

    Raises:
        BadSample: it is of another type, or has fewer rows.
    """
    rows: Sequence[Any]
    if isinstance(value, Ragged):
        rows = value.rows
    elif isinstance(value, torch.Tensor):
        rows = value.unbind() if value.is_nested or value.ndim else ()
    elif isinstance(value, np.ndarray) and value.ndim:
        rows = list(value)
    elif isinstance(value, (list, tuple)):
        rows = value
    elif isinstance(value, StandIn):
        held = value.state.get("tensordicts") if isinstance(value.state, Mapping) else None
        rows = held if isinstance(held, (list, tuple)) else ()
    elif type(value).__name__ in ("NonTensorData", "NonTensorStack", "LinkedList"):
        rows = list(value)
    else:
        rows = ()
    if len(rows) < count:
        raise BadSample(where, field, f"should have {count} rows, got {shown(value)}")
    return [plain(row) for row in rows[:count]]


def plain(value: Any) -> Any:
    """Out of tensordict's wrapper for Python values."""
    if type(value).__name__ in ("NonTensorData", "NonTensorStack"):
        return value.data
    if (
        isinstance(value, StandIn)
        and value.name.endswith("NonTensorData")
        and isinstance(value.state, Mapping)
    ):
        for key in ("non_tensordict", "_non_tensordict"):
            if isinstance(held := value.state.get(key), Mapping):
                return held.get("data")
    return value


def parts_of_proto(proto: Any, where: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The tensors, the other columns and the notes of a DataProto.

    Raises:
        BadSample: ``proto`` is not one.
    """
    if isinstance(proto, StandIn):
        state = proto.state
        if not isinstance(state, (tuple, list)) or len(state) != 3:
            raise BadSample(where, "batch", f"should be a DataProto of verl, got {shown(proto)}")
        held, other, meta = state
        try:
            batch = inner(held) if isinstance(held, bytes) else held
        except DAMAGED as error:
            raise BadSample(where, "batch", f"cannot be read ({str(error)[:200]})") from error
    elif all(hasattr(proto, name) for name in ("batch", "non_tensor_batch")):
        batch, other, meta = proto.batch, proto.non_tensor_batch, getattr(proto, "meta_info", None)
    else:
        raise BadSample(where, "batch", f"should be a DataProto of verl, got {shown(proto)}")
    if not isinstance(other, Mapping):
        raise BadSample(where, "non_tensor_batch", f"should be a table of columns, got {shown(other)}")
    return columns_of(batch, where), dict(other), dict(meta) if isinstance(meta, Mapping) else {}
