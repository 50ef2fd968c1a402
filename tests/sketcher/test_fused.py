"""Fused taps: sketches are those of the gradient, the modules come back, and what is not fused says so.

The oracle is autograd in float64; fused kernels may be twice as far from it as autograd in the model's own dtype.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.versions import checkpoint_layers
from torch import nn

from cropi_kernels import GradientSketcher, LiveSketcher, SketchSpec, UncoveredParameterError
from cropi_kernels.sketcher.attach import fusable
from cropi_kernels.sketcher.attach.fused import GATE, NORM
from cropi_kernels.sketcher.sums import engine

SPEC = SketchSpec(width=16, vocab_width=64)
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
transformers.logging.set_verbosity_error()


@functools.cache
def exact_and_allowed(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The sketches of float64 gradients, and how far a segment's may be from them."""
    model = zoo.make(name, dtype)
    own = zoo.sketches(model, zoo.gradients(model), SPEC, (), torch.float32)
    exact = zoo.sketches(model, zoo.gradients(model.double()), SPEC)
    return exact, 2 * (own - exact).norm(dim=1)


def sketches(model: nn.Module, layout: str = "padded", fused: bool = True, **options: Any) -> torch.Tensor:
    with GradientSketcher(model, SPEC, fused=fused, **options) as sketcher:
        return zoo.LAYOUTS[layout]().sketch(sketcher).sketches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_sketches_are_those_of_the_gradient(name: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    """With the self-test, which holds the fused kernels to the modules' own code; and the kernels have run."""
    called: dict[str, int] = {}
    for method in ("rms_norm", "add_rms_norm", "swiglu", "swiglu_backward"):
        run = getattr(engine.Operators, method)

        def counted(*args: Any, run: Any = run, method: str = method) -> Any:
            called[method] = called.get(method, 0) + 1
            return run(*args)

        monkeypatch.setattr(engine.Operators, method, counted)
    model = zoo.make(name, dtype)
    with GradientSketcher(model, SPEC, fused=True) as sketcher:
        sketcher.check_model()
        assert sketcher.self_test is not None and not sketcher.self_test.untested
        called.clear()
        got = zoo.padded().sketch(sketcher).sketches
        again = zoo.padded().sketch(sketcher).sketches
    norms = 5 + 4 * (name == "qwen3")  # of two layers, with heads' norms and the last
    assert called == {"rms_norm": 2 * norms, "add_rms_norm": 2 * norms, "swiglu": 4, "swiglu_backward": 4}
    assert sketcher.coverage.fused == {NORM: norms, GATE: 2} and not sketcher.coverage.unfused
    assert torch.equal(got, again), "the same bits"
    exact, allowed = exact_and_allowed(name, dtype)
    assert ((got - exact).norm(dim=1) <= allowed).all() and (allowed <= 0.2 * exact.norm(dim=1)).all()
    assert not any("forward" in vars(module) for module in model.modules()), "everything is as it was"


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_other_layouts(layout: str) -> None:
    got = sketches(zoo.make("qwen3"), layout)
    exact, allowed = exact_and_allowed("qwen3", torch.float32)
    assert ((got - exact).norm(dim=1) <= allowed).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    model = zoo.make("llama")
    plain = sketches(model)
    checkpoint_layers(model, {"use_reentrant": reentrant})
    assert torch.equal(sketches(model.train()), plain)


def test_a_block_with_the_callers_loss() -> None:
    model, batch = zoo.make("qwen2"), zoo.padded()
    made = []
    for fused in (False, True):
        with GradientSketcher(model, SPEC, fused=fused) as sketcher:
            for _ in range(2):  # the first block is watched
                with sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)) as result:
                    logits = model(
                        batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
                    ).logits
                    logits.flatten(0, 1)[batch.positions].logsumexp(-1).sum().backward()
                made.append(result.sketches)
    assert torch.equal(made[2], made[3]) and not torch.equal(made[0], made[2])
    # Two ways of rounding, one norm and product for another: a few units in the last place for each of 7 modules.
    assert ((made[2] - made[0]).norm(dim=1) <= 30 * 2.0**-24 * 7 * made[0].norm(dim=1)).all()


def test_a_backward_pass_after_its_batch_is_named() -> None:
    """A norm is the first that it reaches, where the loss is of the decoder's outputs."""
    model, ids = zoo.make("llama"), torch.zeros(2, 4, dtype=torch.int64)
    with GradientSketcher(model, SPEC, fused=True, verify=False) as sketcher:
        with sketcher.batch(torch.arange(2), shape=(2, 4)):
            loss = model.model(ids)[0].square().sum()
            loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"a backward pass reached model\.norm after its batch"):
            loss.backward()


def test_norms_that_are_not_sketched_are_fused_all_the_same() -> None:
    model = zoo.make("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("norm" not in name and "down" not in name)
    stock, fused = sketches(model, fused=False), sketches(model)
    assert not torch.equal(stock, fused)
    assert ((fused - stock).norm(dim=1) <= 30 * 2.0**-24 * 7 * stock.norm(dim=1)).all()


def test_other_specs_of_the_same_pass() -> None:
    model, wide = zoo.make("qwen2"), SketchSpec(width=32, vocab_width=64)
    with GradientSketcher(model, SPEC, fused=True, more=[wide]) as sketcher:
        (got,) = zoo.padded().sketch(sketcher).more
    with GradientSketcher(model, wide, fused=True) as sketcher:
        want = zoo.padded().sketch(sketcher).sketches
    # Norms of the other spec do not ride: their sums are rounded otherwise.
    assert ((got - want).norm(dim=1) <= 30 * 2.0**-24 * want.norm(dim=1)).all()


def test_a_nan_stays_in_its_segment() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    with GradientSketcher(model, SPEC, fused=True) as sketcher:
        clean = batch.sketch(sketcher).sketches
        weights = zoo.weights_of(batch)
        segment = batch.segments[batch.positions // batch.input_ids.shape[1]]
        weights[segment == 1] = float("nan")
        got = batch.sketch(sketcher, weigh=lambda logp, a, b: weights[a:b]).sketches
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("method", ["add_rms_norm", "swiglu_backward"])
def test_the_self_test_sees_a_wrong_kernel(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(engine.Operators, method)

    def wrong(*args: Any) -> Any:
        made = right(*args)
        return made * 1.001 if isinstance(made, torch.Tensor) else (made[0], made[1] * 1.001)

    monkeypatch.setattr(engine.Operators, method, wrong)
    with pytest.raises(UncoveredParameterError, match="over frozen weights its tap gives something else"):
        sketches(zoo.make("llama"))


# ------------------------------------------------------------------------------------- what is not fused
class OwnNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * 1.0


def test_what_is_left_as_it_is_is_named() -> None:
    model: Any = zoo.make("llama")
    model.model.norm.__class__ = OwnNorm
    model.model.layers[0].mlp.act_fn = nn.GELU()
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    first = model.model.layers[0].input_layernorm
    first.forward = first.forward
    sketcher = GradientSketcher(model, SPEC, fused=True)
    assert sketcher.coverage.fused == {NORM: 3}
    reasons = {
        "model.norm": "OwnNorm: its code, test_fused.OwnNorm.forward, is not that of LlamaRMSNorm",
        "model.layers.0.mlp": "LlamaMLP: its activation is GELU, not SiLU",
        "model.layers.1.mlp": "LlamaMLP: act_fn has hooks, which would not be called",
        "model.layers.0.input_layernorm": "LlamaRMSNorm: its forward was replaced",
    }
    assert {k: v.replace("sketcher.test", "test") for k, v in sketcher.coverage.unfused.items()} == reasons
    shown = str(sketcher.coverage)
    assert "3  RMSNorm modules" in shown and all(f"not fused  {name} (" in shown for name in reasons)
    assert repr(sketcher).endswith("not active; fused: 3 RMSNorm)")


def test_nothing_to_fuse_is_an_error() -> None:
    for name in ("gpt2", "gemma2"):
        with pytest.raises(
            ValueError, match="fused=True: .* has no RMSNorm and no SwiGLU that is known here"
        ):
            GradientSketcher(zoo.make(name), SPEC, fused=True)
    with pytest.raises(TypeError, match="fused"):
        LiveSketcher(zoo.make("llama"), SPEC, fused=True)  # type: ignore[call-arg]


def test_compiled_models_are_refused() -> None:
    model = zoo.make("llama")
    with pytest.raises(ValueError, match="fused=True: the model is compiled"):
        GradientSketcher(torch.compile(model, backend="eager"), SPEC, fused=True)  # type: ignore[arg-type]
    sketcher = GradientSketcher(model, SPEC, fused=True)
    model.compile(backend="eager")
    for _ in range(2):
        with pytest.raises(ValueError, match="fused=True: the model is compiled"), sketcher:
            pass


def test_autocast_that_gives_norms_other_inputs_is_refused() -> None:
    """A norm of heads reads what a product has rounded to bfloat16; its scale is float32."""
    model, batch = zoo.make("qwen3"), zoo.padded()
    with (
        GradientSketcher(model, SPEC, fused=True, verify=False) as sketcher,
        pytest.raises(ValueError, match="q_norm has torch.float32 weights and torch.bfloat16 inputs"),
        sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(batch.input_ids, use_cache=False)


def test_code_that_repeats_llamas_is_known_wherever_it_stands() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    for kind in (MixtralRMSNorm, Qwen3MoeRMSNorm):
        assert fusable.against_norm(kind(8)) is None
    # The same formula, rounded after the scale.
    assert str(fusable.against_norm(Olmo2RMSNorm(8))).endswith(
        "Olmo2RMSNorm.forward, is not that of LlamaRMSNorm"
    )


def test_code_that_calls_another_torch_is_not_the_same() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    own = inspect.unwrap(LlamaRMSNorm.forward)
    other: Any = type("RMSNorm", (LlamaRMSNorm,), {})
    other.forward = FunctionType(own.__code__, {"torch": SimpleNamespace(rsqrt=torch.sqrt)}, "forward")
    assert "is not that of LlamaRMSNorm" in str(fusable.against_norm(other(8)))
    other.forward = FunctionType(own.__code__, {"torch": torch}, "forward")
    assert fusable.against_norm(other(8)) is None


def test_code_that_changed_is_not_known_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = zoo.make("llama").model.norm  # type: ignore[union-attr]
    assert fusable.against_norm(norm) is None  # type: ignore[arg-type]

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * hidden_states

    monkeypatch.setattr(type(norm), "forward", forward)
    assert "does something else" in str(fusable.against_norm(norm))  # type: ignore[arg-type]
