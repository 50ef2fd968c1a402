"""One shard of a sketch store: a safetensors file of rows, and beside it its SHA-256, which commits it.

``shard-00000.safetensors`` holds the tensor ``sketch [n, dim]`` (``int4`` or ``int1``, packed, with these dtypes), with
the dtypes that have one ``scale [n, blocks]`` before it, and in its header, as metadata:

- ``seal``: the SHA-256 of the header, its length included, with zeros in the seal's own place; it stands first
- ``rows``: one JSON object per prompt
- ``job``: the fingerprint of the job whose store the shard belongs to
- ``checks``: XXH3-128 of the scales and of every block of rows, so that a block is checked when it is read
- ``replaces``: numbers of the shards whose rows it took over (:mod:`cropi.store.compact`)

``shard-00000.safetensors.sha256`` is written after it, in the format of ``sha256sum``, so a shard without it was never
finished and ``sha256sum -c *.sha256`` checks a store by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cropi.atomic import forget, write_atomic
from cropi.errors import CropiError, optional, shown
from cropi.files import reading, writing
from cropi.sealed import sums_path
from cropi.store.codec import PACKED
from cropi.store.rows import RowInfo, from_json, rows_from_json, rows_to_json

_SEAL = b'{"__metadata__":{"seal":"'
_KINDS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_HEAD = 1 << 16  # what is read at once of a file, to have the header of most shards
# A block fits into a processor's cache as it is stored, and into little memory as float32.
_STORED, _DECODED = 1 << 21, 1 << 24
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True, slots=True)
class Held:
    """Where a tensor lies in the file, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, int]
    begin: int
    end: int

    def of(self, data: torch.Tensor) -> torch.Tensor:
        """Bytes of whole rows as the tensor's rows."""
        return data.view(self.dtype).view(-1, self.shape[1])


@dataclass(frozen=True, slots=True)
class Block:
    """Rows whose sketches are not read yet, and how any thread reads them: into a buffer of ``size`` bytes at least,
    which the tensors then use."""

    rows: list[RowInfo]
    size: int
    read: Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Shard:
    """The header of a shard. ``kept`` are its rows with a sketch, in the order of the tensors' rows.

    ``path`` is absolute: a script may go to another folder between opening a store and reading it.
    """

    path: Path
    rows: list[RowInfo]
    kept: list[RowInfo]
    tensors: dict[str, Held]
    checks: dict[str, Any]
    replaces: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its tensors, and about those of its rows."""
        return sum(held.end - held.begin for held in self.tensors.values()) + 256 * len(self.rows)

    @property
    def _values(self) -> tuple[str, Held]:
        """The tensor of the rows' numbers, and its name."""
        return next((name, held) for name, held in self.tensors.items() if name != "scale")

    def check_width(self, dim: int) -> None:
        """Raises CropiError: its rows do not have ``dim`` numbers."""
        name, held = self._values
        width = held.shape[1] * 8 // PACKED.get(name, 8)
        if self.kept and width != dim:
            raise CropiError(
                damaged(self.path, f"its rows have {width} numbers, and the manifest says {dim}")
            )

    def unread(self) -> Iterator[Block]:
        """The rows with a sketch, by blocks; each is checked when it is read.

        Raises:
            CropiError: the file is not what was written, or is gone.
        """
        if not self.kept:
            return
        (name, values), step = self._values, self.checks["rows"]
        width = (values.end - values.begin) // values.shape[0]
        scale = self.tensors.get("scale")
        scales = None
        if scale is not None:
            data = torch.empty(scale.end - scale.begin, dtype=torch.uint8, device="cpu")
            scales = scale.of(self._read(scale.begin, scale.end, self.checks["scale"], data))
        for number, first in enumerate(range(0, values.shape[0], step)):
            begin = values.begin + first * width
            end, check = min(begin + step * width, values.end), self.checks["values"][number]
            some = None if scales is None else scales[first : first + step]
            read = partial(self._block, name, begin, end, check, some)
            yield Block(self.kept[first : first + step], end - begin, read)

    def blocks(self) -> Iterator[tuple[list[RowInfo], dict[str, torch.Tensor]]]:
        """The same, read one after the other: rows and tensors, which are valid until the next are asked for."""
        buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        for block in self.unread():
            if len(buffer) < block.size:
                buffer = torch.empty(block.size, dtype=torch.uint8, device="cpu")
            yield block.rows, block.read(buffer)

    def verify(self) -> None:
        """Check the whole file, its SHA-256 included.

        Raises:
            CropiError: it is not what was written.
        """
        digest, file = hashlib.sha256(), self._open()
        with reading(self.path), os.fdopen(file, "rb") as stream:
            while piece := stream.read(_STORED):
                digest.update(piece)
        self._check_commit(digest.hexdigest())
        for _ in self.blocks():
            pass

    def _open(self) -> int:
        try:
            with reading(self.path):
                return os.open(self.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CropiError(
                f"the shard {self.path} is gone: another process compacted or removed the store while it was read; run "
                "the same command again"
            ) from error

    def _block(
        self, name: str, begin: int, end: int, check: str, scale: torch.Tensor | None, buffer: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        block = {name: self.tensors[name].of(self._read(begin, end, check, buffer))}
        if scale is not None:
            block["scale"] = scale
        return block

    def _read(self, begin: int, end: int, check: str, buffer: torch.Tensor) -> torch.Tensor:
        data = buffer[: end - begin]
        view, done, file = _bytes(data), 0, self._open()
        try:
            while done < len(view):
                with reading(self.path):
                    count = os.preadv(file, [view[done:]], begin + done)
                if count == 0:
                    raise CropiError(damaged(self.path, "it is shorter than its header says"))
                done += count
        finally:
            os.close(file)
        if _xxh3(view) != check:
            raise CropiError(damaged(self.path, "its checksum does not match"))
        return data

    def _check_commit(self, digest: str) -> None:
        try:
            with reading(sums_path(self.path)):
                expected = sums_path(self.path).read_text("utf-8", "replace").split()
        except FileNotFoundError:
            expected = []
        if expected[:1] != [digest]:
            raise CropiError(damaged(self.path, "its checksum does not match"))


def write_shard(
    path: Path,
    rows: Sequence[RowInfo],
    tensors: Mapping[str, torch.Tensor],
    job: str,
    replaces: Sequence[int] = (),
) -> Shard:
    """Write and commit one shard of the store of a job (:func:`cropi.store.manifest.job_fingerprint`).

    Args:
        path: of the shard.
        rows: its prompts; the place of each with a sketch counts up.
        tensors: what :func:`cropi.store.codec.encode` gives of the sketches.
        job: the fingerprint.
        replaces: numbers of the shards whose rows these are.

    Raises:
        CropiError: no space is left. What stays behind of this shard has no checksum file, so it does not count.
    """
    data = {name: _bytes(tensors[name]) for name in sorted(tensors, key=lambda name: name != "scale")}
    held, begin = {}, 0
    for name, tensor in data.items():
        held[name] = Held(tensors[name].dtype, _shape(tensors[name]), begin, begin + len(tensor))
        begin += len(tensor)
    checks = _checks(held, data)
    header = _header(rows, held, job, checks, replaces)
    whole = hashlib.sha256(header)
    for part in data.values():
        whole.update(part)
    with writing(sums_path(path)):
        forget(sums_path(path))  # of a shard that was removed by hand
    write_atomic(path, header, *data.values())
    write_atomic(sums_path(path), f"{whole.hexdigest()}  {path.name}\n")
    held = {n: Held(h.dtype, h.shape, h.begin + len(header), h.end + len(header)) for n, h in held.items()}
    return Shard(
        path.absolute(),
        list(rows),
        [row for row in rows if row.row is not None],
        held,
        checks,
        tuple(replaces),
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _shape(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1]


def _checks(held: Mapping[str, Held], data: Mapping[str, memoryview]) -> dict[str, Any]:
    name = next(name for name in held if name != "scale")
    count, entries = held[name].shape
    width = len(data[name]) // count if count else 1
    decoded = 4 * entries * {"int4": 2, "int1": 8}.get(name, 1)
    step = max(1, min(_STORED // max(width, 1), _DECODED // max(decoded, 1)))
    values = [_xxh3(data[name][at : at + step * width]) for at in range(0, len(data[name]), step * width)]
    return {"rows": step, "scale": _xxh3(data["scale"]) if "scale" in data else "", "values": values}


def _header(
    rows: Sequence[RowInfo], held: Mapping[str, Held], job: str, checks: Any, replaces: Sequence[int]
) -> bytes:
    about = {"rows": rows_to_json(rows), "job": job, "checks": json.dumps(checks)}
    if replaces:
        about["replaces"] = json.dumps(list(replaces))
    tensors = {
        name: {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [one.begin, one.end]}
        for name, one in held.items()
    }
    rest = json.dumps(about, ensure_ascii=False)[1:].encode() + b"," + json.dumps(tensors)[1:].encode()
    return _sealed(rest)


def _sealed(rest: bytes) -> bytes:
    """The beginning of a file: the header's size, and its text with the checksum of all of it. ``rest`` is the text
    behind the seal."""
    text = _SEAL + b"0" * 64 + b'",' + rest
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    seal = hashlib.sha256(size + text).hexdigest().encode()
    return size + _SEAL + seal + text[len(_SEAL) + 64 :]


def read_shard(path: Path, job: str) -> Shard:
    """The header of a shard of a job's store.

    Raises:
        CropiError: the header is damaged, or the shard belongs to the store of another job.
        FileNotFoundError: the file is gone.
    """
    try:
        with reading(path):
            text, size = _read_header(path)
        header = from_json(text)
        about = header.pop("__metadata__")
        begin = 8 + len(text)
        tensors = {name: _held(one, begin) for name, one in header.items()}
        rows = rows_from_json(about["rows"])
        kept = [row for row in rows if row.row is not None]
        checks = from_json(about["checks"].encode())
        replaces = tuple(map(int, json.loads(about.get("replaces", "[]"))))
        _check_tensors(tensors, kept, size)
        _check_checks(checks, len(kept), "scale" in tensors)
    except FileNotFoundError:
        raise
    except CropiError:
        raise
    except _DAMAGE as error:
        raise CropiError(damaged(path, f"its header cannot be read ({shown(str(error), 200)})")) from error
    if about.get("job") != job:
        raise CropiError(
            f"the shard {path} belongs to another store: it was made with other settings, files or weights than "
            "manifest.json says; take it and its .sha256 out of the folder"
        )
    return Shard(path, rows, kept, tensors, checks, replaces)


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header's text, whose seal holds, and the file's size."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        head = os.pread(file, _HEAD, 0)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or length > size - 8:
            raise ValueError("it is shorter than its header says")
        text = head[8 : 8 + length] if 8 + length <= len(head) else os.pread(file, length, 8)
    finally:
        os.close(file)
    start = len(_SEAL)
    if len(text) < length:
        raise ValueError("it is shorter than its header says")
    own = hashlib.sha256(head[:8] + _SEAL + b"0" * 64)
    own.update(memoryview(text)[start + 64 :])
    if not text.startswith(_SEAL) or own.hexdigest().encode() != text[start : start + 64]:
        raise CropiError(damaged(path, "the checksum of its header does not match"))
    return text, size


def _held(one: Any, begin: int) -> Held:
    rows, columns = one["shape"]
    first, last = one["data_offsets"]
    kind = _KINDS[one["dtype"]]
    if not all(type(n) is int and n >= 0 for n in (rows, columns, first, last)):
        raise ValueError("a tensor's shape or position is not a count")
    if last - first != rows * columns * kind.itemsize:
        raise ValueError("a tensor's place does not fit its shape")
    return Held(kind, (rows, columns), begin + first, begin + last)


def _check_tensors(tensors: Mapping[str, Held], kept: Sequence[RowInfo], size: int) -> None:
    names = [name for name in tensors if name != "scale"]
    if names not in (["sketch"], ["int4"], ["int1"]):
        raise ValueError(f"its tensors are {shown(list(tensors))}")
    if max(held.end for held in tensors.values()) != size:
        raise ValueError("its size is not what its header says")
    if any(held.shape[0] != len(kept) for held in tensors.values()):
        raise ValueError("its rows are not those of its tensors")
    if [row.row for row in kept] != list(range(len(kept))):
        raise ValueError("its rows are not in the order of its tensors")


def _check_checks(checks: Any, rows: int, scaled: bool) -> None:
    if not rows:
        return
    step, values = checks["rows"], checks["values"]
    right = type(step) is int and step > 0 and isinstance(values, list) and len(values) == -(-rows // step)
    if not right or scaled and not isinstance(checks["scale"], str):
        raise ValueError("its checksums are not those of its blocks")


def _xxh3(data: Any) -> str:
    return str(optional("xxhash").xxh3_128_hexdigest(data))


def shard_number(path: Path) -> int:
    """The number of a shard. From 100000 on it has six digits, so that names do not sort as numbers do.

    Raises:
        CropiError: the file's name has none.
    """
    text = path.stem.removeprefix("shard-")
    if not (text.isascii() and text.isdecimal()):
        raise CropiError(
            f"{path} is not a shard of this store (its name has no number); take it out of the folder"
        )
    return int(text)


def damaged(path: Path, what: str) -> str:
    """The message for a damaged shard, with the way out."""
    return (
        f"the shard {path} is damaged: {what}; remove it and its .sha256 and run the same `cropi sketch` "
        "again: only its prompts are computed again"
    )
