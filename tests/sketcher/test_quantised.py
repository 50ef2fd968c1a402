"""Adapters on a quantised base: right, or an error where the base lets no gradient through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher import SelfTestError

SPEC = SketchSpec(width=16, vocab_width=64)


class Rounded(nn.Module):
    """A frozen layer whose weight is int8 with a scale a row, as quantised bases hold it."""

    def __init__(self, linear: nn.Linear, activations: bool) -> None:
        super().__init__()
        self.activations = activations
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))

    @property
    def weight(self) -> torch.Tensor:
        return self.codes.to(self.scale.dtype) * self.scale  # type: ignore[no-any-return,operator,union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activations:  # rounding has the derivative 0
            step = x.detach().abs().amax(-1, keepdim=True) / 127
            x = (x / step).round() * step
        return nn.functional.linear(x, self.weight)


class Adapted(nn.Module):
    """A base with two small trained matrices beside it."""

    def __init__(self, base: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(columns, 2, bias=False), nn.Linear(2, rows, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def adapted(activations: bool) -> Any:
    torch.manual_seed(0)
    model: Any = zoo.make("llama").requires_grad_(False)
    for layer in model.model.layers:
        for holder, name in ((layer.self_attn, "o_proj"), (layer.self_attn, "v_proj")):
            linear = getattr(holder, name)
            base = Rounded(linear, activations)
            setattr(holder, name, Adapted(base, *linear.weight.shape) if name == "v_proj" else base)
    return model


def assert_right(model: Any, exclude: tuple[str, ...] = ()) -> None:
    got = zoo.sketched(model)
    want = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert want.norm(dim=1).min() > 0
    assert bool(((got - want).norm(dim=1) <= 1e-5 * want.norm(dim=1)).all())


def test_adapters_on_int8_weights_are_right() -> None:
    assert_right(adapted(activations=False))


def test_a_base_that_lets_no_gradient_through_is_an_error() -> None:
    """v_proj's adapters lie behind o_proj, whose rounded inputs have no derivative: all gradients are 0."""
    model = adapted(activations=True)
    batch = zoo.padded()
    for way in ("policy_gradient", "batch"):
        with (
            GradientSketcher(model, SPEC) as sketcher,
            pytest.raises(SelfTestError, match="other than 0") as error,
        ):
            if way == "policy_gradient":
                batch.sketch(sketcher)
            else:
                with sketcher.batch(torch.tensor([0, 1]), shape=(2, 9)):
                    model(input_ids=torch.ones(2, 9, dtype=torch.int64)).logits.sum().backward()
        assert "self_attn.v_proj.down.weight" in str(error.value) and "verify=False" in str(error.value)
    with GradientSketcher(model, SPEC, verify=False) as sketcher:
        assert not batch.sketch(sketcher).sketches.any()


def test_a_detached_part_is_named() -> None:
    model = adapted(activations=False)
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, args, y: y.detach())
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.warns(
            UserWarning, match="no gradient reaches model.layers.0.self_attn.v_proj.*detach"
        ) as said:
            sketcher.check_model()
    assert [one.filename for one in said] == [__file__]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_lora_on_a_torchao_base(kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    peft = pytest.importorskip("peft")
    import cropi

    torch.manual_seed(0)
    model = zoo.make("llama").requires_grad_(False)
    quantization.quantize_(
        model,
        getattr(quantization, kind)(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name,
    )
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    before = cropi.Policy(model).fingerprint
    if "Dynamic" in kind:
        with GradientSketcher(model, SPEC) as sketcher, pytest.raises(SelfTestError, match="other than 0"):
            sketcher.check_model()
    else:
        assert_right(model)
    weight: Any = model.model.model.layers[0].mlp.up_proj.weight
    weight.qdata[0] = weight.qdata[1]  # the fingerprint is of the packed numbers
    assert cropi.Policy(model).fingerprint != before
