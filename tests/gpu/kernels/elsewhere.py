"""A pass with all tensors on another device than the host: ``meta``, which has shapes and no values. A program, since
it changes how operators are registered: tests/gpu/test_gpu_kernels.py runs it.

What a GPU would refuse, or wait for, is an error here: an operand that was left on the host, a number that is read on
the way. Kernels are not launched, but everything around them runs as for a GPU. The one copy of the batch that
`policy_gradient` makes before the pass (docs/gpu.md) is the host's own batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHED: set[str] = set()
REGISTER = library.register_fake
# Operators before the first of the model: two of the sums, three of a mask that is made for eager attention, the others
# of the copy to the device, and views.
BEFORE = 28


def no_shapes_alone(name: str, *args: Any, **kwargs: Any) -> Any:
    """The package's operators run on ``meta`` what they run on a GPU."""
    if not str(name).startswith("cropi::"):
        return REGISTER(name, *args, **kwargs)


def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
    for x in args:
        assert not isinstance(x, torch.Tensor) or x.is_meta, (
            f"{kernel.fn.__name__} was given {x.device} memory"
        )
    x, *others = kwargs["grid"]
    limits = x < 2**31 and max(others, default=0) < 2**16  # CUDA's
    assert limits, f"{kernel.fn.__name__} is launched on a grid of {kwargs['grid']}"
    LAUNCHED.add(kernel.fn.__name__)


library.register_fake = no_shapes_alone  # type: ignore[assignment]
triton.JITFunction.run = launch
torch.Tensor.is_cuda = property(lambda x: x.is_meta)  # type: ignore[assignment, method-assign]

from support import zoo  # noqa: E402
from transformers import masking_utils  # noqa: E402

from cropi_kernels import (  # noqa: E402
    GradientSketcher,
    ProjectionSpec,
    SketchSpec,
    _gpu,
    _triton,
    bias_grad,
    dispatch,
    project,
    project_transpose,
)
from cropi_kernels.ops import _checks  # noqa: E402
from cropi_kernels.ops.linear_logprob import triton_tiles  # noqa: E402
from cropi_kernels.sketcher.attach import attachment, builder  # noqa: E402
from cropi_kernels.sketcher.batch import labels  # noqa: E402
from cropi_kernels.sketcher.model import recognise  # noqa: E402
from cropi_kernels.sketcher.policy import decoder  # noqa: E402

_checks.DEVICES = ("cpu", "meta")
_gpu.on = lambda x: contextlib.nullcontext()
torch.cuda.get_device_capability = lambda device=None: (9, 0)
_triton.shared_memory = lambda device: 232_448
triton_tiles._multiprocessors = lambda device: 132
dispatch.choose = lambda *args, **kwargs: "triton"
torch.is_autocast_enabled = lambda *args: False  # type: ignore[assignment]
# What a module is, and whether the parts make the model, is found out by values, once, before any pass.
builder.embedding_scale = lambda module: 1.0
recognise._multiplies = lambda *args: True
# transformers reads them, where no mask is.
masking_utils.find_packed_sequence_indices = lambda position_ids: None
# Both refuse weights that are not loaded.
decoder._check_place = attachment.check_loaded = lambda model: None
decoder.measure_head = lambda *args: (1.0, None)


class Watched(TorchDispatchMode):
    """Counts the operators before the model's first, for which a device waits. Fails where the pass copies from the
    host after it: torch waits there for everything that was launched before."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.copies, self.inside = 0, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.before += not self.inside
        if self.inside and func.overloadpacket is torch.ops.aten._to_copy and not args[0].is_meta:
            assert str(kwargs.get("device")) != "meta", (
                f"{list(args[0].shape)} is copied in the middle of a pass"
            )
        return func(*args, **kwargs)


def by_labels(batch: zoo.Batch) -> dict[str, Any]:
    """The batch by labels, and a weight for each place."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.positions + 1] = batch.targets
    of_tokens = {k: v for k, v in vars(batch).items() if k not in ("positions", "targets")}
    return of_tokens | {"labels": labels, "weights": torch.ones(labels.shape)}


def by_positions(batch: zoo.Batch) -> dict[str, Any]:
    return vars(batch) | {"weights": zoo.weights_of(batch)}


def one_pass(
    name: str, layout: str, dtype: torch.dtype, given: Callable[[zoo.Batch], dict[str, Any]]
) -> None:
    here = given(zoo.LAYOUTS[layout]())
    there = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in here.items()}
    copies = {id(there[k]): v for k, v in here.items()}
    watched = Watched()

    def on_host(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        watched.copies += 1
        return tuple(x if x is None else copies[id(x)] for x in tensors)

    labels.on_host = on_host
    model = zoo.make(name, dtype).to("meta")
    model.set_attn_implementation("eager")  # type: ignore[operator]  # others look for masks that may be left out
    with GradientSketcher(model, SketchSpec(width=16, vocab_width=64), verify=False) as sketcher:
        sketcher.policy_gradient(**there)  # uploads the tables of plans
        watched.copies = 0
        begin = lambda *args: setattr(watched, "inside", True)  # noqa: E731
        with decoder.split_parts(model).decoder.register_forward_pre_hook(begin), watched:
            got = sketcher.policy_gradient(**there)
    assert watched.copies == 1 and watched.before <= BEFORE, watched.before
    assert got.sketches.is_meta and got.sketches.shape == (zoo.N_SEGMENTS, 32768)


for name in sorted(zoo.FAMILIES):
    for layout in ("padded", "shared"):
        for dtype in (torch.float32, torch.bfloat16):
            one_pass(name, layout, dtype, by_positions)
one_pass("llama", "padded", torch.bfloat16, by_labels)
for kind, nnz in (("countsketch", 1), ("sjlt", 4)):
    for rows, size in ((1, 10**9), (8, 10**6 + 1), (10**5, 100), (3, 0)):
        x = torch.empty(rows, size, dtype=torch.bfloat16, device="meta")
        for dim in (16 * nnz, 4096):
            spec = ProjectionSpec(dim, kind=kind, nnz=nnz)
            assert project(x, spec, 10**10, nonfinite="ignore").is_meta
            y = torch.empty(rows, dim, device="meta")
            assert project_transpose(y, spec, size, 10**10).is_meta
# More programs than CUDA has along an axis other than the first.
offsets = torch.empty(3, dtype=torch.int64, device="meta")
assert bias_grad(torch.empty(64, 1 << 27, dtype=torch.bfloat16, device="meta"), offsets).is_meta
print("launched", *sorted(LAUNCHED))
