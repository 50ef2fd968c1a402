"""Batches of verl by their names alone: no verl is needed to read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cropi.data.readers import read
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.verl_batch import LOGPROBS, REWARDS, rollouts_of_proto, rollouts_of_table
from cropi.trainers.recording import record_step

# A number of its own for every name: the sum over two tokens says which was taken.
SCORES = {
    name: 10.0 * (k + 1) for k, name in enumerate(("token_level_scores", "rm_scores", "token_level_rewards"))
}
PROBS = {"rollout_log_probs": -0.25, "old_log_probs": -0.5}


def columns(names: list[str], rows: int = 2) -> dict[str, Any]:
    tensors: dict[str, Any] = {
        "prompts": torch.tensor([[40, 41]] * rows), "responses": torch.tensor([[50, 1]] * rows),
        "response_mask": torch.ones(rows, 2, dtype=torch.long),
    }  # fmt: skip
    for name in names:
        per_token = SCORES[name] / 2 if name in SCORES else PROBS[name]
        tensors[name] = torch.full((rows, 2), per_token)
    return tensors


def of_proto(names: list[str]) -> list[Any]:
    tensors = columns(names) | {"attention_mask": torch.ones(2, 4, dtype=torch.long)}
    infos = [{"index": 7}, {"index": 8}]
    return list(rollouts_of_proto(SimpleNamespace(batch=tensors, non_tensor_batch={"extra_info": infos}), 1))


def of_table(names: list[str]) -> list[Any]:
    table = columns(names) | {"extra_info": [{"index": 7}, {"index": 8}]}
    return list(rollouts_of_table(table, ["a_0_0", "b_0_0"], [{}, {}], 1))


@pytest.mark.parametrize("read", [of_proto, of_table])
def test_the_reward_is_the_score_before_any_penalty_and_the_log_probs_those_of_sampling(read: Any) -> None:
    """``token_level_rewards`` is less the KL penalty; ``old_log_probs`` are the trainer's own, made again."""
    assert set(SCORES) == set(REWARDS) and set(PROBS) == set(LOGPROBS)
    for first in range(3):
        for names in (list(SCORES)[first:], list(SCORES)[first:][::-1]):
            found = read(names)
            assert [rollout.reward for rollout in found] == [SCORES[list(SCORES)[first]]] * 2
            assert [rollout.id for rollout in found] == ["7", "8"] and found[0].logprobs is None
    for names, expected in ((["old_log_probs", "rollout_log_probs"], -0.25), (["old_log_probs"], -0.5)):
        assert read(["rm_scores", *names])[0].logprobs == [expected] * 2


def test_rows_that_only_pad_a_batch_are_left_out() -> None:
    table = columns(["rm_scores"], rows=4) | {"extra_info": [{"index": i} for i in range(4)]}
    keys = ["a_0_0", "b_0_0", "c_0_0", "pad_0_3"]  # the last one would be an output of several
    tags = [{"is_padding": False}, {"is_padding": True}, {}, {"is_padding": True}]
    assert [rollout.id for rollout in rollouts_of_table(table, keys, tags, 1)] == ["0", "2"]
    assert [rollout.id for rollout in rollouts_of_table(table, keys[:3], tags[:1], 1)] == ["0", "1", "2"]


def test_a_bad_rollout_does_not_end_the_training_that_records_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = columns(["rm_scores"], rows=4) | {"extra_info": [{"index": i // 2} for i in range(4)]}
    table["rm_scores"][1] = float("nan")
    path = tmp_path / "7.jsonl"

    def rollouts(left: Left) -> Iterator[Any]:
        return rollouts_of_table(table, ["a_0_0", "a_1_0", "b_0_0", "b_1_0"], [{}] * 4, 7, left=left)

    assert record_step(path, rollouts) == 2
    assert [group.size for group in read(path)] == [1, 2]
    assert "1 rollouts are left out; the first" in caplog.text and "rm_scores[0]" in caplog.text
    table["rm_scores"][:] = float("nan")
    assert record_step(tmp_path / "8.jsonl", rollouts) == 0 and not (tmp_path / "8.jsonl").exists()
