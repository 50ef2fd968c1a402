"""Triton kernels on CPU tensors. A process is either an interpreter or a compiler, so these tests have one of their
own: `TRITON_INTERPRET=1 pytest tests/interp`, which tests/test_triton_interpreter.py starts.

The interpreter computes bfloat16 wrongly without an error: float32 and float16 here, bfloat16 on a GPU.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(poisoned: None) -> None:
    """A GPU's fresh memory is anything."""
