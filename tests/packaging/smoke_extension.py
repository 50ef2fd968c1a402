"""What the extension module of an installed wheel computes, where there is no torch for the interpreter.

python smoke_extension.py        (`scripts/wheels.sh` does it, in a fresh environment of every interpreter)
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from array import array
from pathlib import Path

FLOAT32 = 0


def extension() -> object:
    """``cropi_kernels._C`` of this environment, without its package, which imports torch."""
    (path,) = (Path(sysconfig.get_path("platlib")) / "cropi_kernels").glob("_C.*")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def matrix(values: array, rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """As the bindings take it: address, rows, columns, distance of rows, dtype."""
    return values.buffer_info()[0], rows, columns, columns, FLOAT32


def check_logits(native, level: int) -> None:
    """Small integers, whose products float32 holds exactly: 5 x 67 and 33 x 67."""
    tokens, vocab, width = 5, 33, 67
    hidden = array("f", [(7 * i) % 11 - 5 for i in range(tokens * width)])
    head = array("f", [(5 * i) % 13 - 6 for i in range(vocab * width)])
    out = array("f", [float("nan")] * (tokens * vocab))
    native.set_level(level)
    native.head_logits(
        matrix(hidden, tokens, width), matrix(head, vocab, width), 0, out.buffer_info()[0], vocab, 2
    )
    for t in range(tokens):
        for v in range(vocab):
            exact = sum(hidden[t * width + k] * head[v * width + k] for k in range(width))
            assert out[t * vocab + v] == exact, (level, t, v, out[t * vocab + v], exact)


if __name__ == "__main__":
    native = extension()
    # Random123's known answer for philox4x32-10 of zeros.
    assert list(native.philox(0, 0, 0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    levels = sorted({1, 3, 4} & set(range(native.detected_level() + 1)))
    for level in levels:
        check_logits(native, level)
    print(f"Python {sys.version.split()[0]}: the extension is right at the instruction sets {levels}")
