"""Writing files so that a crash or a power cut leaves either the old file or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from cropi.errors import CropiError
from cropi.files import check_home, entries, tree, writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced to disk and renamed to ``path``.

    On any error the temporary file is removed and ``path`` keeps its old content. After a kill, a ``.tmp`` file may
    stay behind; nobody reads it, and the next call for the same ``path`` on this machine removes it. The file is made
    under a random name and never opened through a link that stands there. A replaced file keeps its permissions.

    Raises:
        CropiError: ``path`` is a folder or cannot be written, or the disk is full (or a quota or a limit is reached).
    """
    path = Path(path)
    check_home(path)
    with writing(path):
        if path.is_dir():
            raise CropiError(f"cannot write {path}: it is a folder; give the path of a file")
    temporary, made = temporary_path(path), False
    try:
        with writing(path, temporary):
            make_folder(path.parent)
            for left in leftovers(path):
                remove(left)
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            made = True
            with contextlib.closing(os.fdopen(descriptor, "wb")), contextlib.suppress(OSError):
                # The mode of the file that is replaced, if there is one.
                os.fchmod(descriptor, path.stat().st_mode & 0o777)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        if made:
            remove(temporary)


def temporary_path(path: Path) -> Path:
    """Where a file or a folder is made that is renamed to ``path`` afterwards; another one in every call."""
    return path.with_name(f"{_temporary_prefix(path.name)}{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _temporary_prefix(name: str) -> str:
    """What the temporary files of ``name`` begin with on this machine, before the process id."""
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    return f".{name[:80]}.{host}."  # names are limited to 255 bytes


def leftovers(path: Path, ending: str = "") -> list[Path]:
    """The temporary files and folders of ``path`` that killed processes of this machine left, with another ending."""
    prefix = _temporary_prefix(path.name)
    found = entries(path.parent, f"{glob.escape(prefix)}*.tmp{ending}")
    owners = ((left, left.name.removeprefix(prefix).partition(".")[0]) for left in found)
    return [left for left, owner in owners if owner.isdecimal() and not _alive(int(owner))]


def remove(path: Path) -> None:
    """Remove a temporary file or folder, as far as the system lets us."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it runs under another user
    return True


def write_atomic(path: Path, *parts: bytes | memoryview | str) -> None:
    """Write the parts to ``path``, one after the other, whole or not at all (see :func:`replacing`)."""
    with replacing(path) as temporary:
        write_parts(temporary, [part.encode() if isinstance(part, str) else part for part in parts])


def write_parts(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write the parts to a file as they are."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)


def make_folder(folder: Path) -> None:
    """Make a folder that is missing, and those above it, so that they survive a power cut.

    Raises:
        CropiError: it begins with ``~``, which nobody has replaced.
        OSError: it cannot be made.
    """
    check_home(folder)
    made = []
    for above in (folder, *folder.parents):
        if above.exists():
            break
        made.append(above)
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        sync(one.parent)


def forget(path: Path) -> None:
    """Remove a file that may be there, so that it does not come back after a power cut.

    Raises:
        OSError: it cannot be removed.
    """
    if os.path.lexists(path):
        path.unlink(missing_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, survive a power cut.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_all(path: Path) -> None:
    """Make a file, or a folder with all that is in it, and its name survive a power cut.

    Raises:
        OSError: the disk fails.
    """
    if path.is_file():
        sync(path)
    else:
        for folder, files in tree(path):
            for file in files:
                sync(file)
            sync(folder)
    sync(path.absolute().parent)
