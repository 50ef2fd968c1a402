"""The sketch ops as PyTorch operators: opcheck of every schema, no graph breaks, and the same bits when traced."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.op_calls import (
    HEAD,
    NORM,
    OFFSETS,
    OPS,
    OUT,
    PLAN,
    RANGES,
    ROWS,
    STACK,
    TIED,
    A,
    D,
    X,
)
from support.tensors import normal
from torch import library
from torch.fx.experimental.proxy_tensor import make_fx

import cropi_kernels
from cropi_kernels import (
    CsrRows,
    MatrixPlan,
    ProjectionSpec,
    SketchSpec,
    bias_grad,
    dispatch,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    project,
    project_csr,
    project_transpose,
    quantize_rows,
    row_products,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)
from cropi_kernels.plan import matrix_plan_of, recipe_of, vector_plan_of

# The arguments of one call of each operator.
CALLS: dict[str, list[tuple[Any, ...]]] = {
    "fold_columns": [
        (A, recipe_of(PLAN), False, None),
        (X.bfloat16(), recipe_of(TIED), True, None),
        (A, recipe_of(TIED), False, None),  # a plan without that fold: a copy, never the operand itself
        (A.double(), recipe_of(PLAN), False, "reference"),
        (A.t().contiguous().t(), recipe_of(PLAN), False, "cpu"),
    ],
    "sketch_linear": [
        (D, A, OFFSETS, OUT.clone(), recipe_of(PLAN), None),
        (D.bfloat16(), fold_inputs(A, PLAN), OFFSETS, OUT.clone(), recipe_of(PLAN), "cpu"),
        (D.double(), A.double(), OFFSETS, OUT.double(), recipe_of(PLAN), "reference"),
        (X, A, OFFSETS, OUT.clone(), recipe_of(TIED), None),
    ],
    "sketch_grouped": [
        (D, A, RANGES, OUT.clone(), recipe_of(STACK), 0, 20, None),
        (D[:, :8], fold_inputs(A, STACK), RANGES, OUT.clone(), recipe_of(STACK), 3, 20, "cpu"),
        (D.double(), A.double(), RANGES, OUT.double(), recipe_of(STACK), 0, 20, "reference"),
    ],
    "sketch_embedding": [
        (A, ROWS, OFFSETS, OUT.clone(), recipe_of(TIED), None),
        (A, ROWS, OFFSETS, OUT.clone(), recipe_of(TIED), "reference"),
    ],
    "sketch_vector": [
        (normal(3, 40), OUT.clone(), recipe_of(NORM), None),
        (normal(3, 40).double(), OUT.double(), recipe_of(NORM), "reference"),
    ],
    "norm_grad": [
        (A, A + 1, OFFSETS, 1e-6, True, True, None),
        (A.bfloat16(), A, OFFSETS, 1e-6, False, False, "reference"),
        (A.double(), A, OFFSETS, 1e-6, False, True, None),
    ],
    "row_products": [
        (A, normal(2, 40), None, 0, 0, None),
        (torch.ones(3, 5, dtype=torch.uint8), normal(2, 40), normal(3, 4), 1, 1, "cpu"),
        (A.to(torch.int8), normal(2, 40), normal(9, 1), 0, 0, "reference"),
    ],
    "rms_norm": [
        (A, A[0], 1e-6, None),
        (A.bfloat16(), A[0].bfloat16(), 1e-6, "cpu"),
        (A.double(), A[0].double(), 1e-6, "reference"),
    ],
    "rms_norm_backward": [
        (A, A + 1, A[0], A[:, 0].abs(), OFFSETS, None),
        (A.half(), A.half(), A[0].half(), A[:, 0].abs(), None, "cpu"),
        (A.double(), A.double(), A[0].double(), A[:, 0].double(), OFFSETS, "reference"),
    ],
    "swiglu": [
        (A, A + 1, None, None),
        (A.bfloat16(), A.bfloat16(), recipe_of(PLAN), "cpu"),
        (A.double(), A.double(), recipe_of(PLAN), "reference"),
    ],
    "swiglu_backward": [(A, A, A + 1, None), (A.half(), A.half(), A.half(), "reference")],
    "project_add": [
        (A, normal(9, 64), 5, ProjectionSpec(64).recipe, None),
        (A.bfloat16(), normal(9, 64), 5, ProjectionSpec(64, kind="gaussian").recipe, "cpu"),
        (A.double(), normal(9, 64).double(), 5, ProjectionSpec(64).recipe, "reference"),
    ],
    "bias_grad": [(A, OFFSETS, None), (A.double(), OFFSETS, None), (A.half(), OFFSETS, "reference")],
}


@pytest.mark.long
@pytest.mark.parametrize("op,i", [(op, i) for op, calls in CALLS.items() for i in range(len(calls))])
@pytest.mark.filterwarnings("ignore:.*runs on the plain torch reference")
def test_opcheck(op: str, i: int) -> None:
    """The schema says what is written, the shapes for tracing are right, and the op survives functionalisation."""
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in CALLS[op][i])
    library.opcheck(getattr(torch.ops.cropi, op).default, args)


def operators() -> dict[str, str]:
    """The schema of every operator of this package, by name."""
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("cropi::")
    }
    return {name: str(getattr(torch.ops.cropi, name).default._schema) for name in names}


def test_every_operator_is_checked() -> None:
    """A new op must come with its opcheck: here, or in the tests of the ops that have a gradient."""
    names = set(operators())
    elsewhere = {"linear_logprob", "linear_logprob_backward", "project", "project_transpose"}
    elsewhere |= {"project_csr", "project_csr_entries"}
    assert names == set(CALLS) | elsewhere


def test_schemas_say_what_is_written() -> None:
    for op in CALLS:
        schema = getattr(torch.ops.cropi, op).default._schema
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        adds = op.startswith("sketch") or op == "project_add"
        assert written == (["out"] if adds else []) and bool(schema.returns) != adds
        assert all(r.alias_info is None for r in schema.returns), "results are new memory"


def test_the_document_lists_every_operator() -> None:
    """docs/ops.md: the schemas as they are registered, and for each op a folder that has the files of its backends."""
    root = Path(cropi_kernels.__file__).parent
    text = (Path(__file__).parents[2] / "docs" / "ops.md").read_text("utf-8")
    assert re.findall(r"^cropi::.*$", text, re.MULTILINE) == sorted(operators().values())
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| `(\w+)` \| (.*?) \|$", text, re.MULTILINE)
    assert {row[0] for row in rows} == set(operators())
    for _, functions, folder, backends in rows:
        for function in re.findall(r"`(\w+)`", functions):
            assert function in cropi_kernels.ops.__all__ and callable(getattr(cropi_kernels, function))
        for backend in re.sub(r" \(.*?\)", "", backends).split(", "):
            assert backend in dispatch.BACKENDS and (root / "ops" / folder / f"{backend}.py").exists()


# ------------------------------------------------------------------------------------------------ tracing
def everything(
    d: torch.Tensor, a: torch.Tensor, ids: torch.Tensor, head: torch.Tensor, out: torch.Tensor
) -> Any:
    """Several ops, ordinary operators between them, one accumulator that is written four times."""
    sketch_linear(d * 2, fold_inputs(a, PLAN), OFFSETS, PLAN, out)
    weight, bias = norm_grad(a, a + 1, OFFSETS, 1e-6, centered=True, with_bias=True)
    assert bias is not None
    sketch_vector(weight, NORM, out)
    sketch_vector(bias - bias_grad(a, OFFSETS), NORM, out)
    sketch_embedding(a.sin(), ids, OFFSETS, TIED, out)
    logp = linear_logprob(a, head, ids)
    return out.cos(), weight, logp


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("op", OPS)
def test_one_op_without_graph_breaks(op: str, backend: str) -> None:
    torch._dynamo.reset()
    traced = torch.compile(lambda: OPS[op](), fullgraph=True, backend=backend)
    torch.testing.assert_close(traced(), OPS[op](), rtol=0, atol=0)


def test_no_fold_is_traced_too() -> None:
    traced = torch.compile(lambda: fold_inputs(A, TIED) * 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(), A)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_several_ops_in_one_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor":
        if shutil.which("c++") is None and shutil.which("g++") is None:
            pytest.skip("inductor on a CPU needs a C++ compiler")
        import torch._inductor.config as inductor

        monkeypatch.setattr(inductor, "compile_threads", 1)  # no pool of processes for one kernel
    torch._dynamo.reset()
    want_out, got_out = OUT.clone(), OUT.clone()
    want = everything(D, A, ROWS, HEAD, want_out)
    traced = torch.compile(everything, fullgraph=True, backend=backend)
    got = traced(D, A, ROWS, HEAD, got_out)
    for w, g in zip(want, got):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_out, want_out, rtol=1e-5, atol=1e-5)
    assert not torch.equal(got_out, OUT), "the accumulator was written"
    if backend == "inductor":
        return  # one compilation is slow enough
    # Other lengths: recompiled or dynamic, but right.
    twice = [torch.cat([t, t]) for t in (D, A, ROWS)]
    want = everything(*twice, HEAD, OUT.clone())
    for w, g in zip(want, traced(*twice, HEAD, OUT.clone())):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("op", [*OPS, "project", "project, out"])
def test_autocast_rounds_nothing(op: str, backend: str | None) -> None:
    """On a GPU without the CUDA C++ build plain torch serves dense projections, products that autocast would round."""
    spec = ProjectionSpec(64, kind="gaussian")

    def run() -> Any:
        if op in OPS:
            return OPS[op](backend)
        return project(A, spec, out=None if op == "project" else torch.ones(9, 64), backend=backend)

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_what_is_added_to_out_is_traced() -> None:
    """`project` with out called its kernel by itself: a graph had the empty sums, and nothing that fills them."""

    spec = ProjectionSpec(64)  # made here: torch 2.6 traces no dataclass

    def chunks(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(9, 64)
        project(x[:, :30], spec, out=out, nonfinite="ignore")
        return project(x[:, 30:], spec, 30, out=out, nonfinite="ignore")

    torch._dynamo.reset()
    for traced in (make_fx(chunks)(A), torch.compile(chunks, fullgraph=True, backend="aot_eager")):
        assert torch.equal(traced(A + 1), chunks(A + 1))


ADDING = [name for name, call in OPS.items() if "out" in call.operands] + ["project"]


@pytest.mark.parametrize("op", ADDING)
def test_a_refused_out_is_as_it_was(op: str) -> None:
    """Autograd was told of a change, and an out of inference mode was refused once the kernel had written to it."""

    def call(out: torch.Tensor) -> Any:
        return project(A, ProjectionSpec(64), out=out) if op == "project" else OPS[op](None, out=out)

    wide = torch.zeros(9, 65) if op == "project" else torch.zeros(*OUT.shape[:-1], OUT.shape[-1] + 1)
    with pytest.raises(ValueError, match="out (is|has shape)"):
        call(wide)
    assert wide._version == 0
    with torch.inference_mode():
        mine = torch.zeros(9, 64) if op == "project" else torch.zeros_like(OUT)
    with pytest.raises(ValueError, match=r"out was made under torch.inference_mode.*give out.clone\(\)"):
        call(mine)
    assert not mine.any()
    with torch.inference_mode():
        assert torch.equal(call(mine), call(torch.zeros_like(mine)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", ADDING)
def test_autograd_sees_what_is_added_to(op: str, backend: str) -> None:
    """Kernels write by address: a tensor kept for backward had other numbers there, and gave their gradient."""
    out = torch.zeros(9, 64) if op == "project" else OUT.clone()
    factor = torch.ones_like(out).requires_grad_()
    loss = (factor * out).sum()
    if op == "project":
        project(A, ProjectionSpec(64), out=out, backend=backend)
    else:
        OPS[op](backend, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input_is_said_while_tracing() -> None:
    torch._dynamo.reset()
    wrong = torch.compile(
        lambda: sketch_linear(D[:, :7], A, OFFSETS, PLAN, OUT.clone()), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"d has shape \(9, 7\): it must be \[tokens, 20\]"):
        wrong()


def test_no_sketch_has_a_gradient() -> None:
    """Operands inside a graph are taken out of it: nothing is recorded that could not be differentiated."""
    a = A.clone().requires_grad_()
    out = sketch_linear(D.clone().requires_grad_(), a, OFFSETS, PLAN, OUT.clone())
    results = [
        out,
        fold_inputs(a, PLAN),
        bias_grad(a, OFFSETS),
        norm_grad(a, a, OFFSETS, 1e-6, centered=False)[0],
    ]
    results += [fold_inputs(a.double(), PLAN, backend="reference"), bias_grad(a.double(), OFFSETS)]
    assert not any(r.requires_grad for r in results)


@pytest.mark.parametrize(
    ("named", "run"),
    [
        ("linear_logprob .* hidden", lambda x: linear_logprob(x, HEAD, ROWS)),
        ("project .* x", lambda x: project(x, ProjectionSpec(40))),
        ("project_transpose .* y", lambda x: project_transpose(x, ProjectionSpec(40), 30)),
    ],
)
def test_what_has_a_gradient_refuses_transforms(named: str, run: Callable[[Any], Any]) -> None:
    """PyTorch takes an operator's results for constants in forward mode: derivatives were zeros. Reverse modes of
    torch.func ended in a text about autograd.Function."""

    def jvp() -> Any:
        return torch.func.jvp(run, (A,), (A,))

    for ask in (jvp, torch.compile(jvp, backend="eager"), lambda: torch.func.jacfwd(run)(A)):
        with pytest.raises(RuntimeError, match=named.replace(".*", "has no derivative in forward mode, and")):
            ask()
    with torch.autograd.forward_ad.dual_level():
        run(A)  # which has no tangent

    def loss(x: Any) -> Any:
        return run(x).sum()

    def of_rows(x: Any) -> Any:
        return torch.func.vmap(lambda row: loss(row.expand(len(x), -1)))(x).sum()

    for ask in (loss, of_rows):
        with pytest.raises(
            RuntimeError, match=named.replace(".*", "has no derivative under torch.func .*, and")
        ):
            torch.func.grad(ask)(A)
    torch.func.grad(lambda y: (run(A).sum() * y).sum())(A)  # a constant there

    def detached(x: Any) -> Any:
        with torch.no_grad():
            kept = loss(x)
        return kept + loss(x.detach()) + x.sum()

    assert torch.equal(torch.func.grad(detached)(A), torch.ones_like(A)), "the remedy that the error names"


WITHOUT_DERIVATIVE = {
    op: (lambda x, op=op: OPS[op](**{next(iter(OPS[op].operands)): x}), next(iter(OPS[op].operands.values())))
    for op in OPS
    if op != "linear_logprob"
} | {
    "logprob_and_grad": (lambda x: logprob_and_grad(x, HEAD, ROWS, lambda logp, i, j: logp), A),
    "project_csr": (lambda x: project_csr(CsrRows(OFFSETS, ROWS, x, 60), ProjectionSpec(40)), A[0, :9]),
    "quantize_rows": (lambda x: quantize_rows(x, torch.int8), A),
    "row_products": (lambda x: row_products(x, A), A),
}


@pytest.mark.parametrize("op", WITHOUT_DERIVATIVE)
def test_what_has_no_gradient_loses_no_derivative(op: str) -> None:
    """Its results were constants without a word: torch.func.jvp and grad gave zeros."""
    run, x = WITHOUT_DERIVATIVE[op]
    what = "x.values" if op == "project_csr" else r"\w+"
    with pytest.raises(
        RuntimeError, match=f"^{op} has no derivative in forward mode, and {what} has a tangent"
    ):
        torch.func.jvp(run, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        run(x.clone())  # which has no tangent
        with pytest.raises(
            RuntimeError, match=f"^{op} has no derivative in forward mode, and {what} has a tangent"
        ):
            run(torch.autograd.forward_ad.make_dual(x, x))

    def loss(x: Any) -> Any:
        run(x)
        return x.sum()

    with pytest.raises(
        RuntimeError, match=f"^{op} has no derivative under torch.func .*, and {what} is differ"
    ):
        torch.func.grad(loss)(x)
    if op in ("logprob_and_grad", "sketch_linear"):
        with pytest.raises(RuntimeError, match=f"^{op} does not run under torch.func.vmap.* call it once"):
            torch.func.vmap(lambda row: run(row.expand(x.shape)))(x)
    if op == "bias_grad":
        with pytest.raises(RuntimeError, match="^bias_grad has no derivative in forward mode"):
            torch.compile(lambda: torch.func.jvp(run, (x,), (x,)), backend="eager")()


def test_project_under_vmap_names_what_needs_the_numbers() -> None:
    spec = ProjectionSpec(40)
    for more, named in (
        ({}, "nonfinite='warn': torch.func.vmap"),
        ({"out": torch.zeros(1, 40)}, "out: torch.func"),
    ):
        with pytest.raises(RuntimeError, match=named):
            torch.func.vmap(lambda x, more=more: project(x[None], spec, **more)[0])(A)
    rows = torch.func.vmap(lambda x: project(x[None], spec, nonfinite="ignore")[0])(A)
    assert torch.equal(rows, project(A, spec))


@pytest.mark.long
def test_a_spec_is_made_inside_a_compiled_function() -> None:
    """json.dumps, which wrote its recipe, cannot be traced."""
    fields = {"kind": "sjlt", "nnz": 4, "keep": 0.3, "seed": 1 << 70, "size": 1 << 40}

    def inside(x: torch.Tensor) -> torch.Tensor:
        return project(x, ProjectionSpec(40, **fields), nonfinite="ignore") * SketchSpec(4096).dim

    torch._dynamo.reset()
    traced = torch.compile(inside, fullgraph=True, backend="eager")
    assert torch.equal(traced(A), project(A, ProjectionSpec(40, **fields)) * 4096)
    for spec in (
        ProjectionSpec(40, **fields),
        SketchSpec(64, width=None),
        SketchSpec(kind="dropout", keep=1e-5),
    ):
        assert spec.recipe == json.dumps(spec.to_dict())


def test_fake_tensors_pass_through() -> None:
    """Shapes can be worked out for a device that is not here, without running anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        d, a = torch.empty(9, 20, device="cuda"), torch.empty(9, 40, device="cuda", dtype=torch.bfloat16)
        offsets, out = torch.empty(4, dtype=torch.int64, device="cuda"), torch.empty(3, 32768, device="cuda")
        assert fold_inputs(a, PLAN).shape == (9, 16) and fold_inputs(a, PLAN).dtype == torch.bfloat16
        assert sketch_linear(d, a, offsets, PLAN, out) is out
        weight, bias = norm_grad(a, a, offsets, 1e-6, centered=True, with_bias=True)
        assert bias is not None and (weight.shape, bias.dtype) == ((3, 40), torch.float32) and weight.is_cuda


# -------------------------------------------------------------------------------------------------- plans
def test_a_plan_is_found_again_by_its_recipe() -> None:
    assert matrix_plan_of(recipe_of(PLAN)) is PLAN and vector_plan_of(recipe_of(NORM)) is NORM


def test_a_plan_changed_by_hand_is_refused() -> None:
    import dataclasses

    changed: MatrixPlan = dataclasses.replace(PLAN, rows=19)
    with pytest.raises(
        ValueError, match="'model.layers.0.mlp.up_proj.weight' was changed by hand: make plans by"
    ):
        sketch_linear(D[:, :19], A, OFFSETS, changed, OUT.clone())
