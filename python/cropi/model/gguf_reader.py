"""What transformers does with a GGUF file, without what takes most of its time; the numbers are the same.

- Every token of the vocabulary is cut out of the mapped file as arrays of numpy's class of mapped files, which asks of
  each whether it shares the file's memory. Arrays of the plain class are cut in a third of the time.
- A job asks for the configuration first and for the weights later, and parses the file's head for each. What was parsed
  for the configuration is handed out once more, while the file is the same.
- The table of tensor names depends on architecture and number of layers alone, and is made anew for every module.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# The reader of the file that was read last, by the file, its size and its time; at most one.
_last: dict[tuple[str, int, int], Any] = {}


@contextmanager
def quick_reading() -> Iterator[None]:
    """Inside, transformers finds a reader of plain arrays, and keeps the tables of names that it asks for."""
    import gguf

    whole, names = gguf.gguf_reader.GGUFReader, gguf.tensor_mapping.get_tensor_name_map

    class PlainReader(whole):  # type: ignore[misc, valid-type]
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray[Any, Any]) -> None:
            self._data = np.asarray(mapped)  # of the base class, on the same memory

    def reader(path: str) -> Any:
        found = os.stat(path)
        key = os.path.realpath(path), found.st_size, found.st_mtime_ns
        held = _last.pop(key, None)
        _last.clear()
        if held is None:
            held = _last[key] = PlainReader(path)
        return held

    gguf.GGUFReader, gguf.get_tensor_name_map = reader, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = whole, names
