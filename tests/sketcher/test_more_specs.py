"""Several sketches of one pass: each has the bits that it has alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import moe, zoo
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec

SPEC = SketchSpec(width=16, vocab_width=64)
OTHERS = [
    dataclasses.replace(SPEC, seed=7),
    SketchSpec(dim=1024, seed=3),
    SketchSpec(dim=512, kind="countsketch"),
]


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_has_the_bits_that_it_has_alone(family: str, dtype: torch.dtype) -> None:
    model, batch = zoo.make(family).to(dtype), zoo.padded()
    alone = []
    for spec in (SPEC, *OTHERS):
        with GradientSketcher(model, spec) as sketcher:
            alone.append(batch.sketch(sketcher))
    with GradientSketcher(model, SPEC, more=OTHERS) as sketcher:
        for _ in range(2):
            together = batch.sketch(sketcher)
            assert torch.equal(together.sketches, alone[0].sketches)
            assert torch.equal(together.logprobs, alone[0].logprobs) and len(together.more) == len(OTHERS)
            for found, one in zip(together.more, alone[1:], strict=True):
                assert torch.equal(found, one.sketches) and found.abs().sum() > 0
    assert alone[0].more == ()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_adapters_of_the_head_are_in_each() -> None:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "lm_head"]
    model = peft.get_peft_model(zoo.make("llama"), peft.LoraConfig(r=4, target_modules=targets)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    batch = zoo.padded()
    with GradientSketcher(model, OTHERS[0]) as sketcher:
        alone = batch.sketch(sketcher)
    with GradientSketcher(model, SPEC, more=OTHERS[:1]) as sketcher:
        assert torch.equal(batch.sketch(sketcher).more[0], alone.sketches)


@pytest.mark.long
def test_experts_are_in_each() -> None:
    """They run once, inside the taps of one spec, whose forward stands in the place of the others'."""
    model, batch = moe.small("mixtral"), zoo.padded()
    alone = []
    for spec in (SPEC, *OTHERS[:2]):
        with GradientSketcher(model, spec, verify=False) as sketcher:
            alone.append(batch.sketch(sketcher).sketches)
    for verify in (False, True):
        with GradientSketcher(model, SPEC, more=OTHERS[:2], verify=verify) as sketcher:
            together = batch.sketch(sketcher)
        assert all(map(torch.equal, (together.sketches, *together.more), alone))


def test_a_batch_that_fails_leaves_the_others_usable() -> None:
    model, batch = zoo.make("llama"), zoo.padded()

    def fails(*args: object) -> torch.Tensor:
        raise KeyError("a mistake in the caller's code")

    with GradientSketcher(model, SPEC, more=OTHERS[:1]) as sketcher:
        first = batch.sketch(sketcher)
        with pytest.raises(KeyError):
            batch.sketch(sketcher, weigh=fails)
        again = batch.sketch(sketcher)
    assert torch.equal(first.more[0], again.more[0])


def test_gradients_that_are_formed_are_those_of_one_sketch() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    assert GradientSketcher(model, SPEC).coverage.by_kind["exact"] == 16
    with pytest.raises(
        ValueError, match="more: the gradient of 1.weight is formed, for one sketch: give no more"
    ):
        GradientSketcher(model, SPEC, more=OTHERS[:1])


def test_what_one_kind_alone_sketches_is_named() -> None:
    """Else the sketches would be of other parameters, and the coverage that of the first."""
    model, other = moe.small("mixtral"), SketchSpec(dim=512, kind="countsketch")
    for spec, more in ((SPEC, other), (other, SPEC)):
        with pytest.raises(
            ValueError, match=r"one alone sketches model\.layers\.0\.mlp\.experts.*: exclude them"
        ):
            GradientSketcher(model, spec, "uncovered", more=[more])
    together = GradientSketcher(model, SPEC, ["uncovered", "*.experts.*"], more=[other])
    assert not any("experts" in name for name in together.coverage.names)
