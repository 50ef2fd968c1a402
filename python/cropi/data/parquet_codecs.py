"""What packs the pages of a parquet file: https://parquet.apache.org/docs/file-format/data-pages/compression/."""

from __future__ import annotations

from cropi.errors import optional

CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


def unpacked(data: bytes, size: int, codec: int) -> bytes:
    """The bytes of a page.

    Args:
        data: they, packed.
        size: how many there are.
        codec: the number of what packed them; 0: nothing.

    Raises:
        ValueError: they are damaged, or packed by something else.
    """
    if not codec:
        return data
    if codec not in CODECS:
        raise ValueError(f"packed by the codec {codec}")
    pyarrow = optional("pyarrow")
    try:
        return bytes(pyarrow.decompress(data, size, CODECS[codec], asbytes=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError("damaged") from error
