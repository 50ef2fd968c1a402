"""Locks that keep two processes from writing into one place. A lock ends with the processes that hold it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from cropi.errors import CropiError

LOCK = ".lock"  # the file of a folder's lock


def lock_folder(folder: Path, in_use: Callable[[str], CropiError]) -> int:
    """Lock a folder for this process and for the commands that inherit the descriptor.

    Args:
        folder: it exists.
        in_use: the error for a folder that is locked, from the id of the process that locked it.

    Returns:
        The descriptor of the lock's file. Closing it ends the lock, and so does the end of the process.

    Raises:
        CropiError: the folder is locked already, or its file system has no locks.
        OSError: the lock's file cannot be written.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not try_lock(lock, folder):
            raise in_use(os.read(lock, 64).decode(errors="replace").strip() or "unknown")
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def try_lock(descriptor: int, folder: Path) -> bool:
    """Lock an open file for this process; False where another one holds the lock.

    Raises:
        CropiError: the file system of ``folder`` has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise CropiError(
            f"the file system of {folder} gives no file locks ({error.strerror}), and two jobs could write into one "
            "folder; give a folder on another file system"
        ) from error
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``, which another process may have removed or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
