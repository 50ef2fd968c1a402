"""What the tests of the verl adapters share: which verl there is, and small material for it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cropi.data.readers import read
from support.made_data import make_tokenizer, write_lines

ROOT = Path(__file__).resolve().parents[2]
HAS_VERL = importlib.util.find_spec("verl") is not None
if HAS_VERL:
    from cropi.trainers.verl.versions import verl_version

    NEW = verl_version() >= (0, 8)
else:
    NEW = False
verl_only = pytest.mark.skipif(not HAS_VERL, reason="verl is not installed: make test-verl")
old_only = pytest.mark.skipif(not HAS_VERL or NEW, reason="needs verl 0.7: make test-verl")
new_only = pytest.mark.skipif(not NEW, reason="needs verl 0.8 or newer: make test-verl")


def dataset_file(folder: Path) -> Path:
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "data_source": "sums",
             "reward_model": {"ground_truth": str(2 * i), "style": "rule"}, "extra_info": {"index": 100 + i}}
            for i in range(12)]  # fmt: skip
    return write_lines(folder / "train.jsonl", rows)


def select_into(path: Path, ids: list[int]) -> Path:
    """A selection file as `cropi select` writes it: a new file under the old name."""
    write_lines(path.with_suffix(".new"), [{"id": str(i), "rank": r} for r, i in enumerate(ids, 1)])
    os.replace(path.with_suffix(".new"), path)
    return path


def data_config(folder: Path, **more: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create({
        "train_files": [str(dataset_file(folder))], "val_files": [str(folder / "train.jsonl")], "train_batch_size": 2,
        "max_prompt_length": 50, "filter_overlong_prompts": True, "filter_overlong_prompts_workers": None,
        "cache_dir": str(folder / "cache"), "shuffle": True, "seed": 5, "dataloader_num_workers": 0,
        "sampler": None, "custom_cls": {"path": None, "name": None}, **more,
    })  # fmt: skip


def make_dataset(config: Any, files: str = "train_files") -> Any:
    if NEW:
        from verl.trainer.ppo.utils import create_rl_dataset
    else:
        from verl.trainer.main_ppo import create_rl_dataset
    return create_rl_dataset(
        config[files], config, make_tokenizer(chat=True), None, is_train=files == "train_files"
    )


def loader(dataset: Any, sampler: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils.dataset.rl_dataset import collate_fn

    return StatefulDataLoader(
        dataset=dataset, batch_size=2, num_workers=0, drop_last=True, collate_fn=collate_fn, sampler=sampler
    )


def indices(batch: dict[str, Any]) -> list[int]:
    return [int(info["index"]) for info in batch["extra_info"]]


def proto(ids: list[int], **meta: Any) -> Any:
    from verl import DataProto

    n = len(ids)
    tensors = {
        "prompts": torch.tensor([[0, 40 + i % 7] for i in ids]), "responses": torch.tensor([[50, 1]] * n),
        "attention_mask": torch.tensor([[0, 1, 1, 1]] * n), "response_mask": torch.ones(n, 2, dtype=torch.long),
        "old_log_probs": torch.full((n, 2), -0.5),
        "token_level_scores": torch.tensor([[0.0, float(k % 2)] for k in range(n)]),
    }  # fmt: skip
    infos = np.array([{"index": i} for i in ids], dtype=object)
    return DataProto.from_dict(tensors=tensors, non_tensors={"extra_info": infos}, meta_info=meta)


def queue_table(ids: list[int]) -> Any:
    """A table of the transfer queue: ragged tensors, and Python values."""
    from tensordict import TensorDict

    def ragged(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    lengths = [2 + k % 2 for k in range(len(ids))]
    table = TensorDict({
        "prompts": ragged([torch.tensor([40 + i % 7] * (1 + i % 2)) for i in ids]),
        "responses": ragged([torch.arange(60, 60 + n) for n in lengths]),
        "response_mask": ragged([torch.ones(n, dtype=torch.long) for n in lengths]),
        "rm_scores": ragged([torch.tensor([0.0] * (n - 1) + [float(n == 2)]) for n in lengths]),
        "rollout_log_probs": ragged([torch.full((n,), -0.25) for n in lengths]),
    }, batch_size=[len(ids)])  # fmt: skip
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor_stack(table, "extra_info", [{"index": i} for i in ids])
    tu.assign_non_tensor_stack(table, "reward_model", [{"ground_truth": str(i)} for i in ids])
    return table


def check_queue_records(path: Path) -> None:
    groups = list(read(path))
    assert [group.id for group in groups] == ["103", "104"]
    for group in groups:
        i = int(group.id)
        assert group.prompt_ids == [40 + i % 7] * (1 + i % 2) and group.answer == str(i)
        assert group.response_ids == [[60, 61], [60, 61, 62]] and group.rewards == [1.0, 0.0]
        assert group.logprobs == [[-0.25] * 2, [-0.25] * 3] and group.temperature == 0.8
