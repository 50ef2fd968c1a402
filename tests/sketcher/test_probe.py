"""The probe of a policy: what a model is like is measured, and what `policy_gradient` cannot take is an error."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from support import odd_models, zoo
from torch import nn
from transformers.models.falcon import modeling_falcon as falcon

from cropi_kernels import GradientSketcher, SketchSpec, token_logprobs
from cropi_kernels.sketcher import PolicyProbeError
from cropi_kernels.sketcher.policy.decoder import split_parts
from cropi_kernels.sketcher.policy.probe import probe_rows

SPEC = SketchSpec(width=16, vocab_width=64)


def probed(model: nn.Module) -> Any:
    with GradientSketcher(model, SPEC) as sketcher:
        sketcher.check_model()
    return sketcher.probe


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factor_and_cap_of_the_logits_are_measured(dtype: torch.dtype) -> None:
    for name, scale, cap in (("llama", 1.0, None), ("granite", 0.5, None), ("gemma2", 1.0, 30.0)):
        found = probed(zoo.make(name, dtype))
        assert (found.scale, found.softcap) == (scale, cap)
    unused = zoo.make("gemma2", dtype)
    unused.config.logit_scale = 2.0  # type: ignore[union-attr]  # a name that the model does not read
    assert (probed(unused).scale, probed(unused).softcap) == (1.0, 30.0)


def test_a_head_with_a_factor_of_its_own_is_right() -> None:
    model: Any = zoo.make("gemma2", tie_word_embeddings=False)
    model.lm_head.__class__ = Doubling
    model.lm_head.requires_grad_(False)
    with GradientSketcher(model, SPEC) as sketcher:
        got = zoo.padded().sketch(sketcher).sketches
    assert (sketcher.probe.scale, sketcher.probe.softcap) == (2.0, 30.0)  # type: ignore[union-attr]
    exact = zoo.sketches(model, zoo.gradients(model.double()), SPEC)
    assert ((got - exact).norm(dim=1) <= 1e-5 * exact.norm(dim=1)).all()


def test_a_model_that_looks_ahead_is_refused() -> None:
    model: Any = zoo.make("llama")
    norm = model.model.norm
    norm.register_forward_hook(lambda m, args, y: y + 0.1 * y.mean(1, keepdim=True))
    with GradientSketcher(model, SPEC) as sketcher, pytest.raises(PolicyProbeError, match="is not causal"):
        sketcher.check_model()


def test_a_row_that_depends_on_others_is_refused() -> None:
    model: Any = zoo.make("llama")
    model.model.norm.register_forward_hook(lambda m, args, y: y - 0.1 * y.mean(0, keepdim=True))
    with (
        GradientSketcher(model, SPEC) as sketcher,
        pytest.raises(PolicyProbeError, match="other rows of the batch"),
    ):
        sketcher.check_model()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_padded_on_the_left_are_right(name: str) -> None:
    """GPT-2 counts its learned positions from the padding on, unless it is told."""
    model, batch = zoo.make(name), zoo.padded()
    left = zoo.on_the_left(batch)
    with GradientSketcher(model, SPEC) as sketcher:
        want = batch.sketch(sketcher)
        got = batch.sketch(sketcher, **left)
    assert torch.allclose(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    alone = token_logprobs(model, targets=batch.targets, **left)
    assert torch.allclose(alone, want.logprobs, rtol=0, atol=1e-5)
    assert ((got.sketches - want.sketches).norm(dim=1) <= 1e-5 * want.sketches.norm(dim=1)).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_no_property(error: Exception) -> None:
    model = zoo.make("llama")
    expected, passes = probe_rows(model, split_parts(model)), 0
    while passes < 20:
        left = passes

        def fail(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise error

        hook = model.model.layers[0].register_forward_pre_hook(fail)
        try:
            found = probe_rows(model, split_parts(model))
        except RuntimeError as raised:
            assert raised is error
        else:
            assert (found, left) == (expected, 0)
            break
        finally:
            hook.remove()
        passes += 1
    assert passes >= 6  # the plain one, lengths, and two each for padding and packing


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_the_longest_row_scales_are_found(kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
    longest = 24 if kind == "dynamic" else 96
    sizes = {**zoo.SIZES, "max_position_embeddings": longest, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope)).eval()
    ids = torch.randint(3, zoo.VOCAB, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    with GradientSketcher(model, SPEC) as sketcher:
        sketcher.check_model()
        assert sketcher.probe is not None and sketcher.probe.switch == 24
        assert "beyond 24 tokens" in str(sketcher.probe)
        with pytest.raises(ValueError, match="rows of 10 and of 40 tokens .* beyond 24 tokens"):
            sketcher.policy_gradient(
                ids,
                segments=torch.tensor([0, 1]),
                positions=torch.tensor([5, 45]),
                targets=torch.tensor([7, 8]),
                weigh=lambda logp, a, b: torch.ones(b - a),
                attention_mask=mask,
            )
    with pytest.raises(ValueError, match="rows of 10 and of 40 tokens .* beyond 24 tokens"):
        token_logprobs(
            model, ids, positions=torch.tensor([5]), targets=torch.tensor([7]), attention_mask=mask
        )


@pytest.mark.parametrize("name, masked", [("llama", True), ("falcon", False)])
def test_sequences_that_the_model_does_not_keep_apart_are_refused(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads position_ids only where there is no mask; Falcon never did before transformers 5.24. A mask of
    pairs serves both."""
    mask = falcon.create_causal_mask
    monkeypatch.setattr(falcon, "create_causal_mask", lambda **given: mask(**{**given, "position_ids": None}))
    model, batch = zoo.make(name), zoo.packed()
    ones = torch.ones_like(batch.input_ids) if masked else None
    begin = (batch.position_ids == 0).cumsum(1)  # type: ignore[union-attr, attr-defined]
    pairs = ((begin[:, :, None] == begin[:, None]) & torch.ones(1, *[begin.shape[1]] * 2).tril().bool())[
        :, None
    ]
    refused = pytest.raises(ValueError, match="row 0 holds several sequences .* does not keep apart")
    given = dict(positions=batch.positions, targets=batch.targets, position_ids=batch.position_ids)
    with refused:
        token_logprobs(model, batch.input_ids, attention_mask=ones, **given)  # type: ignore[arg-type]
    with GradientSketcher(model, SPEC) as sketcher:
        with refused:
            batch.sketch(sketcher, attention_mask=ones)
        got = batch.sketch(sketcher, attention_mask=pairs)
        want = zoo.padded().sketch(sketcher)
        assert sketcher.probe is not None
        assert sketcher.probe.packing == ("without a mask" if masked else "wrong")
    assert ((got.sketches - want.sketches).norm(dim=1) <= 1e-5 * want.sketches.norm(dim=1)).all()


@pytest.mark.long
@pytest.mark.parametrize(
    "make, dtype",
    [(odd_models.llama4, torch.float32), (lambda: zoo.make("llama"), torch.float32),
     (lambda: zoo.make("llama"), torch.bfloat16)],
    ids=["llama4", "llama", "llama in bfloat16"],
)  # fmt: skip
def test_packed_rows_are_probed_as_long_as_they_are(make: Any, dtype: torch.dtype) -> None:
    model, apart = make().to(dtype), make is not odd_models.llama4
    alone = torch.randint(3, zoo.VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    places = torch.arange(3 * 40).view(3, 40)[:, 10:-1].flatten()
    targets = alone[:, 11:].flatten()
    row = dict(input_ids=alone.view(1, -1), position_ids=torch.arange(40).repeat(3)[None])
    given: dict[str, Any] = dict(positions=places, targets=targets)
    short = dict(input_ids=alone[:2, :12].reshape(1, -1), position_ids=torch.arange(12).repeat(2)[None])
    few: dict[str, Any] = dict(positions=torch.tensor([5, 20]), targets=torch.tensor([7, 8]))
    weights = torch.sin(torch.arange(len(targets)) + 1.0)
    refused = "row 0 holds several sequences .* in column 40.* does not keep apart"
    token_logprobs(model, **short, **few)
    with GradientSketcher(model, SPEC) as sketcher:
        sketcher.policy_gradient(
            **short, **few, segments=torch.arange(2).repeat_interleave(12)[None], weights=torch.ones(2)
        )
        rest: dict[str, Any] = dict(segments=torch.arange(3).repeat_interleave(40)[None], weights=weights)
        if not apart:
            for _ in range(2):
                with pytest.raises(ValueError, match=refused):
                    sketcher.policy_gradient(**row, **given, **rest)
                with pytest.raises(ValueError, match=refused):
                    token_logprobs(model, **row, **given)
            return
        got = sketcher.policy_gradient(**row, **given, **rest)
        assert sketcher.probe is not None and sketcher.probe.packed == 120
        want = sketcher.policy_gradient(alone, **given, segments=torch.arange(3), weights=weights)
    near = 2e-6 if dtype == torch.float32 else 0.05
    assert ((got.sketches - want.sketches).norm(dim=1) <= near * want.sketches.norm(dim=1)).all()
    found = token_logprobs(model, **row, **given)
    torch.testing.assert_close(found, want.logprobs, rtol=near, atol=near)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_rows_are_held_to_the_rounding_of_short_ones(dtype: torch.dtype) -> None:
    """The second model shifts what it gives from column 512 on by a tenth: more than 16 bits round away."""
    row = torch.randint(3, zoo.VOCAB, (1, 1024), generator=torch.Generator().manual_seed(0))
    where = torch.arange(512).repeat(2)[None]
    given: dict[str, Any] = dict(positions=torch.tensor([5, 1000]), targets=torch.tensor([7, 8]))
    for shift in (0.0, 0.1):
        model: Any = zoo.make("llama", max_position_embeddings=512).to(dtype)
        model.model.norm.register_forward_hook(
            lambda m, args, y, s=shift: y + s * (torch.arange(y.shape[1]) >= 512)[:, None].to(y)
        )
        said = pytest.raises(ValueError, match="does not keep apart") if shift else contextlib.nullcontext()
        with said:
            token_logprobs(model, row, position_ids=where, **given)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_padded_on_the_left_are_probed_as_long_as_they_are(name: str) -> None:
    """The second model shifts what it gives from column 40 on, as no short row shows."""
    alone = torch.randint(3, zoo.VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[:, :20] = 0
    left = torch.cat([alone[:, :1].expand(2, 20), alone], 1)
    places, weights = torch.arange(5, 39), torch.ones(68)
    rest: dict[str, Any] = dict(segments=torch.arange(2), targets=alone[:, 6:].flatten(), weights=weights)
    padded = dict(attention_mask=mask, positions=torch.cat([places + 20, places + 80]))
    model: Any = zoo.make(name)
    with GradientSketcher(model, SPEC) as sketcher:
        want = sketcher.policy_gradient(alone, positions=torch.cat([places, places + 40]), **rest).sketches
        got = sketcher.policy_gradient(left, **padded, **rest).sketches
        assert sketcher.probe is not None and sketcher.probe.padded == 60
    assert ((got - want).norm(dim=1) <= 2e-6 * want.norm(dim=1)).all()
    norm = model.model.norm if name == "llama" else model.transformer.ln_f
    norm.register_forward_hook(lambda m, args, y: y + 0.1 * (torch.arange(y.shape[1]) >= 40)[:, None])
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match="pads rows on the left, and the model gives other results"):
            sketcher.policy_gradient(left, **padded, **rest)
    # Positions that were measured not to make them right are no remedy; others are the caller's.
    own = (mask.cumsum(1) - 1).clamp_min(0)
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(ValueError, match="also with position_ids that count each row's own tokens"):
            sketcher.policy_gradient(left, **padded, **rest, position_ids=own)
        sketcher.policy_gradient(left, **padded, **rest, position_ids=own + 1)
    with pytest.raises(ValueError, match="pads rows on the left, and the model gives other results"):
        token_logprobs(model, left, **padded, targets=rest["targets"])


def test_another_kind_of_attention_is_probed_anew() -> None:
    model: Any = zoo.make("llama")
    sketcher = GradientSketcher(model, SPEC)
    with sketcher:
        sketcher.check_model()
    model.set_attn_implementation("eager")
    with sketcher:
        assert sketcher.probe is None
        sketcher.check_model()


def test_segments_that_share_a_sequence_are_refused() -> None:
    """But padding, and what comes behind the last scored token, may have any segment."""
    model, packed, padded = zoo.make("llama"), zoo.packed(), zoo.padded()
    at = int((packed.segments[0] == 1).nonzero()[0])
    rows, length = padded.input_ids.shape
    each = padded.segments[:, None].repeat(1, length)
    each[:-1, -1] = each[1:, 0]
    with GradientSketcher(model, SPEC) as sketcher:
        with pytest.raises(
            ValueError, match=f"another segment begins in row 0, column {at}, .* give position_ids"
        ):
            packed.sketch(sketcher, position_ids=None)
        with pytest.raises(ValueError, match=f"another segment begins in row 0, column {at}"):
            packed.sketch(sketcher, position_ids=torch.arange(packed.input_ids.shape[1])[None])
        got, want = padded.sketch(sketcher, segments=each), padded.sketch(sketcher)
    assert torch.equal(got.sketches, want.sketches)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_a_mask_of_pairs_is_bool_or_added(dtype: torch.dtype) -> None:
    """One of ones and zeros would be added to the scores, too."""
    batch = zoo.packed()
    square = torch.ones(1, 1, *[batch.input_ids.shape[1]] * 2).tril().to(dtype)
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        with pytest.raises(ValueError, match="of ones and zeros: give attention_mask.bool"):
            batch.sketch(sketcher, attention_mask=square)


def test_inputs_are_rows_of_the_embedding_and_targets_rows_of_the_head() -> None:
    model: Any = zoo.make("llama")
    model.model.embed_tokens = nn.Embedding(120, 32)
    batch = zoo.padded()
    ids = batch.input_ids.clone()
    ids[0, 0] = 119
    with GradientSketcher(model, SPEC) as sketcher:
        assert batch.sketch(sketcher, input_ids=ids).sketches.isfinite().all()
        with pytest.raises(ValueError, match="targets runs from .* to 119: the vocabulary is 0 .. 96"):
            batch.sketch(sketcher, targets=batch.targets.clamp_min(119))
