"""Small dumps of every trainer whose files are read: the same four rollouts of two prompts in each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def write(path: Path, made: Any) -> Path:
    """By the ending of the name: by torch.save, or as lines of JSON."""
    if path.suffix == ".pt":
        torch.save(made, path)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return path


# By source: the file's name, what makes it, the list of its samples, the option that names the ids.
Kind = tuple[str, Callable[[], Any], Callable[[Any], list[Any]], str]
KINDS: dict[str, Kind] = {
    "slime": ("7.pt", slime, lambda made: made["samples"], "id"),
    "nemo-rl": ("train_data_step7.jsonl", nemo, lambda made: made, "name"),
    "verl": ("tq_batch.pt", queue, lambda made: made["keys"], "extra_info.id"),
    "verl text": ("7.jsonl", text, lambda made: made, "uid"),
}


def made(kind: str) -> Any:
    """A copy that may be changed."""
    return copy.deepcopy(KINDS[kind][1]())


def words(kind: str, path: Path, out: Path) -> list[str]:
    """The words of ``cropi convert`` for a file."""
    given = ["convert", str(path), "--source", kind.split()[0], "--out", str(out), "--id-key", KINDS[kind][3]]
    return given + list(TEMPERATURE)
