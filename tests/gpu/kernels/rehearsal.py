"""A stage for the GPU suite where there is no GPU: CUDA calls reach the CPU, kernels whatever runs them there.

Sizes are cut down by the tests. What is rehearsed is everything but the speed: names, shapes, units, keys of the rows,
and that nothing in a script breaks.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cropi_kernels import _gpu, dispatch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def cpu(value: Any) -> Any:
    """An argument as it is on the stage."""
    if isinstance(value, str) and value.startswith("cuda") or isinstance(value, torch.device):
        return torch.device("cpu")
    return value


class Stage(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(cpu, args)), {k: cpu(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.cpu:
            return args[0].clone()  # as a device does: the copy is not the tensor
        if func is torch.mm and "out_dtype" in kwargs:
            del kwargs["out_dtype"]
            args = tuple(a.float() for a in args)
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return max((other.time - self.time) * 1000, 1e-3)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Properties:
    name, multi_processor_count, total_memory, L2_cache_size = "a stage", 2, 1 << 30, 256


REAL_GENERATOR = torch.Generator


class Generator(torch.Generator):
    def __new__(cls, device: Any = None) -> Any:
        return REAL_GENERATOR()


class Graph:
    """Records nothing: the capture itself has computed, and a replay finds its results overwritten."""

    def replay(self) -> None:
        pass


def set_stage(monkeypatch: pytest.MonkeyPatch, kernels: bool = True) -> Stage:
    """Everything that a script asks of `torch.cuda`, and the choice of backend; the tensors' part is to be entered.

    Without ``kernels`` the ops run on the CPU's own: the interpreter takes a minute for what a benchmark repeats.
    """
    calls: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 1 << 20,
        "current_stream": lambda *args: Stream(),
        "set_per_process_memory_fraction": lambda share: None,
        "set_sync_debug_mode": lambda mode: None,
        "device_count": lambda: 2,
        "get_device_properties": lambda device: Properties(),
        "graph": lambda graph: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
    }
    for name, value in calls.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(_gpu, "on", lambda x: contextlib.nullcontext())
    if not kernels:
        return Stage()
    choose = dispatch.choose

    def triton_where_it_can(op: str, *tensors: torch.Tensor, backend: str | None = None, **rest: Any) -> str:
        """What a GPU would be served by; float64 is the oracle's."""
        wide = any(t.dtype == torch.float64 for t in tensors)
        return choose(op, *tensors, backend=backend if backend or wide else "triton", **rest)

    monkeypatch.setattr(dispatch, "choose", triton_where_it_can)
    return Stage()
