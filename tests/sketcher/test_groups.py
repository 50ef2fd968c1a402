"""Sketches of groups of parameters in one pass: each has the bits of a sketch of its own parameters alone."""

from __future__ import annotations

import copy
import fnmatch
from typing import Any

import pytest
import torch
from support import moe, zoo
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec, canonical_name
from cropi_kernels.sketcher.formed import FormedSketcher

SPEC = SketchSpec(1024, width=16, vocab_width=64)
# Biases and scales of one module in two groups; q, k and v, which share their folded inputs, in two.
GROUPS = {"attention": ["*attn*weight", "*attention*weight"], "biases": ["*.bias"], "others": ["rest"]}


def names_of(model: nn.Module) -> list[str]:
    return [canonical_name(name) for name, p in model.named_parameters() if p.requires_grad]


def fitting(model: nn.Module) -> dict[str, list[str]]:
    """`GROUPS` without the patterns that match nothing in this model."""
    names = names_of(model)
    kept = {name: [p for p in own if p == "rest" or fnmatch.filter(names, p)] for name, own in GROUPS.items()}
    return {name: own for name, own in kept.items() if own}


def members(model: nn.Module, groups: dict[str, list[str]]) -> list[set[str]]:
    """The parameters of each group; the rest comes last."""
    names, made = names_of(model), list[set[str]]()
    for own in groups.values():
        matched = {name for pattern in own for name in fnmatch.filter(names, pattern)}
        made.append(matched if own != ["rest"] else set(names).difference(*made))
    return made


def without(model: nn.Module, mine: set[str]) -> tuple[str, ...]:
    """What to exclude, so that these are left."""
    return tuple(name for name in names_of(model) if name not in mine)


def alone(model: nn.Module, groups: dict[str, list[str]], spec: SketchSpec, batch: Any) -> torch.Tensor:
    """The groups' sketches, each of a pass of its own in which all other parameters are left out."""
    made = []
    for mine in members(model, groups):
        with GradientSketcher(model, spec, exclude=without(model, mine), verify=False) as sketcher:
            made.append(batch.sketch(sketcher).sketches)
    return torch.cat(made, dim=1)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama-tied", torch.float32), ("gpt2", torch.float32), ("qwen2", torch.float16)]
)
def test_each_has_the_bits_that_it_has_alone(family: str, dtype: torch.dtype) -> None:
    model, batch = zoo.make(family).to(dtype), zoo.padded()
    groups = fitting(model)
    with GradientSketcher(model, SPEC, groups=groups) as sketcher:
        first, again = batch.sketch(sketcher), batch.sketch(sketcher)
    assert first.sketches.shape == (zoo.N_SEGMENTS, len(groups) * SPEC.dim)
    assert torch.equal(first.sketches, again.sketches)
    assert torch.equal(first.sketches, alone(model, groups, SPEC, batch))
    with GradientSketcher(model, SPEC) as sketcher:
        whole = batch.sketch(sketcher)
    assert torch.equal(whole.logprobs, first.logprobs)
    parts = first.sketches.view(zoo.N_SEGMENTS, len(groups), SPEC.dim)
    assert bool((parts.norm(dim=2) > 0).all())
    # At most one rounding for every number of base_dim that is summed to one of dim, and for every group.
    bound = 2.0**-24 * (SPEC.base_dim / SPEC.dim + len(groups)) * float(parts.abs().sum(1).max())
    assert float((parts.sum(1) - whole.sketches).abs().max()) <= bound


@pytest.mark.parametrize("kind", ["countsketch", "tensor"])
def test_the_other_kinds(kind: str) -> None:
    model, batch = zoo.make("gpt2"), zoo.padded()
    spec = SketchSpec(512, kind=kind)
    with GradientSketcher(model, spec, groups=fitting(model)) as sketcher:
        made = batch.sketch(sketcher).sketches
    assert torch.equal(made, alone(model, fitting(model), spec, batch))


def test_each_group_against_float64_gradients() -> None:
    """At most twice the error of plain torch's float32 gradients."""
    model, batch = zoo.make("qwen2"), zoo.padded()
    groups = fitting(model)
    with GradientSketcher(model, SPEC, groups=groups) as sketcher:
        made = batch.sketch(sketcher).sketches.view(zoo.N_SEGMENTS, len(groups), SPEC.dim).double()
    wide = zoo.gradients(copy.deepcopy(model).double())
    plain = zoo.gradients(model)
    for g, mine in enumerate(members(model, groups)):
        right, torchs = (zoo.sketches(model, each, SPEC, without(model, mine)) for each in (wide, plain))
        error, allowed = ((x - right).norm(dim=1) for x in (made[:, g], torchs))
        assert bool((error <= 2 * allowed + 2.0**-24 * right.norm(dim=1)).all())


@pytest.mark.long
def test_experts() -> None:
    model, batch = moe.small("mixtral"), zoo.padded()
    groups = {"experts": ["*experts*"], "others": ["rest"]}
    with GradientSketcher(model, SPEC, groups=groups) as sketcher:
        made = batch.sketch(sketcher).sketches
    assert torch.equal(made, alone(model, groups, SPEC, batch))


def test_a_gradient_that_is_formed_where_no_tap_knows_its_module() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) * self.scale

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 3, 4)
    groups = {"scale": ["scale"], "others": ["rest"]}
    made = []
    for how in ({"groups": groups}, *({"exclude": without(model, mine)} for mine in members(model, groups))):
        with GradientSketcher(model, SPEC, **how) as sketcher:
            with sketcher.batch(torch.tensor([0, 1]), shape=(2, 3)) as result:
                model(x).square().sum().backward()
        made.append(result.sketches)
    assert torch.equal(made[0], torch.cat(made[1:], dim=1)) and bool(made[0].isfinite().all())
    assert bool((made[0].view(4, SPEC.dim).norm(dim=1) > 0).all())


def test_gradients_that_autograd_forms_go_to_the_same_groups() -> None:
    model, batch = zoo.make("gpt2"), zoo.padded()
    groups = fitting(model)
    with FormedSketcher(model, SPEC, groups=groups) as sketcher:
        formed = batch.sketch(sketcher, num_segments=zoo.N_SEGMENTS).sketches
    with GradientSketcher(model, SPEC, groups=groups) as sketcher:
        made = batch.sketch(sketcher, num_segments=zoo.N_SEGMENTS).sketches
    for a, b in zip(formed.view(-1, SPEC.dim), made.view(-1, SPEC.dim)):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_any_loss() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    groups = fitting(model)

    def block(sketcher: GradientSketcher) -> torch.Tensor:
        with sketcher.batch(batch.segments, shape=batch.input_ids.shape) as result:
            model(input_ids=batch.input_ids).logits.square().sum().backward()
        return result.sketches

    with GradientSketcher(model, SPEC, groups=groups) as sketcher:
        made = block(sketcher)
    with GradientSketcher(model, SPEC) as sketcher:
        whole = block(sketcher)
    parts = made.view(len(whole), len(groups), SPEC.dim)
    assert float((parts.sum(1) - whole).norm()) <= 1e-5 * float(whole.norm())


def test_fused_taps_add_to_the_same_groups() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    groups = {"norms": ["*norm*"], "others": ["rest"]}
    made = []
    for fused in (False, True):
        with GradientSketcher(model, SPEC, groups=groups, fused=fused) as sketcher:
            made.append(batch.sketch(sketcher).sketches.view(-1, SPEC.dim))
    plain, other = made
    assert bool(((other - plain).norm(dim=1) <= 1e-5 * plain.norm(dim=1)).all()) and bool(
        (plain != 0).any(1).all()
    )


def test_a_segment_that_fails_fails_in_all_groups() -> None:
    model, batch = zoo.make("llama"), zoo.padded()

    def nan_first(logprobs: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        weights = torch.ones_like(logprobs)
        return torch.where(torch.arange(start, stop) == 0, float("nan"), weights)

    with GradientSketcher(model, SPEC, groups=fitting(model)) as sketcher:
        made = batch.sketch(sketcher, weigh=nan_first).sketches
    assert bool(made[0].isnan().all()) and bool(made[1:].isfinite().all())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "groups={}: give"),
        (["*mlp*"], r"groups=\['\*mlp\*'\]: give"),
        ({"a": "*mlp*"}, r"'a' has '\*mlp\*': give a list of patterns"),
        ({"a": []}, r"'a' has \[\]: give a list of patterns"),
        ({"a": ["*mlp*", "rest"]}, "'rest' stands alone, in one group: 'a'"),
        ({"a": ["rest"], "b": ["rest"]}, "'rest' stands alone, in one group: 'b'"),
        ({"a": ["*mpl*"], "b": ["rest"]}, r"'\*mpl\*' of 'a' matches no parameter that is sketched \(e.g. "),
        ({"a": ["*mlp*"], "b": ["*up_proj*", "*attn*"]}, r"'a' and 'b' both have model.layers.0.mlp.up_proj.weight, "),
        ({"a": ["*mlp*"]}, r"none has model.embed_tokens.weight, .* and \d+ more: add patterns, or a group with"),
        ({"a": ["*"], "b": ["rest"]}, "no parameter is left for 'b', the rest"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientSketcher(zoo.make("llama"), SPEC, groups=groups)
