"""The taps' short way to the CPU kernels: the operators' bits, taken where it can be, left where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo

from cropi_kernels import GradientSketcher, SketchSpec, _native
from cropi_kernels.plan import plan_matrix
from cropi_kernels.sketcher import capture, taps
from cropi_kernels.sketcher.batch import Segments
from cropi_kernels.sketcher.direct import Direct

SPEC = SketchSpec(width=16, vocab_width=64)
pytestmark = pytest.mark.skipif(_native.unsupported() is not None, reason="the CPU kernels are not built")


def run(model: torch.nn.Module, batch: zoo.Batch) -> torch.Tensor:
    with GradientSketcher(model, SPEC) as sketcher:
        return batch.sketch(sketcher).sketches


def by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Direct, "of", classmethod(lambda cls, segments, out, folded: None))


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
        monkeypatch.setattr(taps, name, never)
    monkeypatch.setattr(taps.Tap, "rows", never)
    model = zoo.make("qwen2")
    model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator]
    run(model, zoo.padded())


def test_another_backend_by_name_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = Segments.of(torch.tensor([0, 1]), 2, 3, None)
    out = torch.zeros(2, SPEC.dim)
    assert isinstance(Direct.of(segments, out), Direct)
    monkeypatch.setenv("CROPI_KERNELS_BACKEND", "reference")
    assert Direct.of(segments, out) is None


def test_what_is_not_the_common_case_is_left_alone() -> None:
    segments = Segments.of(torch.tensor([0, 1]), 2, 3, None)
    out = torch.zeros(2, SPEC.dim)
    direct = Direct(segments, out)
    plan = plan_matrix(SPEC, "w", 24, 40, "linear")
    x, dy = torch.randn(2, 3, 40), torch.randn(2, 3, 24)
    folded = direct.fold(x, plan)
    assert folded is not None and folded.shape == (6, 16)
    odd = {
        "strides": torch.randn(2, 24, 3).transpose(1, 2),
        "float64": dy.double(),
        "heads": torch.randn(2, 3, 4, 6),
        "other tokens": torch.randn(2, 4, 24),
        "other features": torch.randn(2, 3, 23),
        "flat": torch.randn(6, 24),
        "a subclass": torch.nn.Parameter(dy),
    }
    for case, wrong in odd.items():
        assert not direct.add_linear(wrong, folded, plan), case
    assert direct.fold(torch.randn(2, 3, 39), plan) is None
    assert direct.fold(x, plan_matrix(SketchSpec(width=None), "w", 24, 40, "linear")) is None, (
        "nothing to fold"
    )
    assert not direct.add_norm(x, dy, 1e-6, False, None, None), "two widths"
    assert not out.any(), "a refused call adds nothing"
    assert direct.add_linear(dy, folded, plan) and out.any()


def test_one_block_for_the_copies_of_every_batch_after_the_first() -> None:
    model, batch = zoo.make("llama-tied"), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        first, second = (batch.sketch(sketcher).sketches for _ in range(2))
        expected = sketcher._acc._folded
    assert torch.equal(first, second)
    folded_inputs = 4 * 2  # q/k/v, o, gate/up and down of two layers
    assert expected == folded_inputs * 16


def test_hooks_give_the_bits_of_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.make("gpt2"), zoo.padded()
    by_hooks = run(model, batch)
    monkeypatch.setattr(capture, "packed", lambda: True)
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
