"""One shard of a sketch store: a safetensors file of rows, and beside it its SHA-256, which commits it.

``shard-00000.safetensors`` holds the tensor ``sketch [n, dim]`` (``scale [n, blocks]`` with float16 and int8) and,
in its header, one JSON object per prompt, their SHA-256 (a header is read without the rest of the file), and the
fingerprint of the job whose store it belongs to. ``shard-00000.safetensors.sha256`` is written after it, in the
format of ``sha256sum``, so a shard without it was never finished and ``sha256sum -c *.sha256`` checks a store
by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cropi.errors import CropiError, optional
from cropi.files import write_atomic
from cropi_kernels import QuantizedRows, quantize_rows

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class RowInfo:
    """What the store knows about one prompt. ``row`` is its place in the shard's tensor, or None without a
    sketch.

    ``status`` is "ok", "failed" (tried, and no usable sketch came out) or "skipped" (not tried); ``reason``
    says why.
    """

    id: str
    status: str = OK
    reason: str = ""
    set: str | None = None
    task: str | None = None
    pass_rate: float = 0.0
    tokens: int = 0
    norm: float = 0.0
    row: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def encode(rows: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """Float32 rows ``[n, dim]`` in the store's dtype: int8 and float16 with the scales of `quantize_rows`."""
    if dtype in ("int8", "float16"):
        held = quantize_rows(rows.to(torch.float32), DTYPES[dtype])
        return {"sketch": held.values, "scale": held.scale}
    return {"sketch": rows.to(torch.float32).contiguous().to(DTYPES[dtype])}


def decode(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The float32 rows of a shard's tensors."""
    if "scale" not in tensors:
        return tensors["sketch"].to(torch.float32)
    return QuantizedRows(tensors["sketch"], tensors["scale"]).float()


def write_shard(path: Path, rows: Sequence[RowInfo], sketches: torch.Tensor, dtype: str, job: str) -> str:
    """Write and commit one shard of the store of a job (:func:`cropi.store.manifest.job_fingerprint`); returns its
    SHA-256.

    Raises:
        CropiError: no space is left. What stays behind of this shard has no checksum file, so it does not count.
    """
    safetensors = optional("safetensors.torch")
    text = json.dumps([asdict(row) for row in rows], ensure_ascii=False)
    header = {"rows": text, "rows_sha256": _sha256(text), "job": job}
    data: bytes = safetensors.save(encode(sketches, dtype), metadata=header)
    checksum = hashlib.sha256(data).hexdigest()
    commit_path(path).unlink(missing_ok=True)  # of a shard that was removed by hand
    write_atomic(path, data)
    write_atomic(commit_path(path), f"{checksum}  {path.name}\n")
    return checksum


def read_rows(path: Path, job: str) -> list[RowInfo]:
    """The prompts of a shard of a job's store, from its header alone.

    Shards of the first release say neither what their rows' checksum is nor which job they belong to.

    Raises:
        CropiError: the header is damaged, or the shard belongs to the store of another job.
    """
    safetensors = optional("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata()
        text = header["rows"]
        intact = header.get("rows_sha256", _sha256(text)) == _sha256(text)
        rows = [RowInfo(**row) for row in json.loads(text)] if intact else []
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CropiError(damaged(path, f"its header cannot be read ({error})")) from error
    if not intact:
        raise CropiError(damaged(path, "the checksum of its header does not match"))
    if header.get("job", job) != job:
        raise CropiError(
            f"the shard {path} belongs to another store: it was made with other settings, files or weights than "
            "manifest.json says; take it and its .sha256 out of the folder"
        )
    return rows


def read_sketches(path: Path) -> torch.Tensor:
    """The sketches of a shard as float32 ``[n, dim]``, after checking its SHA-256.

    Raises:
        CropiError: the file is not what was written.
    """
    data = path.read_bytes()
    expected = commit_path(path).read_text().split()
    if not expected or hashlib.sha256(data).hexdigest() != expected[0]:
        raise CropiError(damaged(path, "its checksum does not match"))
    return decode(optional("safetensors.torch").load(data))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def shard_number(path: Path) -> int:
    """The number of a shard. From 100000 on it has six digits, so that names do not sort as numbers do.

    Raises:
        CropiError: the file's name has none.
    """
    text = path.stem.removeprefix("shard-")
    if not text.isdecimal():
        raise CropiError(
            f"{path} is no shard of this store (its name has no number); take it out of the folder"
        )
    return int(text)


def commit_path(path: Path) -> Path:
    """The checksum file that commits a shard."""
    return path.with_name(path.name + ".sha256")


def damaged(path: Path, what: str) -> str:
    """The message for a damaged shard, with the way out."""
    return (
        f"the shard {path} is damaged: {what}; remove it and its .sha256 and run the same `cropi sketch` "
        "again: only its prompts are computed again"
    )
