"""Masks of responses: tokens of tools and users are read, not scored, everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_tokenizer, write_lines
from support.oracle import response_logprobs, sketch_of

from cropi.data.readers import read
from cropi.data.records import parse_record
from cropi.errors import RecordError
from cropi.gradient.estimators import ESTIMATORS
from cropi.gradient.tokenize import Tokenize
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

SPEC = SketchSpec(dim=2048)
RECORD: dict[str, Any] = {
    "id": "a", "prompt_ids": [5, 6, 7, 8],
    "response_ids": [[10, 11, 12, 40, 41, 42, 13, 14], [20, 21, 22, 23, 24], [30, 31, 50, 51, 32], [15, 16, 17]],
    "loss_mask": [[1, 1, 1, 0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 1], [1, 1, 1]],
    "rewards": [1.0, 0.0, 0.5, 0.0],
}  # fmt: skip


def with_logprobs(record: dict[str, Any], model: Any) -> dict[str, Any]:
    """The record with behaviour log-probs a little off the policy's, and other things at tokens that are not scored."""
    rng, found = np.random.default_rng(0), []
    for ids, mask in zip(record["response_ids"], record["loss_mask"]):
        with torch.no_grad():
            values = response_logprobs(model, record["prompt_ids"], ids).double()
        off = (values - torch.from_numpy(rng.uniform(0.0, 0.3, len(ids)))).tolist()
        found.append(
            [value if scored else [0.0, None, 7.0][t % 3] for t, (value, scored) in enumerate(zip(off, mask))]
        )
    return record | {"logprobs": found}


def sketches(
    tmp_path: Path, record: dict[str, Any], model: Any, estimator: str = "cropi", **options: Any
) -> tuple[torch.Tensor, Any]:
    out = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
    # One name: a row notes the file that it came from.
    path = write_lines(tmp_path / "records.jsonl", [record])
    job = SketchJob([path], out, spec=SPEC, estimator=ESTIMATORS[estimator], **options)
    sketch(Policy(model, make_tokenizer()), job, progress=False)
    ((rows, table),) = SketchStore.open(out).shards()
    return table[0], rows[0]


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS.keys() - {"sft"}))
@pytest.mark.parametrize("stored", [False, True])
def test_a_masked_gradient_is_that_of_the_scored_tokens(
    tmp_path: Path, layout: str, estimator: str, stored: bool
) -> None:
    model = make_model()
    record = with_logprobs(RECORD, model) if stored else RECORD
    got, row = sketches(tmp_path, record, model, estimator, layout=layout)
    in32 = sketch_of(model, record, estimator, SPEC)
    in64 = sketch_of(make_model().double(), record, estimator, SPEC)
    own = float((in32 - in64).norm())  # what float32 costs plain torch
    assert float((got.double() - in64).norm()) <= 2 * own + 8 * torch.finfo(torch.float32).eps * float(
        in64.norm()
    )
    assert row.tokens == sum(map(sum, RECORD["loss_mask"]))
    if not stored:
        unmasked = sketch_of(model, record | {"loss_mask": None}, estimator, SPEC)
        assert float((got - unmasked).norm()) > 0.05 * float(got.norm()), "the mask changes this gradient"


@pytest.mark.long
def test_a_mask_of_ones_changes_no_bit(tmp_path: Path) -> None:
    model = make_model()
    plain = {key: value for key, value in RECORD.items() if key != "loss_mask"}
    ones = plain | {"loss_mask": [[1] * len(ids) for ids in plain["response_ids"]]}
    for layout in ("shared", "padded"):
        first, row = sketches(tmp_path, plain, model, layout=layout)
        second, other = sketches(tmp_path, ones, model, layout=layout)
        assert torch.equal(first, second) and row == other


@pytest.mark.parametrize("name", ["response_mask", "assistant_masks", "completion_mask", "loss_masks"])
def test_other_names_and_forms_of_a_mask(name: str) -> None:
    masks: list[list[Any]] = RECORD["loss_mask"]
    plain = {key: value for key, value in RECORD.items() if key != "loss_mask"}
    expected = parse_record(json.dumps(RECORD), "f:1")
    for form in (
        masks,
        [[bool(value) for value in mask] for mask in masks],
        [[float(value) for value in mask] for mask in masks],
        [[0] * len(RECORD["prompt_ids"]) + mask for mask in masks],  # over prompt and response
    ):
        assert parse_record(json.dumps(plain | {name: form}), "f:1") == expected
    with pytest.raises(RecordError, match="'loss_mask' is there under two names"):
        parse_record(json.dumps(RECORD | {name: masks}), "f:1")


BAD = {
    "too short": ([[1] * 7, [1] * 5, [1] * 5, [1] * 3],
                  "must have one entry per token of response_ids[0] (8), got 7"),
    "too few": ([[1] * 8], "'loss_mask' must have one entry per reward (4), got 1"),
    "nothing scored": ([[1] * 8, [0] * 5, [1] * 5, [1] * 3], "loss_mask[1] is 0 at every token"),
    "no bit": ([[1] * 7 + [2], [1] * 5, [1] * 5, [1] * 3], "loss_mask[0][7] must be 0 or 1, got 2"),
    "null": ([[1] * 7 + [None], [1] * 5, [1] * 5, [1] * 3], "loss_mask[0][7] must be 0 or 1, got None"),
    "flat": ([1, 1, 1, 1], "loss_mask[0] must have one entry per token of response_ids[0] (8), got 1"),
    "prompt scored": ([[1] * 12, [1] * 5, [1] * 5, [1] * 3],
                      "loss_mask[0] covers the prompt too, and marks tokens of it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_masks_that_cannot_be(tmp_path: Path, case: str) -> None:
    mask, words = BAD[case]
    path = write_lines(tmp_path / "t.jsonl", [RECORD | {"id": "first"}, RECORD | {"loss_mask": mask}])
    with pytest.raises(RecordError) as caught:
        list(read(path))
    assert words in str(caught.value) and f"{path}:2" in str(caught.value)
    assert [group.id for group in read(path, skip_bad=True)] == ["first"]


def test_a_mask_needs_token_ids() -> None:
    record = {"id": "a", "prompt": "p", "responses": ["x", "y"], "rewards": [1, 0], "loss_mask": [[1], [1]]}
    with pytest.raises(RecordError, match="'loss_mask' without 'response_ids' cannot be matched to tokens"):
        parse_record(json.dumps(record), "f:1")


def test_a_logprob_at_a_scored_token_must_be_one() -> None:
    values = [[-0.5] * len(ids) for ids in RECORD["response_ids"]]
    values[0][6] = 3.0
    with pytest.raises(RecordError, match=r"logprobs\[0\]\[6\] must be a finite number <= 0, got 3.0"):
        parse_record(json.dumps(RECORD | {"logprobs": values}), "f:1")


def test_what_comes_behind_the_last_scored_token_is_not_computed() -> None:
    tokens = Tokenize(make_tokenizer(), 98)(parse_record(json.dumps(RECORD), "f:1"))
    assert (
        tokens.responses[1] == [20, 21, 22, 23]
        and tokens.masks is not None
        and tokens.masks[1] == [0, 1, 1, 1]
    )
    assert tokens.lengths == [5, 3, 2, 3] and tokens.scored == 13


def test_truncation_that_leaves_nothing_to_score_is_an_error() -> None:
    group = parse_record(
        json.dumps(RECORD | {"loss_mask": [[1] * 8, [0, 0, 0, 1, 1], [1] * 5, [1] * 3]}), "f:1"
    )
    cut = Tokenize(make_tokenizer(), 98, context=64, max_length=8, too_long="truncate-right")(group)
    assert cut.lengths == [4, 1, 4, 3]
    with pytest.raises(RecordError, match=r"responses\[1\] has no scored token left where it is cut"):
        Tokenize(make_tokenizer(), 98, context=64, max_length=7, too_long="truncate-right")(group)
