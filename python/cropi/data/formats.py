"""What a file is, told by its first bytes and not by its name: files are renamed, and downloads are unpacked."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from cropi.errors import CropiError

# The formats that are read.
JSON, PARQUET, ARROW_FILE, ARROW_STREAM = "json", "parquet", "arrow file", "arrow stream"
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
ENDINGS_OF_PACKED = (".gz", ".zst", ".bz2", ".xz")
ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".pt", ".pkl", ".dp")
TABLES = (".csv", ".tsv")
READ = "JSON lines or a JSON array (plain, .gz, .zst, .bz2 or .xz), parquet and arrow are read"

_CONVERT = "`cropi convert --source ...` turns a trainer's dump into records"
_SAVE = f"{READ}; write the records as one of them"
# First bytes of other formats: what they are, and what to do.
_REFUSED = [
    (b"\x80\x02", "a pickle", _CONVERT),
    (b"\x80\x03", "a pickle", _CONVERT),
    (b"\x80\x04", "a pickle", _CONVERT),
    (b"\x80\x05", "a pickle", _CONVERT),
    (b"PK\x03\x04", "a zip archive, as torch.save and numpy.savez write them", f"unpack it, or: {_CONVERT}"),
    (b"PK\x05\x06", "an empty zip archive", _SAVE),
    (b"\x93NUMPY", "a numpy array", _SAVE),
    (b"\x89HDF\r\n", "an HDF5 file", _SAVE),
    (b"SQLite format 3\x00", "an SQLite data base", _SAVE),
    (b"GGUF", "model weights (GGUF)", "it belongs under --model"),
    (b"\x89PNG", "a PNG picture", _SAVE),
    (b"\xff\xd8\xff", "a JPEG picture", _SAVE),
    (b"GIF8", "a GIF picture", _SAVE),
    (b"%PDF", "a PDF document", _SAVE),
    (b"7z\xbc\xaf", "a 7-zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "packed by lz4", "unpack it (lz4 -d), or pack it by gzip or zstd"),
    (b"\x50\x2a\x4d\x18", "packed by zstd with a header frame of its own", "pack it again by zstd"),
    (b"ORC", "an ORC file", _SAVE),
    (b"Obj\x01", "an Avro file", _SAVE),
    (b"FEA1", "a Feather file of version 1", "write it again, as parquet"),
    (b"\x7fELF", "a program", _SAVE),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save it as UTF-8"),
    # Without a byte order mark; of JSON, which begins with a bracket.
    *((start, "text in UTF-16", "save it as UTF-8") for start in (b"{\0", b"[\0", b"\0{", b"\0[")),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it: git lfs pull"),
]


def format_of(head: bytes, path: str | Path) -> str:
    """The format of an unpacked file that begins with ``head`` (at least 512 bytes, or the whole file).

    Raises:
        CropiError: a format that is not read; the message names it.
    """
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith(b"ARROW1"):
        return ARROW_FILE
    if head.startswith(b"\xff\xff\xff\xff") and len(head) > 8:
        return ARROW_STREAM
    for magic, name, remedy in _REFUSED:
        if head.startswith(magic):
            raise CropiError(
                f"{path} is {name}, which holds no trajectory records that can be read here; {remedy}"
            )
    if len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 100_000_000:
        raise CropiError(
            f"{path} is a safetensors file (tensors), which holds no trajectory records; {_SAVE}"
        )
    if head[257:262] == b"ustar":
        raise CropiError(f"{path} is a tar archive; unpack it, and give the files in it")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CropiError(f"{path} is a web page (HTML or XML), perhaps in place of a download; {_SAVE}")
    if start[:1] not in (b"{", b"[") and any(ending in Path(path).name.lower() for ending in TABLES):
        tabs = ", sep='\\t'" if ".tsv" in Path(path).name.lower() else ""
        names = re.findall(r"[\w.]+", head.partition(b"\n")[0].decode(errors="replace"))
        score = next((f".astype({{{name!r}: float}})" for name in ("reward", "score") if name in names), "")
        raise CropiError(
            f"{path} is a table of text ({' or '.join(TABLES)}); write it as parquet, texts as text and "
            f"rewards as numbers, for example by pandas.read_csv({str(path)!r}{tabs}, dtype=str){score}"
            f".to_parquet({Path(path).stem + '.parquet'!r})"
        )
    if start and start[:1] not in (b"{", b"[") and b"\x00" in head:
        raise CropiError(f"{path} is a binary file (it begins with {head[:8].hex(' ')}); {_SAVE}")
    return JSON


def packing_of(head: bytes) -> str | None:
    """How a file that begins with ``head`` is packed: gzip, zstd, bz2, xz, or None."""
    return next((name for magic, name in PACKED.items() if head.startswith(magic)), None)


def stem(path: str | Path) -> str:
    """The name of a trajectory file, of a folder or of a data set without its endings.

    >>> stem("math.jsonl.gz"), stem("runs/eval_0.pt"), stem("owner/name?split=test")
    ('math', 'eval_0', 'name')
    """
    name = str(path).partition("?")[0].rstrip("/").rpartition("/")[2] or "records"
    for ending in (*ENDINGS_OF_PACKED, *ENDINGS):
        name = name.removesuffix(ending) or name
    return name


def ending_of(path: str | Path) -> str:
    """The ending of a file's name in small letters, without that of what packed it.

    >>> ending_of("a.JSONL.gz")
    '.jsonl'
    """
    name = PurePath(path).name.lower()
    packed = next((one for one in ENDINGS_OF_PACKED if name.endswith(one)), "")
    return PurePath(name.removesuffix(packed)).suffix


def begins(head: bytes) -> bytes:
    """The first byte of a text that is no mark and no blank."""
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
