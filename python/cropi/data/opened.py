"""Files as streams of unpacked bytes, with limits that a packed bomb runs into."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from cropi.data.formats import packing_of
from cropi.errors import CropiError, optional, shortened
from cropi.files import check_name, meant, open_to_read

# Records of 64 responses of 32,000 tokens with log-probs have 60 MB. A line is held in memory, and its objects
# (cropi.bulk).
LONGEST_LINE = 256 * 2**20
# Text packs to a third, token ids to a fifth, many equal records to a hundredth.
LARGEST_RATIO, RATIO_FROM = 400, 64 * 2**20
# Python's own buffer of some kB makes a line of 70 kB out of ten parts: a third of the speed.
BUFFER = 2**20
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


def check_file(path: Path) -> None:
    """Check that there is a file that can be read more than once.

    Raises:
        CropiError: the file does not exist, or is a folder, a pipe or a device.
    """
    if os.path.isdir(path):
        raise CropiError(
            f"{path} is a folder; give trajectory files (.jsonl, .jsonl.gz, .parquet), or the folder that "
            "datasets' save_to_disk wrote"
        )
    if not os.path.exists(path):  # False also for a name that no file system takes
        check_name(path)
        if os.path.exists(f"{path}.part"):
            raise CropiError(
                f"{path}: there is only {path.name}.part, which is not finished; run the command that writes it again"
            )
        raise CropiError(
            f"{shortened(str(path), 500)}: there is no such file; {meant(path)}give the path of one"
        )
    if not os.path.isfile(path):
        raise CropiError(
            f"{path} is a pipe or a device, but trajectories are read twice; write them to a file"
        )


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes of a file.

    Raises:
        CropiError: the disk fails, the packed stream is damaged, or it unpacks to more than :data:`LARGEST_RATIO` times
            its size.
    """
    with open_to_read(path, BUFFER) as file:
        packing = packing_of(file.read(16))
        file.seek(0)
        if packing is None:
            yield file
            return
        counted = _Counted(_unpacker(packing, file), file, path)
        try:
            yield cast(IO[bytes], Unpacked(counted, 2**18))
        except (*_DAMAGE, OSError) as error:
            if (
                isinstance(error, OSError)
                and not isinstance(error, gzip.BadGzipFile)
                and error.errno is not None
            ):
                raise
            if "Frame requires too much memory" in str(error):
                raise CropiError(
                    f"{path} is packed by zstd with a window above 128 MiB, which is not read here; pack it again "
                    "without --long (`zstd -dc --long=31` unpacks it)"
                ) from error
            raise CropiError(
                f"{path}: the {packing} stream is damaged after line {counted.lines} ({error}); copy it again"
            ) from error


def _unpacker(packing: str, file: IO[bytes]) -> Any:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if packing == "bz2":
        return _Streams(bz2.BZ2Decompressor, file)
    if packing == "xz":
        return _Streams(lzma.LZMADecompressor, file, padding=b"\0")
    pyarrow = optional("pyarrow")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


class _Streams:
    """An unpacker of bz2 or xz streams that follow each other.

    ``bz2.BZ2File`` and ``lzma.LZMAFile`` take a later stream whose first bytes are damaged for no stream, and leave out
    all from there on without an error; padding behind xz streams, which xz allows, is an error there.
    """

    def __init__(self, make: Callable[[], Any], file: IO[bytes], padding: bytes = b"") -> None:
        self._make, self._file, self._padding = make, file, padding
        self._stream = make()

    def read(self, size: int) -> bytes:
        while True:
            data: bytes = b""
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(self._padding)
                while not data and (piece := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                    data = piece.lstrip(self._padding)
                if not data:
                    return b""
                self._stream = self._make()
            elif self._stream.needs_input and not (data := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                raise EOFError("it ends within a stream")
            if made := self._stream.decompress(data, size):
                return bytes(made)


def peek(stream: IO[bytes]) -> bytes:
    """The first bytes, which are not taken."""
    return stream.peek(512)[:512]  # type: ignore[attr-defined]


class Unpacked(io.BufferedReader):
    """The unpacked bytes of a packed file."""


class _Counted(io.RawIOBase):
    """An unpacker's output, counted against the packed bytes that it has taken."""

    def __init__(self, source: Any, packed: IO[bytes], path: Path) -> None:
        self.source, self.packed, self.path = source, packed, path
        self.read_bytes = self.lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        self.read_bytes += len(data)
        self.lines += data.count(b"\n")
        if self.read_bytes > RATIO_FROM and self.read_bytes > LARGEST_RATIO * max(self.packed.tell(), 1):
            raise CropiError(
                f"{self.path} unpacks to more than {LARGEST_RATIO} times its size ({self.read_bytes >> 20} MiB from "
                f"{self.packed.tell() >> 10} KiB so far), which no trajectories do; unpack it yourself if it is right"
            )
        return len(data)
