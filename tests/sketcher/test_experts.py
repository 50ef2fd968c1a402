"""Mixtures of experts against plain autograd: every family that transformers builds small, experts and routers.

The oracle is autograd in float64 through the family's own loop over experts, and the sketch coordinate by coordinate.
"""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support import moe, zoo
from support.versions import checkpoint_layers
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec, UncoveredParameterError
from cropi_kernels.sketcher.model.experts import Unsupported, recognise_experts
from cropi_kernels.sketcher.taps.experts import ExpertsTap
from cropi_kernels.testing import sketch_gradients

SPEC = SketchSpec(width=16, vocab_width=64)
transformers.logging.set_verbosity_error()
# Experts and routers of these must be covered whole; of the other families, what is covered must be right.
NAMED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "olmoe",
    "granitemoe", "llama4_text", "nemotron_h", "phimoe", "ernie4_5_moe", "minimax_m2", "jamba",
)  # fmt: skip
QUICK = ("qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "nemotron_h")
# Experts or routers of one family alone, for which there is no tap: an error by name.
ALONE = {
    "jetmoe", "longcat_flash", "inkling_text", "inkling2_text", "inkling2_loop_text", "gemma4_text", "kimi_linear"
}  # fmt: skip
# Built from sizes of their own, or larger than memory at any: left out here, by name.
NOT_SMALL = {"dbrx", "gemma4"}


def exact_sketches(model: nn.Module, exclude: tuple[str, ...] = ()) -> torch.Tensor:
    return zoo.sketches(model, zoo.gradients(model), SPEC, exclude)


def named_in(error: UncoveredParameterError) -> list[str]:
    return [re.split(r"[ :]", line.strip())[0] for line in str(error).splitlines() if line.startswith("  ")]


def cover(model: nn.Module) -> tuple[torch.Tensor, GradientSketcher, tuple[str, ...]]:
    """Sketches of all that can be covered, and the parameters that errors named on the way."""
    left_out: list[str] = []
    names = {name for name, _ in model.named_parameters()}
    while True:
        try:
            with GradientSketcher(model, SPEC, left_out) as sketcher:
                return zoo.padded().sketch(sketcher).sketches, sketcher, tuple(left_out)
        except UncoveredParameterError as error:
            more = [
                name if name in names else f"{name.removesuffix('.weight')}.*" for name in named_in(error)
            ]
            assert more and not set(more) & set(left_out), error
            left_out += more


@pytest.mark.slow
def test_the_families_are_those_of_transformers() -> None:
    assert set(NAMED) <= set(moe.families()) and len(moe.families()) > 45


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in moe.families()]
)
def test_family(kind: str) -> None:
    try:
        model = moe.eager(moe.small(kind).double())
    except ValueError as error:
        assert kind in NOT_SMALL, error
        pytest.skip(str(error))
    assert kind not in NOT_SMALL, f"{kind} builds small: take it off the list"
    try:
        exact_gradients = zoo.gradients(model)
    except RuntimeError as error:  # float32 inside of their code
        assert "dtype" in str(error) and kind not in NAMED
        pytest.skip(str(error))
    try:
        got, sketcher, left_out = cover(model)
    except ValueError as error:
        assert re.search("do not give its logits|does not see every token once", str(error)), error
        assert kind not in NAMED  # refused, by name
        return
    exact = zoo.sketches(model, exact_gradients, SPEC, left_out)
    # Taps and oracle sum in float64; the sketches are float32, so are the norms' and routers' own casts.
    terms = 64
    assert ((got - exact).norm(dim=1) <= terms * 2**-24 * exact.norm(dim=1)).all()
    assert exact.norm(dim=1).gt(0).all()
    experts = [name for name in left_out if "experts" in name or "mlp.gate" in name or "router" in name]
    if kind not in ALONE:
        assert not experts, experts
    if kind in NAMED:
        assert not experts and sketcher.coverage.by_kind["expert"] > 0
        fused = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3 and "experts" in n)
        assert sketcher.coverage.by_kind["expert"] == fused


# GPT-OSS does not keep the sequences of a packed row apart: its own log-probs differ there.
@pytest.mark.parametrize(
    "kind, layout",
    [
        (k, layout)
        for k in ("qwen3_moe", "gpt_oss", "llama4_text")
        for layout in zoo.LAYOUTS
        if (k, layout) != ("gpt_oss", "packed")
    ],
)
def test_layouts_in_float32(kind: str, layout: str) -> None:
    """Packed and shared rows: the tokens of an expert are cut by segment, wherever they stand."""
    model = moe.small(kind)
    left_out = ("*sinks",) if kind == "gpt_oss" else ()
    with GradientSketcher(model, SPEC, left_out) as sketcher:
        got = zoo.LAYOUTS[layout]().sketch(sketcher).sketches
    own = zoo.sketches(model, zoo.gradients(model), SPEC, left_out, torch.float32)
    wide = moe.eager(copy.deepcopy(model).double())
    exact = exact_sketches(wide, left_out)
    error, allowed = (got - exact).norm(dim=1), (own - exact).norm(dim=1)
    assert (error <= 2 * allowed).all() and (allowed <= 1e-3 * exact.norm(dim=1)).all()


def qwen(**changes: Any) -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **{**{k: v for k, v in moe.SIZES.items() if hasattr(transformers.Qwen3MoeConfig(), k)}, **changes}
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()  # type: ignore[no-any-return]


def test_more_experts_than_tokens() -> None:
    """Most experts have no token, and those that have one have one."""
    model = moe.eager(qwen(num_experts=64).double())
    got = zoo.sketched(model)
    exact = exact_sketches(model)
    assert ((got - exact).norm(dim=1) <= 64 * 2**-24 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_twice_the_same_bits(dtype: torch.dtype) -> None:
    model = qwen().to(dtype)
    with GradientSketcher(model, SPEC) as sketcher:
        first, second = (zoo.packed().sketch(sketcher).sketches for _ in range(2))
    assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    model = qwen().train()
    with GradientSketcher(model, SPEC) as sketcher:
        want = zoo.padded().sketch(sketcher).sketches
        checkpoint_layers(model, {"use_reentrant": reentrant})
        got = zoo.padded().sketch(sketcher).sketches
    assert torch.equal(got, want)


def test_a_bad_token_stays_in_its_segment() -> None:
    model = qwen()
    with GradientSketcher(model, SPEC) as sketcher:
        clean = zoo.padded().sketch(sketcher).sketches
        with torch.no_grad():
            model.model.embed_tokens.weight[93] = float("nan")  # of the last prompt
        broken = zoo.padded().sketch(sketcher).sketches
    # Tokens that are no number choose other experts, and a product of other lengths may add in another order.
    wrong = (broken - clean)[:2].norm(dim=1)
    assert (wrong <= 64 * 2**-24 * clean[:2].norm(dim=1)).all() and broken[2].isnan().all()


def test_the_model_is_left_as_it_was() -> None:
    model = qwen()
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    implementation = model.config._experts_implementation
    with pytest.raises(KeyError), GradientSketcher(model, SPEC) as sketcher:
        zoo.padded().sketch(sketcher)
        assert "forward" in vars(model.model.layers[0].mlp.experts)
        raise KeyError
    assert model.config._experts_implementation == implementation
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name
    with torch.no_grad():
        ids = zoo.padded().input_ids
        twin = copy.deepcopy(model)
        assert torch.equal(model(ids).logits, twin(ids).logits)


def test_frozen_experts_cost_no_tap() -> None:
    model = qwen()
    for name, p in model.named_parameters():
        p.requires_grad_("experts" not in name and "gate.weight" not in name)
    with GradientSketcher(model, SPEC) as sketcher:
        zoo.padded().sketch(sketcher)
        assert "expert" not in sketcher.coverage.by_kind and "router" not in sketcher.coverage.by_kind
        assert "forward" not in vars(model.model.layers[0].mlp.experts)


@pytest.mark.parametrize("left", ["gate_up_proj", "down_proj"])
def test_one_of_two_weights(left: str) -> None:
    model = moe.eager(qwen().double())
    exclude = (f"*experts.{left}",)
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    exact = exact_sketches(model, exclude)
    assert ((got - exact).norm(dim=1) <= 64 * 2**-24 * exact.norm(dim=1)).all()


# ------------------------------------------------------------------------------------------- refused in words
def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def expert_parallel(model: Any) -> None:
    experts_of(model)._is_expert_parallel = True


def replaced_forward(model: Any) -> None:
    experts = experts_of(model)
    experts.forward = experts.forward


def another_parameter(model: Any) -> None:
    experts_of(model).scale = nn.Parameter(torch.ones(1))


def another_gate(model: Any) -> None:
    class Doubled(type(experts_of(model))):  # type: ignore[misc]
        def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super()._apply_gate(x)

        def eager(self, *args: Any) -> Any:
            return type(self).__mro__[1].forward.__wrapped__(self, *args)

        def forward(self, *args: Any) -> Any:
            return self.eager(*args)

        forward.__wrapped__ = eager  # type: ignore[attr-defined]

    experts_of(model).__class__ = Doubled


WRONG = {
    "experts are spread over ranks .expert parallel.": expert_parallel,
    "something replaced the module's forward": replaced_forward,
    "they have parameters besides their weights": another_parameter,
    "its forward is not gate and up, activation, down": another_gate,
}


@pytest.mark.parametrize("reason", WRONG)
def test_other_experts_are_refused_with_the_reason(reason: str) -> None:
    model = qwen()
    WRONG[reason](model)
    with pytest.raises(Unsupported, match=reason):
        recognise_experts(experts_of(model))
    with pytest.raises(UncoveredParameterError, match=f"(?s)mlp.experts.gate_up_proj .*: {reason}.*exclude="):
        GradientSketcher(model, SPEC)


def test_comparison_kinds_do_not_sketch_experts() -> None:
    with pytest.raises(UncoveredParameterError, match="by kind='slab', not by kind='countsketch'"):
        GradientSketcher(qwen(), SketchSpec(dim=1024, kind="countsketch"))


def test_experts_of_other_ranks_are_named() -> None:
    model = qwen()
    with GradientSketcher(model, SPEC, verify=False) as sketcher:
        sketcher.check_model()
        experts_of(model).forward(torch.zeros(1, 32), torch.tensor([[0, 5]]), torch.ones(1, 2))
        with pytest.raises(ValueError, match="a token is sent to expert 6 of 6: experts of other ranks"):
            with sketcher.batch(torch.zeros(1, dtype=torch.int64), shape=(1, 1)):
                experts_of(model)(torch.zeros(1, 32), torch.tensor([[0, 6]]), torch.ones(1, 2))


class Router(nn.Module):
    """``how``: what else becomes of the weight."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(4, 8)), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x.double(), self.weight.double())
        if self.how == "norm":
            y = y / self.weight.norm()
        if self.how == "twice":
            y = y + nn.functional.linear(x.double(), self.weight.to(torch.float64))
        if self.how == "transposed":
            y = y + x.double() @ self.weight.T.double()
        return y.softmax(-1).topk(2).values


class Casting(Router):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.double(), self.weight.type(torch.float64)).softmax(-1).topk(2).values


class Routed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(5, 8), (Router if how else Casting)(how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(self.first(x).tanh()).sum()


@pytest.mark.parametrize("how", ["", "norm", "twice", "transposed"])
def test_routers_that_cast_their_weight_or_use_it_otherwise(how: str) -> None:
    """One product is seen in the call; what does more has its gradient formed. Both exact."""
    model, x = Routed(how).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    model(x).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with GradientSketcher(model, SPEC) as sketcher:
        assert sketcher.coverage.by_kind["exact" if how else "router"] == 32
        with sketcher.batch(torch.zeros(2, 3, dtype=torch.int64)) as result:
            model(x).backward()
    want = sketch_gradients(model, exact, SPEC)
    assert (result.sketches[0] - want).norm() <= 64 * 2**-24 * want.norm()
    assert "forward" not in vars(model.router)


class Hidden(Router):
    """A second use that the code of its forward does not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) * self.size()

    def size(self) -> torch.Tensor:
        return self.weight.norm()


def test_a_use_that_only_the_call_shows_is_an_error() -> None:
    model = Routed("")
    model.router = Hidden("")
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match="router uses its weight in norm, which no tap sees"):
            with sketcher.batch(torch.zeros(2, 3, dtype=torch.int64)):
                model(torch.randn(2, 3, 5)).backward()
    assert "forward" not in vars(model.router)


def test_experts_that_do_not_see_every_token_once_are_refused() -> None:
    told: list[str] = []
    tap: Any = SimpleNamespace(
        acc=SimpleNamespace(segments=SimpleNamespace(batch=2, length=3)),
        layout=SimpleNamespace(repeated=False),
        where="experts",
        refuse=told.append,
    )
    module, choice = nn.Module(), (torch.zeros(6, 1), torch.zeros(6, 1))
    assert ExpertsTap._fits(tap, module, (torch.zeros(6, 4), *choice)) and not told
    for wrong in ((torch.zeros(5, 4), *choice), (torch.zeros(6, 1, 4), *choice), (torch.zeros(6, 4),)):
        assert not ExpertsTap._fits(tap, module, wrong)
        assert "does not see every token once" in told.pop()


class Listed(nn.Module):
    """Experts in a list, each called on its own tokens, as models call them whose experts are no single weight."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(32, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 4), nn.SiLU(), nn.Linear(4, 32)) for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, -1)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            if len(token):
                out.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        return out.view_as(x)


@pytest.mark.long
def test_experts_in_a_list_that_a_few_tokens_do_not_reach() -> None:
    """A few tokens show of some experts that their gradients have to be formed; a batch reaches others."""
    model: Any = zoo.make("llama", num_hidden_layers=1)
    model.model.layers[0].mlp = Listed(64)
    wide, own = zoo.gradients(copy.deepcopy(model).double()), zoo.gradients(model)
    with GradientSketcher(model, SPEC) as sketcher:
        sketcher.check_model()
        first = set(sketcher.self_test.names)  # type: ignore[union-attr]
        got = zoo.padded().sketch(sketcher).sketches
        assert set(sketcher.self_test.names) - first, "a few tokens reach all that the batch does"  # type: ignore[union-attr]
        assert sketcher.coverage.by_kind["exact"] == sum(
            p.numel() for p in model.model.layers[0].mlp.experts.parameters()
        )
    zoo.assert_close(got, model, wide, own)
