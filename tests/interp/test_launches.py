"""What a launch on a GPU must be: on the operands' own device, and without the host ever waiting for the device.

Run in the interpreter, with CPU tensors that say they are on a GPU. What would make a host wait (reading a value, a
shape that depends on values) is forbidden for the whole call: so every op can be recorded in a CUDA graph, and the
backward of a model runs ahead of the device.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import cropi_kernels
from cropi_kernels import (
    SketchSpec,
    _gpu,
    bias_grad,
    flat_sketch,
    fold_inputs,
    fold_outputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    plan_vector,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)

READS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.item, torch.ops.aten.equal, torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.unique_dim, torch.ops.aten._unique2,
    torch.ops.aten.unique_consecutive, torch.ops.aten.repeat_interleave, torch.ops.aten.bincount,
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails where the host would read what the device has computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in (
            torch.ops.aten.index,
            torch.ops.aten.index_put,
            torch.ops.aten.index_put_,
        )
        by_mask = masks and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert func.overloadpacket not in READS and not by_mask, f"the host waits for the device: {func}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """CPU tensors in the role of CUDA tensors; yields the names of the kernels as they are launched."""
    depth, launched = 0, []

    @contextlib.contextmanager
    def on(tensor: torch.Tensor) -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            yield
        finally:
            depth -= 1

    run = GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        assert depth, f"{self.fn.__name__} is launched on whichever device is current"
        launched.append(self.fn.__name__)
        run(self, *args, **kwargs)

    monkeypatch.setattr(_gpu, "on", on)
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    # Offsets on a device are not read; these are on the host, where the ops would.
    for op in ("sketch_linear", "sketch_rows", "norm_grad"):
        monkeypatch.setattr(f"cropi_kernels.ops.{op}.ops.check_offset_values", lambda offsets, n: None)
    yield launched


SPEC = SketchSpec(width=16, vocab_width=16)
PLAN = plan_matrix(SPEC, "a.mlp.up_proj.weight", 20, 40)
WIDE = plan_matrix(SketchSpec(width=None), "a.mlp.down_proj.weight", 1300, 700)
TIED = plan_matrix(SPEC, "lm_head.weight", 60, 40, "tied")
NORM = plan_vector(SPEC, "model.norm.weight", 40)
D, A, X, H = torch.ones(9, 20), torch.ones(9, 40), torch.ones(9, 60), torch.ones(9, 1300).half()
B = torch.ones(700, 9).half().t()  # strided columns
OFFSETS, IDS, OUT = (
    torch.tensor([0, 4, 4, 9]),
    torch.tensor([1, 5, 5, 0, 59, 2, 2, 7, 7]),
    torch.zeros(3, 32768),
)
FLAT = SketchSpec(kind="dropout", keep=0.5, dim=64)
HEAD, TARGETS = torch.ones(60, 40) / 7, torch.tensor([1, -100, 5, 0, 59, 2, 2, 7, 7])

CALLS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "fold_inputs": (lambda: fold_inputs(A, PLAN, backend="triton"), {"fold_kernel"}),
    "fold_outputs": (lambda: fold_outputs(X, TIED, backend="triton"), {"fold_kernel"}),
    "sketch_linear": (
        lambda: sketch_linear(D, A, OFFSETS, PLAN, OUT.clone(), backend="triton"),
        {"fold_kernel", "slab_kernel"},
    ),
    "sketch_linear without a fold, strided": (
        lambda: sketch_linear(H, B, OFFSETS, WIDE, OUT.clone(), backend="triton"),
        {"fold_kernel", "slab_kernel", "reduce_partials_kernel"},
    ),
    "sketch_embedding": (
        lambda: sketch_embedding(A, IDS, OFFSETS, TIED, OUT.clone(), backend="triton"),
        {"rows_kernel"},
    ),
    "sketch_vector": (lambda: sketch_vector(A[:3], NORM, OUT.clone(), backend="triton"), {"vector_kernel"}),
    "norm_grad": (
        lambda: norm_grad(A, A, OFFSETS, 1e-6, centered=True, with_bias=True, backend="triton"),
        {"norm_kernel"},
    ),
    "bias_grad": (lambda: bias_grad(A, OFFSETS, backend="triton"), {"norm_kernel"}),
    "flat_sketch": (
        lambda: flat_sketch(A, FLAT, "w", OUT[0, :64].clone(), backend="triton"),
        {"scatter_kernel", "flush_kernel"},
    ),
    "linear_logprob": (
        lambda: linear_logprob(A, HEAD, TARGETS, return_entropy=True, chunk_size=4, backend="triton"),
        {"forward_kernel"},
    ),
    "logprob_and_grad": (
        lambda: logprob_and_grad(A, HEAD, TARGETS, lambda logp, a, b: logp, chunk_size=4, backend="triton"),
        {"forward_kernel", "backward_kernel"},
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_no_op_makes_the_host_wait(op: str, gpu: list[str]) -> None:
    call, kernels = CALLS[op]
    call()  # the first call with a plan uploads its tables
    gpu.clear()
    with NoWaiting():
        call()
    assert kernels <= set(gpu), f"launched {gpu}"


def test_the_backward_of_log_probs_neither(gpu: list[str]) -> None:
    hidden = A.clone().requires_grad_()
    logp = linear_logprob(hidden, HEAD, TARGETS, chunk_size=4, backend="triton")
    with NoWaiting():
        logp.sum().backward()
    assert "backward_kernel" in gpu


def test_what_is_forbidden_is_seen() -> None:
    for waits in (lambda: A.sum().item(), lambda: A.nonzero(), lambda: A[A > 0], lambda: bool((A > 0).any())):
        with pytest.raises(AssertionError, match="the host waits"), NoWaiting():
            waits()


# ------------------------------------------------------------------------------------------------- source
def launches(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, kernel, whether inside ``with _gpu.on(...)``) of every ``some_kernel[grid](...)``."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            inside |= any(ast.unparse(item.context_expr).startswith("_gpu.on(") for item in node.items)
        kernel = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        if kernel and ast.unparse(node.func.value).endswith("kernel"):
            yield node.lineno, ast.unparse(node.func.value), inside
        yield from launches(node, inside)


def test_every_launch_is_on_its_operands_device() -> None:
    """Several GPUs in one process: Triton launches on the current device, whatever its operands are on."""
    found = [
        (path.name, *launch)
        for path in Path(cropi_kernels.__file__).parent.rglob("*.py")
        for launch in launches(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(found) >= 9, found
    assert not [launch for launch in found if not launch[-1]]
