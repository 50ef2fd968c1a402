"""Frozen linear layers by oneDNN: right values, equal bits for every thread count, weights that change, errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.versions import checkpoint_layers, keep_layers

from cropi_kernels import GradientSketcher, PolicyGradient, SketchSpec, frozen

pytestmark = pytest.mark.skipif(frozen.unsupported() is not None, reason=str(frozen.unsupported()))
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=80, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradient(sketcher: GradientSketcher) -> PolicyGradient:
    ids = torch.randint(0, 80, (3, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    return sketcher.policy_gradient(
        ids, segments=torch.arange(3), labels=labels, weights=torch.tensor([1.0, -2.0, 0.5])
    )


def sketches(model: Any, **options: Any) -> torch.Tensor:
    with GradientSketcher(model, SketchSpec(), **options) as sketcher:
        return gradient(sketcher).sketches


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the operands of the products that oneDNN makes from now on."""
    seen: list[tuple[int, ...]] = []
    product = frozen.product

    def counting(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        seen.append((x.shape[-1], packed.shape[0]))
        return product(x, packed, bias)

    monkeypatch.setattr(frozen, "product", counting)
    return seen


@pytest.mark.parametrize(
    "shape", [(16, 3, 5), (33, 64, 48), (256, 192, 576), (100, 1000, 37), (1, 20, 40, 24)], ids=str
)
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_against_float64(shape: tuple[int, ...], bias: bool, threads: None) -> None:
    *tokens, rows, cols = shape
    g = torch.Generator().manual_seed(rows)
    weight = torch.nn.Parameter(torch.randn(rows, cols, generator=g), requires_grad=False)
    b = torch.randn(rows, generator=g) if bias else None
    x, dy = torch.randn(*tokens, cols, generator=g), torch.randn(*tokens, rows, generator=g)
    seen: list[torch.Tensor] = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        leaf = x.clone().requires_grad_(True)
        with frozen.PackedLinears([weight], "onednn") as mode:
            y = torch.nn.functional.linear(leaf, weight, b)
            y.backward(dy)
            assert mode.nbytes == 2 * weight.numel() * 4
        seen += [y.detach(), leaf.grad]
    assert all(torch.equal(a, seen[i % 2]) for i, a in enumerate(seen))
    eps = torch.finfo(torch.float32).eps
    wide = weight.double()
    for got, want, terms, magnitude in (
        (
            seen[0],
            x.double() @ wide.T + (0 if b is None else b.double()),
            cols,
            x.abs().double() @ wide.abs().T + 5,
        ),
        (seen[1], dy.double() @ wide, rows, dy.abs().double() @ wide.abs()),
    ):
        assert ((got - want).abs() <= (terms + 2) * eps * magnitude).all()


@pytest.mark.long
def test_sketches_are_as_exact_as_torchs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sketches(copy.deepcopy(model).double(), linears="torch")
    theirs = sketches(model, linears="torch")
    seen = counted(monkeypatch)
    ours = sketches(model, linears="onednn")
    assert len(seen) == 2 * 2 * 7, "seven matrices a layer, there and back; the head has kernels of its own"
    error, bound = (ours - exact).norm(dim=1), (theirs - exact).norm(dim=1)
    assert (error <= 2 * bound).all()


@pytest.mark.long
def test_equal_bits_for_every_thread_count(model: Any, threads: None) -> None:
    seen = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        seen.append(sketches(model, linears="onednn"))
    assert all(torch.equal(s, seen[0]) for s in seen)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_left_to_torch(
    model: Any, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    """They run twice, the second time where nothing of this is on: both times must be the same."""
    want, seen = sketches(model, linears="torch"), counted(monkeypatch)
    checkpoint_layers(model, {"use_reentrant": reentrant})
    model.train()
    try:
        assert torch.equal(sketches(model, linears="onednn"), want) and not seen
    finally:
        model.eval()
        keep_layers(model)


@pytest.mark.parametrize("through", ["in place", "data"])
def test_weights_that_change_are_packed_anew(model: Any, through: str) -> None:
    model = copy.deepcopy(model)
    weight = model.model.layers[1].mlp.down_proj.weight
    with GradientSketcher(model, SketchSpec(), linears="onednn") as sketcher:
        before = gradient(sketcher).sketches
        with torch.no_grad():
            weight.mul_(1.5) if through == "in place" else weight.data.copy_(weight * 1.5)
        after = gradient(sketcher).sketches
    assert torch.equal(after, sketches(model, linears="onednn")) and not torch.equal(after, before)


def test_weights_with_strides_of_their_own(model: Any) -> None:
    turned = copy.deepcopy(model)
    for module in turned.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    assert torch.equal(sketches(turned, linears="onednn"), sketches(model, linears="onednn"))


def test_copies_are_said_and_freed(model: Any) -> None:
    sketcher = GradientSketcher(model, SketchSpec(), linears="onednn")
    with sketcher:
        gradient(sketcher)
        matrices = [m.weight for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        assert sketcher._linears.nbytes == 2 * 4 * sum(w.numel() for w in matrices)
        assert "MB of packed weights" in repr(sketcher)
    assert sketcher._linears.nbytes == 0 and "packed" not in repr(sketcher)


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test decides for this process is nothing to another."""
    monkeypatch.setattr(frozen, "_DECISIONS", {})


@pytest.mark.long
def test_auto_takes_what_a_measurement_says(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(frozen.VARIABLE, raising=False)
    monkeypatch.setattr(frozen, "_LEAST_SIZE", 0)
    asked: list[tuple[int, int]] = []

    def ratio(rows: int, cols: int, threads: int) -> float:
        asked.append((rows, cols))
        return 0.5 if (rows, cols) == (48, 96) else 0.9

    monkeypatch.setattr(frozen, "_ratio", ratio)
    seen = counted(monkeypatch)
    sketches(model)
    assert set(asked) == {(48, 48), (24, 48), (96, 48), (48, 96)}
    assert sorted(seen) == sorted([(96, 48), (48, 96)] * 2), "down_proj of two layers, there and back"
    monkeypatch.setattr(frozen, "_ratio", lambda *_: 0.9)
    want = sketches(model, linears="torch")
    with GradientSketcher(model, SketchSpec()) as sketcher:
        assert torch.equal(gradient(sketcher).sketches, want)
        asked.clear()
        assert torch.equal(gradient(sketcher).sketches, want) and not asked, (
            "nothing gains: nothing is asked again"
        )


def test_a_measurement_is_of_both_ways() -> None:
    assert 0.05 < frozen._ratio(96, 64, torch.get_num_threads()) < 20
    assert frozen._ratio.cache_info().currsize >= 1


def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    linear, w = torch.nn.functional.linear, torch.nn.Parameter(torch.randn(32, 32), requires_grad=False)
    half, trained = torch.nn.Parameter(w.bfloat16(), requires_grad=False), torch.nn.Parameter(w.clone())
    x = torch.randn(64, 32)
    with frozen.PackedLinears([w, half, trained], "onednn"):
        linear(x.bfloat16(), half)
        linear(x, trained)
        linear(x, w.clone())  # not the model's
        linear(x[:15], w)  # too few rows for equal bits
        linear(x[:0], w)
        linear(x, w, torch.zeros(32, requires_grad=True))
        with torch.autocast("cpu"):
            linear(x, w)
        assert not seen
        linear(input=x, weight=w, bias=None)
    assert seen == [(32, 32)]


def test_errors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="linears='mkl': choose one of auto, torch, onednn"):
        GradientSketcher(model, linears="mkl")  # type: ignore[arg-type]
    monkeypatch.setenv(frozen.VARIABLE, "fast")
    with pytest.raises(ValueError, match="CROPI_KERNELS_LINEARS='fast'"):
        GradientSketcher(model)
    monkeypatch.setenv(frozen.VARIABLE, "torch")
    assert GradientSketcher(model)._linears.linears == "torch"
    assert GradientSketcher(model, linears="onednn")._linears.linears == "onednn"
    monkeypatch.setattr(frozen, "unsupported", lambda: "this build of torch is without oneDNN")
    with pytest.raises(RuntimeError, match="linears='onednn' cannot be had: this build"):
        GradientSketcher(model, linears="onednn")
    assert GradientSketcher(model, linears="auto")._linears.linears == "torch"


def test_a_torch_that_does_not_name_its_hooks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.6, the oldest that is allowed: every pass asked for a function that it does not have."""
    want = sketches(model, linears="torch")
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert torch.equal(sketches(model), want)
    with pytest.raises(RuntimeError, match="torch .* does not say whether a layer is checkpointed"):
        GradientSketcher(model, linears="onednn")


@pytest.mark.long
def test_compiled_modules_are_refused_by_name(model: Any) -> None:
    model = copy.deepcopy(model)
    model.model.layers[0].mlp.compile(backend="eager")
    with (
        GradientSketcher(model, linears="onednn") as sketcher,
        pytest.raises(RuntimeError, match="compiled modules"),
    ):
        gradient(sketcher)


def test_decoding_looks_at_a_weight_each_time_it_begins() -> None:
    """Within one decoding weights stay as they are; the next one sees what was changed in between."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(64, 48, generator=g)), torch.randn(3, 48, generator=g)
    mode = frozen.PackedLinears([weight], "onednn", inference=True)
    for factor in (1.0, 2.0, -0.5):
        with torch.no_grad():
            weight.mul_(factor)
        with torch.inference_mode(), mode:
            for _ in range(2):
                y = torch.nn.functional.linear(x, weight)
        want, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        assert ((y - want).abs() <= 50 * torch.finfo(torch.float32).eps * magnitude).all()
