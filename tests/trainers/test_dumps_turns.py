"""Rollouts of several turns and with tools: what is no single sequence of a prompt and a response is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.made_dumps import made, messages, write
from test_runs_as_they_lie import groups, rewards

from cropi.data.scan import LossyTokens
from cropi.errors import CropiError
from cropi.trainers.dumps.auto import opened
from cropi.trainers.dumps.nemo_gym import ClosingWords

lossy = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


@lossy
def test_outputs_of_one_rollout_are_refused_in_verls_text_too(tmp_path: Path) -> None:
    rows = [row | {"uid": f"5-a_{k % 2}_0"} for k, row in enumerate(made("verl text"))]
    path = write(tmp_path / "7.jsonl", rows)
    assert len(groups(path)) == 2
    rows[1]["uid"] = "5-a_0_1"
    with pytest.raises(CropiError, match=r"7.jsonl:2, uid: '5-a_0_1': one of several outputs of a rollout"):
        groups(write(path, rows))


@lossy
def test_turns_of_skyrl_are_no_responses_to_prompts_of_their_own(tmp_path: Path) -> None:
    """Its dump has a row a turn; the last turn has the reward of all."""
    rows, path = made("skyrl"), tmp_path / "sums.jsonl"
    turn = rows[1] | {"score": 0.0}
    rows[1:2] = [turn, turn | {"input_prompt": "q0r1tool", "output_response": "r", "score": 1.0}]
    with pytest.raises(CropiError, match=r"sums.jsonl:2, input_prompt: differs from that of a row beside it"):
        groups(write(path, rows))
    assert rewards(path, skip_bad=True) == [[1.0], [0.5, 1.0]]


def changed(kind: str, change: Callable[[list[Any]], Any]) -> list[Any]:
    content: list[Any] = made(kind)
    change(content)
    return content


@lossy
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("ms-swift", lambda x: x[1]["num_turns"].__setitem__(2, 2), "2, response 2, num_turns: is 2"),
        ("ms-swift", lambda x: x[1]["prompt"].pop(), "2, line: should hold columns of one length, got 'prompt' 3"),
        ("ms-swift", lambda x: x[1]["step"].__setitem__(3, "x"), "2, response 3, step: should be a number"),
        ("open-instruct", lambda x: x[2]["request_info"].update(tool_calleds=True), "3, request_info: the"),
        ("open-instruct", lambda x: x[1].pop("response_tokens"), "2, response_tokens: is missing"),
        ("open-instruct", lambda x: x[0]["logprobs"].pop(), "1, logprobs: has 2 entries for 3 response tokens"),
        ("atropos", lambda x: x[0].update(advantages=[[0.5], [1.0]]), "1, advantages: are the environment's own"),
        ("atropos", lambda x: x[1]["overrides"][1].update(set_advantage_to_zero=True), "2, member 1, overrides: set"),
        ("atropos", lambda x: x[0].update(images=["x.png"]), "1, images: holds what the policy saw"),
        ("atropos", lambda x: x[1]["tokens"][1].__setitem__(0, 4), "2, member 1, tokens: begins with another prompt"),
        ("atropos", lambda x: x[0]["masks"][0].pop(), r"1, member 0, masks: has 5 entries for 6 tokens"),
        ("atropos", lambda x: x[0]["scores"].pop(), "1, tokens: the columns of the group have several lengths"),
        ("atropos", lambda x: x[0]["inference_logprobs"][0].__setitem__(-1, 1.0), "member 0, logprobs: .*1.0"),
        ("nemo-gym", lambda x: x[3]["response"]["output"][-1]["prompt_token_ids"].pop(0), "4, trajectory.1..tok"),
        ("nemo-gym", lambda x: x[3]["response"]["output"][1].pop("generation_token_ids"), "4, response.output.1"),
        ("art", lambda x: x[1].update(messages=None), "row 1, messages: are missing"),
        ("art", lambda x: x[1]["messages"][2].update(content="z"), "row 1, messages: begin with another prompt"),
        ("art", lambda x: x[0]["messages"].append(x[0]["messages"][1]), "row 0, messages: should be"),
    ],
)  # fmt: skip
def test_what_is_not_one_sequence_of_a_prompt_and_a_response_is_refused(
    kind: str, change: Callable[[list[Any]], Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / ("7.parquet" if kind == "art" else "7.jsonl")
    with pytest.raises(CropiError, match=words):
        groups(write(path, changed(kind, change)))


@lossy
@pytest.mark.parametrize("release", ["0.5.18", "later"])
def test_an_example_in_the_prompt_is_not_what_the_policy_said(tmp_path: Path, release: str) -> None:
    calls = json.dumps([{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}])
    schema = {"type": "function", "function": {"name": "f"}}
    content = made("art")
    for row in content:
        said = row["messages"].pop()
        row["messages"] += [
            said | {"content": None, "tool_calls": calls},
            {**said, "role": "tool", "trainable": False},
        ]
        row["messages"] += [said]
        row["tools"] = json.dumps([schema])
        if release == "0.5.18":
            for name in ("format_version", "trajectory_index", "group_json", "trajectory_json"):
                del row[name]
            row |= dict.fromkeys(("group_metadata", "group_metrics", "group_logs", "metadata", "logs"))
            row["metrics"] = '{"n": 1}'
    found = groups(write(tmp_path / "0007.parquet", content), id_key="group_index")
    for n, group in enumerate(found):
        example = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
        assert (
            group.prompt == [*example, *messages(n)] and group.tools == [schema] and group.policy == "step 7"
        )
        assert [turn["role"] for turn in group.responses[0]] == ["assistant", "tool", "assistant"]
        assert group.responses[0][0]["tool_calls"] == json.loads(calls)


def test_what_closes_a_rollout_of_nemo_gym_without_tokens_is_left_out(tmp_path: Path) -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": ""}]}
    content, path = made("nemo-gym"), tmp_path / "rollouts.jsonl"
    wanted = groups(write(path, content))
    # An empty turn, of a context that was full, holds nothing that was sampled; a tool's words are not the policy's.
    content[0]["response"]["output"] += [{"type": "function_call_output", "output": "t"}, said]
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClosingWords)
        assert groups(write(path, content)) == wanted
    content[0]["response"]["output"][-2:] = [
        said,
        {"type": "function_call_output", "output": "t"},
        {"type": "f"},
    ]
    content[2]["response"]["output"].append({**said, "content": [{"type": "output_text", "text": "done"}]})
    with pytest.warns(ClosingWords, match=r"2 rollouts, for example .*rollouts.jsonl:1, end in text") as told:
        assert groups(write(path, content)) == wanted
    assert [one.category for one in told].count(ClosingWords) == 1


def test_rollouts_of_nemo_gym_without_tokens_are_text(tmp_path: Path) -> None:
    content, path = made("nemo-gym"), tmp_path / "rollouts.jsonl"
    for row in content:
        row["response"]["output"] = [
            {"type": "message", "role": "assistant", "content": [{"text": "r"}, {"text": "s"}]}
        ]
        row["responses_create_params"]["instructions"] = "be short"
    with pytest.warns(LossyTokens, match="holds text"):
        found = groups(write(path, content))
    system = {"role": "system", "content": "be short"}
    assert sorted(str(group.prompt) for group in found) == [str([system, *messages(n)]) for n in (0, 1)]
    assert all(group.responses == ["rs"] * 2 and group.temperature == 0.7 for group in found)
    content[0]["response"]["output"].insert(0, {"type": "reasoning", "summary": []})
    with pytest.raises(CropiError, match="response.output: is 'reasoning', 'message', without token ids"):
        groups(write(path, content))
    content = made("nemo-gym")
    content[1]["mask_sample"] = True
    (held,) = opened(write(path, content))
    assert held.left.counts == {"mask_sample": 1}
