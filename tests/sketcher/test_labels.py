"""Labels and tensors of weights give the bits of positions and a function; what scores nothing of a row is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher.batch.labels import from_labels
from cropi_kernels.testing import exact_gradient, sketch_gradients

SPEC = SketchSpec(width=16, vocab_width=64)


def labels_of(batch: zoo.Batch) -> torch.Tensor:
    """The labels that score the same tokens as the batch's positions and targets."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.positions + 1] = batch.targets
    return labels


def by_labels(sketcher: GradientSketcher, batch: zoo.Batch, **arguments: Any) -> Any:
    given = {"labels": labels_of(batch), "segments": batch.segments, "attention_mask": batch.attention_mask}
    return sketcher.policy_gradient(
        batch.input_ids, **(given | {"position_ids": batch.position_ids} | arguments)
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_labels_give_the_bits_of_positions(layout: str) -> None:
    batch = zoo.LAYOUTS[layout]()
    flat = zoo.weights_of(batch)
    placed = torch.full(batch.input_ids.shape, float("nan"))  # what is not scored has no say
    placed.view(-1)[batch.positions + 1] = flat
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        want = batch.sketch(sketcher)
        for weights in (flat, placed, lambda logprobs, start, stop: flat[start:stop]):
            got = by_labels(sketcher, batch, weights=weights)
            assert torch.equal(got.sketches, want.sketches)
            assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.weights, want.weights)
        positions = batch.positions, batch.targets
        got = by_labels(
            sketcher, batch, labels=None, positions=positions[0], targets=positions[1], weights=flat
        )
        assert torch.equal(got.sketches, want.sketches)


def test_a_weight_for_each_row_is_that_of_its_tokens() -> None:
    """Against plain autograd in float64 of sum_i a_i sum_t log pi(labels[i, t])."""
    model, batch = zoo.make("qwen2", torch.float64), zoo.padded()
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.25, -0.75, 1.5])
    with GradientSketcher(model, SPEC) as sketcher:
        got = by_labels(sketcher, batch, weights=advantages).sketches.double()
    row_of = batch.positions // batch.input_ids.shape[1]
    for s in range(zoo.N_SEGMENTS):
        mine = batch.segments[row_of] == s
        gradient = exact_gradient(
            model, batch.input_ids, attention_mask=batch.attention_mask, positions=batch.positions[mine],
            targets=batch.targets[mine], weights=advantages.double()[row_of[mine]],
        )  # fmt: skip
        want = sketch_gradients(model, gradient, SPEC)
        assert float((got[s] - want).norm()) <= 1e-5 * float(want.norm())


def test_the_first_column_is_never_scored() -> None:
    batch = zoo.padded()
    labels = labels_of(batch)
    labels[:, 0] = batch.input_ids[:, 0]  # as labels = input_ids has it
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        want = by_labels(sketcher, batch, weights=zoo.weights_of(batch))
        got = by_labels(sketcher, batch, labels=labels, weights=zoo.weights_of(batch))
    assert torch.equal(got.sketches, want.sketches)


def changed(batch: zoo.Batch, row: int, column: int, value: int) -> torch.Tensor:
    labels = labels_of(batch)
    labels[row, column] = value
    return labels


PADDED = zoo.padded()
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "neither weights nor weigh": ({}, "give weights, a tensor or a function"),
    "both": ({"weights": torch.ones(18), "weigh": lambda p, a, b: p}, "one of both"),
    "labels and positions": (
        {"weights": torch.ones(18), "positions": PADDED.positions}, "leave positions and targets out",
    ),
    "nothing is scored": ({"labels": None, "weights": torch.ones(18)}, "which tokens are scored is not said"),
    "targets alone": ({"labels": None, "targets": PADDED.targets, "weights": torch.ones(18)}, "is not said"),
    "a list": ({"labels": [[1]], "weights": torch.ones(18)}, "labels is of type list: give a tensor"),
    "shape": ({"labels": PADDED.input_ids[:2], "weights": torch.ones(18)}, r"give int64 \(6, 9\), as input_ids"),
    "floats": ({"labels": PADDED.input_ids.float(), "weights": torch.ones(18)}, "labels is torch.float32"),
    "negative": ({"labels": changed(PADDED, 0, 5, -1), "weights": torch.ones(18)}, "labels holds -1: only -100"),
    "shifted": (
        {"labels": labels_of(PADDED).roll(-1, 1), "weights": torch.ones(18)}, "are the tokens in their own places",
    ),
    "another token": (
        {"labels": changed(PADDED, 1, 5, 8), "weights": torch.ones(18)}, r"labels\[1, 5\] is 8, and the token there 9",
    ),
    "padding": (
        {"labels": changed(PADDED, 1, 8, 0) if PADDED.attention_mask[1, 8] == 0 else changed(PADDED, 0, 8, 0),
         "weights": torch.ones(19)}, r"is scored, but is padding",
    ),
    "several sequences in a row": (
        {"weights": torch.ones(6), "position_ids": torch.arange(9).remainder(6).expand(6, 9), "attention_mask": None,
         "labels": PADDED.input_ids}, r"row 0 holds several sequences \(position_ids restart in column 6\)",
    ),
    "sequences that the mask numbers": (
        {"weights": torch.ones(18), "attention_mask": 2 * PADDED.attention_mask},
        r"holds several sequences \(attention_mask is 2 in column \d\), but segments holds one number a row",
    ),
    "weights of a list": ({"weights": [1.0] * 18}, "weights is of type list: give a tensor"),
    "a number of weights": ({"weights": torch.ones(17)}, r"weights has shape \[17\]: give \[6, 9\].*\[6\].*\[18\]"),
    "complex": ({"weights": torch.ones(18, dtype=torch.complex64)}, "give real numbers"),
    "weights elsewhere": ({"weights": torch.ones(18, device="meta")}, "weights is on meta"),
    "labels elsewhere": ({"labels": torch.ones(6, 9, dtype=torch.int64, device="meta"), "weights": torch.ones(18)},
                         "labels is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_named(name: str) -> None:
    arguments, message = WRONG[name]
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher, pytest.raises(ValueError, match=message):
        by_labels(sketcher, PADDED, **arguments)


@pytest.mark.parametrize("first", [-100, 8])
def test_a_row_of_which_nothing_is_scored_is_named(first: int) -> None:
    """Its sketch would be zero, as that of a prompt whose rewards are equal. No column predicts the first."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    labels = torch.tensor([[-100, 6, 7], [first, -100, -100]])
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        with pytest.raises(ValueError, match="labels: nothing of row 1 is scored"):
            sketcher.policy_gradient(ids, segments=torch.arange(2), labels=labels, weights=torch.ones(2))


def test_a_negative_token_id_is_named_where_it_is() -> None:
    """With labels that are a copy of the ids, it was the labels that were blamed."""
    ids = torch.tensor([[5, 6, 7], [8, -1, 10]])
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        with pytest.raises(ValueError, match=r"input_ids\[1, 1\] is -1: the id of a scored token is 0"):
            sketcher.policy_gradient(ids, segments=torch.arange(2), labels=ids, weights=torch.ones(2))
    # As the place of an image, which the model reads by itself.
    labels = ids.where(ids > 0, torch.tensor(-100))
    positions, targets = from_labels(labels, ids)
    assert positions.tolist() == [0, 1, 4] and targets.tolist() == [6, 7, 10]


def test_one_token_a_row_has_one_weight() -> None:
    """A weight for each row and one for each scored token are the same."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    labels = torch.tensor([[-100, -100, 7], [-100, 9, -100]])
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        result = sketcher.policy_gradient(
            ids, segments=torch.arange(2), labels=labels, weights=torch.tensor([1.0, 2])
        )
        assert result.weights.tolist() == [1.0, 2.0]


def test_a_token_that_begins_another_segment_is_not_scored_from_the_one_before() -> None:
    packed = zoo.packed()
    labels = labels_of(packed)
    start = int((packed.segments[0] == 1).nonzero()[0])
    labels[0, start] = 9
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        with pytest.raises(
            ValueError, match=rf"labels\[0, {start}\] is scored, but predicted from a token of an"
        ):
            by_labels(sketcher, packed, labels=labels, weights=torch.ones(19))
