"""A module with other values for a while, and nothing that was made of the values before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cropi_kernels.ops import _device_plan
from cropi_kernels.ops.norm_grad import triton as norm
from cropi_kernels.ops.sketch_linear import triton as slab
from cropi_kernels.ops.swiglu import triton as gates


@contextlib.contextmanager
def changed(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        forget()
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
        forget()


def forget() -> None:
    """What was made of the values before: the tables of plans, the launches of kernels."""
    _device_plan.cache.clear()
    for launch in (
        slab.fold_launch, norm.norm_launch, norm.sums_launch, gates.forward_launch, gates.fold_launch,
    ):  # fmt: skip
        launch.cache_clear()
