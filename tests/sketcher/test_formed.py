"""`FormedSketcher` hands a model the rows of a batch with what belongs to them, as `GradientSketcher` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher.formed import FormedSketcher

SPEC = SketchSpec(width=16, vocab_width=64)


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    assert ((got.sketches - want.sketches).norm(dim=1) <= 1e-5 * want.sketches.norm(dim=1)).all()


def first_axis(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Positions [3, batch, length], of which a text model has those of the first axis."""
    where = kwargs.get("position_ids")
    return args, kwargs | {"position_ids": where[0] if where is not None and where.ndim == 3 else where}


@pytest.mark.parametrize("rows", ["all", "three"])
def test_positions_of_three_axes_go_with_their_rows(rows: str) -> None:
    """Also of three rows, where the first axis is as long as the second."""
    model: Any = zoo.make("llama")
    batch = zoo.padded()
    if rows == "three":
        few = batch.positions < 3 * batch.input_ids.shape[1]
        batch = zoo.Batch(
            batch.input_ids[:3], batch.segments[:3], batch.positions[few], batch.targets[few],
            batch.attention_mask[:3],  # type: ignore[index]
        )  # fmt: skip
    batch_size, length = batch.input_ids.shape
    count = {"num_segments": int(batch.segments.max()) + 1}
    with GradientSketcher(model, SPEC) as sketcher:
        # Of each row other positions, which rotary embeddings tell apart by their distances.
        where = torch.arange(length) * torch.arange(1, batch_size + 1)[:, None]
        want = batch.sketch(sketcher, position_ids=where, **count)
    model.model.register_forward_pre_hook(first_axis, with_kwargs=True)
    axes = torch.stack([where, torch.zeros_like(where), torch.zeros_like(where)])
    with FormedSketcher(model, SPEC) as formed:
        close(batch.sketch(formed, position_ids=axes, **count), want)
        close(batch.sketch(formed, position_ids=where, **count), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_padded_on_the_left_are_right(name: str) -> None:
    model, batch = zoo.make(name), zoo.padded()
    with FormedSketcher(model, SPEC) as formed:
        want = batch.sketch(formed, num_segments=zoo.N_SEGMENTS)
        close(batch.sketch(formed, num_segments=zoo.N_SEGMENTS, **zoo.on_the_left(batch)), want)


def test_sequences_that_the_model_does_not_keep_apart_are_refused() -> None:
    model, batch = zoo.make("llama"), zoo.packed()
    rows = {"segments": torch.arange(len(batch.input_ids)), "num_segments": len(batch.input_ids)}
    with FormedSketcher(model, SPEC) as formed:
        with pytest.raises(ValueError, match="row 0 holds several sequences .* does not keep apart"):
            batch.sketch(formed, attention_mask=torch.ones_like(batch.input_ids), **rows)
        got = batch.sketch(formed, **rows)
    with GradientSketcher(model, SPEC) as sketcher:
        close(got, batch.sketch(sketcher, **rows))
