"""What the sketch ops say to bad input, and which backend serves a call. A message names the argument, its value and
the remedy, and comes before any work."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from support import op_calls
from support.op_calls import OPS
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from cropi_kernels import (
    ProjectionSpec,
    SketchSpec,
    _native,
    bias_grad,
    dispatch,
    explain,
    fold_inputs,
    fold_outputs,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    plan_vector,
    project,
    project_transpose,
    projection_of,
    reduce_sketch,
    row_products,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)

NAME = "model.layers.0.mlp.up_proj.weight"
PLAN = plan_matrix(SketchSpec(width=16, vocab_width=16), NAME, 20, 40)
TIED = plan_matrix(SketchSpec(width=16, vocab_width=16), NAME, 20, 40, "tied")
VECTOR = plan_vector(SketchSpec(), "model.norm.weight", 40)
OFFSETS = torch.tensor([0, 2, 5])
D, A, OUT = torch.ones(5, 20), torch.ones(5, 40), torch.zeros(2, 32768)
ROWS = torch.arange(5)


def linear(
    d: torch.Tensor = D, a: torch.Tensor = A, offsets: torch.Tensor = OFFSETS, out: torch.Tensor = OUT
) -> None:
    sketch_linear(d, a, offsets, PLAN, out)


def embedding(x: torch.Tensor = A, rows: torch.Tensor = ROWS, out: torch.Tensor = OUT) -> None:
    sketch_embedding(x, rows, OFFSETS, PLAN, out)


def norm(x: torch.Tensor, dy: torch.Tensor, offsets: torch.Tensor = OFFSETS) -> None:
    norm_grad(x, dy, offsets, 1e-6, centered=True)


# What is called, the argument that must be named, what the message must tell.
CASES: list[tuple[Callable[[], object], str, str]] = [
    (lambda: SketchSpec(dim=100), "dim=100", "power of two from 64 to 1048576"),
    (lambda: SketchSpec(dim=32), "dim=32", "power of two from 64"),
    (lambda: SketchSpec(dim=1 << 21), "dim=2097152", "to 1048576"),
    (lambda: SketchSpec(dim=1024.0), "dim=1024.0", "power of two"),  # type: ignore[arg-type]
    (lambda: SketchSpec(dim=True), "dim=True", "power of two"),
    (lambda: SketchSpec(width=8), "width=8", "power of two from 16 to 65536 or None for no fold"),
    (lambda: SketchSpec(width=48), "width=48", "or None"),
    (lambda: SketchSpec(kind="kron", width=16), "width=16 needs kind='slab'", "folds nothing: leave it out"),
    (lambda: SketchSpec(kind="dropout", vocab_width=64), "vocab_width=64 needs kind='slab'", "leave it out"),
    (lambda: SketchSpec.from_dict({"kind": "kron", "width": 48}), "width=48", "or None"),
    (lambda: SketchSpec(vocab_width=5), "vocab_width=5", "or None"),
    (lambda: SketchSpec(kind="gauss"), "kind='gauss'", "slab, countsketch, dropout, kron, tensor"),  # type: ignore[arg-type]
    (lambda: SketchSpec(seed=-1), "seed=-1", "integer >= 0"),
    (lambda: SketchSpec(seed=1.5), "seed=1.5", "integer >= 0"),  # type: ignore[arg-type]
    (lambda: SketchSpec(seed=True), "seed=True", "integer >= 0"),
    (lambda: SketchSpec(keep=0.0, kind="dropout"), "keep=0.0", "in (0, 1]"),
    (lambda: SketchSpec(keep=1.5, kind="dropout"), "keep=1.5", "in (0, 1]"),
    (lambda: SketchSpec(keep=0.5), "keep=0.5", "kind='dropout'"),
    (lambda: SketchSpec(version=2), "version=2", "sketch again"),
    (lambda: SketchSpec.from_dict({"dimension": 64}), "'dimension'", "known are dim"),
    (lambda: plan_matrix(SketchSpec(), "w", 0, 3), "shape=(0, 3) of 'w'", "at least 1"),
    (lambda: plan_matrix(SketchSpec(), "w", 3, 3, "head"), "role='head' of 'w'", "'linear'"),  # type: ignore[arg-type]
    (lambda: plan_vector(SketchSpec(), "b", 0), "size=0 of 'b'", "at least 1"),
    (lambda: linear(d=torch.ones(5, 21)), "d has shape (5, 21)", "[tokens, 20]"),
    (lambda: linear(d=torch.ones(5, 1, 20)), "d has shape (5, 1, 20)", "[tokens, 20]"),
    (lambda: linear(a=torch.ones(5, 39)), "a has shape (5, 39)", "[tokens, 40]"),
    (lambda: linear(a=torch.ones(5, 1, 16)), "a has shape (5, 1, 16)", "[tokens, 16]"),
    (lambda: linear(a=torch.ones(4, 40)), "d has 5 tokens but a has 4", "same forward"),
    (lambda: linear(offsets=OFFSETS.int()), "offsets is torch.int32", "int64"),
    (lambda: linear(offsets=OFFSETS[None]), "offsets is torch.int64 (1, 3)", "1-D"),
    (lambda: linear(offsets=torch.tensor([0, 0, 0, 0])[::2]), "offsets is", "contiguous"),
    (lambda: linear(offsets=torch.tensor([], dtype=torch.int64)), "offsets is torch.int64 (0,)", "1-D"),
    (lambda: linear(offsets=torch.tensor([0, 3, 2])), "offsets[2]=2 is below offsets[1]=3", "backwards"),
    (lambda: linear(offsets=torch.tensor([0, 3, 6])), "offsets run from 0 to 6", "5 tokens"),
    (lambda: linear(offsets=torch.tensor([-1, 3, 5])), "offsets run from -1 to 5", "5 tokens"),
    (
        lambda: linear(offsets=torch.zeros(3, dtype=torch.int64, device="meta")),
        "offsets is on meta",
        ".cpu()",
    ),
    (lambda: linear(out=torch.zeros(3, 32768)), "out has shape (3, 32768)", "[2, 32768]"),
    (lambda: linear(out=torch.zeros(2, 65536)), "out has shape (2, 65536)", "[2, 32768]"),
    (lambda: linear(out=torch.zeros(2, 32768, dtype=torch.bfloat16)), "out is torch.bfloat16", "float32"),
    (
        lambda: linear(out=torch.zeros(2, 65536)[:, ::2]),
        "out is torch.float32, contiguous=False",
        "contiguous",
    ),
    (lambda: fold_inputs(torch.ones(5, 41), PLAN), "a has shape (5, 41)", "[tokens, 40]"),
    (lambda: fold_outputs(torch.ones(5, 41), TIED), "d has shape (5, 41)", "[tokens, 20]"),
    (lambda: embedding(x=torch.ones(5, 41)), "x has shape (5, 41)", "[tokens, 40]"),
    (lambda: embedding(rows=ROWS[:4]), "rows is torch.int64 (4,)", "[5]"),
    (lambda: embedding(rows=ROWS.int()), "rows is torch.int32", "int64"),
    (lambda: embedding(rows=ROWS + 16), "rows runs from 16 to 20", "rows 0 .. 19"),
    (lambda: embedding(rows=ROWS - 1), "rows runs from -1 to 3", "rows 0 .. 19"),
    (lambda: embedding(rows=ROWS.to_sparse()), "rows: the tensor has the layout", "give a dense tensor"),
    (
        lambda: linear(offsets=OFFSETS.to_sparse()),
        "offsets: the tensor has the layout",
        "give a dense tensor",
    ),
    (lambda: embedding(out=torch.zeros(2, 64)), "out has shape (2, 64)", "[2, 32768]"),
    (lambda: norm(A, torch.ones(5, 39)), "x has shape (5, 40) but dy (5, 39)", "[tokens, n]"),
    (lambda: norm(A, torch.ones(4, 40)), "x has shape (5, 40) but dy (4, 40)", "[tokens, n]"),
    (lambda: norm(A[None], A[None]), "x has shape (1, 5, 40)", "[tokens, n]"),
    (lambda: norm(A, A, torch.tensor([0, 9])), "offsets run from 0 to 9", "5 tokens"),
    (lambda: bias_grad(A[None], OFFSETS), "dy has shape (1, 5, 40)", "[tokens, n]"),
    (lambda: bias_grad(A, torch.tensor([3, 9])), "offsets run from 3 to 9", "5 tokens"),
    (lambda: sketch_vector(torch.ones(2, 39), VECTOR, OUT), "gradient has shape (2, 39)", "[segments, 40]"),
    (lambda: sketch_vector(torch.ones(3, 40), VECTOR, OUT), "out has shape (2, 32768)", "[3, 32768]"),
    (lambda: projection_of(SketchSpec(), NAME), "kind='slab'", "'countsketch' or 'dropout'"),
    (lambda: SketchSpec(kind="dropout", keep=1e-6), "keep=1e-06 rounds to 0 / 65536", "at least 1.53e-05"),
    (lambda: reduce_sketch(OUT, 3000), "dim=3000", "power of two"),
    (lambda: reduce_sketch(OUT, 65536), "dim=65536", "32768"),
    (lambda: reduce_sketch(OUT.bool(), 1024), "sketch is torch.bool", "sketch.float()"),
    (lambda: reduce_sketch(OUT.numpy(), 1024), "sketch is of type ndarray", "torch.as_tensor(sketch)"),  # type: ignore[arg-type]
    (lambda: reduce_sketch(torch.ones(3, 100), 64), "100 numbers", "power of two"),
    (lambda: reduce_sketch(torch.tensor(1.0), 1), "0 numbers", "power of two"),
]


@pytest.mark.parametrize("call, names, tells", CASES, ids=[names for _, names, _ in CASES])
def test_bad_input_is_named(call: Callable[[], object], names: str, tells: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert names in str(error.value) and tells in str(error.value), str(error.value)
    assert not OUT.any(), "nothing was added before the error"


# ----------------------------------------------------------------------------------------------- backends
# Every op in float64, which the C++ kernels do not take; the last two only add to float64.
NAMED: dict[str, Callable[[str | None], object]] = {
    op: lambda b, call=call: call(b, **{name: t.double() for name, t in call.operands.items()})  # type: ignore[misc]
    for op, call in OPS.items()
} | {
    f"{op} into float64": lambda b, op=op: OPS[op](b, out=op_calls.OUT.double())  # type: ignore[misc]
    for op in ("sketch_linear", "sketch_embedding")
}


@pytest.mark.parametrize("op", NAMED)
def test_a_named_backend_serves_or_raises(op: str, fresh_warnings: None) -> None:
    with pytest.raises(
        RuntimeError, match=r"backend='cpu' cannot run \w+: dtype torch.float64 is not one of float32"
    ):
        NAMED[op]("cpu")
    with pytest.raises(
        ValueError, match=r"backend='tpu': choose one of cuda, triton, cpu, reference, or None"
    ):
        NAMED[op]("tpu")
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run \w+: no CUDA C\+\+ kernel"):
        NAMED[op]("cuda")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run \w+: \w+"):
        NAMED[op]("triton")
    with pytest.raises(ValueError, match=r"backend='': choose one of"):
        NAMED[op]("")
    NAMED[op]("reference")
    NAMED[op](None)  # float64 has one backend: nothing to warn of


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch, fresh_warnings: None) -> None:
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run bias_grad"):
        bias_grad(A.double(), OFFSETS)
    assert bias_grad(A, OFFSETS).equal(torch.tensor([[2.0], [3.0]]).expand(2, 40))
    assert bias_grad(A.double(), OFFSETS, backend="reference").dtype == torch.float64, (
        "an argument goes first"
    )
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend='fastest': choose one of cuda, triton, cpu, reference"):
        bias_grad(A, OFFSETS)
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "")
    bias_grad(A.double(), OFFSETS)


def test_a_missing_module_is_said_once(monkeypatch: pytest.MonkeyPatch, fresh_warnings: None) -> None:
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "IMPORT_ERROR", "no such file")
    with pytest.raises(
        RuntimeError, match=r"cannot run bias_grad: cropi_kernels._C is not built \(no such file\)"
    ):
        bias_grad(A, OFFSETS, backend="cpu")
    with pytest.raises(ImportError, match=r"compiled kernels are missing \(no such file\): build them with"):
        _native.native()
    with pytest.warns(UserWarning, match=r"bias_grad runs on the plain torch reference.*not built") as said:
        want = bias_grad(A, OFFSETS)
    assert said[0].filename == __file__, "the line that called, not one of ours"
    assert want.equal(torch.tensor([[2.0], [3.0]]).expand(2, 40))
    bias_grad(A, OFFSETS)  # a second warning would be an error here
    assert "not built" in explain(A) and "reference  serves the call" in explain(A)


def test_explain_names_every_backend_and_its_reason() -> None:
    lines = explain(A).splitlines()
    assert [line.split()[0] for line in lines] == list(dispatch.BACKENDS)
    assert re.search(r"cpu +serves the call \((baseline|AVX2|AVX-512) kernels\)", lines[2])
    assert "not chosen" in lines[3]
    assert "torch.float64 is not one of" in explain(A.double())
    assert "on meta, not on the CPU" in explain(torch.ones(2, device="meta"))


class Wrapper(torch.Tensor):
    """As a DTensor is one: PyTorch asks this class, and it has no memory of its own."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["x"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *rest: object) -> Wrapper:
        return Wrapper(inner["x"])

    @classmethod
    def __torch_dispatch__(
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        raise NotImplementedError(f"{func} has no sharding strategy")


# What PyTorch imports for the layout `jagged` takes seconds.
LAYOUTS = (torch.strided, pytest.param(torch.jagged, marks=pytest.mark.long))


def nested(x: torch.Tensor, layout: torch.layout) -> torch.Tensor:
    rows = list(x[:, None])
    if layout == torch.strided:
        return torch._nested_tensor_from_tensor_list(rows)  # without those imports
    return torch.nested.nested_tensor(rows, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [*OPS, "project", "project_transpose", "row_products", "logprob_and_grad"])
def test_tensors_without_memory_of_their_own_are_named(op: str, layout: torch.layout) -> None:
    """They ended in texts of PyTorch about its dispatcher and its sharding strategies."""
    more = {
        "project": lambda b, x: project(x, ProjectionSpec(40), backend=b),
        "project_transpose": lambda b, y: project_transpose(y, ProjectionSpec(40), 30, backend=b),
        "row_products": lambda b, rows: row_products(rows, A),
        "logprob_and_grad": lambda b, hidden: logprob_and_grad(hidden, A, ROWS, lambda logp, i, j: logp),
    }
    name = more[op].__code__.co_varnames[1] if op in more else ""
    call = op_calls.OpCall({name: A}, more[op]) if op in more else OPS[op]
    for operand, x in call.operands.items():
        with pytest.raises(
            ValueError, match=rf"^{operand}: the tensor is nested: give a dense one \(torch.cat"
        ):
            call(**{operand: nested(x, layout)})
        with pytest.raises(
            ValueError, match=rf"^{operand}: the tensor is of type Wrapper: give a plain tensor"
        ):
            call(**{operand: Wrapper(x)})


def test_what_a_collective_fills_is_projected() -> None:
    """`DTensor.to_local()` may give it; PyTorch's operators wait for it by themselves."""
    filled: torch.Tensor = AsyncCollectiveTensor(A)
    assert torch.equal(project(filled, ProjectionSpec(40)), project(A, ProjectionSpec(40)))
    with pytest.raises(
        ValueError, match=r"^hidden: .* AsyncCollectiveTensor: give a plain tensor \(its clone"
    ):
        logprob_and_grad(filled, A, ROWS, lambda logp, i, j: logp)


def test_explain_of_tensors_that_no_op_takes() -> None:
    for x, reason in (
        (nested(A, torch.strided), "is nested"),
        (A.to_sparse(), "has the layout torch.sparse_coo"),
    ):
        assert f"none of cuda, triton, cpu, reference serves the call: the tensor {reason}" in explain(x)


def test_default_dtype_does_not_reach_the_buffers() -> None:
    """Libraries set it while they load a model; a kernel that writes float32 into bfloat16 would break the heap."""
    want = norm_grad(A, A, OFFSETS, 1e-6, centered=False, with_bias=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = norm_grad(A, A, OFFSETS, 1e-6, centered=False, with_bias=True)
        folded = fold_inputs(A, PLAN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(x is not None and y is not None and torch.equal(x, y) for x, y in zip(want, got))
    assert folded.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- spec
def test_spec_round_trip_and_fingerprint() -> None:
    spec = SketchSpec(dim=1024, width=None, kind="dropout", keep=0.1, seed=2**70)
    assert SketchSpec.from_dict(spec.to_dict()) == spec
    assert SketchSpec.from_dict(spec.to_dict()).fingerprint() == spec.fingerprint()
    others = [
        SketchSpec(),
        SketchSpec(seed=1),
        SketchSpec(dim=64),
        SketchSpec(width=16),
        SketchSpec(kind="kron"),
    ]
    assert len({s.fingerprint() for s in [spec, *others]}) == 6 and len(spec.fingerprint()) == 16
    for whole, same in (SketchSpec(keep=1), SketchSpec()), (ProjectionSpec(64, keep=1), ProjectionSpec(64)):
        assert whole == same and whole.fingerprint() == same.fingerprint() and whole.recipe == same.recipe
    assert (SketchSpec(dim=64).base_dim, SketchSpec(dim=65536).base_dim) == (32768, 65536)
    assert SketchSpec(dim=64, kind="tensor").base_dim == 64


@pytest.mark.parametrize("spec", [SketchSpec, ProjectionSpec])
def test_all_but_the_dim_of_a_spec_go_by_name(spec: type) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        spec(4096, "countsketch")
    assert spec(4096, kind="countsketch") == spec(dim=4096, kind="countsketch")
