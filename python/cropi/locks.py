"""Locks that keep two processes from writing into one place. A lock ends with the processes that hold it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from cropi.atomic import make_folder, remove
from cropi.errors import CropiError, warn
from cropi.files import is_folder, is_there, writing

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


@contextlib.contextmanager
def locked_folder(out: Path, command: str) -> Iterator[int]:
    """Lock a folder of results, which is made if it is missing; yields the descriptor of the lock's file.

    Commands inherit it. So if this process is killed while a trainer runs, the folder stays locked until that trainer
    has ended, and no second one writes over it.

    Args:
        out: the folder.
        command: which locks it, for the message that another one gets.

    Raises:
        CropiError: it is a file, cannot be written, or is locked already.
    """
    if is_there(out) and not is_folder(out):
        raise CropiError(f"out: {out} is a file; give a folder")

    def in_use(owner: str) -> CropiError:
        return CropiError(
            f"{out} is in use: by the `{command}` of process {owner}, or by a command that it started and that is "
            "still running; wait for it, or end it"
        )

    with writing(out):
        make_folder(out)
        lock = lock_folder(out, in_use)
    try:
        yield lock
    finally:
        os.close(lock)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Inside, this thread alone writes the files that belong together under a name; others wait, and say so.

    The lock is a hidden file beside ``path`` that is removed afterwards; after a kill it stays, and nobody waits for
    it. Where the file system has no locks, nobody waits.

    Raises:
        CropiError: the lock's file cannot be made.
    """
    lock = path.with_name(f".{path.name[:80]}{LOCK}")
    descriptor = _waited(path, lock)
    try:
        yield
    finally:
        # Before it is released: a process that waits for it sees that it is gone, and makes another.
        remove(lock)
        os.close(descriptor)


def _waited(path: Path, lock: Path) -> int:
    """The descriptor of a lock's file that this thread holds."""
    while True:
        with writing(path, lock):
            make_folder(path.parent)
            descriptor = os.open(lock, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    warn(f"another process writes {path}; waiting for it to end")
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
