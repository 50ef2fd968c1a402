"""Small parameters that a model uses in a way of its own: their gradient is formed, and is that of autograd.

The yardstick is that of test_sketcher_models.py: twice the distance of ordinary autograd in the model's dtype from
float64, per segment.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from support import odd_models, zoo
from support.formed import Gradients
from support.versions import checkpoint_layers
from support.zoo import SPEC, assert_close
from torch import nn

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
