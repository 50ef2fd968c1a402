"""The operator ``cropi::flat_sketch``: checks, choice of backend, shapes for tracing."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ... import dispatch
from ..._library import register
from ...philox import key_of
from ...spec import SketchSpec
from .._checks import check_accumulator, check_devices
from . import cpu, reference


class Draw(NamedTuple):
    """What the kernels need of a spec and a name: where coordinates go, and which are kept."""

    key: tuple[int, int]
    keep_below: int  # a coordinate is kept where its second word is below; 0: all are
    scale: float


@functools.lru_cache(maxsize=16384)
def draw_of(spec: str, name: str) -> Draw:
    """What the spec with recipe ``spec`` draws for a parameter."""
    made = SketchSpec.from_recipe(spec)
    keep_below = 0 if made.keep >= 1.0 else max(1, int(made.keep * 2.0**32))
    return Draw(key_of(made.version, made.seed, name), keep_below, made.keep**-0.5)


def _sketch(
    x: torch.Tensor, out: torch.Tensor, spec: str, name: str, offset: int, backend: str | None
) -> None:
    _check(x, out, SketchSpec.from_recipe(spec), offset)
    draw = draw_of(spec, name)
    chosen = dispatch.choose("flat_sketch", x, out, backend=backend)
    if chosen == "triton":
        from . import triton

        triton.flat_sketch(x, *draw, out, offset)
    elif chosen == "cpu":
        cpu.flat_sketch(x, *draw, out, offset)
    else:
        reference.flat_sketch(x, *draw, out, offset)


def _sketch_fake(
    x: torch.Tensor, out: torch.Tensor, spec: str, name: str, offset: int, backend: str | None
) -> None:
    _check(x, out, SketchSpec.from_recipe(spec), offset)


def _check(x: torch.Tensor, out: torch.Tensor, spec: SketchSpec, offset: int) -> None:
    if x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype}, contiguous={x.is_contiguous()}: give a contiguous float32 tensor")
    if out.ndim != 1 or out.shape[0] != spec.dim:
        raise ValueError(f"out has shape {tuple(out.shape)}: it must be a contiguous [{spec.dim}]")
    check_accumulator(out)
    check_devices("x", x, out=out)
    if offset < 0 or offset + x.numel() > 1 << 62:
        raise ValueError(f"offset={offset}: coordinates must stay between 0 and 2^62")


SKETCH = register(
    "flat_sketch(Tensor x, Tensor(a!) out, str spec, str name, int offset, str? backend) -> ()",
    _sketch, _sketch_fake, remedy="give the coordinates in pieces, each at its offset",
)  # fmt: skip
