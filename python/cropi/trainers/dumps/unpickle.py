"""A reader of pickled dumps that runs none of their code.

``pickle`` calls whatever a file names. Here a file may name plain containers, numbers, dates, NumPy arrays and tensors,
which are rebuilt by the functions below, and the classes of tensordict, verl, slime and vLLM, whose contents are kept
without the class (:class:`StandIn`). Anything else raises an error that names it.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from typing import IO, Any

import numpy as np
import torch

from cropi.trainers.dumps.pickle_items import load as load_items

# Classes of these packages are kept as what they hold.
TRAINERS = ("tensordict", "verl", "slime", "vllm")
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class Forbidden(pickle.UnpicklingError):
    """The file names something that a dump has no need of."""


class StandIn:
    """An object of a trainer's class: what it was made from, and its state, but none of its code."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Ragged:
    """Rows of different lengths, as a nested tensor holds them: one after the other."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, values: torch.Tensor, offsets: torch.Tensor, lengths: torch.Tensor | None = None) -> Ragged:
        """The rows that begin at ``offsets``; of ``lengths``, or up to the next."""
        starts = offsets.tolist()
        ends = starts[1:] if lengths is None else [a + n for a, n in zip(starts, lengths.tolist())]
        return cls([values[a:b] for a, b in zip(starts, ends)])


class Reader(pickle.Unpickler):
    """An unpickler of a dump.

    Args:
        file: the pickle.
        storage: the bytes of a tensor's storage, by its key.
        parts: what stands for the items of a list (:mod:`cropi.trainers.dumps.pickle_items`).
    """

    def __init__(self, file: Any, storage: Callable[[str], bytes] | None = None, parts: Any = None) -> None:
        super().__init__(file)
        self._storage, self._kept, self._parts = storage, {}, parts  # type: ignore[var-annotated]

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for.

        Raises:
            Forbidden: nothing.
        """
        if (allowed := ALLOWED.get(f"{module}.{name}")) is not None:
            return allowed
        if module == "torch" and (name in DTYPES or isinstance(getattr(torch, name, None), torch.dtype)):
            return DTYPES.get(name) or getattr(torch, name)
        if (module, name) == ("numpy", "dtype"):
            return type("DType", (_DType,), {"name": "numpy.dtype"})
        if module.partition(".")[0] in TRAINERS or (module, name) in INERT:
            return type("StandIn", (StandIn,), {"name": f"{module}.{name}"})
        raise Forbidden(f"it calls {module}.{name}")

    def persistent_load(self, key: Any) -> Any:
        """A tensor's storage as a tensor of one dimension; of 0, what stands for the items of a list."""
        if key == 0 and self._parts is not None:
            return self._parts
        missing = pickle.UnpicklingError("it refers to a storage that is not in the file")
        if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or self._storage is None:
            raise missing
        dtype, name, size = key[1], key[2], key[4]
        if not isinstance(dtype, torch.dtype) or not isinstance(name, str) or type(size) is not int:
            raise missing
        if name not in self._kept:
            data = bytearray(self._storage(name))
            self._kept[name] = (
                torch.frombuffer(data, dtype=torch.uint8)
                if data
                else torch.empty(0, dtype=torch.uint8, device="cpu")
            )
        held: torch.Tensor = self._kept[name]
        if size * dtype.itemsize != held.numel():
            raise pickle.UnpicklingError(
                f"a storage has {held.numel()} bytes where {size} numbers are said to be"
            )
        return held.view(dtype)


def read_zip(data: IO[bytes], largest: int, by_items: bool = False) -> Any:
    """What ``torch.save`` wrote.

    Args:
        data: the file.
        largest: bytes that it may hold unpacked.
        by_items: as :func:`cropi.trainers.dumps.pickle_items.load` gives it.

    Raises:
        Forbidden: it names something that is not allowed.
        ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError, ...: it is damaged, or of another kind.
    """
    with zipfile.ZipFile(data) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > largest:
            raise ValueError(f"it holds more than {largest} bytes unpacked")
        pickles = [entry.filename for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("it was not written by torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are in big-endian order")
        storage = lambda name: archive.read(f"{folder}data/{name}")  # noqa: E731
        if by_items:
            return load_items(archive.read(pickles[0]), partial(Reader, storage=storage))
        with archive.open(pickles[0]) as file:
            held = Reader(file, storage).load()
            while file.read(2**20):  # the checksum is compared at the end
                pass
        return held


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    numbers = [*size, *stride, offset]
    if not isinstance(storage, torch.Tensor) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor without a storage, sizes or strides")
    count = 1
    for n in size:
        count *= n
    if count > storage.numel():  # also what only repeats a few numbers: it would be unpacked
        raise pickle.UnpicklingError(f"a tensor of {count} numbers on a storage of {storage.numel()}")
    return storage.as_strided(size, stride, offset)


def _typed(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if function not in (TENSOR, NESTED, STRIDED):
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    return function(*args)


def _nested(state: Any) -> Ragged:
    return Ragged.of(state["values"], state["offsets"], state.get("lengths"))


def _strided(buffer: Any, sizes: Any, strides: Any, offsets: Any) -> Ragged:
    rows = zip(sizes.tolist(), strides.tolist(), offsets.tolist())
    return Ragged([_tensor(buffer, offset, size, stride) for size, stride, offset in rows])


class _DType(StandIn):
    """A type of NumPy by its code and byte order alone: its own state could be made to break an array."""

    def dtype(self) -> np.dtype[Any]:
        code, state = self.args[0] if self.args else None, self.state
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSUO]\d{1,6}|O", code):
            raise pickle.UnpicklingError("an array of an unknown type")
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
        return np.dtype(f"{order}{code}" if order in ("<", ">") else code)


class _Array(np.ndarray[Any, Any]):
    """Filled by ``__setstate__``, as NumPy's own are, once the sizes have been compared."""

    def __setstate__(self, state: Any) -> None:
        shape, kind, fortran, data = tuple(state)[-4:]
        if not isinstance(kind, _DType):
            raise pickle.UnpicklingError("an array without a type")
        dtype = kind.dtype()
        if any(type(n) is not int or n < 0 for n in shape):
            raise pickle.UnpicklingError("an array without a shape")
        held = len(data) if isinstance(data, list) else len(data) // max(dtype.itemsize, 1)
        if dtype.hasobject != isinstance(data, list) or math.prod(shape) != held:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {held} values")
        super().__setstate__((1, tuple(shape), dtype, bool(fortran), data))  # type: ignore[arg-type]


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    return np.ndarray.__new__(_Array, (0,), "b")


def _from_buffer(buffer: Any, kind: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(kind, _DType) or kind.dtype().hasobject:
        raise pickle.UnpicklingError("an array without a type")
    return np.frombuffer(buffer, dtype=kind.dtype()).reshape(shape, order=order)


def _scalar(kind: Any, data: Any = None) -> Any:
    if not isinstance(kind, _DType) or kind.dtype().hasobject or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a value that is said to be a number of NumPy, and is not")
    return np.frombuffer(data, dtype=kind.dtype(), count=1)[0]


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _object(kind: Any, base: Any, state: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, StandIn)):
        raise pickle.UnpicklingError("an object of a class that is not known")
    return kind()


def _plain_bytes(data: Any = b"") -> bytes:
    if not isinstance(data, (bytes, bytearray)):  # a number would be so many zeros
        raise pickle.UnpicklingError("bytes made from something else")
    return bytes(data)


class _Call:
    """A function that the file may call and not change: a pickle can set attributes of whatever it names."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __call__(self, *args: Any) -> Any:
        function: Callable[..., Any] = self.function  # type: ignore[attr-defined]
        return function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


INERT = {
    ("torch._dynamo.decorators", "_DimRange"), ("torch.nested._internal.nested_tensor", "NestedTensor"),
    ("torch", "device"), ("torch", "Tensor"), ("numpy", "ndarray"),
}  # fmt: skip
# All of these classes are written in C, so that a pickle cannot change them either.
TYPES = {
    f"{module}.{kind.__name__}": kind
    for module in ("builtins", "__builtin__")
    for kind in (set, frozenset, dict, list, tuple, complex, int, float, str, bool, slice)
} | {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.deque": collections.deque,
    "datetime.datetime": datetime.datetime,
    "datetime.date": datetime.date,
    "datetime.timedelta": datetime.timedelta,
    "decimal.Decimal": decimal.Decimal,
    "torch.Size": tuple,
}
TENSOR, NESTED, STRIDED = _Call(_tensor), _Call(_nested), _Call(_strided)
CALLS: list[tuple[str, Callable[..., Any]]] = [
    *(
        (f"{module}.{name}", _plain_bytes)
        for module in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    ),
    ("_codecs.encode", _bytes),
    ("copyreg._reconstructor", _object),
    ("copy_reg._reconstructor", _object),
    ("torch._tensor._rebuild_from_type_v2", _typed),
]
for core in ("core", "_core"):
    CALLS += [
        (f"numpy.{core}.multiarray._reconstruct", _array),
        (f"numpy.{core}.multiarray.scalar", _scalar),
        (f"numpy.{core}.numeric._frombuffer", _from_buffer),
    ]
ALLOWED: dict[str, Any] = (
    TYPES
    | {name: _Call(function) for name, function in CALLS}
    | {
        "torch._utils._rebuild_tensor_v2": TENSOR,
        "torch._utils._rebuild_nested_tensor": STRIDED,
        "torch.nested._internal.nested_tensor._rebuild_njt": NESTED,
    }
)
