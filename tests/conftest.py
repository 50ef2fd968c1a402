"""Fixtures that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cropi_kernels import _native

LEVELS = [level for level in (1, 3, 4) if level <= _native.native().detected_level()]


@pytest.fixture(params=LEVELS, ids=lambda level: f"level={level}")
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every instruction-set level that this machine can run: 1 baseline, 3 AVX2, 4 AVX-512."""
    before = _native.native().current_level()
    _native.native().set_level(request.param)
    assert _native.native().current_level() == request.param
    yield request.param
    _native.native().set_level(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
