"""Small dumps of every trainer whose files are read: the same four rollouts of two prompts in each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.made_data import write_lines

TEMPERATURE = ("--temperature", "0.7")
# prompt, response, mask, reward; the second prompt's responses have a tool's token in the middle.
ROLLOUTS = [
    ([5, 6, 7], [10, 11, 1], [1, 1, 1], 1.0), ([5, 6, 7], [12, 1], [1, 1], 0.0),
    ([8, 9], [13, 40, 1], [1, 0, 1], 0.5), ([8, 9], [14, 41, 42, 16], [1, 0, 0, 1], 1.0),
]  # fmt: skip


def logprobs(ids: list[int]) -> list[float]:
    return [-token / 8 for token in ids]  # exact in float32


def slime() -> dict[str, Any]:
    """``{"rollout_id", "samples"}`` with the fields of slime's samples."""
    samples = [
        {"tokens": prompt + ids, "response_length": len(ids), "reward": reward, "rollout_log_probs": logprobs(ids),
         "loss_mask": mask, "group_index": k // 2, "index": k, "label": "g", "prompt": f"q{k // 2}", "response": "r",
         "status": "truncated" if k == 3 else "completed", "remove_sample": False, "metadata": {"id": f"m{k // 2}"}}
        for k, (prompt, ids, mask, reward) in enumerate(ROLLOUTS)
    ]  # fmt: skip
    return {"rollout_id": 7, "samples": samples}


def nemo() -> list[dict[str, Any]]:
    """A line a rollout, every value in a list of one, padded."""
    made = []
    for number, (prompt, ids, mask, reward) in enumerate(ROLLOUTS):
        pad = [0] * (8 - len(prompt) - len(ids))
        made.append({
            "content": ["..."], "rewards": [reward], "input_lengths": [len(prompt) + len(ids)],
            "token_ids": [prompt + ids + pad], "token_loss_mask": [[0] * len(prompt) + mask + pad],
            "sample_loss_mask": [1.0], "generation_logprobs": [[0.0] * len(prompt) + logprobs(ids) + pad],
            "prev_logprobs": [[0.0] * 8], "idx": number, "name": [f"m{number // 2}"],
        })  # fmt: skip
    return made


def queue() -> dict[str, Any]:
    """What verl's transfer queue saves, with plain dictionaries and lists for its classes."""
    table = {
        "prompts": [torch.tensor(prompt) for prompt, *_ in ROLLOUTS],
        "responses": [torch.tensor(ids) for _, ids, *_ in ROLLOUTS],
        "response_mask": [torch.tensor(mask) for _, _, mask, _ in ROLLOUTS],
        "rm_scores": [torch.tensor([0.0] * (len(ids) - 1) + [reward]) for _, ids, _, reward in ROLLOUTS],
        "rollout_log_probs": [torch.tensor(logprobs(ids)) for _, ids, *_ in ROLLOUTS],
        "extra_info": [{"index": k // 2, "id": f"m{k // 2}"} for k in range(4)],
        "reward_model": [{"ground_truth": "g"}] * 4, "data_source": ["sums"] * 4,
        "raw_prompt": [[{"role": "user", "content": f"q{k // 2}"}] for k in range(4)],
    }  # fmt: skip
    return {
        "tensordict": table,
        "keys": ["a_0_0", "a_1_0", "b_0_0", "b_1_0"],
        "tags": [{}] * 4,
        "global_steps": 7,
    }


def text() -> list[dict[str, Any]]:
    """verl's lines of text."""
    return [
        {
            "input": f"q{k // 2}",
            "output": f"r{k}",
            "gts": "g",
            "score": reward,
            "step": 7,
            "uid": f"m{k // 2}",
        }
        for k, (*_, reward) in enumerate(ROLLOUTS)
    ]


def turns(mask: list[int]) -> list[tuple[int, int]]:
    """Where the policy's turns begin and end."""
    edges = [0, *(t for t in range(1, len(mask)) if mask[t] != mask[t - 1]), len(mask)]
    return [(start, end) for start, end in zip(edges, edges[1:]) if mask[start]]


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"q{number}"}]


def vllm() -> list[dict[str, Any]]:
    """RequestOutput of vLLM as JSON: a table of the likeliest tokens at each place, and rewards added by a user."""
    made: list[dict[str, Any]] = []
    for k in (0, 2):
        outputs = []
        for n, (_, ids, _, reward) in enumerate(ROLLOUTS[k : k + 2]):
            tables = [
                {
                    str(token): {"logprob": p, "rank": 2, "decoded_token": "x"},
                    "3": {"logprob": -0.5, "rank": 1},
                }
                for token, p in zip(ids, logprobs(ids))
            ]
            outputs.append({
                "index": n, "text": f"r{k + n}", "token_ids": ids, "cumulative_logprob": sum(logprobs(ids)),
                "logprobs": tables, "finish_reason": "length" if k + n == 3 else "stop", "stop_reason": None,
                "reward": reward,
            })  # fmt: skip
        made.append({
            "request_id": str(k), "prompt": f"q{k // 2}", "prompt_token_ids": ROLLOUTS[k][0], "outputs": outputs,
            "finished": True, "name": f"m{k // 2}",
        })  # fmt: skip
    return made


def chat() -> list[dict[str, Any]]:
    """A batch's output: an answer a request, with the server's token ids, and what a user wrote beside it."""
    made = []
    for k, (prompt, ids, _, reward) in enumerate(ROLLOUTS):
        entries = [
            {"token": f"token_id:{token}", "logprob": p, "bytes": [65], "top_logprobs": []}
            for token, p in zip(ids, logprobs(ids))
        ]
        choice = {
            "index": 0, "message": {"role": "assistant", "content": f"r{k}", "tool_calls": []},
            "logprobs": {"content": entries}, "finish_reason": "length" if k == 3 else "stop",
        }  # fmt: skip
        body = {"id": f"c{k}", "object": "chat.completion", "choices": [choice], "prompt_token_ids": prompt}
        made.append({
            "id": f"b{k}", "custom_id": f"m{k // 2}", "response": {"status_code": 200, "body": body}, "error": None,
            "reward": reward, "messages": messages(k // 2),
        })  # fmt: skip
    return made


def prime() -> list[dict[str, Any]]:
    """prime-rl's rollouts with the tokens of every turn: the second prompt's have two, with a tool's answer between."""
    made = []
    for k, (prompt, ids, mask, reward) in enumerate(ROLLOUTS):
        steps = [{"tokens": {
            "prompt_ids": prompt + ids[:start], "prompt_mask": [0] * (len(prompt) + start),
            "completion_ids": ids[start:end], "completion_mask": [1] * (end - start),
            "completion_logprobs": logprobs(ids[start:end]), "overlong_prompt": False, "is_truncated": False,
        }} for start, end in turns(mask)]  # fmt: skip
        made.append({
            "example_id": k // 2, "task": "sums", "prompt": messages(k // 2), "reward": reward, "answer": "g",
            "completion": [{"role": "assistant", "content": f"r{k}"}], "trajectory": steps, "error": None,
            "is_truncated": k == 3, "sampling_args": {"temperature": 0.7}, "name": f"m{k // 2}",
        })  # fmt: skip
    return made


def traces() -> list[dict[str, Any]]:
    """The same as traces of verifiers: a node a message, with the tokens that it adds; the second half as episodes."""
    made: list[dict[str, Any]] = []
    for k, (prompt, ids, mask, reward) in enumerate(ROLLOUTS):
        nodes: list[dict[str, Any]] = [
            {"message": messages(k // 2)[0], "token_ids": prompt[:-1], "mask": [False] * (len(prompt) - 1)}
        ]
        scaffold, start = prompt[-1:], 0
        while start < len(ids):
            end = start + (mask[start:] + [0]).index(0)
            after = end + (mask[end:] + [1]).index(1)
            nodes.append({
                "parent": len(nodes) - 1, "message": {"role": "assistant", "content": f"r{k}"}, "sampled": True,
                "token_ids": scaffold + ids[start:end], "mask": [False] * len(scaffold) + [True] * (end - start),
                "logprobs": logprobs(ids[start:end]),
            })  # fmt: skip
            if after > end:
                nodes.append({
                    "parent": len(nodes) - 1, "message": {"role": "tool", "content": "t"},
                    "token_ids": ids[end:after], "mask": [False] * (after - end), "logprobs": [],
                })  # fmt: skip
            scaffold, start = [], after
        trace = {
            "version": 1, "id": f"trace{k}", "task": {"type": "Sums", "data": {"name": f"m{k // 2}", "answer": "g"}},
            "agent": {"name": "solver", "trainable": True}, "nodes": nodes, "ok": True, "errors": [],
            "calls": [{"sampling": {"temperature": 0.7}, "finish_reason": "length" if k == 3 else "stop"}],
            "rewards": {"correct": {"score": (reward - 0.25) / 2, "weight": 2.0}, "form": {"score": 0.25}},
        }  # fmt: skip
        episode = {
            "id": f"episode{k}",
            "env": {"id": "sums"},
            "task": trace["task"],
            "ok": True,
            "traces": [trace],
        }
        made.append(trace if k < 2 else episode | {"run": {"work": {"step": 7}}})
    return made


def trl() -> list[dict[str, Any]]:
    """TRL's completions: two reward functions, and advantages of their sum."""
    made = []
    for k, (*_, reward) in enumerate(ROLLOUTS):
        pair = [ROLLOUTS[k // 2 * 2 + n][3] for n in (0, 1)]
        made.append({
            "step": 7, "prompt": f"q{k // 2}", "completion": f"r{k}", "accuracy": reward - 0.25, "form": 0.25,
            "solution": "g", "advantage": (reward - sum(pair) / 2) / (abs(pair[0] - pair[1]) / 2**0.5 + 1e-4),
        })  # fmt: skip
    return made


def rows(prompt: str, response: str, score: str, **more: Any) -> list[dict[str, Any]]:
    """A row a response as text."""
    return [
        {prompt: f"q{k // 2}", response: f"r{k}", score: reward, "name": f"m{k // 2}", **more}
        for k, (*_, reward) in enumerate(ROLLOUTS)
    ]


def skyrl() -> list[dict[str, Any]]:
    return rows(
        "input_prompt", "output_response", "score", stop_reason="stop", env_class="sums", data_source="sums",
        env_extras={"reward_spec": {"ground_truth": "g"}},
    )  # fmt: skip


def areal() -> list[dict[str, Any]]:
    """A task a prompt; the smallest version is that of the prompt's tokens."""
    made = rows("prompt", "completion", "reward", head_version=-1, tail_version=7)
    return [row | {"task_id": k // 2, "sample_idx": k % 2} for k, row in enumerate(made)]


def swift() -> list[dict[str, Any]]:
    """A line a step, with columns; the first one is of rollouts that an evaluation at the same step wrote over."""
    names = ("prompt", "completion", "accuracy", "form")
    columns: dict[str, Any] = {name: [row[name] for row in trl()] for name in names}
    columns |= {
        "step": ["7"] * 4,
        "advantages": [row["advantage"] for row in trl()],
        "entropy": [0.5, 0.25, 1.0, 0.0],
    }
    columns |= {"num_turns": [1] * 4, "solution": ["g"] * 4}
    return [columns | {"completion": ["x"] * 4}, columns]


def gym() -> list[dict[str, Any]]:
    """NeMo-Gym's rollouts: the tokens of every turn beside the last item of it."""
    made = []
    for k, (prompt, ids, mask, reward) in enumerate(ROLLOUTS):
        items: list[dict[str, Any]] = [
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
        ]
        for start, end in turns(mask):
            items += [{"type": "function_call_output", "call_id": "c", "output": "t"}] if start else []
            items.append({
                "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": f"r{k}"}],
                "prompt_token_ids": prompt + ids[:start], "generation_token_ids": ids[start:end],
                "generation_log_probs": logprobs(ids[start:end]),
            })  # fmt: skip
        asked = {"input": messages(k // 2), "temperature": 0.7, "tools": []}
        made.append({
            "responses_create_params": asked, "response": {"object": "response", "output": items}, "reward": reward,
            "_ng_task_index": k // 2, "_ng_rollout_index": k % 2, "agent_ref": {"name": "sums"}, "name": f"m{k // 2}",
        })  # fmt: skip
    return made


def open_instruct() -> list[dict[str, Any]]:
    return [
        {
            "step": 7, "sample_idx": k, "prompt_idx": k // 2, "prompt_tokens": prompt, "response_tokens": ids,
            "reward": reward, "advantage": 0.5, "finish_reason": "stop", "dataset": "sums", "ground_truth": "g",
            "request_info": {"num_calls": 0, "tool_calleds": False}, "logprobs": logprobs(ids), "name": f"m{k // 2}",
        } for k, (prompt, ids, _, reward) in enumerate(ROLLOUTS)
    ]  # fmt: skip


def atropos() -> list[dict[str, Any]]:
    """A line a group; beside tokens that are not trained on stands 1.0."""
    made = []
    for k in (0, 2):
        group: dict[str, Any] = {name: [] for name in ("tokens", "masks", "scores", "inference_logprobs")}
        for prompt, ids, mask, reward in ROLLOUTS[k : k + 2]:
            group["tokens"].append(prompt + ids)
            group["masks"].append(
                [-100] * len(prompt) + [token if bit else -100 for token, bit in zip(ids, mask)]
            )
            group["scores"].append(reward)
            probs = [p if bit else 1.0 for p, bit in zip(logprobs(ids), mask)]
            group["inference_logprobs"].append([1.0] * len(prompt) + probs)
        empty: dict[str, Any] = {
            "advantages": [],
            "images": [],
            "messages": [],
            "overrides": [{"set_advantage_to_zero": False}, {}],
            "group_overrides": {},
        }
        made.append(group | empty | {"name": f"m{k // 2}", "generation_params": {"temperature": 0.7}})
    return made


def roll() -> list[dict[str, Any]]:
    """ROLL's step, by columns."""
    settings = json.dumps({"global_step": 7, "generation_config": {"temperature": 0.7, "top_p": 1.0}})
    made = rows(
        "prompt",
        "responses",
        "scores",
        global_step=7,
        ground_truth="g",
        domain="sums",
        sampling_params=settings,
    )
    return [{key: [row[key] for row in made] for key in made[0]} | {"id": ["0", "0", "1", "1"]}]


def art() -> list[dict[str, Any]]:
    """ART's table: an example in the prompt, which no policy said."""

    def message(role: str, content: str, trainable: bool = False) -> dict[str, Any]:
        return {
            "role": role,
            "content": content,
            "tool_calls": None,
            "tool_call_id": None,
            "trainable": trainable,
        }

    shot = [message("user", "q"), message("assistant", "r")]
    return [
        {
            "format_version": 2, "group_index": k // 2, "trajectory_index": k % 2, "group_json": "{}", "tools": None,
            "trajectory_json": "{}", "reward": reward,
            "messages": [*shot, message("user", f"q{k // 2}"), message("assistant", f"r{k}", True)],
        } for k, (*_, reward) in enumerate(ROLLOUTS)
    ]  # fmt: skip


def write(path: Path, made: Any) -> Path:
    """By the ending of the name: by torch.save, or as lines of JSON."""
    if path.suffix == ".pt":
        torch.save(made, path)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
    else:
        write_lines(path, made)
    return path


# By source: the file's name, what makes it, the list of its samples, the option that names the ids.
Kind = tuple[str, Callable[[], Any], Callable[[Any], list[Any]], str]
KINDS: dict[str, Kind] = {
    "slime": ("7.pt", slime, lambda made: made["samples"], "id"),
    "nemo-rl": ("train_data_step7.jsonl", nemo, lambda made: made, "name"),
    "verl": ("tq_batch.pt", queue, lambda made: made["keys"], "extra_info.id"),
    "verl text": ("7.jsonl", text, lambda made: made, "uid"),
}
# Those that `--source auto` came with; all are told by what stands in them.
MORE: dict[str, Kind] = {
    "vllm": ("7.json", vllm, lambda made: made, "name"),
    "openai": ("step_7.jsonl", chat, lambda made: made, "custom_id"),
    "prime-rl": ("step_7.jsonl", prime, lambda made: made, "name"),
    "prime-rl traces": ("step_7.jsonl", traces, lambda made: made, "task.data.name"),
    "trl": ("completions_00007.parquet", trl, lambda made: made, "prompt"),
    "trl lines": ("completions_00007.jsonl", trl, lambda made: made, "prompt"),
    "openrlhf": ("7.jsonl", lambda: rows("input", "output", "reward", label="g"), lambda made: made, "name"),
    "skyrl": ("step_7.jsonl", skyrl, lambda made: made, "name"),
    "areal": ("7.jsonl", areal, lambda made: made, "name"),
    "ms-swift": ("completions.jsonl", swift, lambda made: made, "prompt"),
    "nemo-gym": ("step_7.jsonl", gym, lambda made: made, "name"),
    "open-instruct": ("run_rollouts_000000.jsonl", open_instruct, lambda made: made, "name"),
    "atropos": ("groups.jsonl", atropos, lambda made: made, "name"),
    "roll": ("rollout_dump_data.step_7.jsonl", roll, lambda made: made, "name"),
    "art": ("0007.parquet", art, lambda made: made, "group_index"),
}


def made(kind: str) -> Any:
    """A copy that may be changed."""
    return copy.deepcopy((KINDS | MORE)[kind][1]())


def words(kind: str, path: Path, out: Path) -> list[str]:
    """The words of ``cropi convert`` for a file."""
    given = [
        "convert",
        str(path),
        "--source",
        kind.split()[0],
        "--out",
        str(out),
        "--id-key",
        (KINDS | MORE)[kind][3],
    ]
    return given + list(TEMPERATURE)
