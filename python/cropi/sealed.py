"""Checksums of what is written: inside of JSON that is read back, and in a file beside what others read.

``NAME.sha256`` has the format of ``sha256sum``, so that ``sha256sum -c NAME.sha256`` checks an export without this
package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.atomic import forget, write_atomic
from cropi.bulk import check_bulk
from cropi.errors import CropiError, shown
from cropi.files import check_no_pipe, is_folder, reading, tree, writing
from cropi.form import check_form, is_writable
from cropi.locks import one_at_a_time

CHECKSUM = "checksum"
# After a backslash, the name is written as sha256sum does where it holds line ends.
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")


def digest(values: Mapping[str, Any]) -> str:
    """The SHA-256 of values of JSON's types, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values and the checksum of all of them."""
    return {**values, CHECKSUM: digest(values)}


def read_sealed(
    path: Path,
    form: Mapping[str, Any],
    remedy: str,
    version: tuple[str, str, int] | None = None,
    writer: str = "",
) -> dict[str, Any]:
    """The values in a JSON file, without their checksum.

    Args:
        path: the file.
        form: which fields there must be (:func:`cropi.form.wrong_form`).
        remedy: for messages.
        version: what the file's version is called, the field that names it, and the one that is read.
        writer: the command whose file it is to be, where a user named the file.

    Raises:
        CropiError: the file is not there, no JSON, of another version, not what was written, or not of the form.
    """
    said = f"{path} is not what {writer} writes" if writer else f"{path} is damaged"
    try:
        check_no_pipe(path)
        with reading(path, missing=True):
            data = path.read_bytes()
        check_bulk(data, path)
        left = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CropiError):
            raise
        raise CropiError(f"{said} ({error}); {remedy}") from error
    if version is not None:
        called, field, number = version
        form = {field: int, **form}
        if isinstance(left, dict) and left.get(field, number) != number:
            raise CropiError(
                f"{path} has the {called} {shown(left[field])}; this release reads {field} {number}"
            )
    if isinstance(left, dict) and CHECKSUM in left and left.pop(CHECKSUM) != digest(left):
        raise CropiError(f"{path} is damaged: its checksum does not match; {remedy}")
    check_form(left, form, said, remedy)
    if not is_writable(left):
        raise CropiError(f"{said}: it holds half a character; {remedy}")
    return dict(left)


SUMS = ".sha256"


def sums_path(path: Path) -> Path:
    """The file of an export's checksums; ``.`` has no name of its own, and is refused by what reads it."""
    return Path(f"{path}{SUMS}")


@contextlib.contextmanager
def summed(path: str | Path, *beside: Path) -> Iterator[None]:
    """Inside, an export is written; then the SHA-256 of its file, of those ``beside`` it, or of all in its folder, goes
    to ``NAME.sha256``. Of several processes that write it at once, one writes all of its files after the other.

    Killed before that, the export has no such file: never one of what stood there before.
    """
    path = Path(path)
    with one_at_a_time(path):
        with writing(path, sums_path(path)):
            forget(sums_path(path))
        yield
        files = sorted(file for _, held in tree(path) for file in held) if is_folder(path) else [path]
        lines = (_line(sum_of(file), str(file.relative_to(path.parent))) for file in (*files, *beside))
        write_atomic(sums_path(path), *lines)


def _line(found: str, name: str) -> str:
    """A line of a file of checksums, as ``sha256sum`` writes it."""
    if "\n" not in name:
        return f"{found}  {name}\n"
    escaped = name.replace("\\", r"\\").replace("\n", r"\n")
    return f"\\{found}  {escaped}\n"


def check_sums(path: str | Path, *, whole: bool = False) -> int:
    """Compare a file, or a folder of files, with the checksums beside it.

    Args:
        path: of the file or folder.
        whole: every file that the checksums name, and there must be some; False: ``path`` alone, where they name it.

    Returns:
        The number of files that were compared.

    Raises:
        CropiError: a file is not what was written, or is missing.
    """
    path = Path(path)
    sums, compared = sums_path(path), 0
    if not whole and not os.path.exists(sums):  # also where it would be too long for a name
        return 0
    for name, want in _sums(sums, whole).items():
        file = path.parent / name
        if whole or file == path or path in file.parents:
            if sum_of(file) != want:
                raise CropiError(
                    f"{file} is not the file that was written: its SHA-256 is not the one in {sums.name}; make it "
                    "again, or remove that file of checksums where the change is yours"
                )
            compared += 1
    if whole and not compared:
        raise CropiError(f"{path} has no checksums beside it ({sums.name}), so it cannot be checked")
    return compared


def _sums(path: Path, strict: bool) -> dict[str, str]:
    """The checksums in a file, by the names of the files that they are of; none where there is no such file.

    Lines of another form are left out, or with ``strict`` an error.
    """
    try:
        with reading(path):
            lines = path.read_bytes().decode("utf-8", "replace").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return {}
    matches = [_LINE.fullmatch(line.removesuffix("\r")) for line in lines]
    if strict and None in matches:
        raise CropiError(f"{path} is damaged: line {matches.index(None) + 1} is not a checksum of a file")
    return {_name(match): match[2] for match in matches if match}


def _name(line: re.Match[str]) -> str:
    unescaped = re.sub(r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], line[3])
    return unescaped if line[1] else line[3]


def sum_of(path: Path) -> str:
    """The SHA-256 of a file, computed once as long as the file is the same; "" where there is no file."""
    if not os.path.isfile(path):
        return ""
    with reading(path, missing=True):
        stat = path.stat()
        return _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *version: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
