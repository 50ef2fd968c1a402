"""What all tests share: one thread, known random numbers, and fixtures that several files use."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cropi_kernels import _native, dispatch
from support import quick

LEVELS = [level for level in (1, 3, 4) if level <= _native.native().detected_level()]
# Small tensors: a second thread costs more than it brings, and torch's own sums follow it.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Modules and tests stay until the end: to go through their 700,000 objects while they are read, and in every full
    collection behind that, was a tenth of the processor time of the tests of trainers and sketchers."""
    gc.disable()
    try:
        return (yield)  # type: ignore[misc]
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)  # what -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests first: no process waits at the end for another one's last test."""
    if config.getoption("quick", False):
        quick.choose(config, items)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    """The same random numbers for a test whatever ran before it, and its number of threads ends with it."""
    torch.manual_seed(9)  # the tests' own generators begin at 0
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS, ids=lambda level: f"level={level}")
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Every instruction-set level that this machine can run: 1 baseline, 3 AVX2, 4 AVX-512."""
    before = _native.native().current_level()
    _native.native().set_level(request.param)
    assert _native.native().current_level() == request.param
    yield request.param
    _native.native().set_level(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty starts as NaN: an element that is read before it is written shows."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No backend is named by the environment, none has been warned of, and a warning is an error."""
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("CROPI_KERNELS_BACKEND", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
