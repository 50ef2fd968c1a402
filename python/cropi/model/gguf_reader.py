"""What transformers does with a GGUF file, without what takes most of its time; the numbers are the same.

- Every token of the vocabulary is cut out of the mapped file as arrays of numpy's class of mapped files, which asks of
  each whether it shares the file's memory. Arrays of the plain class are cut in a third of the time.
- The table of tensor names depends on architecture and number of layers alone, and is made anew for every module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


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

    gguf.GGUFReader, gguf.get_tensor_name_map = PlainReader, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = whole, names
