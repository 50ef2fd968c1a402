"""What a launch on a GPU must be: on the operands' own device, and without the host ever waiting for the device.

Run in the interpreter, with CPU tensors that say they are on a GPU. What would make a host wait (reading a value, a
shape that depends on values) is forbidden for the whole call: so every op can be recorded in a CUDA graph, and the
backward of a model runs ahead of the device.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.op_calls import HEAD, NORM, OFFSETS, OPS, ROWS, A, OpCall
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import cropi_kernels
from cropi_kernels import (
    ProjectionSpec,
    SketchSpec,
    _gpu,
    linear_logprob,
    logprob_and_grad,
    plan_matrix,
    project,
    project_transpose,
    sketch_linear,
    swiglu,
)
from cropi_kernels.ops._triton_segments import cut
from cropi_kernels.ops.linear_logprob import oracle, triton_tiles
from cropi_kernels.ops.linear_logprob.contract import Settings, Stats
from cropi_kernels.ops.linear_logprob.ops import prepare
from cropi_kernels.ops.sketch_vector.triton import sketch_tail

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
    for op in ("sketch_linear", "sketch_grouped", "sketch_embedding", "norm_grad", "rms_norm"):
        # By import: a function of the package's folder has the same name as the folder.
        operator = importlib.import_module(f"cropi_kernels.ops.{op}.ops")
        monkeypatch.setattr(operator, "check_offset_values", lambda offsets, n: None)
    monkeypatch.setattr(operator, "_check_cover", lambda offsets, n: None)  # of the last, rms_norm
    yield launched


WIDE = plan_matrix(SketchSpec(width=None), "a.mlp.down_proj.weight", 1300, 700)
TARGETS = torch.where(ROWS == 0, -100, ROWS)
HALF = torch.ones(20, 16).half()
THINNED = ProjectionSpec(64, keep=0.5)
# The ops of OPS that Triton serves; `test_the_list_is_whole` holds the keys to what the ops themselves say.
KERNELS = {
    "fold_inputs": {"fold_kernel"},
    "fold_outputs": {"fold_kernel"},
    "sketch_linear": {"fold_kernel", "chunks_kernel", "slab_kernel"},
    "sketch_grouped": {"fold_kernel", "grouped_kernel"},
    "sketch_embedding": {"rows_kernel"},
    "sketch_vector": {"vector_kernel"},
    "norm_grad": {"norm_kernel"},
    "bias_grad": {"sums_kernel"},
    "rms_norm": {"rms_kernel"},
    "rms_norm_backward": {"rms_backward_kernel"},
    "swiglu": {"swiglu_fold_kernel"},
    "swiglu_backward": {"swiglu_backward_kernel"},
    "linear_logprob": {"forward_kernel"},
}


def wide_and_strided() -> None:
    d, a = torch.ones(9, 1300).half(), torch.ones(700, 9).half().t()
    sketch_linear(d, a, OFFSETS, WIDE, torch.zeros(3, 32768), backend="triton")


def log_probs_by_tiles() -> None:
    """Without the product of the backward pass, which no CPU makes of 16 bits with a wide result."""
    targets = ROWS % len(HALF)
    call = prepare(HALF[:9], HALF, targets, None, Settings(1.0, 0.0, -100, 0, "triton"))
    call = call._replace(kernels=SimpleNamespace(times_head=lambda dz, head, out: out.zero_()))
    for by_row in (False, True):  # as float16 and as bfloat16 are
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_tiles, "by_row", lambda dtype, chosen=by_row: chosen)
            rows, stats = call.rows(9, keep=True), Stats(*torch.zeros(3, 9), None)
        rows.compute(HALF[:9], call.target)
        rows.forward(call.target, stats)
        gradient = rows.backward(call.target, torch.ones(9), stats, whole=False)
        rows.times_head(gradient, call.target, torch.zeros(9, HALF.shape[1]).half())


def sums_of_chunks() -> None:
    chunks = cut(OFFSETS, 9, 4, True)
    sketch_tail(torch.ones(chunks.n_slots, 40), (NORM,), chunks, torch.zeros(3, 32768))


# What is called, and the kernels that it must launch at least.
CALLS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    op: (lambda op=op: OPS[op]("triton"), kernels)  # type: ignore[misc]
    for op, kernels in KERNELS.items()
} | {
    "sketch_linear without a fold, strided": (
        wide_and_strided,
        {"slab_kernel", "reduce_partials_kernel"},
    ),
    "swiglu without a fold": (lambda: swiglu(A, A, backend="triton"), {"swiglu_kernel"}),
    "sketch_tail": (sums_of_chunks, {"tail_kernel"}),
    "linear_logprob with entropies": (
        lambda: linear_logprob(A, HEAD, TARGETS, return_entropy=True, chunk_size=4, backend="triton"),
        {"forward_kernel"},
    ),
    "logprob_and_grad": (
        lambda: logprob_and_grad(A, HEAD, TARGETS, lambda logp, a, b: logp, chunk_size=4, backend="triton"),
        {"forward_kernel", "backward_kernel"},
    ),
    "log-probs by tiles": (
        log_probs_by_tiles,
        {"own_kernel", "tiles_kernel", "again_kernel", "combine_kernel", "rescale_kernel", "scale_kernel"},
    ),
    "project": (
        lambda: project(A, THINNED, nonfinite="ignore", backend="triton"),
        {"draws_kernel", "gather_runs_kernel", "add_kernel"},
    ),
    "project one by one": (
        lambda: project(A, ProjectionSpec(40), nonfinite="ignore", backend="triton"),
        {"draws_kernel", "gather_kernel", "add_kernel"},
    ),
    "project_transpose": (
        lambda: project_transpose(A, ProjectionSpec(40), 300, backend="triton"),
        {"draws_kernel", "spread_kernel"},
    ),
    "project_transpose by runs": (
        lambda: project_transpose(torch.ones(9, 64), THINNED, 300, backend="triton"),
        {"draws_kernel", "spread_runs_kernel"},
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


def test_ignored_tokens_hold_zero_where_they_are_computed(gpu: list[str]) -> None:
    """A GPU's host does not look at the targets, so it cannot leave rows out as the CPU does."""
    logp, entropy = linear_logprob(A, HEAD, TARGETS, return_entropy=True, chunk_size=4, backend="triton")
    right = oracle.linear_logprob(A, HEAD, TARGETS)
    ignored = TARGETS == -100
    assert ignored.any() and not logp[ignored].any() and not entropy[ignored].any()
    torch.testing.assert_close(entropy.double(), right.entropy, rtol=1e-5, atol=1e-5)


def test_what_is_forbidden_is_seen() -> None:
    for waits in (lambda: A.sum().item(), lambda: A.nonzero(), lambda: A[A > 0], lambda: bool((A > 0).any())):
        with pytest.raises(AssertionError, match="the host waits"), NoWaiting():
            waits()


def served_by_triton(op: str) -> bool:
    """False where the op itself refuses the backend; any other error is the test's."""
    try:
        OPS[op]("triton")
    except RuntimeError as error:
        if str(error).startswith(f"backend='triton' cannot run {op}: "):
            return False
        raise
    return True


def test_the_list_is_whole(gpu: list[str]) -> None:
    """An op is left out above if Triton does not serve it, and a kernel never."""
    assert set(KERNELS) == {op for op in OPS if served_by_triton(op)}
    named = set().union(*(kernels for _, kernels in CALLS.values()))
    # Gluon has no interpreter: tests/gpu/aot holds what is compiled of these, the suite on a GPU their bits; the
    # emulator those of slabs.
    in_gluon = {"turns_kernel", "slab_turns_kernel", "slab_stay_kernel"}
    assert named == {kernel for _, _, kernel, _ in all_launches()} - {"self.kernel"} - in_gluon


@pytest.mark.parametrize("op", [*KERNELS, "project"])
def test_the_interpreter_computes_no_bfloat16(op: str, gpu: list[str]) -> None:
    """It takes the 16 bits for an integer and says nothing: products of sketches and log-probs were garbage."""
    call = OPS.get(op, OpCall({"x": A}, lambda b, x: project(x, THINNED, backend=b)))
    narrow = {name: x.bfloat16() for name, x in call.operands.items() if name not in ("out", "scale")}
    with pytest.raises(RuntimeError, match="computes bfloat16 wrongly.* give float32 or float16, or unset"):
        call("triton", **narrow)
    assert not gpu


# ------------------------------------------------------------------------------------------------- source
def launches(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, kernel, whether inside ``with _gpu.on(...)``) of every ``some_kernel[grid](...)``, and of every
    ``Launch(some_kernel, ...)``, whose own launch is the one of ``self.kernel``. Each says how sums are rounded."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            inside |= any(ast.unparse(item.context_expr).startswith("_gpu.on(") for item in node.items)
        kernel = isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        if kernel and ast.unparse(node.func.value).endswith("kernel"):
            assert "**OPTIONS" in ast.unparse(node), f"line {node.lineno}: how are sums rounded?"
            yield node.lineno, ast.unparse(node.func.value), inside
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Launch":
            yield node.lineno, ast.unparse(node.args[0]), True
        yield from launches(node, inside)


def all_launches() -> list[tuple[str, int, str, bool]]:
    """Those of the package, the file's name in front."""
    return [
        (path.name, *launch)
        for path in Path(cropi_kernels.__file__).parent.rglob("*.py")
        for launch in launches(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_every_launch_is_on_its_operands_device() -> None:
    """Several GPUs in one process: Triton launches on the current device, whatever its operands are on."""
    found = all_launches()
    assert len(found) >= 9, found
    assert not [launch for launch in found if not launch[-1]]
