"""Which parameters `GradientSketcher` sketches, which it names in an error, and by which names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from torch import nn

from cropi_kernels import Coverage, GradientSketcher, SketchSpec, UncoveredParameterError, canonical_name
from cropi_kernels.sketcher.taps import exact

SPEC = SketchSpec(width=16, vocab_width=64)
transformers.logging.set_verbosity_error()


def test_coverage_counts_every_parameter() -> None:
    model = zoo.make("qwen2")
    for p in model.get_input_embeddings().parameters():  # type: ignore[operator]
        p.requires_grad_(False)
    coverage = GradientSketcher(model, SPEC, ["*.mlp.*"]).coverage
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    mlp = {n: size for n, size in sizes.items() if ".mlp." in n}
    assert coverage.total == sum(sizes.values())
    assert coverage.excluded == mlp
    assert coverage.covered == sum(coverage.by_kind.values())
    assert coverage.covered == coverage.total - sum(mlp.values()) - sizes["model.embed_tokens.weight"]
    assert set(coverage.by_kind) == {"linear", "bias", "norm", "head"}
    text = str(coverage)
    assert (
        f"{coverage.covered:,} of {coverage.total:,}" in text
        and "model.layers.1.mlp.down_proj.weight" in text
    )
    assert "0.0%" in str(Coverage(10, 0, {}, (), {}))


def with_parameter(model: nn.Module) -> nn.Module:
    model.model.steering = nn.Parameter(torch.ones(3))  # type: ignore[union-attr]
    return model


def with_max_norm(name: str) -> nn.Module:
    """An embedding that rescales its rows has another gradient; tied, its head alone must not count as coverage."""
    model = zoo.make(name)
    model.get_input_embeddings().max_norm = 1.0  # type: ignore[operator]
    return model


def norm_with_two_scales() -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight + self.bias  # no norm at all

    return nn.Sequential(nn.Linear(8, 8), Odd())


def linear_of_its_own(layer: nn.Module) -> nn.Module:
    """Its weight is 0, as a new adapter's: what it does must not be told from its outputs for that weight."""
    nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    return nn.Sequential(nn.Linear(8, 8), layer)


class Gated(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.T).tanh()


class Spelled(nn.Linear):  # Falcon's
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class OddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return [x * self.weight][x.ndim]


def with_looked_up_positions() -> nn.Module:
    """OPT looks its positions up by the attention mask: ids alone are an IndexError there."""
    sizes = {k: v for k, v in zoo.SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32))


def with_scaled_gradient() -> nn.Module:
    model = zoo.make("llama")
    model.get_input_embeddings().scale_grad_by_freq = True  # type: ignore[operator]
    return model


def mixture() -> nn.Module:
    # Other implementations of the experts know no float64.
    sizes = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    config = transformers.MixtralConfig(**zoo.SIZES, **sizes)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def jetmoe() -> nn.Module:
    sizes = {k: v for k, v in zoo.SIZES.items() if k != "num_attention_heads"}
    config = transformers.JetMoeConfig(**sizes, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    return transformers.JetMoeForCausalLM(config).eval()


UNCOVERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a parameter of one's own": (
        lambda: with_parameter(zoo.make("llama")),
        r"model.steering \(3,\) in LlamaModel",
    ),
    "an embedding with max_norm": (
        lambda: with_max_norm("llama"),
        r"model.embed_tokens.weight \(97, 32\) in Embedding",
    ),
    "a tied embedding with max_norm": (
        lambda: with_max_norm("llama-tied"),
        r"model.embed_tokens.weight .* in Embedding",
    ),
    "an embedding whose gradient depends on the batch": (
        with_scaled_gradient,
        r"model.embed_tokens.weight \(97, 32\) in Embedding: scale_grad_by_freq divides",
    ),
    "experts of one family alone": (
        jetmoe,
        r"model.layers.0.mlp.input_linear.weight \(4, 96, 32\) in JetMoeParallelExperts",
    ),
    "not a norm": (norm_with_two_scales, r"1.weight \(8,\) in Odd"),
    "not a product": (lambda: linear_of_its_own(Gated(8, 8)), r"1.weight \(8, 8\) in Gated"),
    "a linear layer that is never called": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)),
        r"1.out_proj.weight \(8, 8\) in NonDynamicallyQuantizableLinear",
    ),
    "a norm that raises": (lambda: nn.Sequential(nn.Linear(8, 8), OddNorm()), r"1.weight \(8,\) in OddNorm"),
    "an embedding of something else than ids": (
        with_looked_up_positions,
        r"model.decoder.embed_positions.weight \(66, 32\) in OPTLearnedPositionalEmbedding",
    ),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_an_uncovered_parameter_is_named_before_any_work(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is too large for its gradient to be formed; test_exact.py has the others."""
    monkeypatch.setattr(exact, "LARGEST", 0)
    make, message = UNCOVERED[case]
    model = make()
    with pytest.raises(UncoveredParameterError, match=message) as error:
        GradientSketcher(model, SPEC)
    assert "exclude=[" in str(error.value)
    names = re.findall(r"^  (\S+) \(", str(error.value), re.MULTILINE)
    GradientSketcher(model, SPEC, names)  # the remedy works
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_linear_layer_in_other_words_is_covered(dtype: torch.dtype) -> None:
    model = linear_of_its_own(Spelled(8, 5)).to(dtype)
    assert GradientSketcher(model, SPEC).coverage.covered == 8 * 8 + 8 + 8 * 5 + 5


@pytest.mark.parametrize("exclude", [(), ("*experts*",), ("*experts*", "*.gate.*")], ids=str)
def test_a_mixture_of_experts_whole_and_in_parts(exclude: tuple[str, ...]) -> None:
    model = mixture()
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    own = zoo.sketches(model, zoo.gradients(model), SPEC, exclude, torch.float32)
    want = zoo.sketches(model, zoo.gradients(model.double()), SPEC, exclude)
    assert ((got - want).norm(dim=1) <= 2 * (own - want).norm(dim=1)).all()


NOTHING: list[tuple[Callable[[], object], str]] = [
    (
        lambda: GradientSketcher(zoo.make("llama").requires_grad_(False), SPEC),
        "nothing to sketch: 0 of the model's 21",
    ),
    (lambda: GradientSketcher(zoo.make("llama"), SPEC, ["*"]), "nothing to sketch: .* exclude leaves out 21"),
    (
        lambda: GradientSketcher(zoo.make("llama"), SPEC, ["*.bias"]),
        r"exclude pattern '\*.bias' matches no trainable",
    ),
    (
        lambda: GradientSketcher(zoo.make("llama"), SPEC, "*.mlp.*"),
        r"give a list of patterns, e.g. exclude=\['\*.mlp",
    ),
]


@pytest.mark.parametrize("make, message", NOTHING, ids=[message[:30] for _, message in NOTHING])
def test_nothing_to_sketch_is_an_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_two_parameters_of_one_name_are_an_error() -> None:
    """They would get the same coordinates and signs, and so be added as if they were one."""
    inner = nn.ModuleDict({"module": nn.Linear(4, 4, bias=False)})
    inner.weight = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="two parameters are named 'weight' once wrappers"):
        GradientSketcher(inner, SPEC)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "_orig_mod.model.layers.0.self_attn.q_proj.weight",
        "module._orig_mod.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_wrappers_do_not_change_names(name: str) -> None:
    assert canonical_name(name) == "model.layers.0.self_attn.q_proj.weight"
    assert canonical_name("submodule.weight") == "submodule.weight"


def test_a_wrapped_model_has_the_same_sketch() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    batch, results = zoo.padded(), []
    for model in (zoo.make("llama"), Wrapper(zoo.make("llama"))):
        with GradientSketcher(model, SPEC) as sketcher:
            with sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)) as out:  # type: ignore[arg-type]
                model(batch.input_ids, attention_mask=batch.attention_mask).logits.square().sum().backward()
        results.append(out.sketches)
    assert torch.equal(*results) and results[0].any(dim=1).all()
