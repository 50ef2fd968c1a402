"""`CpuEngine` beside `Operators`: the same bits, taken in the common case, left in every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import zoo
from support.versions import NAMED_HOOKS

from cropi_kernels import GradientSketcher, SketchSpec, _native
from cropi_kernels.plan import plan_vector
from cropi_kernels.sketcher.batch.segments import Segments
from cropi_kernels.sketcher.model import hooks
from cropi_kernels.sketcher.sums import engine
from cropi_kernels.sketcher.sums.accumulator import engine_for
from cropi_kernels.sketcher.sums.engine import CpuEngine, Norm, Operators, Site
from cropi_kernels.sketcher.sums.matrix import matrix_sketch

SPEC = SketchSpec(width=16, vocab_width=64)
pytestmark = pytest.mark.skipif(_native.unsupported() is not None, reason="the CPU kernels are not built")


def run(model: torch.nn.Module, batch: zoo.Batch) -> torch.Tensor:
    with GradientSketcher(model, SPEC) as sketcher:
        return batch.sketch(sketcher).sketches


def by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuEngine, "serves", staticmethod(lambda out: False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gpt2", "gemma3", "phi"])
def test_same_bits_as_the_operators(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.make(name, dtype), zoo.padded()
    short = run(model, batch)
    assert short.any() and not short.isnan().any()
    by_operators(monkeypatch)
    assert torch.equal(short, run(model, batch))


def test_the_common_case_calls_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an operator was called")

    for name in ("sketch_vector", "norm_grad", "bias_grad"):
        monkeypatch.setattr(engine, name, never)
    monkeypatch.setattr(Operators, "rows", never)
    model = zoo.make("qwen2")
    model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    run(model, zoo.padded())


def test_another_backend_by_name_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments.of(torch.tensor([0, 1]), 2, 3, None)
    out = torch.zeros(2, SPEC.dim)
    assert isinstance(engine_for(segments, out), CpuEngine)
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "reference")
    assert type(engine_for(segments, out)) is Operators


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strides": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "float64": torch.Tensor.double,
    "heads": lambda x: x.unflatten(2, (4, -1)),
    "flat": lambda x: x.flatten(0, 1),
    "a subclass": torch.nn.Parameter,
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_the_common_case_goes_to_the_operators(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method, called with such a tensor, falls back, and adds what `Operators` adds."""
    segments = Segments.of(torch.tensor([0, 1]), 2, 3, None)
    torch.manual_seed(0)
    x, dy = (ODD[case](torch.randn(2, 3, n)).detach() for n in (40, 24))
    if case == "a subclass":
        x, dy = torch.nn.Parameter(x, False), torch.nn.Parameter(dy, False)
    n_in, n_out, site = x.shape[-1], dy.shape[-1], Site("w")
    matrix = matrix_sketch(SketchSpec(width=None if case == "heads" else 16), "w", n_out, n_in, "linear")
    bias, norm = plan_vector(SPEC, "b", n_out), Norm(True, 1e-6, *(plan_vector(SPEC, p, n_out) for p in "vb"))
    results, fell = [], []
    monkeypatch.setattr(
        Operators, "rows", lambda self, *a, way=Operators.rows: fell.append(type(self)) or way(self, *a)
    )
    for kind in (CpuEngine, Operators):
        one = kind(segments, torch.zeros(2, SPEC.dim))
        assert one.plain(x) is None if isinstance(one, CpuEngine) else True
        one.add_linear(dy, one.fold(x, matrix, site), matrix, site)
        one.add_bias(dy, bias, site)
        one.add_norm(dy, 2 * dy, norm, site)
        results.append(one.out)
    assert torch.equal(*results) and results[0].any(dim=1).all()
    assert fell.count(CpuEngine) == fell.count(Operators) == 5, "fold, add_linear, add_bias, add_norm twice"


def test_sizes_that_do_not_fit_are_an_error_and_add_nothing() -> None:
    segments = Segments.of(torch.tensor([0, 1]), 2, 3, None)
    one = CpuEngine(segments, torch.zeros(2, SPEC.dim))
    matrix, site = matrix_sketch(SPEC, "w", 24, 40, "linear"), Site("layer.w")
    x, dy = torch.randn(2, 3, 40), torch.randn(2, 3, 24)
    folded = one.fold(x, matrix, site)
    assert folded.shape == (6, 16)
    with pytest.raises(ValueError, match=r"must be \[tokens, 40\]"):
        one.fold(torch.randn(2, 3, 39), matrix, site)
    with pytest.raises(ValueError, match=r"must be \[tokens, 24\]"):
        one.add_linear(torch.randn(2, 3, 23), folded, matrix, site)
    with pytest.raises(ValueError, match="layer.w saw an input of shape"):
        one.add_linear(torch.randn(2, 4, 24), folded, matrix, site)
    with pytest.raises(ValueError, match="d has 6 tokens but a has 5"):
        one.add_linear(dy, folded[:5], matrix, site)
    assert not one.out.any()
    one.add_linear(dy, folded, matrix, site)
    assert one.out.any()


def test_inputs_that_come_back_with_other_strides() -> None:
    """What autograd kept went through whatever hooks are set for saved tensors."""
    segments = Segments.of(torch.tensor([0, 1]), 2, 3, None)
    matrix, site = matrix_sketch(SPEC, "w", 24, 40, "linear"), Site("layer.w")
    x, dy = torch.randn(2, 3, 40), torch.randn(2, 3, 24)
    one, other = (CpuEngine(segments, torch.zeros(2, SPEC.dim)) for _ in range(2))
    folded = one.fold(x, matrix, site)
    one.add_linear(dy, folded, matrix, site)
    other.add_linear(dy, folded.t().contiguous().t(), matrix, site)
    assert one.out.any() and torch.equal(one.out, other.out)


@NAMED_HOOKS
def test_one_block_for_the_copies_of_every_batch_after_the_first() -> None:
    model, batch = zoo.make("llama-tied"), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        first, second = (batch.sketch(sketcher).sketches for _ in range(2))
        expected = sketcher._tapped.acc._needed[CpuEngine]
    assert torch.equal(first, second)
    folded_inputs = 4 * 2  # q/k/v, o, gate/up and down of two layers
    assert expected == folded_inputs * 16


def test_hooks_give_the_bits_of_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.make("gpt2"), zoo.padded()
    by_hooks = run(model, batch)
    monkeypatch.setattr(hooks, "packed", lambda: True)
    assert torch.equal(by_hooks, run(model, batch))


def test_a_graph_that_is_kept_is_sketched_again() -> None:
    model, batch = zoo.make("qwen2"), zoo.padded()
    rows = tuple(batch.input_ids.shape)
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(batch.segments, shape=rows) as once:
            model(batch.input_ids, attention_mask=batch.attention_mask).logits.sum().backward()
        with sketcher.batch(batch.segments, shape=rows) as twice:
            loss = model(batch.input_ids, attention_mask=batch.attention_mask).logits.sum()
            loss.backward(retain_graph=True)
            loss.backward()
    torch.testing.assert_close(twice.sketches, 2 * once.sketches, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_layouts_are_told_apart_in_graphs_with_dynamic_shapes() -> None:
    """There the sizes are symbols: a tuple of them holds no number, and what compares them is no index."""
    segments = Segments.of(torch.zeros(4, dtype=torch.int64), 4, 11, None)

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return (x + 0.0, x + 1.0)[segments.heads_first(x)]

    compiled = torch.compile(chosen, backend="eager", fullgraph=True, dynamic=True)
    square = torch.zeros(4, 11, 11, 8)
    for x, heads_first in (
        (torch.zeros(4, 2, 11, 8), True),
        (torch.zeros(4, 11, 2, 8), False),
        (square.transpose(1, 2), True),
        (square, False),
        (torch.zeros(4, 2, 3, 8), False),
    ):
        assert bool(compiled(x).all()) == bool(chosen(x).all()) == segments.heads_first(x) == heads_first
