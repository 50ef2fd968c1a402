"""Dumps of trainers: masks are kept, one bad sample does not end a conversion, and no file runs code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import json_lines
from support.made_dumps import KINDS, ROLLOUTS, logprobs, made, words, write

from cropi.cli import main
from cropi.data.readers import read

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
TOKENS = ("slime", "nemo-rl", "verl")


def converted(kind: str, tmp_path: Path, content: Any, *more: str) -> int:
    return main([*words(kind, write(tmp_path / KINDS[kind][0], content), tmp_path / "out.jsonl"), *more])


# ----------------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("kind", TOKENS)
def test_masks_log_probs_and_tokens_are_kept(kind: str, tmp_path: Path) -> None:
    assert converted(kind, tmp_path, made(kind)) == 0
    written = json_lines(tmp_path / "out.jsonl")
    assert [record["id"] for record in written] == ["m0", "m1"]
    for number, record in enumerate(written):
        expected = ROLLOUTS[2 * number : 2 * number + 2]
        assert record["prompt_ids"] == expected[0][0] and record["rewards"] == [r for *_, r in expected]
        assert record["response_ids"] == [ids for _, ids, *_ in expected]
        # A token of a tool has no log-prob of the policy: it is written as 0.
        assert record["logprobs"] == [
            [p if m else 0.0 for p, m in zip(logprobs(ids), mask)] for _, ids, mask, _ in expected
        ]
        assert record.get("loss_mask") == (None if number == 0 else [mask for _, _, mask, _ in expected])
        assert record["policy"] == "step 7" and record["temperature"] == 0.7
    assert [group.id for group in read(tmp_path / "out.jsonl")] == ["m0", "m1"]


def test_responses_that_were_cut_are_marked(tmp_path: Path) -> None:
    assert converted("slime", tmp_path, made("slime")) == 0
    written = json_lines(tmp_path / "out.jsonl")
    assert [record["truncated"] for record in written] == [[False, False], [False, True]]


def test_a_mask_beside_responses_without_one_is_of_ones(tmp_path: Path) -> None:
    content = made("slime")
    content["samples"][2]["loss_mask"] = None
    assert converted("slime", tmp_path, content) == 0
    record = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
    assert record["loss_mask"] == [[1, 1, 1], [1, 0, 0, 1]]


def test_slimes_samples_may_stand_in_groups(tmp_path: Path) -> None:
    content = made("slime")
    assert converted("slime", tmp_path, content) == 0
    flat = (tmp_path / "out.jsonl").read_bytes()
    content["samples"] = [content["samples"][:2], content["samples"][2:]]
    assert converted("slime", tmp_path, content) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == flat


# ------------------------------------------------------------------- samples that no trainer trains on either
def aborted(sample: dict[str, Any]) -> None:
    sample |= {"status": "aborted", "reward": None, "response_length": 0, "tokens": [5, 6]}


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("slime", aborted, "status"),
        ("slime", lambda s: s.update(status="pending"), "status"),
        ("slime", lambda s: s.update(remove_sample=True), "remove_sample"),
        ("slime", lambda s: s.update(response_length=0), "response_length"),
        ("slime", lambda s: s.update(loss_mask=[0, 0, 0]), "loss_mask"),
        ("nemo-rl", lambda s: s.update(token_loss_mask=[[0] * 8]), "token_loss_mask"),
        ("nemo-rl", lambda s: s.update(sample_loss_mask=[0.0]), "sample_loss_mask"),
        ("verl text", lambda s: s.update(output=""), "output"),
    ],
)  # fmt: skip
def test_unused_samples_are_left_out_and_counted(
    kind: str, change: Callable[[Any], None], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = made(kind)
    change(KINDS[kind][2](content)[2])
    assert converted(kind, tmp_path, content) == 0
    groups = list(read(tmp_path / "out.jsonl"))
    assert [group.size for group in groups] == [2, 1] and groups[1].rewards == [1.0]
    shown = capsys.readouterr().out
    assert f"left out      1 sample: 1 by {reason}" in shown and f", {reason}: " in shown


def test_rows_of_verl_without_a_response_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = made("verl")
    content["tensordict"]["responses"][1] = torch.tensor([], dtype=torch.long)
    content["tensordict"]["response_mask"][2] = torch.zeros(3)
    assert converted("verl", tmp_path, content) == 0
    assert "left out      2 samples: 1 by response_mask, 1 by responses" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ bad samples
def put(field: str, value: Any) -> Callable[[str, Any], None]:
    """Set a field of the third sample, whatever the kind."""

    def change(kind: str, content: Any) -> None:
        if kind == "verl":
            if field in ("keys", "tags"):
                content[field][2] = value
            else:
                content["tensordict"][field][2] = value
        elif kind == "nemo-rl":
            content[2][field] = [value]
        else:
            KINDS[kind][2](content)[2][field] = value

    return change


BAD: list[tuple[str, str, Any, str]] = [
    ("slime", "reward", None, "reward: is missing"),
    ("slime", "reward", "1", "reward: should be a finite number, got '1'"),
    ("slime", "reward", [1.0], "reward: should be a finite number, got [1.0]"),
    ("slime", "reward", {"acc": 1.0}, "reward: is a table: 'acc'; name the one that is trained on"),
    ("slime", "reward", 1e31, "rewards: rewards[0] is"),
    ("slime", "tokens", "abc", "tokens: should be a list, got 'abc'"),
    ("slime", "tokens", [1, [2]], "tokens[1]: should be an integer, got [2]"),
    ("slime", "tokens", [1, 2.5, 3, 4, 5], "tokens[1]: should be an integer, got 2.5"),
    ("slime", "tokens", [1, True, 3, 4, 5], "tokens[1]: should be an integer, got True"),
    ("slime", "tokens", [1, -2, 3, 4, 5], "tokens[1]: should be a token id, got -2"),
    ("slime", "response_length", 5, "response_length: is 5 of 5 tokens"),
    ("slime", "response_length", None, "response_length: is missing"),
    ("slime", "loss_mask", [1, 1], "loss_mask: has 2 entries for 3 response tokens"),
    ("slime", "loss_mask", [1, 2, 1], "loss_mask[1]: should be 0 or 1, got 2"),
    ("slime", "rollout_log_probs", [-1.0], "rollout_log_probs: has 1 entries for 3 response tokens"),
    ("slime", "rollout_log_probs", [0.5, -1.0, -1.0], "logprobs: logprobs[0][0] must be a finite number <= 0"),
    ("slime", "metadata", None, "metadata: has no 'id'"),
    ("slime", "metadata", {"id": 1.5}, "metadata.id: a prompt's id should be text or an integer, got 1.5"),
    ("nemo-rl", "input_lengths", 9, "input_lengths: is 9 for 8 token_ids and 8 of token_loss_mask"),
    ("nemo-rl", "token_ids", 3, "token_ids: should be a list, got 3"),
    ("nemo-rl", "token_loss_mask", [1] * 8, "token_loss_mask: marks the first token"),
    ("nemo-rl", "token_loss_mask", [0, 0, 3, 0, 0, 0, 0, 0], "token_loss_mask[2]: should be 0 or 1, got 3"),
    ("nemo-rl", "generation_logprobs", [0.0], "generation_logprobs: has 1 entries for 5 tokens"),
    ("nemo-rl", "name", None, "name: is missing, which --id-key names"),
    ("verl", "responses", torch.tensor([[1]]), "responses: should have one dimension"),
    ("verl", "responses", torch.tensor([1.5]), "responses[0]: should be an integer, got 1.5"),
    ("verl", "response_mask", torch.ones(2), "response_mask: has 2 entries for 3 response tokens"),
    ("verl", "rollout_log_probs", torch.zeros(7), "rollout_log_probs: has 7 entries for 3 response tokens"),
    ("verl", "extra_info", {}, "extra_info.id: is missing, which --id-key names"),
    ("verl", "extra_info", 3, "extra_info.id: is missing"),
    ("verl", "keys", "b_0_1", "keys: one of several outputs of a rollout"),
    ("verl", "data_source", [1], "data_source: a prompt's id should be text"),
    ("verl text", "score", None, "score: should be a finite number, got None"),
    ("verl text", "step", "7", "step: should be an integer, got '7'"),
    ("verl text", "input", 5, "input: should be text, got 5"),
    ("verl text", "output", None, "output: should be text, got None"),
    ("verl text", "uid", None, "uid: is missing, which --id-key names"),
]  # fmt: skip


NOT_FINITE: list[tuple[str, str, Any, str]] = [
    ("slime", "reward", math.nan, "reward: should be a finite number, got nan"),
    ("slime", "rollout_log_probs", [-1.0, -1.0, -math.inf], "rollout_log_probs[2]: should be a finite number, got -"),
    ("nemo-rl", "rewards", math.nan, "rewards: should be a finite number, got nan"),
    ("verl", "rm_scores", torch.tensor([math.nan]), "rm_scores[0]: should be a finite number, got nan"),
    ("slime", "reward", 10**400, "reward: should be a finite number, got 1000"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field", "value", "message"), NOT_FINITE)
def test_a_sample_with_a_number_that_is_not_finite_is_left_out_and_counted(
    kind: str, field: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = made(kind)
    put(field, value)(kind, content)
    assert converted(kind, tmp_path, content) == 0
    groups = list(read(tmp_path / "out.jsonl"))
    assert [group.size for group in groups] == [2, 1] and groups[1].rewards == [1.0]
    shown = capsys.readouterr().out
    assert "left out      1 sample: 1 by" in shown and message in shown


@pytest.mark.parametrize(("kind", "field", "value", "message"), BAD)
def test_a_bad_sample_is_named_and_can_be_skipped(
    kind: str, field: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = made(kind)
    put(field, value)(kind, content)
    assert converted(kind, tmp_path, content) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / KINDS[kind][0]) in error and message in error and "--skip-bad" in error, error
    assert not (tmp_path / "out.jsonl").exists()
    assert converted(kind, tmp_path, content, "--skip-bad") == 0
    groups = list(read(tmp_path / "out.jsonl"))
    assert [group.size for group in groups] == [2, 1] and groups[1].rewards == [1.0]
    assert "left out      1 sample: 1 by" in capsys.readouterr().out


def test_lines_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("nemo-rl", "verl text"):
        path = write(tmp_path / KINDS[kind][0], made(kind))
        good = path.read_bytes()
        for line in (
            b"{",
            b"[1]",
            b"3",
            b'"x"',
            b"\xff\xfe",
            b"[" * 100_000,
            b"{}",
            b'{"rewards": [1], "token_ids": 2}',
        ):
            path.write_bytes(b"\xef\xbb\xbf" + good + line + b"\n")
            assert main(words(kind, path, tmp_path / "out.jsonl")) == 2
            assert f"{path}:5" in capsys.readouterr().err
            assert main([*words(kind, path, tmp_path / "out.jsonl"), "--skip-bad"]) == 0
            assert "left out      1 sample" in capsys.readouterr().out
            assert [group.size for group in read(tmp_path / "out.jsonl")] == [2, 2]


def test_samples_that_disagree_on_their_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = made("slime")
    content["samples"][1]["metadata"] = {"id": "m1"}
    assert converted("slime", tmp_path, content) == 2
    error = capsys.readouterr().err
    assert "another prompt at" in error and "--id-key, or pass --skip-bad" in error
    assert converted("slime", tmp_path, content, "--skip-bad") == 0
    assert "left out      2 samples: 2 by prompt" in capsys.readouterr().out


def test_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = made("slime")
    for sample in content["samples"]:
        sample["reward"] = None
    assert converted("slime", tmp_path, content, "--skip-bad") == 2
    error = capsys.readouterr().err
    assert "holds no rollout that can be used: " in error and "sample 0, reward: is missing" in error


# ---------------------------------------------------------------------------------------------- other layouts
@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("slime", [1], "has 'rollout_id' and 'samples', but holds [1]"),
        ("slime", {"samples": []}, "but holds 'samples'"),
        ("slime", {"samples": {}, "rollout_id": 1}, "samples: should be a list, got {}"),
        ("slime", {"samples": [], "rollout_id": None}, "rollout_id: should be an integer, got None"),
        ("slime", {"samples": [], "rollout_id": 1}, "holds no rollout that can be used"),
        ("slime", {"samples": [5], "rollout_id": 1}, "sample 0, sample: should be a table of fields, got 5"),
        ("verl", {"keys": []}, "has tensordict, keys, tags, global_steps, but holds 'keys'"),
        ("verl", {"keys": 1, "tensordict": {}, "tags": 1, "global_steps": 1}, "prompts: is missing"),
        ("verl", {"keys": [1], "tensordict": 3, "tags": [], "global_steps": 1}, "should be a table of columns, got 3"),
    ],
)  # fmt: skip
def test_files_of_another_layout(
    kind: str, content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converted(kind, tmp_path, content) == 2
    assert message in capsys.readouterr().err
