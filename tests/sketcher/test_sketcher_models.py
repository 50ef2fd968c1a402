"""The tap against the exact gradient: every family, layout, kind and dtype.

The oracle is ordinary autograd in float64 and the sketch written out coordinate by coordinate. The tap may be twice as
far from it as ordinary autograd in the model's own dtype with the sketch in float32: nothing but rounding may differ.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from support.versions import checkpoint_layers
from support.zoo import SPEC, assert_close
from torch import nn

from cropi_kernels import GradientSketcher, SketchSpec, UncoveredParameterError, token_logprobs
from cropi_kernels.sketcher.model.hooks import checkpointed
from cropi_kernels.sketcher.policy import logprobs
from cropi_kernels.sketcher.policy.decoder import split_model

transformers.logging.set_verbosity_error()


@functools.cache
def wide_gradients(
    name: str, temperature: float = 1.0, dtype: torch.dtype | None = None
) -> list[dict[str, torch.Tensor]]:
    """float64 gradients of the model, or of a model whose weights were rounded to ``dtype`` before."""
    model = zoo.make(name) if dtype is None else zoo.make(name, dtype)
    return zoo.gradients(model.double(), temperature)


@functools.cache
def own_gradients(
    name: str, temperature: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[dict[str, torch.Tensor]]:
    return zoo.gradients(zoo.make(name, dtype), temperature)


# Falcon makes its mask without a look at position_ids: it knows no packed rows.
@pytest.mark.parametrize(
    "name, layout",
    [(n, layout) for n in zoo.FAMILIES for layout in zoo.LAYOUTS if (n, layout) != ("falcon", "packed")],
)
def test_families_and_layouts(name: str, layout: str) -> None:
    model = zoo.make(name)
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.LAYOUTS[layout]().sketch(sketcher)
    assert sketcher.coverage.covered == sketcher.coverage.total == sum(p.numel() for p in model.parameters())
    assert_close(result.sketches, model, wide_gradients(name), own_gradients(name))
    assert result.weights.tolist() == zoo.weights_of(zoo.padded()).tolist()


def test_more_inputs_of_the_model() -> None:
    """GPT-2 looks token types up in its tied embedding, too: three uses of one weight."""
    model, batch = zoo.make("gpt2"), zoo.padded()
    more = {"token_type_ids": batch.input_ids % 3}
    with GradientSketcher(model, SPEC) as sketcher:
        got = batch.sketch(sketcher, model_kwargs=more).sketches
    wide, own = zoo.gradients(zoo.make("gpt2").double(), **more), zoo.gradients(model, **more)
    assert_close(got, model, wide, own)


def test_log_probs_are_the_models_own() -> None:
    model, batch = zoo.make("gemma2"), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        result = batch.sketch(sketcher, temperature=0.7)
    with torch.no_grad():
        logits = model.double()(batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    want = (logits[batch.positions] / 0.7).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert result.logprobs.dtype == torch.float32
    assert torch.allclose(result.logprobs.double(), want, rtol=0, atol=1e-5)


SPECS = [
    SketchSpec(width=16, dim=1024),
    SketchSpec(width=64, dim=65536, vocab_width=None),
    SketchSpec(width=None, vocab_width=16),
    SketchSpec(width=None, dim=64, seed=3),
    SketchSpec(kind="countsketch", dim=256),
    SketchSpec(kind="dropout", dim=1024, keep=0.25),
    SketchSpec(kind="kron", dim=512),
    SketchSpec(kind="tensor", dim=256),
    SketchSpec(kind="tensor", dim=16384),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.dim}-w{s.width}")
@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gpt2"])
def test_specs(name: str, spec: SketchSpec) -> None:
    model = zoo.make(name)
    with GradientSketcher(model, spec) as sketcher:
        result = zoo.shared().sketch(sketcher)
    wide, own = wide_gradients(name), own_gradients(name)
    if spec.kind != "tensor":
        assert_close(result.sketches, model, wide, own, spec)
        return
    # An FFT rounds every number by the size of all others; test_sketch_kinds.py bounds that. Here a wrong coordinate
    # or a lost term would be an error of order 1.
    exact = zoo.sketches(model, wide, spec)
    assert ((result.sketches - exact).norm(dim=1) < 1e-4 * exact.norm(dim=1)).all()


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_half_precision_models(name: str, dtype: torch.dtype) -> None:
    model = zoo.make(name, dtype)
    for layout in (zoo.padded, zoo.shared):
        with GradientSketcher(model, SPEC) as sketcher:
            result = layout().sketch(sketcher)
        wide, own = wide_gradients(name, 1.0, dtype), own_gradients(name, 1.0, dtype)
        assert_close(result.sketches, model, wide, own)
        assert result.logprobs.dtype == torch.float32


def test_a_float64_model_differs_by_the_rounding_of_the_sums_alone() -> None:
    model = zoo.make("qwen3", torch.float64)
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.shared().sketch(sketcher)
    exact = zoo.sketches(model, wide_gradients("qwen3"), SPEC)
    terms = len(sketcher.coverage.names)
    assert ((result.sketches - exact).norm(dim=1) <= terms * 2**-24 * exact.norm(dim=1)).all()


@pytest.mark.long
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_activation_checkpointing_changes_no_bit(name: str, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = zoo.make(name).train()
        for module in model.modules():  # GPT-2's dropout is not what is tested
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            checkpoint_layers(model, {"use_reentrant": reentrant})
            assert checkpointed(model)
        with GradientSketcher(model, SPEC) as sketcher:
            results.append(zoo.padded().sketch(sketcher))
    assert torch.equal(results[0].sketches, results[1].sketches) and results[0].sketches.any(dim=1).all()


@pytest.mark.parametrize("layout", zoo.LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_eager_attention(name: str, layout: str) -> None:
    """Eager attention adds its mask to the scores: a bool mask has to become an additive one on the way."""
    model = zoo.make(name, attn_implementation="eager")
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.LAYOUTS[layout]().sketch(sketcher)
    assert_close(result.sketches, model, wide_gradients(name), own_gradients(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_temperature(name: str) -> None:
    model = zoo.make(name)
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.padded().sketch(sketcher, temperature=0.6)
    assert_close(result.sketches, model, wide_gradients(name, 0.6), own_gradients(name, 0.6))


def test_excluded_parameters_are_left_out() -> None:
    model, exclude = zoo.make("qwen2"), ("model.embed_tokens.*", "*.mlp.*", "*norm.weight", "*q_proj.bias")
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        result = zoo.shared().sketch(sketcher)
    assert_close(result.sketches, model, wide_gradients("qwen2"), own_gradients("qwen2"), exclude=exclude)
    kept = {n for n, _ in model.named_parameters()} - set(sketcher.coverage.excluded)
    assert (
        set(sketcher.coverage.names)
        == kept
        == {
            "lm_head.weight",
            *(f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"),
            *(f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(2) for p in "kv"),
        }
    )


@pytest.mark.parametrize("excluded", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_side_of_an_untied_head(excluded: str) -> None:
    model = zoo.make("llama")
    with GradientSketcher(model, SPEC, [excluded]) as sketcher:
        result = zoo.shared().sketch(sketcher)
    assert_close(result.sketches, model, wide_gradients("llama"), own_gradients("llama"), exclude=(excluded,))


def lora(dtype: torch.dtype, **changes: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0, **changes
    )
    return zoo.with_adapter(zoo.make("llama"), config).to(dtype)


@pytest.mark.parametrize("layout", zoo.LAYOUTS)
def test_lora_sketches_the_adapters_only(layout: str) -> None:
    model = lora(torch.float32)
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.LAYOUTS[layout]().sketch(sketcher)
    assert len(sketcher.coverage.names) == 12
    assert all(".lora_" in n and not n.startswith("base_model") for n in sketcher.coverage.names)
    assert_close(result.sketches, model, zoo.gradients(lora(torch.float64)), zoo.gradients(model))


def test_a_head_that_lora_trains_as_a_whole() -> None:
    """PEFT's `modules_to_save` keeps a copy of the head beside the original, and runs the copy."""
    models = [lora(dtype, modules_to_save=["lm_head"]) for dtype in (torch.float32, torch.float64)]
    model, wide = models
    with torch.no_grad():
        for one in models:
            one.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)  # type: ignore[union-attr, index, operator, call-overload]
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.shared().sketch(sketcher)
    assert sketcher.coverage.by_kind["head"] == 97 * 32
    assert_close(result.sketches, model, zoo.gradients(wide), zoo.gradients(model))


def test_a_tied_head_that_lora_trains_as_a_whole() -> None:
    """PEFT's copy of it says out_features of the hidden size, and in_features of the vocabulary."""
    import peft

    changes = dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = peft.get_peft_model(
        zoo.make("llama-tied"), peft.LoraConfig(r=4, target_modules=["q_proj"], **changes)
    ).eval()
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.shared().sketch(sketcher)
    assert_close(result.sketches, model, zoo.gradients(copy.deepcopy(model).double()), zoo.gradients(model))


def test_a_prefix_that_names_no_part() -> None:
    """Llama 4's text model is its `model`, whatever its `base_model_prefix` says."""
    model = zoo.make("llama")
    model.base_model_prefix = "language_model"  # type: ignore[assignment]
    with GradientSketcher(model, SPEC) as sketcher:
        result = zoo.shared().sketch(sketcher)
    assert_close(result.sketches, model, wide_gradients("llama"), own_gradients("llama"))


@pytest.mark.long
def test_batch_takes_any_loss() -> None:
    """The same gradient through the model's own logits, a loss of the user's, and `sketcher.batch`."""
    for name in ("gpt2", "phi", "gemma2"):
        model, batch = zoo.make(name), zoo.padded()
        with GradientSketcher(model, SPEC) as sketcher:
            got = batch.through(sketcher, model)
        assert_close(got, model, wide_gradients(name), own_gradients(name))


def test_token_ids_of_32_bits_are_token_ids() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    narrow = dict(input_ids=batch.input_ids.int(), segments=batch.segments.int())
    with GradientSketcher(model, SPEC) as sketcher:
        assert torch.equal(batch.sketch(sketcher, **narrow).sketches, batch.sketch(sketcher).sketches)


def test_micro_batches_add_up() -> None:
    """A segment's rows may be split over calls in any way: sketches add."""
    model, batch = zoo.make("qwen3"), zoo.padded()
    length, total = batch.input_ids.shape[1], torch.zeros(zoo.N_SEGMENTS, 32768)
    weights = zoo.weights_of(batch)
    with GradientSketcher(model, SPEC) as sketcher:
        for begin, end in ((0, 1), (1, 4), (4, 6)):
            mine = (batch.positions // length >= begin) & (batch.positions // length < end)
            chosen = weights[mine]
            total += sketcher.policy_gradient(
                batch.input_ids[begin:end],
                segments=batch.segments[begin:end],
                positions=batch.positions[mine] - begin * length,
                targets=batch.targets[mine],
                weigh=lambda logp, a, b, w=chosen: w[a:b],
                attention_mask=batch.attention_mask[begin:end],  # type: ignore[index]
                num_segments=zoo.N_SEGMENTS,
            ).sketches
    assert_close(total, model, wide_gradients("qwen3"), own_gradients("qwen3"))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_as_many_heads_as_tokens(name: str) -> None:
    """[1, 4 heads, 4 tokens, n] after a transpose, [1, 4 tokens, 4 heads, n] before one: strides alone tell which."""
    ids, where = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 1, 0, 1]])
    # At a sequence's first token attention has one choice, and the heads' norms have no gradient: score the second.
    positions, targets, weights = torch.tensor([1, 3]), torch.tensor([9, 10]), torch.tensor([1.0, -2.0])
    results = []
    for dtype in (torch.float64, torch.float32):
        model = zoo.make(name, dtype)
        one = [
            dict(positions=positions[i : i + 1], targets=targets[i : i + 1], weights=weights[i : i + 1])
            for i in (0, 1)
        ]
        results.append([zoo.exact_gradient(model, ids, position_ids=where, **chosen) for chosen in one])
    with GradientSketcher(model, SPEC) as sketcher:
        got = sketcher.policy_gradient(
            ids,
            segments=torch.tensor([[0, 0, 1, 1]]),
            positions=positions,
            targets=targets,
            weigh=lambda logp, a, b: weights[a:b],
            position_ids=where,
        )
    assert_close(got.sketches, model, results[0], results[1])


def test_any_module_through_batch() -> None:
    """No embedding starts a graph here; a layer is used twice; inputs are two rows of three tokens."""
    torch.manual_seed(0)
    shared_layer = nn.Linear(24, 24)
    model = nn.Sequential(
        nn.Linear(20, 24), nn.LayerNorm(24), shared_layer, nn.GELU(), shared_layer, nn.RMSNorm(24, 1e-6)
    )
    x, w = torch.randn(2, 3, 20), torch.randn(2, 3, 24)
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 3)) as out:
            (model(x) * w).sum().backward()
        with sketcher.batch(torch.tensor([[0, 0, 1], [1, 1, 1]])) as by_token:
            (model(x) * w).sum().backward()
    for result, cut in ((out, 3), (by_token, 2)):
        grads = []
        for dtype in (torch.float64, torch.float32):
            m = model.to(dtype)
            per_segment = []
            for span in (slice(0, cut), slice(cut, 6)):
                m.zero_grad()
                (m(x.to(dtype)) * w.to(dtype)).flatten(0, 1)[span].sum().backward()
                per_segment.append({n: p.grad.clone() for n, p in m.named_parameters()})  # type: ignore[union-attr]
            m.zero_grad()
            grads.append(per_segment)
        assert_close(result.sketches, model, *grads)


def test_an_input_that_changes_in_place_is_folded_again() -> None:
    """Layers of one parent share the folded copy of an input, unless it has been written to in between. Autograd with
    weight gradients cannot run such a model: the oracle is the same one without the write."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.in_place = nn.Linear(40, 8), nn.Linear(40, 8), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1.0
            y = self.a(x)
            return y + self.b(x.mul_(3.0) if self.in_place else x * 3.0)

    torch.manual_seed(0)
    model, x, w = nn.ModuleDict({"block": Block()}), torch.randn(1, 5, 40), torch.randn(1, 5, 8)
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(torch.tensor([0]), shape=(1, 5)) as out:
            (model["block"](x) * w).sum().backward()
    model["block"].in_place, grads = False, []  # type: ignore[assignment]
    for dtype in (torch.float64, torch.float32):
        model.to(dtype).zero_grad()
        (model["block"](x.to(dtype)) * w.to(dtype)).sum().backward()
        grads.append([{n: p.grad.clone() for n, p in model.named_parameters()}])  # type: ignore[union-attr]
    assert_close(out.sketches, model, *grads)


@pytest.mark.parametrize("layout", zoo.LAYOUTS)
@pytest.mark.parametrize("name", ["gemma2", "granite", "phi"])
def test_token_logprobs_are_those_of_the_pass(name: str, layout: str) -> None:
    model, batch = zoo.make(name, attn_implementation="eager"), zoo.LAYOUTS[layout]()
    scored = dict(positions=batch.positions, targets=batch.targets, temperature=0.7)
    inputs = dict(attention_mask=batch.attention_mask, position_ids=batch.position_ids)
    got = token_logprobs(model, batch.input_ids, **scored, **inputs)
    with GradientSketcher(model, SPEC) as sketcher:
        assert torch.equal(got, batch.sketch(sketcher, temperature=0.7).logprobs)
    assert got.dtype == torch.float32 and not got.requires_grad


def test_token_logprobs_see_that_a_model_has_other_parts_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are checked once a model, and again where its head has been replaced."""
    model, batch = zoo.make("llama"), zoo.padded()
    checked = []

    def spy(model: nn.Module) -> object:
        checked.append(model)
        return split_model(model)

    monkeypatch.setattr(logprobs, "split_model", spy)
    scored = dict(positions=batch.positions, targets=batch.targets, attention_mask=batch.attention_mask)
    first, again = (token_logprobs(model, batch.input_ids, **scored) for _ in range(2))
    assert len(checked) == 1 and torch.equal(first, again)
    model.lm_head = nn.Linear(32, 97, bias=False)  # type: ignore[assignment]
    other = token_logprobs(model, batch.input_ids, **scored)
    assert len(checked) == 2 and not torch.equal(first, other)
    with pytest.raises(ValueError, match="targets runs from 0 to 97: the vocabulary is 0 .. 96"):
        token_logprobs(model, batch.input_ids, positions=torch.tensor([0, 1]), targets=torch.tensor([0, 97]))
    with pytest.raises(ValueError, match="not a decoder with a linear head"):
        token_logprobs(
            nn.Linear(2, 2),
            torch.zeros(1, 1, dtype=torch.int64),
            positions=torch.tensor([0]),
            targets=torch.tensor([0]),
        )


def test_the_default_spec_and_what_a_sketcher_prints() -> None:
    model = zoo.make("qwen2")
    sketcher = GradientSketcher(model, exclude=["*.bias"])
    assert sketcher.spec == SketchSpec()
    c = sketcher.coverage
    text = f"{c.covered:,} of {c.total:,} parameters sketched, 6 left out by name; not active)"
    assert repr(sketcher) == f"GradientSketcher(Qwen2ForCausalLM, {SketchSpec()}: {text}"
    with sketcher:
        assert repr(sketcher).endswith("; active)")


def test_what_the_head_shares_with_the_decoder_goes_through_batch() -> None:
    """The decoder, which alone runs in `policy_gradient`, shows half of its gradient."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.scale

    model, scaled, batch = zoo.make("llama"), Scaled(), zoo.padded()
    for module in (model.model.layers[0].self_attn.q_proj, model.lm_head):
        nn.utils.parametrize.register_parametrization(module, "weight", scaled)
    model.lm_head.parametrizations.weight.original.requires_grad_(False)
    wide = copy.deepcopy(model).double()
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(UncoveredParameterError, match="(?s)Scaled.*outside the decoder"):
            batch.sketch(sketcher)
        got = batch.through(sketcher, model)
    assert_close(got, model, zoo.gradients(wide), zoo.gradients(model))
