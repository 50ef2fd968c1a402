"""Small parameters that a model uses in a way of its own: their gradient is formed, and is that of autograd.

The yardstick is that of test_sketcher_models.py: twice the distance of ordinary autograd in the model's dtype from
float64, per segment.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import odd_models, zoo
from support.formed import Affine, Gradients, by_autograd
from support.versions import checkpoint_layers
from support.zoo import SPEC, assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint

from cropi_kernels import GradientSketcher, UncoveredParameterError
from cropi_kernels.sketcher.taps import exact
from cropi_kernels.testing import sketch_gradients

transformers.logging.set_verbosity_error()


@functools.cache
def gradients(name: str) -> tuple[Gradients, Gradients]:
    return zoo.gradients(odd_models.make(name, torch.float64)), zoo.gradients(odd_models.make(name))


@pytest.mark.parametrize("name", odd_models.ODD)
def test_families(name: str) -> None:
    model = odd_models.make(name)
    # CPMAnt is not causal, which the probe refuses; its gradient is right all the same.
    with GradientSketcher(model, SPEC, verify=name != "cpmant") as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
        assert not any(p.requires_grad for p in model.parameters())
    assert sketcher.coverage.covered == sketcher.coverage.total
    parameter = odd_models.ODD[name][2]
    formed = [one.name for one in sketcher._tapped.plan.exact.parameters]
    if sketcher.coverage.by_kind.get("router"):  # has a tap of its own
        formed = list(sketcher.coverage.names)
    assert any(name.endswith(parameter) for name in formed)
    assert all(p.grad is None for p in model.parameters())
    assert_close(got, model, *gradients(name))


# Mamba's and Jamba's dt_proj is used beside its module, which only `policy_gradient` notices beforehand.
@pytest.mark.parametrize("name", ["gpt-oss", "gemma3n", "bamba", "lfm2", "apertus", "bart"])
def test_families_through_batch_with_a_cache(name: str) -> None:
    """The model's own forward as users call it: it fills a cache, which a second forward would find filled."""
    model, batch = odd_models.make(name), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        got = batch.through(sketcher, model)
    assert_close(got, model, *gradients(name))


# GPT-OSS does not keep packed rows apart: its logits are others there.
@pytest.mark.parametrize(
    "name, layout",
    [("gpt-oss", "shared"), *((n, x) for n in ("apertus", "cohere") for x in ("shared", "packed"))],
)
def test_segments_that_share_a_row(name: str, layout: str) -> None:
    model = odd_models.make(name, attn_implementation="eager")
    got = zoo.sketched(model, layout)
    assert_close(got, model, *gradients(name))


@pytest.mark.long
def test_checkpointing_around_what_is_formed_is_named() -> None:
    """Gemma 3n uses parameters of AltUp in its layers, which are what is checkpointed."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("the self-test refuses these parameters there")
    model: Any = odd_models.make("gemma3n")
    checkpoint_layers(model, {"use_reentrant": False})
    model.train()
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(RuntimeError, match=r"altup\.correct_output_scale.*: turn that off, or"):
            zoo.padded().sketch(sketcher)
    left_out = ("*altup.correct*",)
    with GradientSketcher(model, SPEC, exclude=left_out) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    assert_close(got, model, *gradients("gemma3n"), exclude=left_out)


@pytest.mark.long
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt-oss", "bamba"])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    model = odd_models.make(name).train()
    checkpoint_layers(model, {"use_reentrant": reentrant})
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
        assert not any(p.requires_grad for p in model.parameters())
    assert_close(got, model, *gradients(name))


@pytest.mark.parametrize("name", ["gpt-oss", "apertus", "opt", "mamba"])
def test_bfloat16(name: str) -> None:
    model = odd_models.make(name, torch.bfloat16)
    got = zoo.sketched(model)
    own = zoo.gradients(model)
    assert_close(got, model, zoo.gradients(model.double()), own)


# --------------------------------------------------------------------------------------------------- modules
class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits.softmax(-1), logits  # type: ignore[return-value]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Router(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, logits = self.gate(x)
        return x * weights + logits  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def norm(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        x = x if gate is None else x * nn.functional.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.norm(x, x.flip(-1)) / self.temperature}


class NotCalled(nn.Module):
    """The module that owns the parameters is never called, its method is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.norm(x, x + 1)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Flat(nn.Module):
    """Sees the tokens in one axis, as the router of a mixture does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Affine()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(0, 1)).view_as(x)  # type: ignore[no-any-return]


class Copies(nn.Module):
    """[copies, batch, length, n], as Gemma-3n has it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Affine()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.stack([x, x.square()])).sum(0)  # type: ignore[no-any-return]


class TwoUses(nn.Module):
    """One call gives two outputs, both used; the parameter meets tokens and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.rand(4))

    def pair(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        sink = self.sinks.reshape(1, 1, 4).expand(*x.shape[:2], 4)
        return torch.cat([x, sink], -1).softmax(-1)[..., :8], x * self.sinks.sum().exp(), None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return self.pair(x)


class Sum(nn.Module):
    """Adds up whatever the module before returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        parts = y.values() if isinstance(y, dict) else y if isinstance(y, tuple) else (y,)
        return sum(part for part in parts if part is not None)  # type: ignore[return-value]


class Sub(nn.Embedding):
    """Rows are rescaled when they are looked up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def replaced(module: nn.Module) -> nn.Module:
    """A user's forward in place of the class's own."""
    plain = module.forward
    module.forward = lambda x: plain(x) * 1.5 + x  # type: ignore[method-assign]
    return module


def conv1d() -> nn.Module:
    layer = transformers.pytorch_utils.Conv1D(8, 8)
    nn.init.normal_(layer.bias)
    return layer


class Mixing(nn.Linear):
    """Mixes the tokens of a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.cumsum(1) if x.ndim == 3 else x)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mixing": lambda: Mixing(8, 8),
    "scaled": lambda: Scaled(8, 8),
    "replaced linear": lambda: replaced(nn.Linear(8, 8)),
    "replaced Conv1D": lambda: replaced(conv1d()),
    "replaced norm": lambda: replaced(nn.RMSNorm(8, 1e-6)),
    "router": Routed,
    "affine": Affine,
    "gated": Gated,
    "not called": NotCalled,
    "convolution": Convolved,
    "flat": Flat,
    "copies": Copies,
    "two outputs": TwoUses,
    "several calls": lambda: nn.Sequential(*[Affine()] * 2),
    "batch norm of running numbers": lambda: nn.Sequential(Affine(), nn.BatchNorm1d(6).eval()),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("case", MODULES)
def test_modules(case: str, checkpointed: bool) -> None:
    """Two rows of six tokens; segments end at a row, or (where tokens are apart) within one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Sum(MODULES[case]()), nn.Linear(8, 8))
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    ids = [torch.tensor([[0] * 6, [1] * 6])]
    if case not in ("convolution", "mixing"):
        ids.append(torch.tensor([[0] * 4 + [1] * 2, [1] * 3 + [2] * 3]))
    for segments in ids:
        with GradientSketcher(model, SPEC) as sketcher:
            assert {"exact", "router"} & set(sketcher.coverage.by_kind)
            with sketcher.batch(segments) as out:
                inputs = x.clone().requires_grad_(True)
                y = checkpoint(model, inputs, use_reentrant=False) if checkpointed else model(inputs)
                (y * w).sum().backward()
            assert not any(p.requires_grad for p in model.parameters())
        ends = [0, *torch.bincount(segments.flatten()).cumsum(0).tolist()]
        spans = [slice(a, b) for a, b in zip(ends, ends[1:])]
        assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))


def test_an_embedding_of_another_kind_has_the_coordinates_of_an_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sub(11, 8, padding_idx=2), nn.Linear(8, 8))
    x, w = torch.randint(11, (2, 6)), torch.randn(2, 6, 8)
    x[0, 0] = 2
    with GradientSketcher(model, SPEC) as sketcher, sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
        (model(x) * w).sum().backward()
    assert sketcher.coverage.by_kind["exact"] == 88
    spans = [slice(0, 6), slice(6, 12)]
    assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))


def test_rows_that_are_looked_up_are_added_without_a_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(exact.Exact, "add", never)
    with GradientSketcher(odd_models.make("opt"), SPEC, verify=False) as sketcher:
        assert zoo.padded().sketch(sketcher).sketches.any()


def test_users_hooks_behind_the_module_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Affine(), nn.RMSNorm(8, 1e-6), nn.Linear(8, 8))
    for module in model:
        module.register_forward_hook(lambda m, args, y: 1.5 * y + y.square())
    x, w = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    with GradientSketcher(model, SPEC) as sketcher, sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
        (model(x) * w).sum().backward()
    spans = [slice(0, 6), slice(6, 12)]
    assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))


def test_a_forward_that_fails_leaves_the_weights_frozen() -> None:
    class Fails(Affine):
        broken = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken:
                raise KeyError("a mistake in the model")
            return super().forward(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Affine(), Fails()), torch.randn(2, 6, 8)
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(KeyError), sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
            model(x)
        assert not any(p.requires_grad for p in model.parameters())
        Fails.broken = False
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)) as out:
            model(x).sum().backward()
    spans, w = [slice(0, 6), slice(6, 12)], torch.ones(2, 6, 8)
    assert_close(out.sketches, model, *(by_autograd(model, x, w, spans, wide) for wide in (True, False)))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_output_that_holds_no_tokens_is_named() -> None:
    class Pooled(Affine):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y.sum((0, 1))

    model = Pooled()
    refused = pytest.raises(
        ValueError, match=r"weight, bias: an output of shape \(8,\) of Pooled has a gradient, and"
    )
    with GradientSketcher(model, SPEC) as sketcher, refused:
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 6)):
            tokens, _ = model(torch.ones(2, 6, 8))
            tokens.sum().backward()  # the other has no gradient
            tokens, pooled = model(torch.ones(2, 6, 8))
            (tokens.sum() + pooled.sum()).backward()


# ------------------------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(use_dora=True, target_modules=["q_proj", "down_proj"]), "lora_magnitude_vector"),
        (dict(target_modules=["embed_tokens", "q_proj"]), "lora_embedding_A"),
        (dict(trainable_token_indices=[5, 7, 30], target_modules=["v_proj"]), "trainable_tokens_delta"),
    ],
    ids=["DoRA", "embeddings", "tokens"],
)
def test_adapters(settings: dict[str, Any], name: str) -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    model = zoo.with_adapter(zoo.make("llama"), config)
    wide = copy.deepcopy(model).double()
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    assert any(name in one.name for one in sketcher._tapped.plan.exact.parameters)
    assert_close(got, model, zoo.gradients(wide), zoo.gradients(model))


# --------------------------------------------------------------------------------------------------- limits
def test_a_convolution_of_a_large_audio_encoder_is_covered() -> None:
    """Whisper's, of 4.9 million numbers. Its plan is a byte for each, and a few for 32768 of them."""
    sketcher = GradientSketcher(nn.Conv1d(1280, 1280, 3), SPEC)
    assert sketcher.coverage.covered == sketcher.coverage.total == 1280 * 1280 * 3 + 1280
    (plan,) = (one.plan for one in sketcher._tapped.plan.exact.parameters if one.name == "weight")
    assert plan is not None and plan.sign.nbytes + plan.blocks.nbytes <= 1.001 * plan.size


def test_what_is_too_large_is_named_and_left_out_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "LARGEST", 1000)
    monkeypatch.setattr("cropi_kernels.sketcher.attach.builder.recognise_experts", lambda module: None)
    model = odd_models.make("mixtral")
    large = {n: p.numel() for n, p in model.named_parameters() if "experts" in n}
    total = sum(p.numel() for p in model.parameters())
    with pytest.raises(UncoveredParameterError) as error:
        GradientSketcher(model, SPEC)
    text = str(error.value)
    assert all(f"  {n} (4, " in text for n in large) and text.count(" in MixtralExperts: ") == len(large) == 4
    assert f"({sum(large.values()) / total:.2%} of all parameters)" in text and "exclude='uncovered'" in text
    for exclude in ("uncovered", ["uncovered"], ["*.q_proj.weight", "uncovered"]):
        sketcher = GradientSketcher(model, SPEC, exclude)
        assert sketcher.coverage.uncovered == large
        share = f"({sum(large.values()) / total:.2%} of all): model.layers.0.mlp.experts.gate_up_proj"
        assert share in str(sketcher.coverage)
        assert len(sketcher.coverage.excluded) == (2 if "*.q_proj.weight" in exclude else 0)
    with GradientSketcher(model, SPEC, "uncovered") as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    wide, own = gradients("mixtral")
    assert_close(got, model, wide, own, exclude=tuple(large))


def test_nothing_is_uncovered_where_all_is_covered() -> None:
    plain, named = (GradientSketcher(zoo.make("qwen3"), SPEC, exclude) for exclude in ((), "uncovered"))
    assert plain.coverage == named.coverage and not named.coverage.uncovered


def test_parameters_outside_the_decoder_are_an_error_of_policy_gradient_alone() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.shift = nn.Parameter(torch.zeros(97))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + self.shift
            return out

    torch.manual_seed(0)
    model, batch = Shifted(transformers.LlamaConfig(**zoo.SIZES)).eval(), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(UncoveredParameterError, match=r" \(Shifted\): outside the decoder"):
            sketcher.check_model()
        got = batch.through(sketcher, model)
    own = zoo.gradients(model)
    assert_close(got, model, zoo.gradients(model.double()), own)


def test_all_that_a_model_cannot_do_is_found_before_the_first_batch() -> None:
    """XLNet has its tokens as [length, batch, n]; its embedding is too much for all of them: it is the head as well."""
    config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48)
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(config).eval()
    with GradientSketcher(model, SPEC) as sketcher:
        for _ in range(2):
            with pytest.raises(UncoveredParameterError) as error:
                sketcher.check_model()
    share = 97 * 32 / sum(p.numel() for p in model.parameters())
    assert f"({share:.2%} of all parameters):\n  transformer.word_embedding (Embedding): called on" in str(
        error.value
    )
    # Without the probe of the policy, which says that XLNet is not causal.
    with GradientSketcher(model, SPEC, "uncovered", verify=False) as sketcher:
        sketcher.check_model()
        assert sketcher.coverage.uncovered == {"transformer.word_embedding.weight": 97 * 32}
        got = zoo.padded().sketch(sketcher).sketches
    own = zoo.gradients(model)
    exclude = ("transformer.word_embedding.weight",)
    for gradient in own:
        assert all(g.isfinite().all() for g in gradient.values())
    assert_close(got, model, zoo.gradients(model.double()), own, exclude=exclude)
    assert all(p.requires_grad for p in model.parameters())


class LengthFirst(nn.Module):
    """A linear layer that sees [length, batch, n]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def test_a_batch_of_as_many_rows_as_tokens_does_not_pass_for_another_layout() -> None:
    """[length, batch] and [batch, length] have one shape there: what other shapes have told must hold."""
    model = zoo.make("llama")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp = LengthFirst(model.config.hidden_size)  # type: ignore[union-attr]
        nn.init.normal_(layer.mlp.linear.weight, std=0.2)
    rows = torch.randint(1, 60, (6, 6), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([0, 0, 1, 1, 2, 2])
    labels = rows.clone()
    labels[:, :3] = -100
    weights = torch.tensor([1.0, -0.5, 0.7, -1.0, 0.3, -0.8])
    with GradientSketcher(model, SPEC) as sketcher:
        got = sketcher.policy_gradient(rows, segments=segments, labels=labels, weights=weights).sketches
    want = []
    for segment in range(3):
        model.zero_grad()
        for i in (2 * segment, 2 * segment + 1):
            logp = torch.log_softmax(model(rows[i : i + 1]).logits[0], -1)
            (weights[i] * logp[2:-1].gather(1, rows[i, 3:, None]).sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        want.append(sketch_gradients(model, gradients, SPEC))
    for mine, truth in zip(got, want, strict=True):
        # Sums of some thousand float32 products, twice.
        assert float((mine - truth).norm() / truth.norm()) < 1e-5
