"""What `GradientSketcher` promises besides numbers: coverage, a model left as it was, failures that stay where they
are, and little memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import zoo
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cropi_kernels import Coverage, GradientSketcher, SketchSpec, UncoveredParameterError, canonical_name

SPEC = SketchSpec(width=16, vocab_width=64)
transformers.logging.set_verbosity_error()


# ---------------------------------------------------------------------------------------------- coverage
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


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits.softmax(-1), logits  # type: ignore[return-value]


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


def mixture() -> nn.Module:
    # Other implementations of the experts know no float64.
    sizes = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    config = transformers.MixtralConfig(**zoo.SIZES, **sizes)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


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
    "a mixture of experts": (
        mixture,
        r"model.layers.0.mlp.experts.gate_up_proj \(4, 96, 32\) in MixtralExperts",
    ),
    "not a norm": (norm_with_two_scales, r"1.weight \(8,\) in Odd"),
    "not a linear layer": (lambda: linear_of_its_own(Scaled(8, 8)), r"1.weight \(8, 8\) in Scaled"),
    "a router": (lambda: linear_of_its_own(Router(8, 8)), r"1.weight \(8, 8\) in Router"),
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
def test_an_uncovered_parameter_is_named_before_any_work(case: str) -> None:
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


def test_the_rest_of_a_mixture_of_experts_is_right() -> None:
    exclude = ("*experts*", "*.gate.*")
    model = mixture()
    with GradientSketcher(model, SPEC, exclude) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    own = zoo.sketches(model, zoo.gradients(model), SPEC, exclude, torch.float32)
    exact = zoo.sketches(model, zoo.gradients(model.double()), SPEC, exclude)
    assert ((got - exact).norm(dim=1) <= 2 * (own - exact).norm(dim=1)).all()


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


# ----------------------------------------------------------------------------------- the model afterwards
def state(model: nn.Module) -> list[object]:
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()
    ]
    flags = [(n, p.requires_grad, p.grad is None, p._version) for n, p in model.named_parameters()]
    return [hooks, flags, [m.training for m in model.modules()]]


def fails(*args: object) -> torch.Tensor:
    raise KeyError("a mistake in the caller's code")


def test_looking_for_norms_leaves_their_statistics() -> None:
    norm = nn.BatchNorm1d(8).train()
    norm(torch.randn(5, 8))
    before = {name: b.clone() for name, b in norm.named_buffers()}
    with pytest.raises(UncoveredParameterError, match=r"1.weight \(8,\) in BatchNorm1d"):
        GradientSketcher(nn.Sequential(nn.Linear(8, 8), norm), SPEC)
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())


@pytest.mark.parametrize("where", ["nowhere", "block", "weigh", "batch", "model"])
def test_the_model_is_left_as_it_was(where: str) -> None:
    model, batch = zoo.make("llama").train(), zoo.padded()
    model.model.norm.eval()  # type: ignore[union-attr]
    model.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
    before = state(model)
    try:
        with GradientSketcher(model, SPEC) as sketcher:
            assert not any(p.requires_grad for p in model.parameters())
            first = batch.sketch(sketcher)
            assert all(p.grad is None for p in model.parameters())
            if where == "block":
                fails()
            if where == "weigh":
                batch.sketch(sketcher, weigh=fails)
            if where == "batch":
                with sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)):  # type: ignore[arg-type]
                    fails()
            if where == "model":
                model.model.norm.forward = fails  # type: ignore[union-attr, method-assign]
                batch.sketch(sketcher)
    except KeyError:
        assert where != "nowhere"
    else:
        assert where == "nowhere"
    model.model.norm.__dict__.pop("forward", None)  # type: ignore[union-attr]
    assert state(model) == before
    with GradientSketcher(model, SPEC) as sketcher:
        assert torch.equal(batch.sketch(sketcher).sketches, first.sketches), "and works again"


def test_a_block_that_is_not_entered_leaves_the_model_as_it_was() -> None:
    """Hugging Face's base class raises NotImplementedError for models that name no input embeddings."""
    model = zoo.make("llama")
    before, sketcher = state(model), GradientSketcher(model, SPEC)
    model.get_input_embeddings = fails  # type: ignore[method-assign]
    with pytest.raises(KeyError), sketcher:
        pass
    assert state(model) == before


def test_a_failed_call_leaves_the_sketcher_usable() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    with GradientSketcher(model, SPEC) as sketcher:
        first = batch.sketch(sketcher).sketches
        with pytest.raises(KeyError):
            batch.sketch(sketcher, weigh=fails)
        with pytest.raises(ValueError, match="input_ids runs"):
            batch.sketch(sketcher, input_ids=batch.input_ids + 90)
        assert torch.equal(batch.sketch(sketcher).sketches, first)


def test_training_goes_on_afterwards() -> None:
    """An ordinary backward pass gives the same gradients before and after, and none of it reaches the sketcher."""
    model, batch = zoo.make("gpt2"), zoo.padded()
    grads = []
    for _ in range(2):
        grads.append(zoo.gradients(model))
        with GradientSketcher(model, SPEC) as sketcher:
            batch.sketch(sketcher)
            with torch.no_grad():  # a generation between two batches
                model(batch.input_ids)
    assert all(torch.equal(x[n], y[n]) for x, y in zip(*grads) for n in x)


def test_default_device_does_not_matter() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    weights = zoo.weights_of(batch)
    results = []
    for device in ("cpu", "meta"):
        with GradientSketcher(model, SPEC) as sketcher, torch.device(device):
            results.append(batch.sketch(sketcher, weigh=lambda logp, a, b: weights[a:b]).sketches)
    assert torch.equal(*results)


def test_only_inside_the_block() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    sketcher = GradientSketcher(model, SPEC)
    with pytest.raises(RuntimeError, match="policy_gradient outside the `with GradientSketcher"):
        batch.sketch(sketcher)
    with pytest.raises(RuntimeError, match="batch outside the `with GradientSketcher"):
        with sketcher.batch(torch.zeros(1, 1, dtype=torch.int64)):
            pass
    with sketcher:
        with pytest.raises(RuntimeError, match="already active"):
            sketcher.__enter__()
        with sketcher.batch(torch.zeros(1, 1, dtype=torch.int64)):
            with pytest.raises(RuntimeError, match="a batch is already open"):
                batch.sketch(sketcher)
        # The model is frozen while another sketcher is on it.
        with pytest.raises(ValueError, match="nothing to sketch"):
            GradientSketcher(model, SPEC)


# ----------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_weight_fails_its_segment_alone(bad: float, layout: str) -> None:
    model, batch = zoo.make("qwen3"), zoo.LAYOUTS[layout]()
    weights = zoo.weights_of(batch)
    broken = weights.clone()
    first = len(zoo.RESPONSES[0][0]) + len(zoo.RESPONSES[0][1])
    broken[first + 1] = bad
    with GradientSketcher(model, SPEC) as sketcher:
        clean = batch.sketch(sketcher).sketches
        got = batch.sketch(sketcher, weigh=lambda logp, a, b: broken[a:b])
    assert got.sketches[1].isnan().all()
    assert torch.equal(got.sketches[[0, 2]], clean[[0, 2]])
    assert got.logprobs.isfinite().all()


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_bad_token_fails_its_segment_alone(layout: str) -> None:
    """Token 94 occurs in the last prompt only. Its hidden states, log-probs and gradients are all NaN."""
    model, batch = zoo.make("llama"), zoo.LAYOUTS[layout]()
    with GradientSketcher(model, SPEC) as sketcher:
        clean = batch.sketch(sketcher).sketches
        with torch.no_grad():
            model.get_input_embeddings().weight[94, 3] = float("nan")  # type: ignore[operator]
        got = batch.sketch(sketcher)
    assert got.sketches[2].isnan().all() and torch.equal(got.sketches[:2], clean[:2])


def test_one_bad_number_fails_the_whole_sketch() -> None:
    """A sketch with a hole would be compared like any other: one output's gradient overflows, and all is NaN."""
    model, x, w = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 3, 8), torch.ones(2, 3, 8)
    w[1, 2, 0] = torch.inf
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(torch.tensor([0, 1]), shape=(2, 3)) as out:
            (model(x) * w).sum().backward()
    assert out.sketches[0].isfinite().all() and out.sketches[0].any()
    assert out.sketches[1].isnan().all()


def test_a_weight_of_zero_hides_no_bad_log_prob() -> None:
    """Token 33 has probability 0 and weight 0, so its gradient is 0 as well: its log-prob alone fails the segment."""
    model, batch = zoo.make("phi"), zoo.padded()
    with torch.no_grad():
        model.get_output_embeddings().bias[33] = -torch.inf  # type: ignore[operator]
    weights = zoo.weights_of(batch).masked_fill(batch.targets == 33, 0.0)
    with GradientSketcher(model, SPEC) as sketcher:
        got = batch.sketch(sketcher, weigh=lambda logp, a, b: weights[a:b])
    assert (got.logprobs == -torch.inf).equal(batch.targets == 33)
    assert got.sketches[1].isnan().all() and got.sketches[[0, 2]].isfinite().all()


def test_empty_segments_and_no_scored_tokens() -> None:
    model, batch = zoo.make("llama"), zoo.padded()
    none = torch.zeros(0, dtype=torch.int64)
    with GradientSketcher(model, SPEC) as sketcher:
        more = batch.sketch(sketcher, segments=2 * batch.segments + 1, num_segments=7).sketches
        assert more.shape == (7, 32768) and not more[[0, 2, 4, 6]].any()
        assert torch.equal(more[[1, 3, 5]], batch.sketch(sketcher).sketches)
        empty = batch.sketch(sketcher, positions=none, targets=none)
    assert empty.sketches.shape == (3, 32768) and not empty.sketches.any()
    assert empty.logprobs.shape == empty.weights.shape == (0,)


# ------------------------------------------------------------------------------------------------- weigh
def test_weights_may_depend_on_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once per chunk and in order, with detached float32 log-probs. Chunks of 8 tokens give the same sketch."""
    model, batch = zoo.make("gemma2"), zoo.shared()
    calls: list[tuple[int, int]] = []

    def weigh(logp: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        assert logp.shape == (stop - start,) and logp.dtype == torch.float32 and not logp.requires_grad
        calls.append((start, stop))
        return logp.exp() + 1

    with GradientSketcher(model, SPEC) as sketcher:
        whole = batch.sketch(sketcher, weigh=weigh)
        assert torch.equal(whole.weights, whole.logprobs.exp() + 1)
        assert set(whole.seconds) == {"forward", "backward", "sketch"} and min(whole.seconds.values()) > 0
        calls.clear()
        monkeypatch.setattr("cropi_kernels.ops.linear_logprob.chunks.default_chunk", lambda *a, **k: 8)
        parts = batch.sketch(sketcher, weigh=weigh)
    n = len(batch.targets)
    assert calls == [(a, min(a + 8, n)) for a in range(0, n, 8)] and len(calls) > 1
    error = (whole.sketches - parts.sketches).norm(dim=1) / whole.sketches.norm(dim=1)
    assert (error < n * 2**-23).all() and torch.allclose(whole.logprobs, parts.logprobs, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ memory
def saved_bytes(run: Callable[[], object], model: nn.Module) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """What autograd keeps between forward and backward, one per storage and without the weights, by shape."""
    kept: dict[int, torch.Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for x in kept.values():
        by_shape.setdefault(tuple(x.shape), []).append(x)
    return by_shape


@pytest.mark.parametrize("width", [16, None])
def test_a_tap_saves_the_folded_inputs_and_nothing_else(width: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    x, w = torch.randn(2, 32, 256), torch.randn(2, 32, 256)

    def run() -> None:
        with GradientSketcher(model, SketchSpec(width=width)) as sketcher:
            with sketcher.batch(torch.tensor([0, 1]), shape=(2, 32)):
                (model(x) * w).sum().backward()

    kept = saved_bytes(run, model)
    total = sum(t.numel() * t.element_size() for ts in kept.values() for t in ts) - w.numel() * 4
    assert total == 4 * 64 * (width or 256) * 4


def test_layers_that_read_the_same_input_share_one_folded_copy() -> None:
    """q, k and v; gate and up: four copies a layer for seven matrices."""
    model, batch = zoo.make("llama", hidden_size=64, intermediate_size=80), zoo.padded()
    tokens = batch.input_ids.numel()

    def run() -> None:
        with GradientSketcher(model, SPEC) as sketcher:
            batch.sketch(sketcher)

    kept = saved_bytes(run, model)
    assert len(kept[(tokens, 16)]) == 2 * 4


def test_checkpointing_keeps_no_folded_copies() -> None:
    model, batch = zoo.make("llama").train(), zoo.padded()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)) as out:  # type: ignore[arg-type]
            loss = model(batch.input_ids).logits.square().sum()
            assert not sketcher._acc._folds
            loss.backward()
    assert out.sketches.any(dim=1).all()
