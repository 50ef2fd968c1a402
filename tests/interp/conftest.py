"""Triton kernels on CPU tensors. A process is either an interpreter or a compiler, so these tests have one of their
own: `TRITON_INTERPRET=1 pytest tests/interp`, which tests/test_triton_interpreter.py starts.

The interpreter computes bfloat16 wrongly without an error: float32 and float16 here, bfloat16 on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty starts as NaN: an element that is read before it is written shows."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
