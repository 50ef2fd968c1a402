"""What `GradientSketcher` promises besides numbers: a model left as it was, failures that stay where they
are, and little memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import transformers
from support import zoo
from support.versions import checkpoint_layers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.ops.linear_logprob import chunks

SPEC = SketchSpec(width=16, vocab_width=64)
transformers.logging.set_verbosity_error()


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
    coverage = GradientSketcher(nn.Sequential(nn.Linear(8, 8), norm), SPEC).coverage
    assert coverage.by_kind == {"linear": 64, "bias": 8, "exact": 16}, "it is none that is known"
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())


def test_a_notebook_shows_results_without_their_numbers_and_lists_of_names() -> None:
    batch = zoo.padded()
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        result = batch.sketch(sketcher)
    scored = len(batch.targets)
    assert repr(result) == f"PolicyGradient(sketches [{zoo.N_SEGMENTS}, 32768], {scored} scored tokens)"
    assert len(sketcher.coverage.names) > 10 and "weight" not in repr(sketcher.coverage)
    # The comparison nearest to its bound has names of its own.
    assert repr(sketcher.self_test).count("weight") < 5


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
        with torch.device(device), GradientSketcher(model, SPEC) as sketcher:
            results.append(batch.sketch(sketcher, weigh=lambda logp, a, b: weights[a:b]).sketches)
    assert torch.equal(*results)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
def test_inputs_that_were_made_under_inference_mode(checkpointing: bool) -> None:
    """As rollouts are; autograd does not save such tensors."""
    model, batch = zoo.make("llama"), zoo.padded()
    if checkpointing:
        checkpoint_layers(model)
        model.train()
    with torch.inference_mode():
        rolled_out = dataclasses.replace(
            batch,
            **{k: v.clone() for k, v in dataclasses.asdict(batch).items() if isinstance(v, torch.Tensor)},
        )
    with GradientSketcher(model, SPEC) as sketcher:
        assert torch.equal(rolled_out.sketch(sketcher).sketches, batch.sketch(sketcher).sketches)
        got = []
        for ids in (rolled_out.input_ids, batch.input_ids):
            with sketcher.batch(batch.segments, shape=ids.shape) as sketch:
                model(ids).logits.log_softmax(-1)[..., 0].sum().backward()
            got.append(sketch.sketches)
        assert torch.equal(*got)


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
        with pytest.raises(ValueError, match="no backward pass ran inside the block"):
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
        monkeypatch.setattr(chunks, "default_chunk", lambda *a, **k: 8)
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
        with GradientSketcher(model, SketchSpec(width=width), verify=False) as sketcher:
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
    checkpoint_layers(model)
    with GradientSketcher(model, SPEC) as sketcher:
        with sketcher.batch(batch.segments, shape=tuple(batch.input_ids.shape)) as out:  # type: ignore[arg-type]
            loss = model(batch.input_ids).logits.square().sum()
            assert not sketcher._tapped.acc._folds
            loss.backward()
    assert out.sketches.any(dim=1).all()
