"""Files: looked for and read, with what the system says in words. :mod:`cropi.atomic` writes them."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cropi.errors import CropiError, did_you_mean, shown

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
NO_ACCESS |= {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}
# Errors of the disk or the process, whichever file the system names with them.
FAILING = NO_SPACE | NO_DESCRIPTOR | {errno.EROFS, errno.EIO}


def reason(error: OSError, otherwise: str = "give a path that can be written") -> str:
    """Why a file could not be written, and the remedy; ``otherwise`` is that for a path that does not do."""
    number = error.errno or 0
    if number in NO_SPACE:
        remedy = "free some space and run the same command again (what was written before is intact)"
    elif number in NO_ACCESS:
        remedy = otherwise
    elif number in NO_DESCRIPTOR:
        remedy = "raise the limit of open files (`ulimit -n`) and run the same command again"
    else:
        remedy = "see to the disk that it is on and run the same command again"
    return f"{os.strerror(number).lower()}; {remedy}"


# What a process may take paths in that is not UTF-8, where UTF-8 mode is switched off.
PATHS = sys.getfilesystemencoding()


def beyond_paths(path: object) -> CropiError:
    """The error for a path with characters that this process has none for."""
    return CropiError(
        f"{shown(str(path), 500)} has characters beyond {PATHS}, in which this process takes paths: set PYTHONUTF8=1, "
        "or a locale of UTF-8 such as LC_ALL=C.UTF-8"
    )


def path_of(value: Any, name: str, wanted: str) -> Path:
    """A path that was given in Python.

    Raises:
        CropiError: it is none; names the argument and what is wanted.
    """
    if isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str) and str(value):
        return Path(value)
    got = "empty" if value == "" else f"of type {type(value).__name__}"
    raise CropiError(f"{name} is {got}: give {wanted}")


def check_characters(path: str | Path) -> None:
    """Check that this process can name a path at all; one that it cannot, others take for a file that is not there.

    Raises:
        CropiError: UTF-8 mode is off, and the path has characters that the process has none for.
    """
    if PATHS != "utf-8":
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            raise beyond_paths(path) from error


def check_home(path: str | Path) -> None:
    """Check that a path which is not there does not begin with the ``~`` of a home folder: a folder of that name would
    be made in the present one.

    Raises:
        CropiError: it does; names the path in the home folder.
    """
    home, first = os.path.expanduser(path), Path(path).parts[:1]
    if home != os.fspath(path) and not os.path.lexists(first[0]):
        raise CropiError(
            f"{shown(str(path), 500)}: {first[0]} is no folder here, and means a home folder only where the shell "
            f"replaces it (not in --out=~/x, a config file or Python); give {home}"
        )


def check_name(path: str | Path) -> None:
    """What may be wrong with the name of a path that was to be there, and is not.

    Raises:
        CropiError: as :func:`check_characters` and :func:`check_home`.
    """
    check_characters(path)
    check_home(path)


def in_words(error: Exception) -> Exception:
    """An error of the system that has nothing to do with the file that it names, with a remedy; others as they are."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == PATHS != "utf-8":
        return beyond_paths(error.object)
    if isinstance(error, OSError) and error.errno in FAILING and error.filename is not None:
        return CropiError(f"{error.filename}: {reason(error)}")
    return error


def failure_of(error: BaseException | None) -> OSError | None:
    """The failing disk, the limit or the missing right that an error of another library comes from; None: it is another
    error.

    Libraries that are written in Rust (safetensors, tokenizers), and torch, tell the number in words alone; safetensors
    says of a file that cannot be opened that there is none.
    """
    while error is not None:
        number = _number_in(str(error)) or getattr(error, "errno", None)
        denied = re.fullmatch("No such file or directory: (.+)", str(error))
        if number is None and denied and os.path.isfile(denied[1]):
            return _opening(denied[1])
        if number in FAILING:
            return OSError(number, os.strerror(number))
        if isinstance(error, PermissionError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _number_in(message: str) -> int | None:
    """The number in "... (os error 5)", as Rust writes it, or in "Input/output error (5)", as torch does."""
    for told in re.finditer(r"\((os error )?(\d{1,4})\)", message):
        if told[1] or message[: told.start()].endswith(f"{os.strerror(int(told[2]))} "):
            return int(told[2])
    return None


def _opening(path: str) -> OSError:
    """The error of opening a file that could not be opened a moment ago."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return error
    # The file can be opened: the earlier failure was the disk's.
    return OSError(errno.EIO, os.strerror(errno.EIO))


@contextlib.contextmanager
def writing(path: Path, *also: Path) -> Iterator[None]:
    """Inside, what the system says of ``path``, of the files ``also``, of a folder above or of a file below them
    becomes an error in words; what it says of another file, which is read meanwhile, stays as it is.

    Raises:
        CropiError: names ``path``, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        # Errors of an open file have no name, and errors of pyarrow's readers no number.
        if error.errno is None or error.filename is not None and not _concerns(error.filename, path, *also):
            raise
        raise CropiError(f"cannot write {path}: {reason(error)}") from error


def _concerns(name: object, *paths: Path) -> bool:
    file = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else None
    return file is not None and any(
        file == path or file in path.parents or path in file.parents for path in paths
    )


@contextlib.contextmanager
def reading(path: str | Path, *, missing: bool = False) -> Iterator[None]:
    """Inside, what the system says of a file that is there becomes an error in words: it is not damaged for that.

    Args:
        path: what messages call it.
        missing: a file that is not there is an error in words, too.

    Raises:
        CropiError: names the file, the reason and the remedy.
        FileNotFoundError: it is not there.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError) and not missing:
            raise
        raise CropiError(f"cannot read {path}: {reason(error, 'give a path that can be read')}") from error


def _status(path: str | Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the name holds a zero byte
        check_characters(path)
        return None
    except OSError as error:
        raise CropiError(f"cannot read {path}: {reason(error, 'give a path that can be read')}") from error


def is_there(path: str | Path) -> bool:
    """Whether there is a file or a folder; in words where the system does not say, as ``Path.exists`` does not.

    Raises:
        CropiError: names the path, the reason (a folder above that cannot be read, links in a circle, a name too
            long, a failing disk) and the remedy.
    """
    return _status(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether there is a file; raises as :func:`is_there`."""
    status = _status(path)
    return status is not None and stat.S_ISREG(status.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; raises as :func:`is_there`."""
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def check_no_pipe(path: str | Path) -> None:
    """Check that a path names no pipe and no device, which end when somebody else ends them, and cannot be read twice.

    Raises:
        CropiError: it does; or as :func:`is_there`.
    """
    status = _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise CropiError(f"{path} is a pipe or a device, which is not read here; give a file")


def size_of(path: str | Path) -> int:
    """The bytes of a file, 0 where there is none; raises as :func:`is_there`."""
    status = _status(path)
    return 0 if status is None else status.st_size


class _Readable(io.FileIO):
    def __init__(self, path: Path) -> None:
        if "\0" in str(path):
            raise CropiError(f"cannot read {path}: no name holds a zero byte; give a path that can be read")
        with reading(path, missing=True):
            super().__init__(path)
        self.path = path

    def readinto(self, buffer: Any) -> int | None:
        with reading(self.path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with reading(self.path):
            return super().readall()


def open_to_read(path: str | Path, buffering: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """A file's bytes, as ``open(path, "rb")`` gives them, with the errors of the disk in words.

    Raises:
        CropiError: now or while it is read; names the file, the reason and the remedy.
    """
    return io.BufferedReader(_Readable(Path(path)), buffering)


def meant(path: str | Path) -> str:
    """Why no file may be at a path: it is a folder or a pipe, or a link to nothing or in a circle, or a pattern, or
    ``"did you mean 'x'? "`` with the name in its folder that is nearest to a misspelt one. With a blank behind; or
    nothing."""
    path = Path(path)
    if os.path.isdir(path):
        return "it is a folder; "
    if os.path.exists(path) and not os.path.isfile(path):
        return "it is a pipe or a device; "
    if os.path.islink(path):
        try:
            os.stat(path)
        except OSError as error:
            circle = error.errno == errno.ELOOP
            end = "and links from there lead round in a circle" if circle else "which is not there"
            return f"it is a link to {shown(os.readlink(path))}, {end}; "
    pattern = "a pattern is for the shell, which replaces it outside of quotes, or glob.glob in Python; "
    near = ""
    if len(path.name) < 256:
        there = entries(path.parent)
        # An ending that both have makes no name near: `train.jsonl` is not meant by `valid.jsonl`.
        stems = get_close_matches(path.stem, {other.stem for other in there})
        same = [other.name for other in there if other.stem == path.stem]
        near = did_you_mean(path.name, (other.name for other in there if other.stem in stems))
        near = near or (f"did you mean {same[0]!r}? " if same else "")
    # Brackets stand in names of files, too.
    return f"{pattern if glob.has_magic(str(path)) else ''}{near}"


def entries(folder: str | Path, pattern: str = "*") -> list[Path]:
    """What a folder holds under names of a pattern, sorted by name; nothing where there is no folder.

    ``Path.glob`` takes a folder that cannot be listed for an empty one (since Python 3.13 whatever the error is).

    Raises:
        CropiError: it cannot be listed; names the folder, the reason and the remedy.
    """
    folder = Path(folder)
    with reading(folder):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # as in _status
            return []
    return sorted(folder / name for name in fnmatch.filter(names, pattern))


def tree(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and all folders in it, each with its files; links to folders are not followed.

    Raises:
        CropiError: one of them cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    with reading(folder, missing=True):
        for root, _, names in os.walk(folder, onerror=refuse):
            files = (Path(root, name) for name in names)
            yield Path(root), sorted(path for path in files if os.path.isfile(path))


# Endings by which readers tell a format, or a packing.
TOLD = {
    ".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".npy", ".npz", ".xlsx",
    ".html", ".yaml", ".yml", ".toml", ".pt", ".safetensors", ".png", ".pdf", ".svg", ".gz", ".zst", ".bz2", ".xz",
}  # fmt: skip
LINES = (".jsonl", ".ndjson", ".json", ".txt")


def check_ending(name: str, path: str | Path, own: Sequence[str]) -> None:
    """Check that a file that is written does not end as another format does: other readers would take it for that one.

    Raises:
        CropiError: names the option or argument, the path and the ending.
    """
    if (ending := Path(path).suffix.lower()) in TOLD and ending not in own:
        raise CropiError(f"{name}: {path}: what is written is no {ending}; give a path that ends in {own[0]}")


def check_outputs(
    outputs: Mapping[str, str | None],
    inputs: Mapping[str, Sequence[str | None]],
    endings: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Check that no file is to be written that is read, or written twice, that is part of a store, or that ends as
    another format does; and before the work that each can be written.

    Args:
        outputs: the paths by option, None where not given. What ``--export`` writes may be a folder.
        inputs: the files that are read, by option.
        endings: how a file of an option ends, which may also have none, or one that tells no format.

    Raises:
        CropiError: names the path and the options; or as :func:`check_home`.
    """
    taken = {
        os.path.realpath(path): f"{name} reads" for name, paths in inputs.items() for path in paths if path
    }
    for name, path in outputs.items():
        if path:
            check_home(path)
            if (other := taken.setdefault(os.path.realpath(path), f"{name} writes")) != f"{name} writes":
                raise CropiError(f"{name}: {path} is the file that {other}; give another path")
            if own := (endings or {}).get(name):
                check_ending(name, path, own)
            # Not MANIFEST of cropi.store, which imports torch.
            if is_file(Path(path).with_name("manifest.json")) and re.match(
                r"manifest\.json|shard-\d+\.safetensors", Path(path).name
            ):
                raise CropiError(
                    f"{name}: {path} is a file of the store {Path(path).parent}; give another path"
                )
            if name != "--export" and is_folder(path):
                raise CropiError(f"{name}: {path} is a folder; give the path of a file")
            _check_writable(name, Path(path).parent)


def _check_writable(name: str, folder: Path) -> Path:
    """What is there of a folder and those above it, into which it can be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if is_there(path))
    if not is_folder(there):
        raise CropiError(f"{name}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CropiError(f"{name}: nothing can be written to {there}; give another folder")
    return there


def check_room(folder: Path, needed: int, what: str) -> None:
    """Check that a folder, which need not be there yet, can be written and has room, before hours of work.

    Args:
        folder: where the files will go.
        needed: bytes, at least.
        what: what needs them, for the message.

    Raises:
        CropiError: too little is free, or the folder cannot be written.
    """
    check_home(folder)
    there = _check_writable(str(folder), folder)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CropiError(
            f"{folder}: {what} need {needed / 1e9:.3g} GB at least, but {free / 1e9:.3g} GB are free there; free some "
            "space, give another folder, or make the sketches smaller (dim, store dtype)"
        )


def text_of(path: Path) -> str:
    """What a UTF-8 text file holds, without a byte order mark, which editors on Windows put in front.

    Raises:
        CropiError: it is not there, or the disk fails.
        UnicodeDecodeError: it is not UTF-8.
    """
    with reading(path, missing=True):
        return path.read_text(encoding="utf-8-sig")
