"""PEFT's adapters, on experts and routers too, and on quantised bases: held to autograd, one response at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import moe, zoo
from support.tensors import off
from torch import nn
from torch.nn import functional as F

from cropi_kernels import (
    GradientSketcher,
    SketchSpec,
    UncoveredParameterError,
    canonical_name,
    token_logprobs,
)

SPEC = SketchSpec(width=16, vocab_width=64)
HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None


def check(model: nn.Module, wide: Callable[[nn.Module], nn.Module] = nn.Module.double) -> GradientSketcher:
    """Held to float64; off by at most twice what torch's own float32 gradients are off."""
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches.double()
    assert sketcher.self_test is not None and not sketcher.self_test.untested
    own = zoo.sketches(model, zoo.gradients(model), SPEC)
    model = wide(model)
    exact = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert 0 < off(got, exact) <= 2 * off(own, exact) + 2.0**-23, off(own, exact)
    return sketcher


ATTENTION = dict(target_modules=["q_proj", "down_proj"])
CONFIGS: dict[str, Callable[[], Any]] = {
    "rsLoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, **ATTENTION),
    "PiSSA": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **ATTENTION),
    "LoRA with a bias": lambda: peft.LoraConfig(r=4, lora_bias=True, **ATTENTION),
    # One bank of vectors for all layers: a part of several modules, and nobody calls it.
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=8, vector_length=8, **ATTENTION),
    "saved embeddings": lambda: peft.LoraConfig(r=4, modules_to_save=["embed_tokens"], **ATTENTION),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_a_dense_model(kind: str) -> None:
    check(zoo.with_adapter(zoo.make("llama"), CONFIGS[kind]()))


def test_adapters_that_are_refused() -> None:
    """A magnitude that is used outside of the layer's output."""
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"])
    message = "(?s)embed_tokens.lora_magnitude_vector.* does not hold the 3 x 11 tokens.*exclude="
    with GradientSketcher(zoo.with_adapter(zoo.make("llama"), config), SPEC) as sketcher:
        with pytest.raises(UncoveredParameterError, match=message):
            zoo.padded().sketch(sketcher)


# -------------------------------------------------------------------------------------- experts and routers
TARGETS = {
    "both products": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "routers": ["mlp.gate.weight"],
    "one product, and routers": ["mlp.experts.down_proj", "mlp.gate.weight"],
}


def in_float64(model: nn.Module) -> nn.Module:
    """The grouped kernels take no float64."""
    model.get_base_model().set_experts_implementation("eager")  # type: ignore[operator]
    return model.double()


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_on_experts_and_routers(targets: str) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj"], target_parameters=TARGETS[targets])
    sketcher = check(zoo.with_adapter(moe.small("qwen3_moe"), config), in_float64)
    assert sum("lora_" in n and "mlp." in n for n in sketcher.coverage.names) == 4 * len(TARGETS[targets])


def test_lora_on_transposed_experts() -> None:
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    check(zoo.with_adapter(moe.small("gpt_oss"), config), in_float64)


@pytest.mark.long
def test_lora_on_experts_beside_their_own_weights() -> None:
    """The adapters are put on a weight and taken off around every call; the weight's own gradient is the same."""
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = zoo.with_adapter(moe.small("qwen3_moe"), config)
    model.requires_grad_(True)
    check(model, in_float64)


def test_names_of_a_nest() -> None:
    """Every wrapper of a nest has adapters of its own; what lies in the middle keeps the name that it always had."""
    inner = "base_model.model.model.layers.0.mlp.experts"
    assert canonical_name(f"{inner}.lora_A.a.weight") == "model.layers.0.mlp.experts.lora_A.a.weight"
    nested = canonical_name(f"{inner}.base_layer.lora_A.a.weight")
    assert nested == "model.layers.0.mlp.experts.base_layer.lora_A.a.weight"
    assert (
        canonical_name(f"{inner}.base_layer.base_layer.down_proj") == "model.layers.0.mlp.experts.down_proj"
    )
    assert canonical_name("model.q_proj.base_layer.weight") == "model.q_proj.weight"


# ---------------------------------------------------------------------------------------------- the head
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("llama", dict(target_modules=["lm_head"])),
    "soft-capped, with a bias, beside others": (
        "gemma2",
        dict(target_modules=["lm_head", "v_proj"], lora_bias=True),
    ),
    "scaled, and its own weight": ("granite", dict(target_modules=["lm_head", "q_proj"], use_rslora=True)),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.filterwarnings("ignore:Model.*tie_word_embeddings")
def test_lora_on_the_head(case: str) -> None:
    name, settings = HEADS[case]
    model = zoo.with_adapter(
        zoo.make(name, tie_word_embeddings=False), peft.LoraConfig(r=4, lora_alpha=8, **settings)
    )
    if "own weight" in case:
        model.requires_grad_(True)
    sketcher = check(model)
    own = [n for n in sketcher.coverage.names if n.startswith("lm_head.lora_")]
    assert len(own) == (3 if "lora_bias" in settings else 2) and set(own) <= set(sketcher.self_test.names)  # type: ignore[union-attr]


def test_lora_on_the_head_of_half_a_precision_and_its_log_probs() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"])
    model, batch = zoo.with_adapter(zoo.make("llama"), config), zoo.padded()
    arguments = dict(positions=batch.positions, targets=batch.targets, attention_mask=batch.attention_mask)
    want = batch.logprobs(model).detach()
    got = token_logprobs(model, batch.input_ids, **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        other = token_logprobs(model, batch.input_ids, **arguments)  # type: ignore[arg-type]
    assert float((other - want).abs().max()) > 1e-3
    with GradientSketcher(model, SPEC) as sketcher:
        exact = batch.sketch(sketcher).sketches
    half = model.to(torch.bfloat16)
    with GradientSketcher(half, SPEC) as sketcher:
        got = batch.sketch(sketcher).sketches
    own = zoo.sketches(half, zoo.gradients(half), SPEC).float()
    assert 0 < off(got, exact) <= 2 * off(own, exact), off(own, exact)


def test_the_scale_of_the_heads_adapter_is_that_of_the_pass() -> None:
    from peft.helpers import rescale_adapter_scale

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    model, batch = zoo.with_adapter(zoo.make("llama", tie_word_embeddings=False), config), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        before = batch.sketch(sketcher).sketches
        with rescale_adapter_scale(model, 3.0):
            got = batch.sketch(sketcher).sketches
        assert torch.equal(batch.sketch(sketcher).sketches, before)
    with rescale_adapter_scale(model, 3.0):
        assert torch.equal(zoo.sketched(model, spec=SPEC), got)
    assert not torch.allclose(got, before, rtol=0.1)


def test_another_head_than_that_of_the_taps_is_refused() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = zoo.with_adapter(zoo.make("llama", tie_word_embeddings=False), config)
    model.add_adapter("other", config)
    with GradientSketcher(model, SPEC) as sketcher:
        before = zoo.padded().sketch(sketcher).sketches
        model.base_model.set_adapter("other")
        with pytest.raises(ValueError, match="another module is the model's head .* make a new one"):
            zoo.padded().sketch(sketcher)
        model.base_model.set_adapter("default")
        assert torch.equal(zoo.padded().sketch(sketcher).sketches, before)


def test_dropout_of_the_heads_adapter_is_refused() -> None:
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.1)
    model = zoo.with_adapter(zoo.make("llama"), config)
    with GradientSketcher(model, SPEC) as sketcher:
        zoo.padded().sketch(sketcher)
        model.train()
        with pytest.raises(
            ValueError, match="adapter 'default' on the head is in training mode with dropout 0.1"
        ):
            zoo.padded().sketch(sketcher)


@pytest.mark.parametrize(
    "family, settings, message",
    [
        ("llama", dict(target_modules=["lm_head"], use_dora=True),
         "adapter 'default' on the head is not a plain LoRA .DoRA"),
        ("llama", dict(target_modules=["v_proj"], trainable_token_indices={"lm_head": [5, 7]}),
         "is not a decoder with a linear head .its head: peft"),
        # PEFT puts the embedding's trained rows into the tied head, too.
        ("llama-tied", dict(target_modules=["v_proj"], trainable_token_indices=[5, 7, 30]),
         "is not a decoder with a linear head .its head: peft"),
    ],
    ids=["DoRA", "tokens", "tied tokens"],
)  # fmt: skip
def test_other_adapters_of_the_head_go_through_batch(
    family: str, settings: dict[str, Any], message: str
) -> None:
    model, batch = zoo.with_adapter(zoo.make(family), peft.LoraConfig(r=4, **settings)), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match=f"{message}.* use `with sket"):
            batch.sketch(sketcher)
        got = batch.through(sketcher, model)
    own = zoo.sketches(model, zoo.gradients(model), SPEC)
    model = model.double()
    exact = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert 0 < off(got.double(), exact) <= 2 * off(own, exact) + 2.0**-23


def test_trained_tokens_alone_are_held_to_autograd() -> None:
    """The self-test's tokens hold some of them: without, no gradient is there to hold them to."""
    model = zoo.with_adapter(zoo.make("llama"), peft.TrainableTokensConfig(token_indices=[17, 31, 94]))
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches.double()
    assert sketcher.self_test is not None and not sketcher.self_test.untested
    model = model.double()
    want = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert off(got, want) <= 5e-6


# --------------------------------------------------------------------------------------- quantised bases
class Int4Linear(nn.Module):
    """As GPTQ and AWQ keep a layer: integers and scales in buffers, no parameter; dequantised in the forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (layer.weight.detach() / scale).round().to(torch.int32))
        self.register_buffer("scales", scale)

    def dequantised(self) -> torch.Tensor:
        return self.qweight * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantised().to(x.dtype))


class CompressedLinear(nn.Linear):
    """As compressed-tensors keep a layer: a linear layer with a packed weight of another shape, and a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.detach().abs().max() / 127
        packed = (layer.weight.detach() / scale).round().to(torch.int8)
        del self.weight
        self.weight_packed = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight_packed.view(self.out_features, self.in_features).to(x.dtype) * self.weight_scale
        return F.linear(x, weight.to(x.dtype))


class FP8Linear(nn.Linear):
    """As fine-grained FP8 keeps a layer: a linear layer with a weight in float8, dequantised in the forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.detach().abs().max() / 448
        self.weight = nn.Parameter(
            (layer.weight.detach() / self.scale).to(torch.float8_e4m3fn), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class NoBackward(Int4Linear):
    """A kernel for inference."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def quantised(kind: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = zoo.with_adapter(zoo.make("llama"), peft.LoraConfig(r=4, **ATTENTION))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (
                type(child) is nn.Linear
                and "lora" not in name
                and not child.weight.requires_grad
                and name != "lm_head"
            ):
                setattr(module, name, kind(child))
    return model


@pytest.mark.parametrize("kind", [Int4Linear, CompressedLinear, FP8Linear])
def test_adapters_on_a_quantised_base(kind: Callable[[nn.Linear], nn.Module]) -> None:
    model = quantised(kind)
    assert sum(type(m) is kind for m in model.modules()) == 14
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    assert len(sketcher.coverage.names) == 8
    want = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert 0 < off(got.double(), want) <= 5e-6  # two float32 backward passes of 2 layers


@pytest.mark.parametrize("method", ["policy_gradient", "batch"])
def test_a_base_without_a_backward_is_named(method: str) -> None:
    """Its graph ends there: what lies before would have no gradient, and autograd itself would say the same."""
    model, batch = quantised(NoBackward), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(
            ValueError,
            match=r"no gradient passes through .*k_proj \(NoBackward\), .*mlp.up_proj \(NoBackward\): quant",
        ):
            if method == "policy_gradient":
                batch.sketch(sketcher)
            else:
                with sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)):  # type: ignore[arg-type]
                    pass


@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_bitsandbytes(bits: int, tmp_path: Path) -> None:
    import transformers

    zoo.make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    settings = (
        dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else dict(load_in_8bit=True, llm_int8_threshold=0.0)
    )
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**settings), dtype=torch.float32
    )
    model = zoo.with_adapter(base, peft.LoraConfig(r=4, **ATTENTION))
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    assert sketcher.self_test is not None and not sketcher.self_test.untested
    want = zoo.sketches(model, zoo.gradients(model), SPEC)
    assert 0 < off(got.double(), want) <= 5e-6


@pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")
def test_8_bit_products_that_depend_on_other_tokens_are_named(tmp_path: Path) -> None:
    """Also where no input of a few tokens is beyond the threshold, so that no trial shows it."""
    import transformers

    zoo.make("llama").save_pretrained(tmp_path)  # type: ignore[operator]
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    model = zoo.with_adapter(base, peft.LoraConfig(r=4, **ATTENTION))
    ids, one = torch.tensor([[5, 6, 7]]), torch.tensor([1])
    for call in (
        lambda: GradientSketcher(model, SPEC, verify=False),
        lambda: token_logprobs(model, ids, positions=one, targets=one),
    ):
        with pytest.raises(
            ValueError, match=r"q_proj.base_layer' is an 8-bit layer.* 6, .*llm_int8_threshold=0.0"
        ):
            call()


def test_adapters_behind_invocation_tokens_are_sketched_by_the_whole_model() -> None:
    """PEFT finds the tokens in its own forward, which policy_gradient does not run: its sketches would be zero."""
    config = peft.LoraConfig(r=4, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM", **ATTENTION)
    model = zoo.with_adapter(zoo.make("llama"), config)
    ids = torch.randint(10, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    for row, start in enumerate((2, 4, 6)):
        ids[row, start : start + 2] = torch.tensor([5, 6])
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(
            ValueError, match=r"active behind invocation tokens \(aLoRA\).*use `with sketcher.batch"
        ):
            sketcher.check_model()
        with sketcher.batch(torch.arange(3), shape=(3, 12)) as sketch:
            logprobs = model(input_ids=ids).logits[:, 8:-1].log_softmax(-1)
            logprobs.gather(2, ids[:, 9:, None]).sum().backward()
    assert sketcher.self_test is not None
    for row in range(3):
        model.zero_grad()
        logprobs = model(input_ids=ids[row : row + 1]).logits[:, 8:-1].log_softmax(-1)
        logprobs.gather(2, ids[row : row + 1, 9:, None]).sum().backward()
        exact = {canonical_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
        want = zoo.sketch_gradients(model, exact, SPEC)
        assert float((sketch.sketches[row] - want).norm() / want.norm()) < 1e-5
